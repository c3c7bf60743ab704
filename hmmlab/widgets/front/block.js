// A region in both tables: at most one table of pages at a time, drawn and walked.

const TABLE = 512; // pages of one page table
const ENGLISH = new Intl.NumberFormat("en");

class Block {
  constructor(owner, info) {
    this.owner = owner;
    this.store = owner.store;
    this.info = info;
    this.open(info.start);

    this.element = make("section", "hmm-block");
    this.head = this.element.appendChild(make("div", "hmm-head"));
    this.map = info.stop - info.start > TABLE ? new TableMap(this) : null;
    if (this.map) this.element.append(this.map.element);
    const scroll = this.element.appendChild(make("div", "hmm-scroll"));
    this.body = scroll.appendChild(make("div", "hmm-pair"));
    this.canvases = [0, 1].map(() => {
      const canvas = this.body.appendChild(make("canvas"));
      canvas.setAttribute("aria-hidden", "true");
      return canvas;
    });
    this.rows = this.body.appendChild(make("div", "hmm-rows"));
    this.rows.setAttribute("role", "rowgroup");
    this.cells = [];
    this.listen();
    this.title();
  }

  /** Show the page table that a page is in. */
  open(vpn) {
    const { start, stop } = this.info;
    const huge = stop - start > TABLE;
    this.first = huge ? Math.max(start, Math.floor(vpn / TABLE) * TABLE) : start;
    this.last = huge ? Math.min(stop, (Math.floor(vpn / TABLE) + 1) * TABLE) : stop;
  }

  get count() {
    return this.last - this.first;
  }

  get split() {
    const { vmas, start, stop } = this.info;
    return vmas.length > 1 || (vmas.length === 1 && (vmas[0][0] > start || vmas[0][1] < stop));
  }

  title() {
    const { name, process, start, stop, vmas } = this.info;
    const pages = ENGLISH.format(stop - start);
    const several = this.store.blocks.some((block) => block.mm !== this.info.mm);
    const kinds = [...new Set(vmas.map((vma) => permissions(vma[2])))];
    this.head.replaceChildren(
      make("strong", "", several ? `${process} · ${name}` : name),
      make("span", "", `${pages} page${stop - start === 1 ? "" : "s"}`),
      ...(kinds.length ? kinds : ["not mapped"]).map((kind) => make("code", "hmm-vma", kind)),
      make("span", "hmm-address", `from 0x${(start * 4096).toString(16)}`),
    );
    this.rows.setAttribute("aria-label", `${name}, ${pages} pages, ${kinds.join(" and ")}`);
  }

  /** Take news of the same pages: other VMAs. */
  inform(info) {
    if (info === this.info) return;
    const old = JSON.stringify([this.info.vmas, this.info.process]);
    this.info = info;
    this.title();
    if (JSON.stringify([info.vmas, info.process]) !== old) this.arrange();
  }

  // --- geometry --------------------------------------------------------------------------------
  layout(columns, size) {
    this.columns = columns;
    this.size = size;
    this.arrange();
    this.map?.layout(this.width);
    this.paint();
  }

  /** Where the rows are: one has room above it for brackets if a VMA begins or ends in it. */
  arrange() {
    const edges = this.info.vmas.flatMap(([start, stop]) => [start, stop]);
    this.tops = [];
    let top = 0;
    for (let row = this.first; row < this.last; row += this.columns) {
      const end = Math.min(row + this.columns, this.last);
      const edge = edges.some((at) => at >= row && at < end);
      top += this.split && (row === this.first || edge) ? BRACKET : 2;
      this.tops.push(top);
      top += this.size;
    }
    this.width = this.owner.left + this.columns * this.size + 3;
    this.height = top + 3;
    this.build();
  }

  corner(vpn) {
    const at = vpn - this.first;
    return [this.owner.left + (at % this.columns) * this.size, this.tops[Math.floor(at / this.columns)]];
  }

