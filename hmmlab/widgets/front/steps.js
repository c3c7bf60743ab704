// The steps of one operation: kernel functions indented as they call each other.

class StepList extends Listbox {
  constructor(model, el) {
    super(model, el.appendChild(make("div", "hmm-steps")), "Steps of the operation");
    this.fill();
  }

  fill() {
    // A row is [depth, function, position or 0, sentence]; position 0 is a call without a step.
    this.rows = this.model.get("rows").map(([depth, name, position, sentence], i) => {
      const row = this.row(position, i, position ? "" : "hmm-call");
      row.style.paddingLeft = `${8 + 8 * depth}px`;
      if (position) row.append(make("i", "", position));
      const label = row.appendChild(make("code"));
      // A long name breaks after an underscore.
      label.append(...name.split(/(?<=[a-z]_)/).flatMap((part) => [part, make("wbr")]));
      if (position) row.append(make("span", "", sentence));
      else row.setAttribute("aria-disabled", "true");
      return row;
    });
    this.list.replaceChildren(...this.rows);
    this.mark();
  }

  mark() {
    super.mark(48); // a step's calls stand above it
  }

  go(position) {
    this.model.set("current", position);
    this.model.save_changes();
  }

  goals() {
    const steps = this.rows.map((row) => row.number).filter(Boolean);
    const at = steps.indexOf(this.model.get("current"));
    return { ArrowUp: steps[at - 1], ArrowDown: steps[at + 1], Home: steps[0], End: steps.at(-1) };
  }
}

export default {
  render: ({ model, el }) => new StepList(model, el).follow(),
};
