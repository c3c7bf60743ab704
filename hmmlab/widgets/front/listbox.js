// A list of rows of which the one whose number is `current` is marked, and kept in sight.

class Listbox {
  /** `list` becomes the box of the rows; who extends this fills `rows`, and says where to `go`. */
  constructor(model, list, label) {
    this.model = model;
    this.list = list;
    this.rows = [];
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-label", label);
    list.tabIndex = 0;
    // Keys that walk the rows are not the notebook's shortcuts.
    list.dataset.lmSuppressShortcuts = "true";
    list.addEventListener("click", (e) => this.click(e));
    list.addEventListener("keydown", (e) => this.key(e));
  }

  /** A row; one with the number 0 cannot be chosen. */
  row(number, id, className = "") {
    const row = make("div", className);
    row.number = number;
    row.id = `${this.model.get("prefix")}-${id}`;
    row.setAttribute("role", "option");
    return row;
  }

  /** Mark the current row, with so many pixels above it in sight. */
  mark(above = 0) {
    const current = this.model.get("current");
    this.list.removeAttribute("aria-activedescendant");
    for (const row of this.rows) {
      const here = row.number > 0 && row.number === current;
      row.setAttribute("aria-selected", String(here));
      if (!here) continue;
      this.list.setAttribute("aria-activedescendant", row.id);
      const [top, bottom] = [row.offsetTop, row.offsetTop + row.offsetHeight];
      const { scrollTop, clientHeight } = this.list;
      if (top - above < scrollTop || bottom > scrollTop + clientHeight)
        this.list.scrollTop = top - clientHeight / 2;
    }
  }

  click(event) {
    const row = event.target.closest('[role="option"]');
    if (row?.number) this.go(row.number);
  }

  /** `goals` says which number a key leads to: 0 or nothing where there is none. */
  key(event) {
    const goals = this.goals();
    if (!(event.key in goals)) return;
    if (goals[event.key]) this.go(goals[event.key]);
    event.preventDefault();
    event.stopPropagation();
  }

  /** Follow the model; returns what ends that. */
  follow() {
    this.model.on("change:rows", () => this.fill());
    this.model.on("change:current", () => this.mark());
    // The list has a height, and the current row a place, only once it is on the page.
    const size = new ResizeObserver(() => this.mark());
    size.observe(this.list);
    return () => size.disconnect();
  }
}
