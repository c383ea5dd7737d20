"""Tables and heat maps of an arena: every attack against every defence."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedjax_sec.core.optional import require
from fedjax_sec.core.registry import headline_in
from fedjax_sec.report import plotting, tables
from fedjax_sec.report.plotting import Panel
from fedjax_sec.runs.experiment import Result
from fedjax_sec.sweeps.arena import NO_ATTACK, Arena

if TYPE_CHECKING:
    import pandas as pd

#: The row of each defence's lowest headline over the attacks.
WORST = "worst attack"
HONEST, MALICIOUS = "kept_honest", "kept_malicious"


class Scores(NamedTuple):
    """One combination's numbers, a number a seed [S]; NaN where nothing was measured.

    `headline` and `success` are those after the last round, the shares of clients `honest` and
    `malicious` that the defence kept means over the rounds in which it was measured.
    """

    headline: np.ndarray
    success: np.ndarray
    honest: np.ndarray
    malicious: np.ndarray
    diverged: int


class Scored(NamedTuple):
    """An arena with the scores of each (attack, defence), and facts of all runs."""

    arena: Arena
    scores: dict[tuple[str, str], Scores]
    metric: str
    data: str
    seeds: int
    rounds: int

    def worst(self, defense: str) -> str | None:
        """The attack under which a defence's headline is lowest."""
        attacks = [a for a in self.arena.attacks if a != NO_ATTACK and (a, defense) in self.scores]
        return min(attacks, key=lambda a: _mean(self.scores[a, defense].headline), default=None)

    def cost(self, defense: str) -> np.ndarray | None:
        """The loss of a defence in the headline without an attack, for each seed [S].

        Against plain mean with the same seed: its data, clients and batches are the same.
        """
        if (NO_ATTACK, defense) not in self.scores:
            return None
        plain = self.scores[NO_ATTACK, self.arena.reference].headline
        return plain - self.scores[NO_ATTACK, defense].headline

    @property
    def reasons(self) -> dict[tuple[str, str], str]:
        """(attack, defence) -> why it is refused."""
        return {(one.attack, one.defense): one.reason for one in self.arena.refused}


def score(arena: Arena, results: Sequence[Result]) -> Scored:
    """The results of an arena's cells, in their order, by combination."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for cell, result in zip(arena.cells, results, strict=True):
        groups.setdefault((cell.labels["attack"], cell.labels["defense"]), []).append(result)
    metric = headline_in(results[0].summary["final"])
    seeds = {cell.experiment.seed for cell in arena.cells}
    return Scored(
        arena,
        {pair: _scores(some, metric) for pair, some in groups.items()},
        metric,
        tables.data_of(results),
        len(seeds),
        arena.cells[0].experiment.rounds,
    )


def _scores(results: Sequence[Result], metric: str) -> Scores:
    def last(name):
        return np.array(
            [one.metrics[name][-1] if name in one.metrics else np.nan for one in results]
        )

    def over_rounds(name):
        return np.array([_mean(one.metrics.get(name, np.nan)) for one in results])

    return Scores(
        last(metric),
        last(plotting.SUCCESS),
        over_rounds(HONEST),
        over_rounds(MALICIOUS),
        sum(bool(one.summary.get("diverged")) for one in results),
    )


def _mean(values) -> float:
    """The mean of what is known, NaN where nothing is."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def _spread(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else float("nan")


# --- Tables -------------------------------------------------------------------------------------


def to_frame(scored: Scored) -> "pd.DataFrame":
    """One row a combination, and for each defence the row of its worst attack.

    Numbers are shares, `NAME_std` their standard deviations over seeds (ddof 1);
    `cost_without_attack` is what the defence loses of the headline without an attack, the same in
    all of its rows. `worst_attack` names the attack of such a row, `refused` says why a combination
    was not run.
    """
    rows = []
    for attack in (*scored.arena.attacks, WORST):
        for defense in scored.arena.defenses:
            named = scored.worst(defense) if attack == WORST else attack
            scores = scored.scores.get((str(named), defense))
            row: dict = {"attack": attack, "defense": defense}
            row |= _columns(scored, scores)
            cost = scored.cost(defense)
            row["cost_without_attack"] = float("nan") if cost is None else _mean(cost)
            row["worst_attack"] = named if attack == WORST else None
            row["refused"] = scored.reasons.get((attack, defense))
            rows.append(row)
    return require("pandas", "A table").DataFrame(rows)


