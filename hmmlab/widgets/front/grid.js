// The whole widget: headings with their legends, the blocks, the frames, the line that reads out.

class Tables {
  constructor(store, model, el) {
    this.store = store;
    this.model = model;
    this.element = el.appendChild(make("div", "hmm-tables"));
    // Keys that walk the tables are not the notebook's shortcuts.
    this.element.dataset.lmSuppressShortcuts = "true";
    this.heads = this.element.appendChild(make("div", "hmm-heads"));
    this.grid = this.element.appendChild(make("div", "hmm-grid"));
    this.grid.setAttribute("role", "grid");
    this.grid.setAttribute("aria-label", "Page tables of the CPU and the device");
    const foot = this.element.appendChild(make("div", "hmm-foot"));
    this.readout = foot.appendChild(make("div", "hmm-readout"));
    for (const [kind, text] of [["changed", "changed by this step"], ["selected", "selected"]]) {
      const key = foot.appendChild(make("span", "hmm-key"));
      key.append(make("span", `hmm-sample hmm-${kind}`), text);
    }
    this.strips = [0, 1].map((kind) => new FrameStrip(this, kind));
    const frames = this.element.appendChild(make("div", "hmm-frames"));
    frames.append(...this.strips.map((strip) => strip.element));
    this.blocks = [];
    this.opened = new Map(); // which page table of a large region is open
    this.focus = null;
    this.theme = null;
    this.grid.addEventListener("keydown", (e) => this.key(e));
    this.grid.addEventListener("focusin", (e) => this.focused(e.target, true));
    this.grid.addEventListener("focusout", (e) => this.focused(e.target, false));
    this.rebuild();
  }

  get selected() {
    return this.model.get("selected");
  }

  rings() {
    return [
      ["hovered", this.model.get("hovered")],
      ["focused", this.focusShown ? this.focus : null],
      ["selected", this.selected],
    ];
  }

  // --- following the store -------------------------------------------------------------------
  update(moved) {
    if (moved) {
      this.keepFocus(() => this.rebuild());
      return;
    }
    this.blocks.forEach((block, i) => {
      block.inform(this.store.blocks[i]);
      block.label();
    });
    this.head();
    this.paint();
  }

  /** Run what makes the cells anew, and give the focus to the successor of the cell that had it. */
  keepFocus(change) {
    const { focusShown } = this;
    const had = this.grid.contains(document.activeElement);
    change();
    if (!had) return;
    this.blockOf(this.focus)?.reveal(this.focus[1])?.focus({ preventScroll: true });
    this.focusShown = focusShown;
    this.paint();
  }

  rebuild() {
    for (const block of this.blocks)
      this.opened.set(`${block.info.mm} ${block.info.name}`, block.first);
    this.blocks = this.store.blocks.map((info) => {
      const block = new Block(this, info);
      const first = this.opened.get(`${info.mm} ${info.name}`);
      if (first >= info.start && first < info.stop) block.open(first);
      return block;
    });
    this.grid.replaceChildren(...this.blocks.map((block) => block.element));
    if (!this.blocks.length)
      this.grid.append(make("p", "hmm-empty",
        "No memory is mapped at this step. Step forward, or map a region."));
    this.head();
    this.layout();
  }

  layout() {
    const width = this.element.clientWidth;
    if (!width) return;
    if (!this.theme) {
      this.theme = readTheme(this.element); // not before the element is on the page
      this.head();
    }
    const largest = Math.max(0, ...this.store.blocks.map((block) => block.stop - block.start));
    this.left = 16 + 7 * String(largest).length; // room for the page offsets
    const pane = Math.floor((width - 24) / 2) - this.left - 3;
    const columns = pane >= 32 * 22 && largest > 32 ? 32 : pane >= 16 * 18 && largest > 8 ? 16 : 8;
    const size = Math.max(18, Math.min(30, Math.floor(pane / columns)));
    this.element.style.setProperty("--hmm-pane", `${this.left + columns * size + 3}px`);
    for (const block of this.blocks) block.layout(columns, size);
    for (const strip of this.strips) strip.layout(width);
    this.read();
  }

