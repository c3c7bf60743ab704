// The steps of one operation: kernel functions indented as they call each other.

class StepList {
  constructor(model, el) {
    this.model = model;
    this.list = el.appendChild(document.createElement("div"));
    this.list.className = "hmm-steps";
    this.list.setAttribute("role", "listbox");
    this.list.setAttribute("aria-label", "Steps of the operation");
    this.list.tabIndex = 0;
    this.list.dataset.lmSuppressShortcuts = "true";
    this.list.addEventListener("click", (e) => this.click(e));
    this.list.addEventListener("keydown", (e) => this.key(e));
    this.fill();
  }

  fill() {
    // A row is [depth, function, position or 0, sentence]; position 0 is a call without a step.
    this.rows = this.model.get("rows").map(([depth, name, position, sentence], i) => {
      const row = document.createElement("div");
      row.style.paddingLeft = `${8 + 8 * depth}px`;
      row.id = `${this.model.get("prefix")}-${i}`;
      row.setAttribute("role", "option");
      row.position = position;
      if (position) row.append(Object.assign(document.createElement("i"), { textContent: position }));
      const label = row.appendChild(document.createElement("code"));
      // A long name breaks after an underscore.
      label.append(...name.split(/(?<=[a-z]_)/).flatMap((part) => [part, document.createElement("wbr")]));
      if (position) row.append(Object.assign(document.createElement("span"), { textContent: sentence }));
      else {
        row.className = "hmm-call";
        row.setAttribute("aria-disabled", "true");
      }
      return row;
    });
    this.list.replaceChildren(...this.rows);
    this.mark();
  }

  mark() {
    const current = this.model.get("current");
    this.list.removeAttribute("aria-activedescendant");
    for (const row of this.rows) {
      const here = row.position > 0 && row.position === current;
      row.setAttribute("aria-selected", String(here));
      if (!here) continue;
      this.list.setAttribute("aria-activedescendant", row.id);
      const [top, bottom] = [row.offsetTop, row.offsetTop + row.offsetHeight];
      const { scrollTop, clientHeight } = this.list;
      // Keep a step's calls, which stand above it, in sight.
      if (top - 48 < scrollTop || bottom > scrollTop + clientHeight)
        this.list.scrollTop = top - clientHeight / 2;
    }
  }

  go(position) {
    this.model.set("current", position);
    this.model.save_changes();
  }

  click(event) {
    const row = event.target.closest('[role="option"]');
    if (row?.position) this.go(row.position);
  }

  key(event) {
    const steps = this.rows.map((row) => row.position).filter(Boolean);
    const at = steps.indexOf(this.model.get("current"));
    const goal = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (goal === undefined) return;
    if (steps[goal] !== undefined) this.go(steps[goal]);
    event.preventDefault();
    event.stopPropagation();
  }
}

export default {
  render({ model, el }) {
    const list = new StepList(model, el);
    model.on("change:rows", () => list.fill());
    model.on("change:current", () => list.mark());
    // The list has a height, and the current row a place, only once it is on the page.
    const size = new ResizeObserver(() => list.mark());
    size.observe(list.list);
    return () => size.disconnect();
  },
};
