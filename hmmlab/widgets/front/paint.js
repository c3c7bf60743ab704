// Drawing cells on canvases in the colours of the theme.

const BRACKET = 24; // room above a row for the brackets of its VMAs
const FONT = 'ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace';

/** The colours of the moment, read from the theme's variables. */
function readTheme(el) {
  const style = getComputedStyle(el);
  const read = (name, fallback) => style.getPropertyValue(name).trim() || fallback;
  const paper = read("--jp-layout-color0", "#ffffff");
  const dark = luminance(parseColour(paper)) < 0.4;
  return {
    dark,
    paper,
    ink: read("--jp-ui-font-color0", dark ? "#ffffff" : "#000000"),
    muted: read("--jp-ui-font-color2", dark ? "#b0b0b0" : "#616161"),
    brand: read("--jp-brand-color1", dark ? "#42a5f5" : "#1976d2"),
    line: dark ? "#5a5a5a" : "#bdbdbd",
    colour: (state) => (dark ? state.colour_dark : state.colour_light),
  };
}

function parseColour(text) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = text;
  probe.fillRect(0, 0, 1, 1);
  return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

function luminance([r, g, b]) {
  const linear = [r, g, b].map((c) =>
    c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

const parsed = new Map();
const inks = new Map();

/** Red, green and blue of a "#rrggbb". */
function rgb(hex) {
  if (!parsed.has(hex))
    parsed.set(hex, [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return parsed.get(hex);
}

/** Black or white, whichever is easier to read on a colour. */
function inkOn(hex) {
  if (!inks.has(hex)) inks.set(hex, luminance(rgb(hex)) > 0.179 ? "#000000" : "#ffffff");
  return inks.get(hex);
}

/** Give a canvas its size in CSS pixels at the screen's resolution; returns its cleared context. */
function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** One page: its colour, its glyph, and whether the step changed it. */
function paintCell(context, theme, state, x, y, size, marked) {
  const colour = theme.colour(state);
  context.fillStyle = colour;
  context.fillRect(x + 1, y + 1, size - 2, size - 2);
  context.fillStyle = state.code === 0 || state.glyph === "·" ? theme.muted : inkOn(colour);
  context.font = `${Math.max(11, Math.round(size * 0.52))}px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(state.glyph, x + size / 2, y + size / 2 + 0.5);
  if (marked) {
    outline(context, theme.ink, x + 1, y + 1, size - 2, size - 2, 2);
    // A folded corner, for those who cannot tell an outline from a colour.
    context.fillStyle = theme.ink;
    context.beginPath();
    context.moveTo(x + size - 1, y + 1);
    context.lineTo(x + size - 1, y + 9);
    context.lineTo(x + size - 9, y + 1);
    context.fill();
  }
}

function outline(context, colour, x, y, width, height, thickness) {
  context.strokeStyle = colour;
  context.lineWidth = thickness;
  context.strokeRect(x + thickness / 2, y + thickness / 2, width - thickness, height - thickness);
}

/** A ring around a cell: two lines, so that it shows on every colour. */
function ring(context, theme, x, y, width, height, kind) {
  if (kind === "selected") {
    outline(context, theme.paper, x - 1, y - 1, width + 2, height + 2, 4);
    outline(context, theme.brand, x - 2, y - 2, width + 4, height + 4, 3);
  } else {
    context.setLineDash(kind === "focused" ? [3, 2] : []);
    outline(context, theme.paper, x + 1, y + 1, width - 2, height - 2, 3);
    outline(context, theme.ink, x, y, width, height, 1.5);
    context.setLineDash([]);
  }
}