def _columns(scored: Scored, scores: Scores | None) -> dict:
    named = (scored.metric, plotting.SUCCESS, HONEST, MALICIOUS)
    nothing = np.full(1, np.nan)
    values = (nothing,) * 4 if scores is None else scores[:4]
    row: dict = {"seeds": 0 if scores is None else len(scores.headline)}
    for name, one in zip(named, values, strict=True):
        row |= {name: _mean(one), f"{name}_std": _spread(one)}
    return row | {"diverged": 0 if scores is None else scores.diverged}


def percent(values: np.ndarray | None, diverged: int = 0) -> str:
    """`mean ± standard deviation` in percent, or less where less is known.

    >>> percent(np.array([0.9, 0.92])), percent(np.array([0.5]), 1), percent(np.array([np.nan]))
    ('91.0 ± 1.4', '50.0 (diverged)', '')
    """
    if values is None or np.isnan(mean := _mean(values)):
        return ""
    spread = _spread(values)
    text = f"{100 * mean:.1f}" + ("" if np.isnan(spread) else f" ± {100 * spread:.1f}")
    if diverged:
        some = "" if len(values) == 1 else f"{diverged} of {len(values)} "
        text += f" ({some}diverged)"
    return text


def matrix(scored: Scored, name: str, worst: str = "") -> "pd.DataFrame":
    """Attacks down, defences across: a field of `Scores` in percent, or that it is refused.

    `worst` is `lowest` or `highest`, for the last row: that over the attacks.
    """
    columns: dict = {}
    for defense in scored.arena.defenses:
        column = columns.setdefault(defense, {})
        known = {}
        for attack in scored.arena.attacks:
            scores = scored.scores.get((attack, defense))
            if scores is None:
                column[attack] = "refused"
                continue
            values = getattr(scores, name)
            column[attack] = percent(values, scores.diverged if name == "headline" else 0)
            if attack != NO_ATTACK and not np.isnan(_mean(values)):
                known[attack] = values
        if worst:
            pick = min if worst == "lowest" else max
            at = pick(known, key=lambda one, known=known: _mean(known[one]), default=None)
            column[WORST] = "" if at is None else percent(known[at])
    frame = require("pandas", "A table").DataFrame(columns)
    frame.index.name = "attack"
    return frame


def by_defense(scored: Scored) -> "pd.DataFrame":
    """One row a defence: without an attack, its cost, its worst attack, and what it kept there."""
    rows = {}
    for defense in scored.arena.defenses:
        clean, worst = scored.scores.get((NO_ATTACK, defense)), scored.worst(defense)
        under = None if worst is None else scored.scores[worst, defense]
        successes = [
            scores.success
            for (attack, rule), scores in scored.scores.items()
            if rule == defense and attack != NO_ATTACK and not np.isnan(_mean(scores.success))
        ]
        words = scored.metric.replace("_", " ")
        rows[defense] = {
            NO_ATTACK: "refused" if clean is None else percent(clean.headline, clean.diverged),
            "cost without an attack": percent(scored.cost(defense)),
            WORST: worst or "",
            f"{words} under it": "" if under is None else percent(under.headline, under.diverged),
            "honest kept": "" if under is None else percent(under.honest),
            "malicious kept": "" if under is None else percent(under.malicious),
            "highest backdoor success": percent(max(successes, key=_mean)) if successes else "",
        }
    frame = require("pandas", "A table").DataFrame.from_dict(rows, orient="index")
    frame.index.name = "defence"
    return frame.loc[:, (frame != "").any()]


def sections(scored: Scored) -> list[tuple[str, str, "pd.DataFrame"]]:
    """(heading, what it is, table) of everything, in the order of the page."""
    words, last = scored.metric.replace("_", " "), f"After {scored.rounds} rounds, in percent."
    written = [
        (
            "Defences",
            f"{last} Cost without an attack: {words} of plain mean "
            f"({scored.arena.reference}) minus the defence's, both without an attack. Kept: mean "
            f"share of the honest and the malicious clients that the defence used under its worst "
            f"attack.",
            by_defense(scored),
        ),
        (words.capitalize(), last, matrix(scored, "headline", "lowest")),
    ]
    if _any(scored, "success"):
        text = f"{last} {tables.about_backdoor(scored.arena.cells)}".strip()
        written.append(("Backdoor success", text, matrix(scored, "success", "highest")))
    kept = (
        "Mean over the measured rounds, in percent. Malicious clients are those that attack; "
        "without an attack they are honest."
    )
    for name, whose in (("honest", "Honest clients kept"), ("malicious", "Malicious clients kept")):
        if _any(scored, name):
            written.append((whose, kept, matrix(scored, name)))
    return written


def _any(scored: Scored, name: str) -> bool:
    return any(not np.isnan(_mean(getattr(one, name))) for one in scored.scores.values())


