// Physical space as a column of places, and the frames of one chunk of device memory as a grid.

class Memory {
  constructor(model, el) {
    this.model = model;
    this.element = el.appendChild(make("div", "hmm-memory"));
    // Keys that walk the frames are not the notebook's shortcuts.
    this.element.dataset.lmSuppressShortcuts = "true";
    const left = this.element.appendChild(make("div", "hmm-space"));
    left.append(make("h3", "", "Physical space"));
    this.places = left.appendChild(make("ol"));
    this.places.setAttribute("aria-label", "Physical space; not to scale");
    left.append(make("p", "hmm-note", "The highest address is on top; not to scale. Click device memory to see its frames."));
    const right = this.element.appendChild(make("div", "hmm-chunk"));
    const head = right.appendChild(make("div", "hmm-chunk-head"));
    head.append(make("h3", "", "Frames of device memory, the last one first"));
    this.higher = this.turner(head, "◀ Higher", -1);
    this.lower = this.turner(head, "Lower ▶", 1);
    this.facts = right.appendChild(make("p", "hmm-note"));
    this.grid = right.appendChild(make("div", "hmm-frame-grid"));
    this.grid.setAttribute("role", "listbox");
    this.grid.setAttribute("aria-label", "Frames of device memory");
    this.grid.addEventListener("keydown", (e) => this.key(e));
    this.readout = right.appendChild(make("p", "hmm-frame-readout"));
    this.focus = 0;
    this.drawPlaces();
    this.drawCells();
  }

  turner(head, text, by) {
    const button = head.appendChild(make("button", "hmm-button", text));
    button.addEventListener("click", () => this.set("window", this.model.get("window") + by));
    return button;
  }

  set(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  drawPlaces() {
    this.places.replaceChildren(...this.model.get("places").map((place) => {
      const item = make("li", `hmm-place hmm-${place.kind}`);
      const box = item.appendChild(make(place.chunk ? "button" : "div"));
      box.append(make("strong", "", place.name), make("span", "", place.size));
      if (place.kind !== "gap") box.append(make("span", "", place.kind), make("span", "", place.use));
      if (place.chunk) {
        box.setAttribute("aria-pressed", String(place.shown));
        box.addEventListener("click", () => this.set("chunk", place.chunk));
      }
      item.append(make("code", "", place.address));
      return item;
    }));
  }

  drawCells() {
    const cells = this.model.get("cells");
    const had = this.grid.contains(document.activeElement);
    this.facts.textContent = this.model.get("facts");
    this.higher.disabled = this.model.get("window") <= 0;
    this.lower.disabled = !this.model.get("more");
    this.focus = Math.min(this.focus, Math.max(cells.length - 1, 0));
    this.cells = cells.map((cell, i) => {
      const box = make("div", cell.changed ? "hmm-frame hmm-frame-changed" : "hmm-frame");
      box.setAttribute("role", "option");
      box.setAttribute("aria-label", cell.told);
      box.title = cell.told;
      box.append(make("code", "", cell.pfn), make("b", "", cell.holder), make("i", "", cell.counts));
      if (cell.colour) {
        box.style.background = cell.colour;
        box.style.color = inkOn(cell.colour);
      }
      box.addEventListener("click", () => this.choose(i));
      box.addEventListener("pointerenter", () => this.point(cell));
      box.addEventListener("pointerleave", () => this.point(null));
      box.addEventListener("focus", () => this.read(cell));
      return box;
    });
    this.grid.replaceChildren(...this.cells);
    this.mark();
    if (had) this.cells[this.focus]?.focus({ preventScroll: true });
  }

  /** Ring the frames of the selected page and of the page that is pointed at. */
  mark() {
    const [selected, hovered] = ["selected", "hovered"].map((name) => this.model.get(name));
    const has = (cell, page) =>
      Boolean(page) && cell.pages.some(([mm, vpn]) => mm === page[0] && vpn === page[1]);
    this.model.get("cells").forEach((cell, i) => {
      const box = this.cells[i];
      box.setAttribute("aria-selected", String(has(cell, selected)));
      box.classList.toggle("hmm-frame-hovered", has(cell, hovered));
      box.tabIndex = i === this.focus ? 0 : -1;
    });
    this.read(null);
  }

  point(cell) {
    this.read(cell);
    const page = cell?.page ?? null;
    if (JSON.stringify(page) !== JSON.stringify(this.model.get("hovered"))) this.set("hovered", page);
  }

  /** The line under the frames: the one pointed at, or else that of the selected page. */
  read(cell) {
    const chosen = this.cells.findIndex((box) => box.getAttribute("aria-selected") === "true");
    const shown = cell ?? this.model.get("cells")[chosen];
    this.readout.textContent = shown?.told ??
      "Point at a frame to read its struct page; click it to select the page that maps it.";
  }

  choose(at) {
    this.focus = at;
    this.set("selected", this.model.get("cells")[at].page);
    this.mark();
    this.cells[at].focus({ preventScroll: true });
    this.read(this.model.get("cells")[at]);
  }

  key(event) {
    if (event.altKey || event.metaKey || event.ctrlKey) return;
    if (event.key === "Enter" || event.key === " ") this.choose(this.focus);
    else {
      const tops = this.cells.map((box) => box.offsetTop);
      const columns = Math.max(tops.filter((top) => top === tops[0]).length, 1);
      const last = this.cells.length - 1;
      const goal = {
        ArrowLeft: this.focus - 1, ArrowRight: this.focus + 1, Home: 0, End: last,
        ArrowUp: this.focus - columns, ArrowDown: this.focus + columns,
      }[event.key];
      if (goal === undefined) return;
      if (goal >= 0 && goal <= last) {
        this.focus = goal;
        this.mark();
        this.cells[goal].focus();
      }
    }
    event.preventDefault();
    event.stopPropagation();
  }
}

export default {
  render({ model, el }) {
    const memory = new Memory(model, el);
    model.on("change:places", () => memory.drawPlaces());
    for (const name of ["cells", "facts", "more", "window"])
      model.on(`change:${name}`, () => memory.drawCells());
    for (const name of ["selected", "hovered"]) model.on(`change:${name}`, () => memory.mark());
  },
};
