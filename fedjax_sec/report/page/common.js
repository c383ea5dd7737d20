"use strict";
// Shared by the pages of one folder and of two: charts, menus, tables, fields of a heat map.

const page = JSON.parse(document.getElementById("rows").textContent);
const views = {};
let busy = 0;

function at(id) {
  return document.getElementById(id);
}

function made(tag, text, parent) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

// A label in lines of at most `width` characters, broken at blanks and otherwise never.
function wrapped(text, width = 26) {
  const lines = [""];
  for (const word of String(text).split(" ")) {
    const last = lines.length - 1;
    if (lines[last] && lines[last].length + word.length + 1 > width) lines.push(word);
    else lines[last] += (lines[last] ? " " : "") + word;
  }
  return lines.join("\n");
}

function words(name) {
  return name.replaceAll("_", " ");
}

// --- Charts ----------------------------------------------------------------------------------------

// A specification with values in place of "@name", and lists in place of ["@*name"].
function filled(part, values) {
  if (typeof part === "string") {
    return part[0] === "@" && part.slice(1) in values ? values[part.slice(1)] : part;
  }
  if (Array.isArray(part)) {
    const only = part.length === 1 && typeof part[0] === "string" && part[0].startsWith("@*");
    return only ? values[part[0].slice(2)] : part.map((one) => filled(one, values));
  }
  if (part === null || typeof part !== "object") return part;
  return Object.fromEntries(Object.entries(part).map(([key, one]) => [key, filled(one, values)]));
}

// Draws chart `name` into element `id`; `size` is what is set on its outermost level.
async function draw(id, name, values, datasets, size, onClick) {
  const spec = { ...filled(page.charts[name], values), ...size, datasets };
  for (const one of spec.params || []) if (one.name in values) one.value = values[one.name];
  const options = { mode: "vega-lite", renderer: "svg", downloadFileName: id };
  options.actions = { export: true, source: false, compiled: false, editor: false };
  document.body.dataset.busy = ++busy;
  try {
    const turn = (views[id] = { turn: (views[id]?.turn || 0) + 1, last: views[id]?.last });
    const number = turn.turn;
    const holder = document.createElement("div"); // beside the page, which so does not jump
    const result = await vegaEmbed(holder, spec, options);
    if (views[id].turn !== number) return result.finalize();
    turn.last?.finalize();
    turn.last = result;
    at(id).replaceChildren(holder);
    if (onClick) result.view.addEventListener("click", (event, item) => onClick(event, item));
  } catch (error) {
    at(id).textContent = `This chart cannot be drawn: ${error.message}`;
    console.error(id, error);
  } finally {
    document.body.dataset.busy = --busy;
  }
}

// Words in place of a chart that has nothing to show.
function blank(id, text) {
  views[id] = { turn: (views[id]?.turn || 0) + 1 };
  at(id).replaceChildren();
  if (text) made("p", text, at(id)).className = "said";
}

function looks(lines) {
  const pick = (list) => lines.map((_, i) => list[i % list.length]);
  const { colours, dashes, shapes } = page.styles;
  return { lines, color: pick(colours), strokeDash: pick(dashes), shape: pick(shapes) };
}

// --- Menus -----------------------------------------------------------------------------------------

// A labelled menu of [value, text] in element `parent`.
function menu(parent, id, label, options, value, onChange) {
  const holder = made("label", undefined, parent);
  made("span", label, holder);
  const select = made("select", undefined, holder);
  select.id = id;
  for (const [one, text] of options) made("option", text, select).value = one;
  select.value = value;
  select.addEventListener("change", () => onChange(select.value));
  return select;
}

// A table of rows below a head; the first column is a heading of its row.
function table(parent, head, rows) {
  const element = made("table", undefined, parent);
  const line = made("tr", undefined, made("thead", undefined, element));
  for (const text of head) made("th", text, line).scope = "col";
  const body = made("tbody", undefined, element);
  for (const row of rows) {
    const next = made("tr", undefined, body);
    row.forEach((text, i) => {
      const cell = made(i ? "td" : "th", text, next);
      if (!i) cell.scope = "row";
    });
  }
  return element;
}

