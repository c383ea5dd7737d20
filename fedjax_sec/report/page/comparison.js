// The page of two folders: heat maps of A, B and their difference, curves of the picked cell, tests.

const LABEL = 60;
const state = { filters: {}, cell: 0, metric: 0, down: page.down, across: page.across };

function metric() {
  return page.metrics[state.metric];
}

function labelAt(axis, cell) {
  return axis.at ? axis.labels[axis.at[cell]] : axis.labels[0];
}

// The cell with these labels; where other axes are left open there may be several.
function cellsAt(down, across) {
  const pairs = [[axisOf(state.down), down], [axisOf(state.across), across]];
  for (const [name, label] of Object.entries(state.filters))
    if (name !== state.down && name !== state.across) pairs.push([axisOf(name), label]);
  return page.cells.map((_, i) => i).filter((i) => pairs.every(([axis, one]) => labelAt(axis, i) === one));
}

function test(cell) {
  return page.tests[state.metric][cell];
}

function probability(p) {
  return p === null ? "" : p < 0.001 ? "< 0.001" : p.toFixed(3);
}

// What the test says of a cell in words.
function verdict(one) {
  if (!one) return "no seed is finished in both";
  if (one.said) return one.said;
  const word = one.larger ? "larger than the spread" : "within the spread";
  return `${word} (adjusted p ${probability(one.adjusted)})`;
}

function signed(value) {
  return shown(metric(), scaled(metric(), value), true);
}

// --- Heat maps -------------------------------------------------------------------------------------

function fields(side) {
  const [rows, columns] = [axisOf(state.down).labels, axisOf(state.across).labels];
  const all = [];
  for (const down of rows)
    for (const across of columns) {
      const cell = cellsAt(down, across)[0];
      const one = cell === undefined ? null : test(cell);
      const row = { down, across, place: cell, value: null, shown: "", grid: true, measured: "", note: "" };
      row.x = wrapped(across, LABEL);
      row.y = wrapped(down, LABEL);
      row.cell = cell === undefined ? "no such cell" : page.cells[cell];
      row.runs = one ? one.pairs : 0;
      row.picked = cell === state.cell && cell !== undefined;
      if (one) {
        row.value = scaled(metric(), side === null ? one.difference : one[side]);
        row.shown = shown(metric(), row.value, side === null) + (side === null && one.larger ? "\u25c6" : "");
        row.measured = row.shown + (one.spread === null || side !== null ? "" : ` \u00b1 ${shown(metric(), scaled(metric(), one.spread))}`);
        row.note = verdict(one);
      } else if (cell !== undefined) row.shown = "\u2013";
      all.push(row);
    }
  return { rows: rows.map((one) => wrapped(one, LABEL)), columns: columns.map((one) => wrapped(one, LABEL)), all };
}

function drawHeat(id, side) {
  const { rows, columns, all } = fields(side);
  const values = known(all.map((one) => one.value));
  const pair = page.tests[state.metric].flatMap((one) => (one ? [scaled(metric(), one.a), scaled(metric(), one.b)] : []));
  let [low, high] = limits(metric(), pair);
  if (side === null) {
    const far = values.map(Math.abs);
    high = metric().share ? Math.max(...far, 5) : limits(metric(), [0, ...far])[1] || 1;
    low = -high;
  }
  for (const one of all) {
    const strong = side === null ? Math.abs(one.value ?? 0) < 0.6 * high : inkOn(one.value ?? 0, low, high) === "black";
    one.ink = one.value === null ? "#333333" : strong ? "black" : "white";
  }
  const { font, box } = sizes(id, rows, columns);
  const fill = { across: state.across || " ", down: state.down || " ", metric: (side === null ? "B \u2212 A, " : "") + titleOf(metric()), format: metric().share ? "d" : ".3~g", columns, rows, low, high, font };
  return draw(id, side === null ? "difference" : "heat", fill, { fields: all }, box, (event, item) => {
    if (item?.datum?.place !== undefined) pick(item.datum.place);
  });
}

// --- The picked cell -------------------------------------------------------------------------------

function pick(cell) {
  state.cell = cell;
  redraw();
}

function curve(run, one) {
  const values = page.curves.metrics[one.name]?.[run];
  const rounds = page.curves.rounds[page.curves.of[run]];
  return values ? rounds.map((round, i) => [round, scaled(one, values[i])]) : [];
}

