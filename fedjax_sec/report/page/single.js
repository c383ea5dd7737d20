// The page of one folder: a heat map of any metric over any two axes, and the picked fields in detail.

const WORST = "worst";
const GAP = " ";
const LABEL = 60; // characters of a line of the heat map's labels
const GOING = "\u2026";
const state = { over: "mean", filters: {}, picks: [], run: null };

function metric() {
  return page.metrics[state.metric];
}

function filters() {
  return Object.entries(state.filters)
    .filter(([name, label]) => label !== "" && name !== state.down && name !== state.across)
    .map(([name, label]) => [axisOf(name), label]);
}

function runsAt(down, across) {
  return runsWith([[axisOf(state.down), down], [axisOf(state.across), across], ...filters()]);
}

function measuredIn(runs, place = state.metric) {
  const one = page.metrics[place];
  return known(runs.map((run) => scaled(one, page.runs[run].final[place])));
}

// --- The heat map ----------------------------------------------------------------------------------

const combine = { mean, lowest: (v) => Math.min(...v), highest: (v) => Math.max(...v) };

function refusal(down, across) {
  const labels = { [state.down]: down, [state.across]: across };
  return page.refused.find((one) => one.attack === labels.attack && one.defense === labels.defense);
}

// One field: its number, and the signs and words for what is wrong with it.
function field(down, across) {
  const runs = runsAt(down, across);
  const values = measuredIn(runs);
  const row = { down, across, runs, value: null, shown: "", note: "", grid: true, measured: "" };
  const going = runs.filter((run) => page.runs[run].state !== "finished");
  const failed = runs.filter((run) => page.runs[run].state === "failed");
  const refused = refusal(down, across);
  if (values.length) {
    row.value = combine[state.over](values);
    row.shown = shown(metric(), row.value);
    const wide = spread(values);
    row.measured = row.shown + (wide === null ? "" : ` \u00b1 ${shown(metric(), wide)}`);
    if (runs.some((run) => page.runs[run].diverged)) row.shown += "\u2020";
    if (going.length) row.shown += "*";
  } else if (refused) row.shown = "\u00d7";
  else if (failed.length) row.shown = "!";
  else if (going.length) row.shown = GOING;
  else if (runs.length) row.shown = "\u2013";
  const notes = [];
  if (going.length) notes.push(`${going.length} of ${runs.length} runs are not finished`);
  if (failed.length) notes.push(`${failed.length} failed`);
  if (runs.some((run) => page.runs[run].diverged)) notes.push("a run diverged");
  if (refused) notes.push(refused.refused);
  if (!runs.length && !refused) notes.push("no such run");
  if (runs.length && !values.length && !going.length) notes.push("not measured");
  row.note = notes.join("; ");
  row.attacked = runs.some((run) => page.runs[run].attacked);
  row.cell = [down, across].filter((label) => label !== nothing.labels[0]).join(" / ");
  return row;
}

// The worst of several fields, among those with an attack where there are any.
function worst(fields, down, across) {
  const measured = fields.filter((one) => one.value !== null);
  const attacked = measured.filter((one) => one.attacked);
  const among = attacked.length ? attacked : measured;
  if (!among.length) return null;
  const sign = state.worst === "lowest" ? 1 : -1;
  const one = among.reduce((best, next) => (sign * next.value < sign * best.value ? next : best));
  return { ...one, down, across, cell: `worst: ${one.cell}`, of: one };
}

// All fields of the heat map, those of the worst ones behind a gap.
function fields() {
  const [rows, columns] = [axisOf(state.down).labels, axisOf(state.across).labels];
  const all = rows.map((down) => columns.map((across) => field(down, across)));
  const grid = all.flat();
  const ends = [];
  if (columns.length > 1) rows.forEach((down, i) => ends.push(worst(all[i], down, WORST)));
  if (rows.length > 1)
    columns.forEach((across, j) => ends.push(worst(all.map((row) => row[j]), WORST, across)));
  return { rows, columns, grid, ends: known(ends) };
}

