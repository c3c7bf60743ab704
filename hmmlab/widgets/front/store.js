// What the browser knows of the two page tables. Joined with the files that page_table_grid.py
// names into one module.

/** The states of all pages, kept up to date by messages from Python, and who wants to know. */
class Store {
  constructor(model) {
    this.model = model;
    this.listeners = new Set();
    const whole = model.get("_whole");
    this.takeWhole(whole, [whole.codes, whole.marks]);
    model.on("msg:custom", (message, buffers) => this.receive(message, buffers));
    // Changes may have been sent while this module was loading.
    this.greet();
  }

  greet() {
    this.model.send({ kind: "hello", serial: this.serial });
  }

  takeWhole(whole, [codes, marks]) {
    Object.assign(this, {
      serial: whole.serial,
      blocks: whole.blocks,
      devices: whole.devices,
      frames: whole.frames,
      states: whole.states,
    });
    this.codes = bytesOf(codes).slice();
    this.pages = this.codes.length / 2;
    this.takeMarks(marks);
  }

  /** Which cells the current step changed, from runs of places. */
  takeMarks(runs) {
    const ends = wordsOf(runs);
    this.marks = new Uint8Array(this.codes.length);
    for (let i = 0; i < ends.length; i += 2) this.marks.fill(1, ends[i], ends[i + 1]);
    this.version = (this.version ?? 0) + 1;
  }

  receive(message, buffers) {
    if (message.kind === "whole") {
      const before = this.places();
      this.takeWhole(message, buffers);
      this.tell(before !== this.places());
    } else if (message.serial === this.serial + 1) {
      this.serial = message.serial;
      this.takeChange(message, buffers);
      this.tell(false);
    } else if (message.serial > this.serial) {
      this.greet();
    }
  }

  takeChange(message, [places, codes, marks]) {
    const changed = wordsOf(places);
    const values = bytesOf(codes);
    changed.forEach((place, i) => (this.codes[place] = values[i]));
    this.takeMarks(marks);
    if (message.frames) this.frames = message.frames;
    if (message.blocks) {
      this.blocks = message.blocks; // the same places, other VMAs
      this.devices = message.devices;
    }
  }

  /** Which cells of the array which block has, for comparing. */
  places() {
    return JSON.stringify(this.blocks.map(({ mm, name, start, stop, at }) => [mm, name, start, stop, at]));
  }

  /** Tell the listeners of news; whether the blocks are other ones. */
  tell(moved) {
    for (const listener of this.listeners) listener(moved);
  }

  // --- looking things up ---------------------------------------------------------------------
  /** State of the page at a place: of the CPU's table (0) or the device's (1). */
  state(table, place) {
    return this.states[table][this.codes[table * this.pages + place]];
  }

  isMarked(table, place) {
    return this.marks[table * this.pages + place] === 1;
  }

  blockOf(page) {
    return page && this.blocks.find(
      (block) => block.mm === page[0] && block.start <= page[1] && page[1] < block.stop,
    );
  }

  /** Where a page [mm, vpn] is in the array, or -1. */
  placeOf(page) {
    const block = this.blockOf(page);
    return block ? block.at + page[1] - block.start : -1;
  }

  /** "A page 5", with its process where there are several. */
  pageName(block, vpn) {
    const several = this.blocks.some((other) => other.mm !== block.mm);
    return `${several ? block.process + " " : ""}${block.name} page ${vpn - block.start}`;
  }

  /** "A page 5: CPU read-write, device read-only". */
  look(block, vpn) {
    const place = block.at + vpn - block.start;
    return `${this.pageName(block, vpn)}: CPU ${this.state(0, place).name}, ` +
      `device ${this.state(1, place).name}`;
  }

  /** How a page looks, and what the step changed of it. */
  label(block, vpn) {
    const place = block.at + vpn - block.start;
    const marks = [this.isMarked(0, place), this.isMarked(1, place)];
    const written = ["", "; this step changed the CPU's entry", "; this step changed the device's entry",
      "; this step changed both entries"][marks[0] + 2 * marks[1]];
    return this.look(block, vpn) + written;
  }

  /** The frames that the strips show for a page: "frame 0x1f in RAM"; in words, or "". */
  frameOf(page) {
    const found = [];
    for (const { title, cells } of this.frames)
      for (const [pfn, mm, vpn] of cells)
        if (mm === page[0] && vpn === page[1])
          found.unshift(`frame 0x${pfn.toString(16)} in ${title === "RAM" ? title : "device memory"}`);
    return found.join(", behind it ");
  }
}

const samePage = (a, b) => a === b || Boolean(a && b && a[0] === b[0] && a[1] === b[1]);

function bytesOf(view) {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** 32-bit words of a buffer, which need not be aligned. */
function wordsOf(view) {
  return new Uint32Array(bytesOf(view).slice().buffer);
}