def page(scored: Scored) -> str:
    """Everything as Markdown."""
    over = (
        "one seed" if scored.seeds == 1 else f"mean ± standard deviation over {scored.seeds} seeds"
    )
    parts = [f"# Every attack against every defence\n\n{scored.data}, {over}.\n"]
    for heading, said, table in sections(scored):
        parts.append(f"## {heading}\n\n{said}\n\n{table.to_markdown(disable_numparse=True)}\n")
    if scored.arena.refused:
        lines = "\n".join(f"- {one}" for one in scored.arena.refused)
        parts.append(f"## Refused\n\nNot run, by the checks before anything compiles:\n\n{lines}\n")
    return "\n".join(parts)


# --- Figures ------------------------------------------------------------------------------------


def write(scored: Scored, results: Sequence[Result], out: Path, title: str = "") -> list[Path]:
    """Writes `arena.md`, `arena.csv`, `runs.csv` and the heat maps into `out`.

    Returns: the heat maps (PNG): of the headline, of backdoor success and of what was kept, where
    they were measured.
    """
    tables.to_frame(scored.arena.cells, results).to_csv(out / "runs.csv", index=False)
    to_frame(scored).to_csv(out / "arena.csv", index=False)
    (out / "arena.md").write_text(page(scored))
    over = "one seed"
    if scored.seeds > 1:
        over = f"mean over {scored.seeds} seeds ± one standard deviation"
    about = f"{scored.data}; {scored.rounds} rounds, {over}"
    lines = [title, about] if title else [about]
    return [plotting.heat_maps(panels, lines, out / name)[0] for name, panels in _figures(scored)]


def _figures(scored: Scored) -> list[tuple[str, list[Panel]]]:
    words = scored.metric.replace("_", " ")
    cost = np.full((1, len(scored.arena.defenses)), np.nan)
    for j, defense in enumerate(scored.arena.defenses):
        if (values := scored.cost(defense)) is not None:
            cost[0, j] = 100 * _mean(values)
    limit = max([10.0, *np.abs(cost[np.isfinite(cost)])])
    headline = _panel(scored, "headline", f"test {words} (%)", WORST, min)
    row = ["cost without\nan attack"]
    empty = np.full(cost.shape, "", object)
    strip = Panel("", row, headline.columns, cost, empty, (-limit, limit), "RdBu_r", ())
    figures = [(scored.metric, [headline, strip])]
    if _any(scored, "success"):
        panel = _panel(scored, "success", "attack success rate (%)", WORST, max)
        figures.append((plotting.SUCCESS, [panel._replace(colours="magma_r")]))
    kept = [
        _panel(scored, name, f"{name} clients kept (%)")
        for name in ("honest", "malicious")
        if _any(scored, name)
    ]
    if kept:
        figures.append(("kept", kept))
    return figures


def _panel(scored: Scored, name: str, title: str, last: str = "", pick=None) -> Panel:
    """The means in percent, attacks down and defences across; the last row picks over attacks."""
    attacks, defenses = scored.arena.attacks, scored.arena.defenses
    values = np.full((len(attacks), len(defenses)), np.nan)
    notes = np.full(values.shape, "", object)
    for i, attack in enumerate(attacks):
        for j, defense in enumerate(defenses):
            scores = scored.scores.get((attack, defense))
            if scores is None:
                notes[i, j] = "refused"
                continue
            given = getattr(scores, name)
            values[i, j] = 100 * _mean(given)
            if name == "headline" and scores.diverged:
                notes[i, j] = "diverged"
            elif not np.isnan(spread := _spread(given)):
                notes[i, j] = f"± {100 * spread:.1f}"
            elif np.isnan(values[i, j]):
                notes[i, j] = "not measured"
    rows = [textwrap.fill(one, 22, break_long_words=False) for one in attacks]
    breaks = (1,)
    if pick is not None and len(attacks) > 1:
        under = np.where(np.isnan(values[1:]), np.inf if pick is min else -np.inf, values[1:])
        at = under.argmin(axis=0) if pick is min else under.argmax(axis=0)
        ends = under[at, range(len(defenses))]
        values = np.vstack([values, np.where(np.isfinite(ends), ends, np.nan)])
        names = [_short(attacks[1 + i]) for i in at]
        notes = np.vstack([notes, np.where(np.isfinite(ends), names, "").astype(object)])
        rows, breaks = [*rows, last], (1, len(attacks))
    columns = [textwrap.fill(one, 18, break_long_words=False) for one in defenses]
    return Panel(title, rows, columns, values, notes, (0.0, 100.0), "viridis", breaks)


def _short(label: str, most: int = 18) -> str:
    return label if len(label) <= most else f"{label[: most - 3]}..."