// --- Numbers ---------------------------------------------------------------------------------------

function known(values) {
  return values.filter((one) => one !== null && one !== undefined);
}

function mean(values) {
  return values.reduce((sum, one) => sum + one, 0) / values.length;
}

// The standard deviation with ddof 1; null of a single value.
function spread(values) {
  if (values.length < 2) return null;
  const centre = mean(values);
  return Math.sqrt(values.reduce((s, one) => s + (one - centre) ** 2, 0) / (values.length - 1));
}

// Shares in percent.
function scaled(metric, value) {
  return value === null || value === undefined ? null : metric.share ? 100 * value : value;
}

function shown(metric, value, signed = false) {
  if (value === null || value === undefined) return "";
  const sign = signed && value > 0 ? "+" : "";
  return sign + (metric.share ? value.toFixed(1) : compact(value));
}

function compact(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.01 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

function titleOf(metric) {
  return words(metric.name) + (metric.share ? " (%)" : metric.name === "seconds" ? " a run" : "");
}

// The ends of an axis of a metric: shares span 20 points at least, and stay within 0 and 100.
function ends(metric, values) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (!values.length) return metric.share ? [0, 100] : [0, 1];
  const pad = Math.max((high - low) * 0.05, Math.abs(high) * 1e-3, 1e-9);
  [low, high] = [low - pad, high + pad];
  if (!metric.share) return [low, high];
  const wanting = Math.max(0, 20 - (high - low)) / 2;
  [low, high] = [Math.floor(low - wanting), Math.ceil(high + wanting)];
  if (low < 0) [low, high] = [0, Math.max(high, 20)];
  if (high > 100) [low, high] = [Math.min(low, 80), 100];
  return [Math.max(low, 0), Math.min(high, 100)];
}

// --- Axes and fields -------------------------------------------------------------------------------

const nothing = { name: "", labels: ["all runs"], numeric: false, at: null };

function axisOf(name) {
  return page.axes.find((axis) => axis.name === name) || nothing;
}

function labelOf(axis, run) {
  return axis.at ? axis.labels[axis.at[run]] : axis.labels[0];
}

// The places of the runs that have these labels: pairs of an axis and a label.
function runsWith(pairs) {
  const all = page.runs.map((_, place) => place);
  return pairs.reduce((left, [axis, one]) => left.filter((run) => labelOf(axis, run) === one), all);
}

// The sizes of a heat map: fields as wide as their numbers, and labels that do not meet.
function sizes(id, rows, columns) {
  const count = columns.length;
  const lines = (labels) => Math.max(...labels.map((label) => label.split("\n").length));
  const longest = Math.max(...rows.flatMap((label) => label.split("\n")).map((line) => line.length));
  const room = (size(id) - 6.5 * longest - 190) / count; // beside the labels and the legend
  const step = Math.max(31, 24 * lines(columns), Math.min(78, room));
  const tall = Math.max(22, Math.min(34, step * 0.6), 15 * lines(rows));
  const font = step > 64 ? 12 : step > 50 ? 11 : step > 40 ? 10 : 9;
  return { font, box: { width: count * step, height: rows.length * tall } };
}

// The ends of the colours: of shares 0 and 100, else those of the values but for far outliers, which
// have the colour of the end, so that one loss of 1e15 does not make all others alike.
function limits(metric, values) {
  if (metric.share) return [0, 100];
  const sorted = [...values].sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const room = 5 * (at(0.75) - at(0.25)) || Infinity;
  const low = Math.max(sorted[0], at(0.25) - room);
  const high = Math.min(sorted.at(-1), at(0.75) + room);
  return [low, high > low ? high : low + 1];
}

// Dark text on light colours and light text on dark ones, of a scale that is dark at its low end.
function inkOn(value, low, high) {
  return (value - low) / (high - low) > 0.46 ? "black" : "white";
}

function size(id) {
  return Math.max(420, at(id).clientWidth);
}