  paint() {
    if (!this.theme) return;
    for (const block of this.blocks) block.paint();
    for (const strip of this.strips) strip.paint();
    this.read();
  }

  retheme() {
    if (!this.theme) return;
    this.theme = readTheme(this.element);
    this.headKey = "";
    this.head();
    this.paint();
  }

  /** Column headings, each with the states that are there now. */
  head() {
    if (!this.theme) return;
    const present = [0, 1].map((table) => {
      const { pages, codes } = this.store;
      const seen = new Uint8Array(256);
      for (let at = table * pages; at < (table + 1) * pages; at++) seen[codes[at]] = 1;
      return this.store.states[table].map((state) => state.code).filter((code) => seen[code]);
    });
    const key = JSON.stringify([present, this.store.devices]);
    if (key === this.headKey) return;
    this.headKey = key;
    const devices = this.store.devices.length ? this.store.devices.join(", ") : "none is open";
    const titles = [["CPU page table", ""], ["Device page table", devices]];
    this.heads.replaceChildren(...titles.map(([title, detail], table) => {
      const head = make("div");
      const line = head.appendChild(make("h3", "", title));
      if (detail) line.append(make("span", "", ` ${detail}`));
      const legend = head.appendChild(make("ul", "hmm-legend"));
      legend.setAttribute("aria-label", `States in the ${title}`);
      for (const code of present[table]) legend.append(this.chip(this.store.states[table][code]));
      return head;
    }));
  }

  chip(state) {
    const item = make("li");
    const colour = this.theme.colour(state);
    const sample = item.appendChild(make("span", "hmm-chip", state.glyph));
    sample.setAttribute("aria-hidden", "true");
    sample.style.background = colour;
    sample.style.color = state.glyph === "·" || state.code === 0 ? this.theme.muted : inkOn(colour);
    item.append(state.name);
    item.title = state.sentence;
    return item;
  }

  // --- pointing ----------------------------------------------------------------------------------
  blockOf(page) {
    return page && this.blocks.find((block) => block.info.mm === page[0] &&
      block.info.start <= page[1] && page[1] < block.info.stop);
  }

  hover(page, frame = undefined) {
    this.frame = frame;
    if (samePage(page, this.model.get("hovered"))) {
      this.read();
      return;
    }
    this.model.set("hovered", page);
    this.model.save_changes();
  }

  choose(page) {
    this.model.set("selected", page);
    this.model.save_changes();
    const block = this.blockOf(page);
    if (block) this.moveTo(page, block.reveal(page[1]));
  }

  /** The line under the tables: what is under the pointer, or under the keyboard's focus. */
  read() {
    const page = this.model.get("hovered") ?? (this.focusShown ? this.focus : null) ?? this.selected;
    const block = this.store.blockOf(page);
    let text = "Point at a page to read its state; click it to take its entries apart.";
    if (block) {
      const frame = this.store.frameOf(page);
      text = this.store.look(block, page[1]) +
        (frame ? ` · ${frame}` : "");
    } else if (this.frame) {
      text = `Frame 0x${this.frame[0].toString(16)}: in use, and no page shown here maps it`;
    }
    if (this.readout.textContent !== text) this.readout.textContent = text;
  }

  // --- the keyboard --------------------------------------------------------------------------------
  /** One cell alone is in the tab order: the one that was left, the selected, or the first. */
  placeTabStop() {
    const page = [this.focus, this.selected].find((candidate) => this.blockOf(candidate));
    const block = this.blockOf(page) ?? this.blocks[0];
    const cell = block?.cells[page ? page[1] - block.first : 0] ?? block?.cells[0];
    for (const old of this.grid.querySelectorAll('[role="gridcell"][tabindex="0"]')) old.tabIndex = -1;
    if (cell) cell.tabIndex = 0;
  }

  focused(cell, gained) {
    if (cell.vpn === undefined) return;
    const block = this.blocks.find((candidate) => candidate.cells.includes(cell));
    if (gained && block) this.focus = [block.info.mm, cell.vpn];
    this.focusShown = gained && cell.matches(":focus-visible");
    this.paint();
  }

