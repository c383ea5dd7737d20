"""What a page says in words and tables: missing runs, warnings, versions, cost."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fedjax_sec.report.page.folder import Cell, Folder, Run
from fedjax_sec.sweeps.status import STATES

#: Runs that are named one by one in a warning.
_NAMED = 4


def of(folder: Folder) -> dict[str, Any]:
    """Everything that the templates `missing.html` and `facts.html` show."""
    runs = folder.runs
    return {
        "lines": lines(folder),
        "missing": missing(runs),
        "unfinished": unfinished(runs),
        "problems": [f"{run.name}: {run.problem}" for run in runs if run.problem],
        "refused": folder.refused,
        "warnings": warnings(folder.cells),
        "versions": [(name, _counted(values)) for name, values in versions(runs).items()],
        "cost": cost(folder.cells),
    }


def lines(folder: Folder) -> list[str]:
    """What the folder holds: where it lies, how many runs, of which data."""
    runs = folder.runs
    many = f"{len(folder.cells)} cells, {len(runs)} runs" if len(runs) > 1 else "one run"
    seeds = sorted({run.seed for run in runs})
    named = ", ".join(map(str, seeds[:12])) + (", ..." if len(seeds) > 12 else "")
    data = dict.fromkeys(
        run.summary["data"]["label"] if run.finished else run.config.get("data", {}).get("name", "")
        for run in runs
    )
    rounds = sorted({run.config["rounds"] for run in runs if "rounds" in run.config})
    several = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else "".join(map(str, rounds))
    about = f"{many}; seed{'s' * (len(seeds) > 1)} {named}; {several} rounds; data: "
    return [str(folder.path), about + " / ".join(one for one in data if one)]


def missing(runs: Iterable[Run]) -> list[dict[str, str]]:
    """A row for each run that is not finished."""
    rows = []
    for run in runs:
        status = run.status
        if status.state != "finished":
            total = "?" if status.rounds is None else status.rounds
            row = {"name": run.name, "state": status.state, "error": status.error or ""}
            rows.append(row | {"round": f"{status.done} of {total}"})
    return rows


def unfinished(runs: Sequence[Run]) -> str:
    """How many runs are in which state."""
    counts = Counter(run.status.state for run in runs)
    said = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"Not everything is finished: of {len(runs)} runs {said}."


def warnings(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """(the runs that have it, a warning), each warning once; diverged runs are one too."""
    having: dict[str, list[tuple[Cell, Run]]] = {}
    for cell in cells:
        for run in cell.runs:
            said = list(run.summary.get("warnings", ()))
            if run.status.diverged:
                said.append("diverged: the final loss or parameters are not finite")
            for text in said:
                having.setdefault(text, []).append((cell, run))
    total = sum(len(cell.runs) for cell in cells)
    return [(_whose(pairs, total), text) for text, pairs in having.items()]


def _whose(pairs: Sequence[tuple[Cell, Run]], total: int) -> str:
    if len(pairs) == total:
        return f"all {total} runs" if total > 1 else "the run"
    seeds: dict[str, list[str]] = {}
    for cell, run in pairs:
        seeds.setdefault(cell.title, []).append(str(run.seed))
    names = [
        f"{title}, seed{'s' * (len(some) > 1)} {', '.join(some)}" for title, some in seeds.items()
    ]
    more = f"; and {len(names) - _NAMED} more cells" if len(names) > _NAMED else ""
    return f"{len(pairs)} of {total} runs ({'; '.join(names[:_NAMED])}{more})"


def versions(runs: Iterable[Run]) -> dict[str, Counter]:
    """name -> how many finished runs have which version, device or machine."""
    counted: dict[str, Counter] = {}
    for run in runs:
        if not run.finished:
            continue
        summary = run.summary
        facts = {name: summary.get(name) for name in ("device", "host", "python", "git_revision")}
        for name, value in (dict(summary.get("versions", {})) | facts).items():
            counted.setdefault(name.replace("_", " "), Counter())[str(value)] += 1
    return counted


def _counted(values: Counter) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({count} runs)" for value, count in values.most_common())


def cost(cells: Sequence[Cell]) -> dict[str, Any]:
    """Seconds of finished runs. Replicas of one program share its time evenly."""
    rows, total, compiled = [], 0.0, 0.0
    for cell in cells:
        done = [run.summary for run in cell.runs if "wall_seconds" in run.summary]
        if not done:
            continue
        seconds = [one["wall_seconds"] / one.get("replicas", 1) for one in done]
        compiling = [one.get("compile_seconds", 0.0) / one.get("replicas", 1) for one in done]
        rates = [one["rounds_per_second"] for one in done if one.get("rounds_per_second")]
        total, compiled = total + sum(seconds), compiled + sum(compiling)
        rows.append(
            [
                cell.title,
                str(len(done)),
                f"{sum(seconds) / len(done):.1f}",
                f"{sum(compiling) / len(done):.1f}",
                f"{max(rates):.1f}" if rates else "",
            ]
        )
    if not rows:
        return {"said": "No run is finished, so nothing is known.", "rows": [], "head": []}
    said = (
        f"{duration(total)} for {sum(int(row[1]) for row in rows)} finished runs, and "
        f"{duration(compiled)} of compilation. Runs of one program share its time evenly."
    )
    head = ["cell", "runs", "seconds a run", "compile seconds a run", "rounds per second"]
    return {"said": said, "head": head, "rows": rows}


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(12.34), duration(600), duration(90000)
    ('12.3 s', '10 min', '25 h 0 min')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
