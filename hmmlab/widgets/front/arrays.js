// The two arrays of a migration as tables, a column a page; a page's name selects it.

/** The rows below the pages' names: title, and what stands in a page's cell. */
const ROWS = [
  ["CPU's word", (page) => [chip(page.state), ` ${page.state.short}`]],
  ["src", (page) => word(page.src)],
  ["dst", (page) => word(page.dst)],
  ["so far", (page) => [page.fate]],
];

function chip(state) {
  const box = make("span", "hmm-chip", state.glyph);
  box.setAttribute("aria-hidden", "true");
  for (const name of ["light", "dark"]) {
    box.style.setProperty(`--${name}`, state[name]);
    box.style.setProperty(`--${name}-ink`, inkOn(state[name]));
  }
  return box;
}

function word({ flags, frame, changed }) {
  const parts = [make("b", "", flags), make("i", "", frame)];
  if (changed) parts.push(make("span", "hmm-hidden", "changed in this phase"));
  return parts;
}

class Arrays {
  constructor(model, el) {
    this.model = model;
    this.element = el.appendChild(make("div", "hmm-arrays"));
    this.element.dataset.lmSuppressShortcuts = "true";
    this.draw();
  }

  draw() {
    const [pages, band] = [this.model.get("pages"), this.model.get("band")];
    const had = this.element.contains(document.activeElement)
      ? document.activeElement.dataset.at : undefined;
    const tables = [];
    for (let at = 0; at < pages.length; at += band)
      tables.push(this.table(pages.slice(at, at + band), at, band));
    const notes = this.model.get("notes").map((text) => make("p", "hmm-note", text));
    const legend = make("ul");
    legend.append(...this.model.get("legend").map((text) => make("li", "", text)));
    this.element.replaceChildren(...tables, ...notes, legend);
    this.mark();
    if (had !== undefined)
      this.element.querySelector(`[data-at="${had}"]`)?.focus({ preventScroll: true });
  }

  table(pages, start, band) {
    const table = make("table");
    table.setAttribute("aria-label", "src and dst, page by page");
    table.style.setProperty("--columns", Math.min(pages.length, band));
    const head = table.createTHead().insertRow();
    head.append(this.title("page", "col"), ...pages.map((page, i) => {
      const cell = this.title("", "col");
      const button = cell.appendChild(make("button", "hmm-button", page.name));
      button.dataset.at = start + i;
      button.title = "Select this page";
      button.addEventListener("click", () => this.choose(page.page));
      return cell;
    }));
    const body = table.createTBody();
    for (const [title, cells] of ROWS) {
      const row = body.insertRow();
      row.append(this.title(title, "row"));
      for (const page of pages) {
        const cell = row.insertCell();
        cell.append(...cells(page));
        if (title === "CPU's word") cell.title = page.state.sentence;
        if (page[title]?.changed) cell.className = "hmm-changed-cell";
        if (title === "so far" && page.arrived) cell.className = "hmm-arrived-cell";
      }
    }
    return table;
  }

  title(text, scope) {
    const cell = make("th", "", text);
    cell.scope = scope;
    return cell;
  }

  choose(page) {
    this.model.set("selected", page);
    this.model.save_changes();
    this.mark();
  }

  mark() {
    const chosen = JSON.stringify(this.model.get("selected"));
    this.model.get("pages").forEach((page, at) => {
      const button = this.element.querySelector(`[data-at="${at}"]`);
      button?.setAttribute("aria-pressed", String(JSON.stringify(page.page) === chosen));
    });
  }
}

export default {
  render({ model, el }) {
    const arrays = new Arrays(model, el);
    for (const name of ["pages", "notes", "legend"]) model.on(`change:${name}`, () => arrays.draw());
    model.on("change:selected", () => arrays.mark());
  },
};