function drawHeat() {
  const { rows, columns, grid, ends: last } = fields();
  const values = measured(grid);
  const share = metric().share;
  const [low, high] = limits(metric(), values);
  const all = [...grid, ...last];
  for (const one of all) {
    one.ink = one.value === null ? "#333333" : inkOn(one.value, low, high);
    one.picked = state.picks.some(([down, across]) => down === one.down && across === one.across);
    one.x = wrapped(one.across, LABEL);
    one.y = wrapped(one.down, LABEL);
  }
  const across = withWorst(columns);
  const down = withWorst(rows);
  const { font, box } = sizes("heat", down, across);
  const fill = {
    across: state.across || GAP,
    down: state.down || GAP,
    metric: titleOf(metric()),
    format: share ? "d" : ".3~g",
    columns: across,
    rows: down,
    low,
    high,
    font,
  };
  const marks = all.map(({ runs, of, ...one }) => ({ ...one, runs: runs.length }));
  draw("heat", "heat", fill, { fields: marks }, box, picked);
  describe(all, values);
}

function withWorst(labels) {
  const lines = labels.map((one) => wrapped(one, LABEL));
  return labels.length > 1 ? [...lines, GAP, WORST] : lines;
}

function measured(grid) {
  return known(grid.map((one) => one.value));
}

function describe(all, values) {
  const others = page.axes.filter((a) => a.name !== state.down && a.name !== state.across);
  const set = new Map(filters().map(([axis, label]) => [axis.name, label]));
  const over = others.filter((axis) => !set.has(axis.name)).map((axis) => axis.name);
  const parts = [`${titleOf(metric())}, ${state.over}`];
  if (over.length) parts[0] += ` over ${over.join(", ")}`;
  for (const [name, label] of set) parts.push(`${name} = ${label}`);
  const text = all.map((one) => one.shown).join("");
  const signs = [
    ["*", "not all runs of the field are finished"],
    ["\u2020", "a run of it diverged"],
    [GOING, "no run of it is finished"],
    ["\u00d7", "refused"],
    ["!", "failed"],
    ["\u2013", "not measured"],
  ].filter(([sign]) => text.includes(sign));
  const ends = `Worst: the ${state.worst} of the row (column), among runs with an attack where there are any.`;
  const said = [`${parts.join("; ")}. ${all.some((one) => one.of) ? ends : ""}`];
  if (signs.length) said.push(signs.map((pair) => pair.join(" ")).join("; ") + ".");
  if (!values.length) said.push("Nothing is measured yet.");
  at("heat-said").textContent = said.join(" ");
}

function picked(event, item) {
  const one = item?.datum;
  if (!one || one.down === undefined) return;
  const target = fields();
  const end = target.ends.find((row) => row.down === one.down && row.across === one.across);
  const { down, across } = end ? end.of : one;
  pick([down, across], event.shiftKey);
}

function pick(pair, add) {
  const same = ([down, across]) => down === pair[0] && across === pair[1];
  if (!add) state.picks = [pair];
  else if (!state.picks.some(same)) state.picks = [...state.picks, pair];
  else if (state.picks.length > 1) state.picks = state.picks.filter((one) => !same(one));
  state.run = null;
  drawHeat();
  drawPicked();
}

// --- The picked fields -----------------------------------------------------------------------------

const MOST_LINES = 12;

function pickedRuns() {
  return [...new Set(state.picks.flatMap(([down, across]) => runsAt(down, across)))];
}

function byCell(runs) {
  const cells = new Map();
  for (const run of runs) {
    const place = page.runs[run].cell;
    cells.set(place, [...(cells.get(place) || []), run]);
  }
  return cells;
}

// A run's curve of a metric: pairs of a round and a number.
function curve(run, one) {
  const values = page.curves.metrics[one.name]?.[run];
  if (!values) return [];
  const rounds = page.curves.rounds[page.curves.of[run]];
  return rounds.map((round, i) => [round, scaled(one, values[i])]);
}

// The mean over runs at the rounds that all of them have.
function meanCurve(runs, one) {
  const at = new Map();
  const drawn = runs.map((run) => curve(run, one)).filter((pairs) => pairs.length);
  for (const pairs of drawn)
    for (const [round, value] of pairs) at.set(round, [...(at.get(round) || []), value]);
  return [...at]
    .filter(([, values]) => values.length === drawn.length && !values.includes(null))
    .sort(([a], [b]) => a - b)
    .map(([round, values]) => [round, mean(values)]);
}

// Places of markers: some on each curve, not the same on neighbouring ones.
function markers(length, place) {
  const every = Math.max(1, Math.floor(length / 8));
  return (i) => (i + place) % every === 0 || i === length - 1;
}

