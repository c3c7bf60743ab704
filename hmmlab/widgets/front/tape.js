// Notifier events downwards in time, one lane a kind; the buttons above choose the kinds.

class EventTape extends Listbox {
  constructor(model, el) {
    super(model, make("div", "hmm-tape-list"), "Notifier events");
    const box = el.appendChild(make("div", "hmm-tape"));
    this.filter = box.appendChild(make("div", "hmm-tape-filter"));
    this.filter.setAttribute("role", "group");
    this.filter.setAttribute("aria-label", "Kinds of events that are shown");
    this.filter.addEventListener("click", (e) => this.choose(e));
    this.titles = box.appendChild(make("div", "hmm-tape-row hmm-tape-titles"));
    this.titles.setAttribute("aria-hidden", "true"); // each row says all this itself
    box.append(this.list);
    this.drawKinds();
    this.fill();
  }

  // --- the kinds -------------------------------------------------------------------------------
  drawKinds() {
    const shown = this.model.get("shown");
    const kinds = this.model.get("kinds");
    const old = [...this.filter.children];
    kinds.forEach(([name, glyph, colour, ink, sentence, raised], i) => {
      const button = old[i] ?? this.filter.appendChild(make("button", "hmm-button"));
      button.type = "button";
      button.title = sentence;
      button.dataset.kind = name;
      button.setAttribute("aria-pressed", String(shown.includes(name)));
      button.classList.toggle("hmm-none", !raised);
      button.replaceChildren(this.chip(glyph, colour, ink), `${name} `, make("b", "", raised));
    });
    const heads = ["step", "", "pages", "", "told", "owner", "raised by"];
    this.titles.replaceChildren(...heads.map((text) => make("span", "", text)));
    this.titles.children[1].replaceChildren(
      ...kinds.map(([, glyph]) => make("i", "", glyph)),
    );
  }

  chip(glyph, colour, ink) {
    const chip = make("i", "hmm-chip", glyph);
    chip.setAttribute("aria-hidden", "true");
    Object.assign(chip.style, { background: colour, color: ink });
    return chip;
  }

  choose(event) {
    const name = event.target.closest("button")?.dataset.kind;
    if (!name) return;
    const names = this.model.get("kinds").map(([kind]) => kind);
    const shown = new Set(this.model.get("shown"));
    // The first choice shows one kind alone, and to put away the last brings all of them back.
    if (shown.size === names.length) this.show([name]);
    else if (shown.delete(name)) this.show(shown.size ? [...shown] : names);
    else this.show([...shown, name]);
  }

  show(kinds) {
    this.model.set("shown", kinds);
    this.model.save_changes();
  }

  // --- the events ------------------------------------------------------------------------------
  fill() {
    const kinds = this.model.get("kinds");
    this.rows = this.model.get("rows").map(([number, position, kind, where, extent, told, owner, operation]) => {
      const [name, glyph, colour, ink] = kinds[kind];
      const row = this.row(number, number, "hmm-tape-row");
      row.setAttribute("aria-setsize", this.model.get("_total"));
      row.setAttribute("aria-posinset", number);
      const owned = owner ? `, owner ${owner}` : "";
      row.setAttribute("aria-label", `Step ${position}: ${name} of ${where}, raised by ${operation}, told: ${told}${owned}`);
      const lanes = make("span", "hmm-tape-lanes");
      const mark = lanes.appendChild(this.chip(glyph, colour, ink));
      mark.style.gridColumn = kind + 1;
      const what = make("span", "hmm-tape-what");
      what.append(make("strong", "", name), ` ${where}`);
      const bar = make("span", "hmm-tape-bar");
      if (extent.length) {
        const part = bar.appendChild(make("i"));
        part.style.left = `${100 * extent[0]}%`;
        part.style.width = `${100 * (extent[1] - extent[0])}%`;
        part.style.background = colour;
      } else bar.className = "";
      row.append(
        make("span", "hmm-tape-step", position), lanes, what, bar,
        make("span", "", told), make("span", "", owner || "–"), make("code", "", operation),
      );
      return row;
    });
    const empty = make("p", "hmm-empty", "No event of these kinds has been raised.");
    this.list.replaceChildren(...(this.rows.length ? this.rows : [empty]));
    this.mark();
  }

  mark() {
    super.mark();
    const current = this.model.get("current");
    for (const row of this.rows) row.classList.toggle("hmm-ahead", row.number > current);
    if (!current) this.list.scrollTop = 0;
  }

  go(number) {
    this.model.send({ go: number });
  }

  goals() {
    const [current, total] = [this.model.get("current"), this.model.get("_total")];
    return {
      Enter: current, ArrowUp: Math.max(current - 1, 1), ArrowDown: Math.min(current + 1, total), Home: 1, End: total,
    };
  }
}

export default {
  render({ model, el }) {
    const tape = new EventTape(model, el);
    model.on("change:kinds change:shown", () => tape.drawKinds());
    return tape.follow();
  },
};
