// A region of many page tables: a row a table, a column a page; a click opens a table.

const EDGE = 4; // room for the frame around the open table

class TableMap {
  constructor(block) {
    this.block = block;
    this.store = block.store;
    const { start, stop } = block.info;
    this.firstTable = Math.floor(start / TABLE);
    this.tables = Math.ceil(stop / TABLE) - this.firstTable;

    this.element = make("div", "hmm-map");
    const bar = this.element.appendChild(make("div", "hmm-map-bar"));
    this.back = bar.appendChild(make("button", "hmm-button", "‹ previous table"));
    this.where = bar.appendChild(make("span"));
    this.where.setAttribute("role", "status");
    this.next = bar.appendChild(make("button", "hmm-button", "next table ›"));
    for (const button of [this.back, this.next]) button.type = "button";
    this.back.addEventListener("click", () => this.go(this.table - 1));
    this.next.addEventListener("click", () => this.go(this.table + 1));
    this.scroll = this.element.appendChild(make("div", "hmm-map-scroll"));
    const pair = this.scroll.appendChild(make("div", "hmm-pair"));
    this.canvases = ["CPU", "Device"].map((whose) => {
      const canvas = pair.appendChild(make("canvas"));
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${whose} page tables of ${block.info.name}, a row each`);
      canvas.addEventListener("click", (e) => this.click(e));
      return canvas;
    });
    this.images = this.canvases.map(() => {
      const image = document.createElement("canvas");
      image.width = TABLE;
      image.height = this.tables;
      return image;
    });
    this.narrow = document.createElement("canvas");
  }

  /** Index of the open table. */
  get table() {
    return Math.floor(this.block.first / TABLE) - this.firstTable;
  }

  go(table) {
    if (table < 0 || table >= this.tables) return;
    this.block.reveal(Math.max(this.block.info.start, (this.firstTable + table) * TABLE));
  }

  /** Choose the page under the pointer. */
  click(event) {
    const { owner, info } = this.block;
    const width = this.width - owner.left - 3;
    const column = Math.floor(((event.offsetX - owner.left) / width) * TABLE);
    const row = Math.floor((event.offsetY - EDGE) / this.pitch);
    if (row < 0 || row >= this.tables || column < 0 || column >= TABLE) return;
    const vpn = (this.firstTable + row) * TABLE + column;
    if (vpn >= info.start && vpn < info.stop) owner.choose([info.mm, vpn]);
  }

  layout(width) {
    this.width = width;
    this.pitch = Math.max(3, Math.min(12, Math.floor(190 / this.tables)));
    const [open, shown] = [this.table * this.pitch, this.scroll];
    if (open < shown.scrollTop || open > shown.scrollTop + shown.clientHeight - this.pitch)
      shown.scrollTop = open - shown.clientHeight / 2;
    this.where.textContent = `page table ${this.table + 1} of ${ENGLISH.format(this.tables)}`;
    this.back.disabled = this.table === 0;
    this.next.disabled = this.table === this.tables - 1;
  }

  paint() {
    const { theme } = this.block.owner;
    const stale = this.theme !== theme || this.painted !== this.store.version;
    [this.theme, this.painted] = [theme, this.store.version];
    this.canvases.forEach((canvas, table) => {
      if (stale) this.paintImage(table);
      const height = this.tables * this.pitch;
      const context = prepare(canvas, this.width, height + 2 * EDGE);
      context.translate(0, EDGE);
      const [left, width] = [this.block.owner.left, this.width - this.block.owner.left - 3];
      // Neighbours in a row may blend where pages are narrower than pixels; rows must not.
      const narrow = this.narrow.getContext("2d");
      this.narrow.width = Math.round(width * (window.devicePixelRatio || 1));
      this.narrow.height = this.tables;
      narrow.drawImage(this.images[table], 0, 0, this.narrow.width, this.tables);
      context.imageSmoothingEnabled = false;
      context.drawImage(this.narrow, left, 0, width, height);
      context.fillStyle = theme.ink;
      for (const row of this.changedTables(table))
        context.fillRect(left - 9, row * this.pitch, 6, Math.max(2, this.pitch - 1));
      outline(context, theme.paper, left - 1, this.table * this.pitch - 2, width + 2, this.pitch + 4, 2);
      outline(context, theme.brand, left - 2, this.table * this.pitch - 3, width + 4, this.pitch + 6, 2);
    });
  }

  /** Draw a pixel a page. */
  paintImage(table) {
    const { info } = this.block;
    const context = this.images[table].getContext("2d");
    const image = context.createImageData(TABLE, this.tables);
    const pixels = new Uint32Array(image.data.buffer);
    const colours = this.store.states[table].flatMap((state) => [...rgb(this.theme.colour(state)), 255]);
    const palette = new Uint32Array(new Uint8Array(colours).buffer);
    const shift = info.start - this.firstTable * TABLE; // pages before the region in its first table
    const base = table * this.store.pages + info.at;
    for (let i = 0; i < info.stop - info.start; i++) pixels[i + shift] = palette[this.store.codes[base + i]];
    context.putImageData(image, 0, 0);
  }

  /** Rows of the map in which the step changed a page. */
  changedTables(table) {
    const { info } = this.block;
    const base = table * this.store.pages + info.at - info.start;
    const rows = [];
    for (let row = 0; row < this.tables; row++) {
      const start = (this.firstTable + row) * TABLE;
      const [from, to] = [Math.max(start, info.start), Math.min(start + TABLE, info.stop)];
      if (this.store.marks.subarray(base + from, base + to).includes(1)) rows.push(row);
    }
    return rows;
  }
}