  /** The page under the pointer, in either table. */
  pageAt(event) {
    for (const canvas of this.canvases) {
      const box = canvas.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left - this.owner.left, event.clientY - box.top];
      if (x < 0 || y < 0 || y >= box.height) continue;
      const column = Math.floor(x / this.size);
      const row = Math.max(0, this.tops.findLastIndex((top) => top <= y));
      const at = row * this.columns + column;
      if (column < this.columns && at < this.count) return [this.info.mm, this.first + at];
    }
    return null;
  }

  // --- the ARIA grid: one transparent cell a page, over the CPU's table --------------------------
  build() {
    const key = [this.first, this.last, this.columns, this.size, this.owner.left].join();
    if (key === this.built) {
      [...this.rows.children].forEach((row, i) => (row.style.top = `${this.tops[i]}px`));
      return;
    }
    this.built = key;
    this.cells = [];
    const rows = [];
    for (let at = 0; at < this.count; at += this.columns) {
      const row = make("div", "hmm-row");
      row.setAttribute("role", "row");
      row.style.cssText = `left:${this.owner.left}px;height:${this.size}px;` +
        `top:${this.tops[at / this.columns]}px`;
      for (let i = at; i < Math.min(at + this.columns, this.count); i++) {
        const cell = row.appendChild(make("div"));
        cell.setAttribute("role", "gridcell");
        cell.tabIndex = -1;
        cell.style.width = `${this.size}px`;
        cell.vpn = this.first + i;
        this.cells.push(cell);
      }
      rows.push(row);
    }
    this.rows.replaceChildren(...rows);
    this.label();
    this.owner.placeTabStop();
  }

  label() {
    for (const cell of this.cells) {
      const label = this.store.label(this.info, cell.vpn);
      if (cell.getAttribute("aria-label") !== label) cell.setAttribute("aria-label", label);
    }
    this.select();
  }

  select() {
    const page = this.owner.selected;
    for (const cell of this.rows.querySelectorAll("[aria-selected]"))
      cell.removeAttribute("aria-selected");
    if (page && page[0] === this.info.mm)
      this.cells[page[1] - this.first]?.setAttribute("aria-selected", "true");
  }

  /** Show a page, opening its page table if need be; returns its cell. */
  reveal(vpn) {
    if (vpn < this.first || vpn >= this.last) {
      this.open(vpn);
      this.layout(this.columns, this.size);
    }
    return this.cells[vpn - this.first];
  }

  listen() {
    this.body.addEventListener("pointermove", (e) => this.owner.hover(this.pageAt(e)));
    this.body.addEventListener("pointerleave", () => this.owner.hover(null));
    this.body.addEventListener("click", (e) => {
      const page = this.pageAt(e);
      if (page) this.owner.choose(page, this);
    });
  }

  // --- drawing -----------------------------------------------------------------------------------
  paint() {
    this.canvases.forEach((canvas, table) => this.paintTable(canvas, table));
    this.map?.paint();
  }

  paintTable(canvas, table) {
    const { theme } = this.owner;
    const context = prepare(canvas, this.width, this.height);
    this.paintOffsets(context);
    if (this.split) this.paintBrackets(context);
    for (let vpn = this.first; vpn < this.last; vpn++) {
      const place = this.info.at + vpn - this.info.start;
      const marked = this.store.isMarked(table, place);
      paintCell(context, theme, this.store.state(table, place), ...this.corner(vpn), this.size, marked);
    }
    for (const [kind, page] of this.owner.rings())
      if (page && page[0] === this.info.mm && page[1] >= this.first && page[1] < this.last)
        ring(context, theme, ...this.corner(page[1]), this.size, this.size, kind);
  }

  paintOffsets(context) {
    context.fillStyle = this.owner.theme.muted;
    context.font = `11px ${FONT}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let vpn = this.first; vpn < this.last; vpn += this.columns)
      context.fillText(String(vpn - this.info.start), this.owner.left - 6, this.corner(vpn)[1] + this.size / 2);
  }

  /** A bracket over each run of pages of one VMA, with its permissions. */
  paintBrackets(context) {
    const { theme } = this.owner;
    context.strokeStyle = theme.muted;
    context.fillStyle = theme.muted;
    context.lineWidth = 1;
    context.font = `11px ${FONT}`;
    context.textAlign = "left";
    context.textBaseline = "middle";
    for (const [start, stop, mode] of this.info.vmas)
      for (let row = this.first; row < this.last; row += this.columns) {
        const [a, b] = [Math.max(start, row), Math.min(stop, row + this.columns, this.last)];
        // A row in the middle of a VMA needs no bracket.
        const edge = this.corner(row)[1] - (row > this.first ? this.corner(row - 1)[1] + this.size : 0);
        if (a >= b || edge < BRACKET) continue;
        const [x, y] = this.corner(a);
        const [from, to, line] = [x + 2.5, x + (b - a) * this.size - 2.5, y - 3.5];
        context.beginPath();
        context.moveTo(from, line - 3);
        context.lineTo(from, line);
        context.lineTo(to, line);
        context.lineTo(to, line - 3);
        context.stroke();
        const text = mode.slice(0, 3);
        if (context.measureText(text).width < to - from - 6)
          context.fillText(text, from + 4, line - 7);
      }
  }
}

/** "rw-p" as "rw- private". */
function permissions(mode) {
  return `${mode.slice(0, 3)} ${{ p: "private", s: "shared" }[mode[3]] ?? ""}`.trim();
}