function drawCurves() {
  const one = metric().drawn ? metric() : page.metrics[0];
  const [seeds, means, marks] = [[], [], []];
  ["A", "B"].forEach((line, side) => {
    const at = new Map();
    const runs = page.runs.map((_, i) => i).filter((i) => page.runs[i].cell === state.cell && page.runs[i].side === side);
    for (const run of runs)
      for (const [round, value] of curve(run, one)) {
        if (value === null) continue;
        seeds.push({ line, run: `seed ${page.runs[run].seed}`, round, value });
        at.set(round, [...(at.get(round) || []), value]);
      }
    const pairs = [...at].filter(([, values]) => values.length === runs.length).sort(([a], [b]) => a - b);
    pairs.forEach(([round, values], i) => {
      means.push({ line, round, value: mean(values) });
      if ((i + side) % Math.max(1, Math.floor(pairs.length / 8)) === 0)
        marks.push({ line, run: `mean of ${runs.length}`, round, value: +mean(values).toPrecision(4) });
    });
  });
  if (!seeds.length) return blank("curves", "Not measured.");
  const [low, high] = ends(one, seeds.map((row) => row.value));
  const fill = { metric: titleOf(one), low, high, ...looks(["A", "B"]) };
  draw("curves", "curves", fill, { seeds, means, marks }, { width: Math.min(640, size("curves") - 150), height: 290 });
}

function describe() {
  const one = test(state.cell);
  at("picked").textContent = page.cells[state.cell];
  at("cell").value = state.cell;
  if (!one) {
    at("picked-said").textContent = "No seed is finished in both folders.";
    return;
  }
  const [a, b] = [one.a, one.b].map((value) => shown(metric(), scaled(metric(), value)));
  const wide = one.spread === null ? "" : ` \u00b1 ${shown(metric(), scaled(metric(), one.spread))}`;
  at("picked-said").textContent = `${titleOf(metric())}: A ${a}, B ${b}; B \u2212 A = ${signed(one.difference)}${wide} over ${one.pairs} pairs: ${verdict(one)}.`;
}

function listTests() {
  const rows = page.tests[state.metric]
    .map((one, cell) => [cell, one])
    .sort(([, a], [, b]) => (a?.adjusted ?? 2) - (b?.adjusted ?? 2) || Math.abs(b?.difference ?? 0) - Math.abs(a?.difference ?? 0))
    .map(([cell, one]) => one
      ? [page.cells[cell], ...[one.a, one.b].map((v) => shown(metric(), scaled(metric(), v))), signed(one.difference),
        one.spread === null ? "" : shown(metric(), scaled(metric(), one.spread)), String(one.pairs),
        probability(one.t_test), probability(one.adjusted), probability(one.wilcoxon), verdict(one)]
      : [page.cells[cell], "", "", "", "", "0", "", "", "", verdict(one)]);
  at("tests").replaceChildren();
  table(at("tests"), ["cell", "A", "B", "B \u2212 A", "spread", "pairs", "t-test p", "adjusted p", "Wilcoxon p", titleOf(metric())], rows);
  const able = page.tests[state.metric].filter((one) => one && one.adjusted !== null);
  const larger = page.tests[state.metric].filter((one) => one?.larger).length;
  at("difference-said").textContent =
    `${titleOf(metric())}: mean difference of the pairs. \u25c6: larger than the spread, in ${larger} of ${page.cells.length} cells (${able.length} could be tested).`;
}

// --- Menus -----------------------------------------------------------------------------------------

function menus() {
  const names = page.metrics.map((one, i) => [i, words(one.name)]);
  menu(at("menus"), "metric", "metric", names, state.metric, (value) => {
    state.metric = Number(value);
    redraw();
  });
  const axes = [["", "(none)"], ...page.axes.map((axis) => [axis.name, axis.name])];
  for (const [id, other] of [["down", "across"], ["across", "down"]])
    menu(at("menus"), id, id, axes, state[id], (value) => {
      if (value && value === state[other]) state[other] = state[id];
      state[id] = value;
      at(other).value = state[other];
      others();
      redraw();
    });
  menu(at("picks"), "cell", "cell", page.cells.map((title, i) => [i, title]), state.cell, (value) => pick(Number(value)));
}

// The axes that are neither down nor across are held at one label: a test is of one cell.
function others() {
  at("filters").replaceChildren();
  for (const axis of page.axes) {
    if (axis.name === state.down || axis.name === state.across) continue;
    state.filters[axis.name] ??= axis.labels[0];
    menu(at("filters"), `only-${axis.name}`, axis.name, axis.labels.map((one) => [one, one]), state.filters[axis.name], (value) => {
      state.filters[axis.name] = value;
      redraw();
    });
  }
}

function redraw() {
  drawHeat("difference", null);
  drawHeat("heat-a", "a");
  drawHeat("heat-b", "b");
  drawCurves();
  describe();
  listTests();
}

menus();
others();
redraw();
