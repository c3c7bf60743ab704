// The strips of frames: which frames are in use, and which page each of them holds.

const NAMED = 128; // up to so many frames, a cell is wide enough to name its page

class FrameStrip {
  constructor(owner, kind) {
    this.owner = owner;
    this.store = owner.store;
    this.kind = kind;
    this.element = make("div", "hmm-strip");
    this.head = this.element.appendChild(make("div", "hmm-head"));
    this.canvas = this.element.appendChild(make("canvas"));
    this.canvas.setAttribute("role", "img");
    this.canvas.addEventListener("pointermove", (e) => this.owner.hover(this.pageAt(e), this.cellAt(e)));
    this.canvas.addEventListener("pointerleave", () => this.owner.hover(null));
    this.canvas.addEventListener("click", (e) => {
      const page = this.pageAt(e);
      if (page) this.owner.choose(page);
    });
  }

  get strip() {
    return this.store.frames[this.kind];
  }

  layout(width) {
    this.width = width;
    this.paint();
  }

  cellAt(event) {
    const column = Math.floor(event.offsetX / this.cell);
    const at = Math.floor(event.offsetY / this.row) * this.columns + column;
    return column < this.columns ? this.strip.cells[at] : undefined;
  }

  pageAt(event) {
    const cell = this.cellAt(event);
    return cell && cell[1] ? [cell[1], cell[2]] : null;
  }

  paint() {
    const { theme } = this.owner;
    const { title, total, first, cells } = this.strip;
    const count = `${ENGLISH.format(total)} frame${total === 1 ? "" : "s"} in use`;
    const [from, to] = [first + 1, first + cells.length].map((at) => ENGLISH.format(at));
    const some = total > cells.length ? `, ${from} to ${to} shown` : "";
    this.head.replaceChildren(make("strong", "", title), make("span", "", count + some));
    this.canvas.setAttribute("aria-label", `${title}: ${count}${some}`);
    const named = cells.length <= NAMED;
    this.row = named ? 22 : 14;
    this.cell = named ? this.fit(cells) : 14;
    this.columns = Math.max(1, Math.floor((this.width - 4) / this.cell));
    const height = Math.ceil(cells.length / this.columns) * this.row;
    const context = prepare(this.canvas, this.width, Math.max(height, this.row) + 3);
    const rings = this.owner.rings();
    cells.forEach(([, mm, vpn], i) => {
      const [x, y] = [(i % this.columns) * this.cell + 2, Math.floor(i / this.columns) * this.row + 2];
      const page = mm ? [mm, vpn] : null;
      this.paintFrame(context, theme, page, x, y, named);
      for (const [kind, ringed] of rings)
        if (page && samePage(page, ringed))
          ring(context, theme, x, y, this.cell - 2, this.row - 2, kind);
    });
  }

  /** Width that holds the longest name. */
  fit(cells) {
    const longest = Math.max(0, ...cells.map(([, mm, vpn]) => this.name([mm, vpn]).length));
    return Math.max(30, longest * 7 + 10);
  }

  name(page) {
    const block = this.store.blockOf(page);
    return block ? `${block.name} ${page[1] - block.start}` : "–";
  }

  paintFrame(context, theme, page, x, y, named) {
    const [width, height] = [this.cell - 2, this.row - 2];
    const place = page ? this.store.placeOf(page) : -1;
    const colour = place < 0 ? theme.paper : theme.colour(this.store.state(0, place));
    context.fillStyle = colour;
    context.fillRect(x, y, width, height);
    if (place < 0) outline(context, theme.line, x, y, width, height, 1);
    if (!named) return;
    context.fillStyle = place < 0 ? theme.muted : inkOn(colour);
    context.font = `11px ${FONT}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(this.name(page), x + width / 2, y + height / 2 + 0.5);
  }
}