function drawCurves(id, one) {
  const cells = [...byCell(pickedRuns())].slice(0, MOST_LINES);
  const [seeds, means, marks] = [[], [], []];
  cells.forEach(([cell, runs], place) => {
    const line = wrapped(page.cells[cell], 60);
    for (const run of runs)
      for (const [round, value] of curve(run, one))
        if (value !== null) seeds.push({ line, run: `seed ${page.runs[run].seed}`, round, value });
    const pairs = meanCurve(runs, one);
    const marked = markers(pairs.length, place);
    pairs.forEach(([round, value], i) => {
      means.push({ line, round, value });
      if (marked(i)) marks.push({ line, run: `mean of ${runs.length}`, round, value: +value.toPrecision(4) });
    });
  });
  const lines = cells.map(([cell]) => wrapped(page.cells[cell], 60));
  if (!seeds.length) return blank(id, `${titleOf(one)}: not measured in what is picked.`);
  const [low, high] = ends(one, seeds.map((row) => row.value));
  const fill = { metric: titleOf(one), low, high, ...looks(lines) };
  const box = { width: Math.min(560, size(id) - 150), height: 270 };
  return draw(id, "curves", fill, { seeds, means, marks }, box);
}

function drawPicked() {
  const runs = pickedRuns();
  const cells = byCell(runs);
  const names = [...cells.keys()].map((cell) => page.cells[cell]);
  at("picked").textContent = names.slice(0, MOST_LINES).join("; ") || "nothing";
  at("curves-said").textContent =
    `Thick: mean over the seeds; thin: each seed.` +
    (names.length > MOST_LINES ? ` ${MOST_LINES} of ${names.length} lines are drawn; choose labels of the other axes.` : "");
  at("cell").value = cells.size === 1 ? String([...cells.keys()][0]) : "";
  const drawn = page.metrics[state.metric].drawn ? metric() : page.metrics[0];
  drawCurves("curves", drawn);
  const second = page.metrics[state.second];
  at("second").hidden = !second || second === drawn;
  if (!at("second").hidden) drawCurves("second", second);
  drawKept();
  drawClients(runs);
  drawScatter();
  drawAxis();
  configure([...cells.keys()]);
}

function drawKept() {
  const there = page.curves.metrics.kept_honest || page.curves.metrics.kept_malicious;
  at("kept-part").hidden = !there && !page.kept.runs.some((one) => one);
  if (!there) return;
  const down = state.picks[0]?.[0];
  const rows = [];
  for (const label of axisOf(state.across).labels) {
    const runs = runsAt(down, label);
    for (const who of ["honest", "malicious"]) {
      const one = page.metrics.find((m) => m.name === `kept_${who}`);
      if (!one) continue;
      const pairs = meanCurve(runs, one);
      const marked = markers(pairs.length, 0);
      pairs.forEach(([round, value], i) =>
        rows.push({ label: wrapped(label, 30), who, round, value: +value.toPrecision(4), mark: marked(i) }));
    }
  }
  const where = state.down ? `${state.down} = ${down}. ` : "";
  at("kept-said").textContent = rows.length
    ? `${where}Mean share of the honest and of the malicious clients that was kept, over the seeds. Without an attack, malicious clients are honest.`
    : `${where}Nothing is measured.`;
  if (!rows.length) blank("kept", "");
  else draw("kept", "kept", { labels: axisOf(state.across).labels.map((one) => wrapped(one, 30)) }, { shares: rows }, {});
}

