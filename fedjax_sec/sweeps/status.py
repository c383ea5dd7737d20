"""How far a run or a sweep is, read from its folder alone while others write to it."""

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedjax_sec.core import ConfigError, files
from fedjax_sec.runs import results
from fedjax_sec.runs.checkpoints import Checkpoints
from fedjax_sec.sweeps import catalog
from fedjax_sec.sweeps import groups as groups_lib

#: States of a run. `waiting`: nothing of it is done. `interrupted`: something is, but no process
#: works on it. `failed`: an error stopped it.
STATES = ("finished", "running", "waiting", "interrupted", "failed")


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """One run: `done` of `rounds` rounds are measured.

    `rounds` is None where the configuration is not written yet. `diverged` says that a finished
    run's loss or parameters are not finite. `group` names the group of a sweep's unfinished run.
    `error` is the one that stopped a failed run, in one line. `newest` are the numbers of the last
    row of metrics of a run that is not finished.
    """

    name: str
    state: str
    done: int
    rounds: int | None
    diverged: bool = False
    group: str | None = None
    error: str | None = None
    newest: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Status:
    """A run's or a sweep's folder: `kind` is `run` or `sweep`.

    `seconds_left` is an estimate; None where nothing tells how long a round takes, 0 where nothing
    is left. `rounds_per_second` are those of all runs together, by all processes that work now,
    with their compilations and evaluations; None where nobody works, or nothing tells.
    """

    path: str
    kind: str
    runs: tuple[RunStatus, ...]
    seconds_left: float | None
    rounds_per_second: float | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many runs are in each state, and how many of the finished ones diverged."""
        counted = Counter(run.state for run in self.runs)
        diverged = sum(run.diverged for run in self.runs)
        return {state: counted[state] for state in STATES} | {"diverged": diverged}

    def to_dict(self) -> dict:
        """Everything as plain values, for JSON."""
        content = dataclasses.asdict(self)
        runs = [dict(run) for run in content.pop("runs")]
        return content | self.counts | {"total": len(runs), "runs": runs}


def survey(out: str | Path) -> Status:
    """The status of a folder that a run or a sweep writes to; a paper's is that of its runs.

    Reads summaries, the last lines of metrics and locks; no device, and no configuration is built.
    The time that is left is estimated by the seconds that a round of one run has taken: over all
    finished runs, or, before there are any, over the groups that are under way. The rounds that
    remain are shared by the processes that work now, one where none does.

    Raises: `ConfigError` for a folder that holds neither a run nor a sweep.
    """
    out, kind = catalog.located(out)
    runs = list(_of_sweep(out) if kind == "sweep" else _of_run(out))
    cost, workers = _seconds_a_round(runs), _workers(runs)
    speed = workers / cost if cost and workers else None
    return Status(str(out), kind, tuple(run for run, _ in runs), _seconds_left(runs), speed)


@dataclasses.dataclass(frozen=True)
class _Spent:
    """`seconds` that a process has spent on `rounds` rounds of all its replicas together."""

    process: str
    seconds: float
    rounds: int


def _of_run(folder: Path) -> Iterator[tuple[RunStatus, _Spent | None]]:
    locked = files.is_locked(folder / results.LOCK)
    yield _status(folder, folder.name, locked, None, folder, folder / results.CHECKPOINTS, 1)


def _of_sweep(out: Path) -> Iterator[tuple[RunStatus, _Spent | None]]:
    group_of, sizes, locked, failed = {}, {}, {}, {}
    for path in sorted((out / groups_lib.GROUPS).glob(f"*/{groups_lib.MEMBERS}")):
        with contextlib.suppress(ConfigError):  # it was removed just now, or is damaged
            names, group = files.read_json(path).get("cells", ()), path.parent.name
            sizes[group] = len(names)
            locked[group] = groups_lib.is_held(out, group)
            if not locked[group]:
                failed[group] = groups_lib.failure_of(out, group)
            group_of |= dict.fromkeys(names, group)
    cells = out / groups_lib.CELLS
    for folder in sorted(cells.glob("*/*/")):
        name = folder.relative_to(cells).as_posix()
        group = group_of.get(name)
        state = out / groups_lib.GROUPS / (group or "none")
        run, spent = _status(
            folder, name, locked.get(group, False), group, state, state / "state", sizes.get(group)
        )
        if run.state != "finished" and (failure := failed.get(group)) is not None:
            run = dataclasses.replace(run, state="failed", error=failure.error)
        yield run, spent


def _status(folder, name, locked, group, state, checkpoints, size):
    """One run's status, and the time that was spent on it as far as that is known."""
    if (folder / results.SUMMARY).exists():
        try:
            summary = files.read_json(folder / results.SUMMARY)
            done, seconds = int(summary["final"]["round"]), float(summary["wall_seconds"])
            replicas, diverged = int(summary.get("replicas", 1)), bool(summary.get("diverged"))
        except (ConfigError, KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{str(folder / results.SUMMARY)!r} is damaged. {results.RunFolder(folder).remedy}"
            ) from None
        run = RunStatus(name, "finished", done, done, diverged)
        return run, _Spent(name, seconds / replicas, done)
    row, rounds = _last_row(folder / results.METRICS), _rounds(folder / results.CONFIG)
    done = 0 if row is None else row["round"]
    started = row is not None or (state / results.EXECUTION).exists()
    newest = {} if row is None else {k: v for k, v in row.items() if isinstance(v, (int, float))}
    kind = "running" if locked else "interrupted" if started else "waiting"
    spent = _spent(group or name, state, folder, done, checkpoints, size or 1)
    return RunStatus(name, kind, done, rounds, group=group, newest=newest), spent