  moveTo(page, cell) {
    this.focus = page;
    this.placeTabStop();
    cell?.focus({ preventScroll: true });
    cell?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  key(event) {
    const at = this.blocks.findIndex((block) => block.cells.includes(event.target));
    if (at < 0 || event.altKey || event.metaKey) return;
    const page = [this.blocks[at].info.mm, event.target.vpn];
    if (event.key === "Enter" || event.key === " ") this.choose(page);
    else if (event.key === "Escape") this.choose(null);
    else {
      const goal = walk(this.blocks, at, event.target.vpn, event.key, event.ctrlKey);
      if (!goal) return;
      const [block, vpn] = goal;
      this.moveTo([block.info.mm, vpn], block.reveal(vpn));
      this.focusShown = true; // also where the browser, after a click, would not
      this.paint();
    }
    event.preventDefault();
    event.stopPropagation();
  }
}

/** Where a key leads from a page: [block, vpn], or null when the key is not ours. */
function walk(blocks, at, vpn, key, control) {
  const block = blocks[at];
  const { start, stop } = block.info;
  const { columns } = block;
  const column = (vpn - block.first) % columns;
  const [before, after] = [blocks[at - 1], blocks[at + 1]];
  const within = (other, goal) => Math.min(Math.max(goal, other.info.start), other.info.stop - 1);
  const lastRow = (other) => {
    const pages = other.info.stop - other.info.start;
    return within(other, other.info.start + Math.floor((pages - 1) / columns) * columns + column);
  };
  switch (key) {
    case "ArrowLeft":
      if (vpn > start) return [block, vpn - 1];
      return before ? [before, before.info.stop - 1] : [block, vpn];
    case "ArrowRight":
      if (vpn < stop - 1) return [block, vpn + 1];
      return after ? [after, after.info.start] : [block, vpn];
    case "ArrowUp":
      if (vpn - columns >= start) return [block, vpn - columns];
      return before ? [before, lastRow(before)] : [block, vpn];
    case "ArrowDown":
      if (vpn + columns < stop) return [block, vpn + columns];
      if (vpn - column + columns < stop) return [block, stop - 1]; // the last row is shorter
      return after ? [after, within(after, after.info.start + column)] : [block, vpn];
    case "Home":
      return control ? [blocks[0], blocks[0].info.start] : [block, vpn - column];
    case "End":
      if (control) return [blocks.at(-1), blocks.at(-1).info.stop - 1];
      return [block, Math.min(vpn - column + columns, block.last) - 1];
    case "PageUp":
      if (block.map && vpn - TABLE >= start) return [block, vpn - TABLE];
      return before ? [before, within(before, before.info.start + vpn - start)] : [block, start];
    case "PageDown":
      if (block.map && vpn + TABLE < stop) return [block, vpn + TABLE];
      return after ? [after, within(after, after.info.start + vpn - start)] : [block, stop - 1];
    default:
      return null;
  }
}

/** Call back when the theme or the screen's resolution changes; returns how to stop. */
function watchTheme(callback) {
  const observer = new MutationObserver(() => requestAnimationFrame(callback));
  for (const element of [document.documentElement, document.body])
    observer.observe(element, {
      attributeFilter: ["class", "style", "data-jp-theme-name", "data-jp-theme-light"],
    });
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", callback);
  return () => {
    observer.disconnect();
    dark.removeEventListener("change", callback);
  };
}

export default () => {
  let store; // of one widget, for all its views
  return {
    initialize({ model }) {
      store = new Store(model);
    },
    render({ model, el }) {
      const tables = new Tables(store, model, el);
      const update = (moved) => tables.update(moved);
      store.listeners.add(update);
      const repaint = () => tables.paint();
      model.on("change:hovered", repaint);
      model.on("change:selected", () => {
        for (const block of tables.blocks) block.select();
        tables.placeTabStop();
        repaint();
      });
      const size = new ResizeObserver(() => tables.keepFocus(() => tables.layout()));
      size.observe(tables.element);
      const unwatch = watchTheme(() => tables.retheme());
      return () => {
        store.listeners.delete(update);
        size.disconnect();
        unwatch();
      };
    },
  };
};