function drawClients(runs) {
  const able = runs.filter((run) => page.kept.runs[run]);
  at("clients-part").hidden = !able.length;
  if (!able.length) return;
  if (!able.includes(state.run)) state.run = able[0];
  at("run-menu").replaceChildren();
  const options = able.map((run) => [run, `${page.cells[page.runs[run].cell]}, seed ${page.runs[run].seed}`]);
  menu(at("run-menu"), "run", "run", options, state.run, (value) => {
    state.run = Number(value);
    drawClients(runs);
  });
  const held = page.kept.runs[state.run];
  const rows = [];
  const parts = [];
  for (const who of ["honest", "malicious"]) {
    const { clients, shares, of } = held[who];
    if (clients.length < of) parts.push(`the first ${clients.length} of ${of} ${who} clients`);
    clients.forEach((client, i) =>
      held.rounds.forEach((round, j) => {
        const digit = shares[i][j];
        if (digit !== "-") rows.push({ who, client, round, share: Math.round((100 * digit) / 9) });
      }));
  }
  const said = ["The darker, the more of a client's update was kept in that round; on grey it did not take part."];
  if (!held.known)
    said.push(page.runs[state.run].attacked
      ? "Who is malicious is known when the run is finished: all clients stand together."
      : "There is no attack, so all clients are honest.");
  if (parts.length) said.push(`Shown are ${parts.join(" and ")}.`);
  if (!page.kept.all) said.push("Only the first seed of each cell is in this page, so that it stays small.");
  at("clients-said").textContent = said.join(" ");
  const most = Math.max(held.honest.clients.length, held.malicious.clients.length);
  const spec = { width: Math.min(900, size("clients") - 160), height: { step: most > 40 ? 7 : 13 } };
  draw("clients", "clients", {}, { fields: rows }, spec);
}

function drawScatter() {
  const success = page.metrics.findIndex((one) => one.name === "attack_success_rate");
  at("scatter-part").hidden = success < 0;
  if (success < 0) return;
  const across = axisOf(state.across);
  const lines = across.labels.map((label) => wrapped(label, 40));
  const [runs, means] = [[], []];
  for (const down of axisOf(state.down).labels)
    for (const label of across.labels) {
      const line = wrapped(label, 40);
      const pairs = runsAt(down, label)
        .map((run) => page.runs[run].final)
        .map((final) => [scaled(page.metrics[0], final[0]), scaled(page.metrics[success], final[success])])
        .filter(([x, y]) => x !== null && y !== null);
      if (!pairs.length) continue;
      const cell = [down, label].join(" / ");
      for (const [x, y] of pairs) runs.push({ line, x, y, cell });
      const centre = [0, 1].map((i) => +mean(pairs.map((pair) => pair[i])).toPrecision(4));
      const chosen = state.picks.some((pair) => pair[0] === down && pair[1] === label);
      means.push({ line, x: centre[0], y: centre[1], cell, down, across: label, picked: chosen });
    }
  if (!runs.length) return blank("scatter", "Nothing is measured yet.");
  const [low, high] = ends(page.metrics[0], runs.map((row) => row.x));
  const fill = { low, high, across: state.across || GAP, headline: titleOf(page.metrics[0]), ...looks(lines) };
  const box = { width: Math.min(560, size("scatter") - 260), height: 380 };
  draw("scatter", "scatter", fill, { runs, means }, box, (event, item) => {
    const one = item?.datum;
    if (one?.down !== undefined) pick([one.down, one.across], event.shiftKey);
  });
}

function drawAxis() {
  const names = [state.across, state.down].filter((name) => axisOf(name).numeric && axisOf(name).labels.length > 2);
  at("axis-part").hidden = !names.length;
  if (!names.length) return;
  const over = axisOf(names[0]);
  const other = axisOf(names[0] === state.across ? state.down : state.across);
  const points = [];
  for (const label of other.labels)
    for (const x of over.labels) {
      const values = measuredIn(runsWith([[over, x], [other, label], ...filters()]));
      if (!values.length) continue;
      const row = { line: wrapped(label, 60), x: Number(x), value: mean(values) };
      points.push({ ...row, low: Math.min(...values), high: Math.max(...values) });
    }
  const numbers = over.labels.map(Number);
  const wide = numbers[0] > 0 && numbers.at(-1) / numbers[0] > 50;
  const [low, high] = ends(metric(), points.flatMap((row) => [row.low, row.high]));
  const lines = other.labels.map((label) => wrapped(label, 60));
  if (!points.length) return blank("axis", "Nothing is measured yet.");
  const fill = { first: numbers[0], last: numbers.at(-1), across: over.name, scale: wide ? "log" : "linear", metric: titleOf(metric()), low, high, ...looks(lines) };
  draw("axis", "axis", fill, { points }, { width: Math.min(720, size("axis") - 110), height: 300 });
}

// --- Configurations --------------------------------------------------------------------------------