def _spent(process, state, folder, done, checkpoints, size) -> _Spent | None:
    """By the newest checkpoint, else by the times of the first file and of the last row."""
    for saved in Checkpoints(checkpoints, ()).rounds()[:1]:
        with contextlib.suppress(ConfigError, KeyError, TypeError, ValueError):
            about = files.read_json(checkpoints / f"{saved}.json")
            if saved > 0:
                return _Spent(process, float(about["elapsed"]), saved * size)
    with contextlib.suppress(FileNotFoundError):
        begin = (state / results.EXECUTION).stat().st_mtime
        seconds = (folder / results.METRICS).stat().st_mtime - begin
        if done > 0 and seconds > 0:
            return _Spent(process, seconds, done * size)
    return None


def _seconds_left(runs) -> float | None:
    left = sum(max((run.rounds or 0) - run.done, 0) for run, _ in runs if run.state != "finished")
    if all(run.state == "finished" for run, _ in runs):
        return 0.0
    cost = _seconds_a_round(runs)
    if cost is None or any(run.rounds is None for run, _ in runs):
        return None
    return left * cost / max(_workers(runs), 1)


def _workers(runs) -> int:
    """How many processes work now."""
    return len({run.group for run, _ in runs if run.state == "running"})


def _seconds_a_round(runs) -> float | None:
    """The seconds that a round of one run has taken a process."""
    known = [spent for run, spent in runs if run.state == "finished" and spent.rounds > 0]
    if not known:  # one of a group says all of it
        known = list({spent.process: spent for _, spent in runs if spent is not None}.values())
    rounds = sum(spent.rounds for spent in known)
    return sum(spent.seconds for spent in known) / rounds if rounds else None


def _rounds(path: Path) -> int | None:
    """`rounds` of a resolved configuration.

    Its line is looked for, since reading the YAML of thousands of runs would take a minute.
    """
    try:
        known = re.search(r"^rounds: (\d+)$", path.read_text(), flags=re.MULTILINE)
    except FileNotFoundError:
        return None
    return None if known is None else int(known[1])


def _last_row(path: Path) -> dict | None:
    """The last whole row of metrics; None where there is no row."""
    try:
        with open(path, "rb") as file:
            end, size = file.seek(0, 2), 4096
            while True:
                file.seek(max(end - size, 0))
                tail = file.read()
                if size >= end or tail.count(b"\n") > 1:
                    break
                size *= 8
    except FileNotFoundError:
        return None
    for line in reversed(tail.split(b"\n")[:-1]):  # a line without an end is being written
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            return row | {"round": int(row["round"])}
    return None