function configure(cells) {
  const { common, cells: rest } = page.configs;
  const chosen = cells.slice(0, 4);
  const keys = [...new Set(rest.flatMap((one) => Object.keys(one)))].sort();
  const holder = at("differences");
  holder.replaceChildren();
  const rows = keys
    .filter((key) => chosen.some((cell) => key in rest[cell]))
    .map((key) => {
      const counts = new Map();
      rest.forEach((one, cell) => {
        if (!chosen.includes(cell)) counts.set(one[key] ?? "\u2013", (counts.get(one[key] ?? "\u2013") || 0) + 1);
      });
      const all = [...counts].sort((a, b) => b[1] - a[1]);
      const others = all.slice(0, 6).map(([text, count]) => `${text} (${count})`);
      if (all.length > 6) others.push(`${all.length - 6} more`);
      return [key, ...chosen.map((cell) => rest[cell][key] ?? "\u2013"), others.join(", ")];
    });
  if (rows.length) table(holder, ["key", ...chosen.map((cell) => page.cells[cell]), "other cells (how many)"], rows);
  else made("p", page.cells.length > 1 ? "It has no key that others have otherwise." : "There is no other configuration.", holder);
  const whole = { ...common, ...(rest[chosen[0]] || {}) };
  at("whole").textContent = Object.keys(whole).sort().map((key) => `${key}: ${whole[key]}`).join("\n");
}

// --- Menus -----------------------------------------------------------------------------------------

function menus() {
  const names = page.metrics.map((one, place) => [place, words(one.name)]);
  const box = at("menus");
  menu(box, "metric", "metric", names, state.metric, (value) => {
    state.metric = Number(value);
    state.worst = metric().worst;
    at("worst").value = state.worst;
    redraw();
  });
  const axes = [["", "(none)"], ...page.axes.map((axis) => [axis.name, axis.name])];
  for (const [id, label, other] of [["down", "down", "across"], ["across", "across", "down"]])
    menu(box, id, label, axes, state[id], (value) => {
      if (value && value === state[other]) state[other] = state[id];
      state[id] = value;
      at(other).value = state[other];
      first();
      others();
      redraw();
    });
  const ways = [["mean", "mean"], ["lowest", "lowest"], ["highest", "highest"]];
  menu(box, "over", "of several runs", ways, state.over, (value) => {
    state.over = value;
    redraw();
  });
  menu(box, "worst", "worst is the", ways.slice(1), state.worst, (value) => {
    state.worst = value;
    redraw();
  });
  const second = page.metrics.map((one, place) => [place, words(one.name), one.drawn]).filter((one) => one[2]);
  menu(at("picks"), "cell", "cell", [["", "(several)"], ...page.cells.map((title, i) => [i, title])], "", (value) => {
    const run = page.runs.findIndex((one) => String(one.cell) === value);
    if (run < 0) return;
    for (const name of Object.keys(state.filters)) if (state.filters[name] !== "") state.filters[name] = labelOf(axisOf(name), run) || "";
    others();
    pick([labelOf(axisOf(state.down), run), labelOf(axisOf(state.across), run)], false);
  });
  if (second.length > 1)
    menu(at("picks"), "second-metric", "beside the metric", second, state.second, (value) => {
      state.second = Number(value);
      drawPicked();
    });
}

// The menus of the axes that are neither down nor across.
function others() {
  at("filters").replaceChildren();
  for (const axis of page.axes) {
    if (axis.name === state.down || axis.name === state.across) continue;
    const options = [["", "all"], ...axis.labels.map((label) => [label, label])];
    state.filters[axis.name] ??= "";
    menu(at("filters"), `only-${axis.name}`, axis.name, options, state.filters[axis.name], (value) => {
      state.filters[axis.name] = value;
      redraw();
    });
  }
}

// Picks the worst field.
function first() {
  const all = fields();
  const one = worst(all.grid, "", "")?.of || all.grid.find((field) => field.runs.length) || all.grid[0];
  state.picks = [[one.down, one.across]];
}

function redraw() {
  drawHeat();
  drawPicked();
}

state.metric = 0;
state.worst = metric().worst;
state.down = page.down;
state.across = page.across;
const success = page.metrics.findIndex((one) => one.name === "attack_success_rate" && one.drawn);
const loss = page.metrics.findIndex((one) => one.name === "loss" && one.drawn);
state.second = success >= 0 ? success : loss >= 0 ? loss : undefined;
at("heat-part").hidden = page.runs.length < 2;
menus();
others();
first();
redraw();
