"""Runs experiments: rounds and evaluations in turns, checkpoints, results."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError, distributed, files
from fedjax_sec.core.advice import shown
from fedjax_sec.core.host import undisturbed
from fedjax_sec.evaluation.robustness import surrogates_of
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import notebook, results
from fedjax_sec.runs.checkpoints import Checkpoints, Saved
from fedjax_sec.runs.checks import missing_bases, refuse_unsharded
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.execution import choose_layout
from fedjax_sec.runs.loggers import Run
from fedjax_sec.runs.loggers.writing import Writing, check_installed
from fedjax_sec.runs.prepare import Prepared, make_replicas, malicious_clients, prepare
from fedjax_sec.runs.program import Program
from fedjax_sec.runs.tuning import Tuning

_log = logging.getLogger(__name__)

#: Keys of the summary -> metrics that count something in every round.
COUNTED = {
    "excluded_updates": "excluded",
    "excluded_honest_updates": "excluded_honest",
    "absent_clients": "absent",
    "zero_aggregate_rounds": "zero_aggregates",
    "attack_rounds": "attack_rounds",
}


class Result(NamedTuple):
    """A finished run.

    `metrics[name]` holds one entry an evaluation, `metrics["round"]` the number of rounds done by
    then, 0 first; what is measured in training is NaN there. `params` are the final parameters as
    the model's tree, None when the run was finished before and only read back (`final_params` reads
    them); `summary` is what `summary.json` says.
    """

    experiment: Experiment
    metrics: dict[str, np.ndarray]
    summary: dict
    params: Any

    def __repr__(self) -> str:
        return f"Result({notebook.sentence(self.summary, self.experiment.seed)})"

    def _repr_html_(self) -> str:
        return notebook.page(self.metrics, self.summary, self.experiment.seed)


def read_result(experiment: Experiment, folder: results.RunFolder) -> Result:
    """A finished run read back from its folder."""
    return Result(experiment, stack_rows(folder.rows()), folder.summary(), None)


def stack_rows(rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """Metric rows as one array a metric, NaN where a row holds null or nothing.

    >>> stack_rows([{"round": 0}, {"round": 5, "train_loss": 0.5}])["train_loss"].tolist()
    [nan, 0.5]
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = {}
    for name in names:
        values = [np.asarray(row[name], dtype=float) for row in rows if name in row]
        nothing = np.full(values[0].shape, np.nan)
        given = iter(values)
        arrays[name] = np.stack([next(given) if name in row else nothing for row in rows])
    return arrays


def best_evaluation(metrics: Mapping, name: str, among=True) -> int:
    """The first evaluation with the highest value of a metric, where the loss is finite.

    `among` is a mask of evaluations. Where none is left, it is the first one.

    >>> nan = float("nan")
    >>> best_evaluation({"accuracy": np.array([0.1, 0.6, 0.9]), "loss": np.array([2, 1, nan])},
    ...     "accuracy",
    ... )
    1
    """
    values = metrics[name]
    usable = np.isfinite(values) & np.isfinite(metrics.get("loss", values)) & among
    return int(np.argmax(np.where(usable, values, -np.inf)))


@undisturbed
def resolve_layout(
    prepared: Prepared,
    checkpoint_dir: str | Path | None,
    replicas: int = 1,
    before: Callable[[], object] = lambda: None,
) -> Tuning:
    """How to compute local training: as an interrupted run with this state did, else chosen anew.

    It changes results by rounding, so it is written down beside the state: what resumes does not
    choose again. `replicas` and `before` as in `choose_layout`.
    """
    if checkpoint_dir is None:
        return choose_layout(prepared, replicas, before)
    path = Path(checkpoint_dir).absolute().parent / results.EXECUTION
    if path.exists():
        try:
            return Tuning.from_dict(files.read_json(path))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            reason = f"{error}" if isinstance(error, ConfigError) else f"{str(path)!r} is damaged."
            raise ConfigError(
                f"{reason} It says how the run was computed: {_begin_again(path.parent)}"
            ) from None
    tuning = choose_layout(prepared, replicas, before)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, tuning.to_dict())
    return tuning


def _begin_again(folder: Path) -> str:
    """The advice where the state in a run's folder, or in the folder of a group, is damaged."""
    if results.read_mark(folder).kind == "run":
        return "choose another folder, or pass --overwrite to begin this run again."
    return f"remove {str(folder)!r} and the cells' folders named here, and start the sweep again."


@undisturbed
def train(
    prepared: Sequence[Prepared],
    folders: Sequence[results.RunFolder] | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    at_once: int | None = None,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    program: Program | None = None,
    profile: str | Path | None = None,
    loggers: Writing | None = None,
) -> list[Result]:
    """Runs experiments of one structure as replicas of one program.

    Args:
      prepared: experiments equal in `Experiment.structure()`, each from `prepare`.
      folders: where each one's metrics and summary go; already claimed with `RunFolder.open`.
      checkpoint_dir: where the common state is saved, and from which it is taken up if there.
      at_once: replicas vmapped at a time; the others follow one after another in the same
        program. None: as many as fit the memory of an accelerator; on a CPU, whose cores one
        replica fills, 1.
      on_evaluation: called with the rounds done and the rows just measured.
      program: compiled functions to use again.
      profile: folder for a JAX profiler trace of the rounds between two evaluations: the second
        time, when everything is warm, or the only time.
      loggers: get every row, those of before an interruption first.
    """
    experiments = [one.experiment for one in prepared]
    if len({e.structure() for e in experiments}) != 1:
        raise ConfigError("These experiments differ in structure and cannot share a program.")
    if distributed.together():
        refuse_unsharded(experiments[0], jax.process_count())
    if checkpoint_dir and not folders:
        raise ConfigError("checkpoint_dir needs folders: a state goes on beside its metrics.")
    begin = time.perf_counter()
    if program is None:
        layout = None
        if distributed.leads():
            layout = resolve_layout(prepared[0], checkpoint_dir, len(prepared))
        layout = Tuning.from_dict(distributed.agree(layout and layout.to_dict()))
        program = Program(prepared[0], at_once, layout).compile(prepared)
    replicas = make_replicas(prepared)
    first = experiments[0]

    starts = [one.start for one in prepared]
    given = starts if any(start is not None for start in starts) else None
    saved = Saved(
        0,
        _whole(program, program.init(replicas, given), replicas),
        0.0,
        [[] for _ in experiments],
        [
            None if start is None else hashlib.sha256(start.tobytes()).hexdigest()
            for start in starts
        ],
    )
    checkpoints, rows_of = None, [[] for _ in experiments]
    if checkpoint_dir:
        checkpoints = Checkpoints(checkpoint_dir, [one.to_dict() for one in experiments])
        saved = _take_up(experiments, folders, checkpoints, saved)
    if folders:
        due = results.evaluated(first)
        rows_of = [
            folder.take_up(digests, due[: len(digests)])
            for folder, digests in zip(folders, saved.rows, strict=True)
        ]
    if loggers:
        loggers.replay(rows_of)
    done, elapsed = distributed.agree([saved.done, saved.elapsed])
    state = distributed.agree_arrays(saved.state["state"])

    def record(done, metrics):
        host = jax.device_get(distributed.local(metrics))
        new = [
            results.to_json({"round": done} | {name: values[i] for name, values in host.items()})
            for i in range(len(experiments))
        ]
        for i, row in enumerate(new):
            rows_of[i].append(row)
            if folders:
                saved.rows[i].append(folders[i].append(row))
        for receive in filter(None, (loggers, on_evaluation)):
            receive(done, new)

    if done == 0:
        record(0, program.evaluate(state, replicas))
    evaluations, training_seconds = 0, 0.0
    rounds_here = first.rounds - done
    stretches = -(-rounds_here // first.evaluation.every)
    while done < first.rounds:
        rounds = min(first.evaluation.every, first.rounds - done)
        traced = profile is not None and evaluations == min(1, stretches - 1)
        tick, compiled = time.perf_counter(), program.compile_seconds
        with jax.profiler.trace(str(profile)) if traced else contextlib.nullcontext():
            state, training = program.advance(state, replicas, done, rounds)
            jax.block_until_ready(state)
        training_seconds += time.perf_counter() - tick - (program.compile_seconds - compiled)
        done += rounds
        record(done, program.evaluate(state, replicas, done) | training)
        evaluations += 1
        if checkpoints and (evaluations % first.checkpoint.every == 0 or done == first.rounds):
            spent = elapsed + time.perf_counter() - begin
            whole = _whole(program, distributed.local(state), replicas)
            checkpoints.save(Saved(done, whole, spent, saved.rows, saved.start))

    wall = elapsed + time.perf_counter() - begin
    timing = {
        "wall_seconds": wall,
        "compile_seconds": program.compile_seconds,
        "compiled": program.compiled,
        "rounds_per_second": (
            rounds_here * len(experiments) / training_seconds if training_seconds else None
        ),
        "replicas": len(experiments),
        "replicas_at_once": min(program.at_once or len(experiments), len(experiments)),
        "layout": program.problem.layout._asdict(),
        "processes": jax.process_count(),
        "tuning": program.tuning.to_dict(),
        "traces": program.traces,
    }
    finished = []
    params = program.params(distributed.local(state), replicas)
    for i, experiment in enumerate(experiments):
        metrics = stack_rows(rows_of[i])
        summary = _summarize(prepared[i], program, metrics, timing)
        finite = np.isfinite(summary["final"]["loss"]) and jnp.isfinite(params[i]).all()
        population = prepared[i].population
        summary |= {
            "diverged": not finite,
            "seed": experiment.seed,
            "placement": experiment.threat.placement,
            "malicious_clients": (
                None if experiment.threat.redraw else malicious_clients(population)
            ),
        }
        if saved.start[i] is not None:
            summary["start_from"] = {"run": experiment.start_from, "parameters": saved.start[i]}
        if folders:
            if first.checkpoint.keep_params:
                folders[i].write_params(params[i])
            folders[i].write_summary(summary)
        finished.append(Result(experiment, metrics, summary, program.unravel(params[i])))
    return finished


def _whole(program: Program, state, replicas) -> dict:
    """A checkpoint's content: the state, and the global parameters [R, D] for later readers."""
    return {"params": program.params(state, replicas), "state": state}


def _take_up(experiments, folders, checkpoints, anew: Saved) -> Saved:
    """The newest checkpoint that can be trusted and that the rows in the folders fit, or `anew`."""
    due = results.evaluated(experiments[0])

    def accept(saved: Saved) -> None:
        if saved.done not in due:
            raise ConfigError(
                f"The state after round {saved.done} cannot go on: with evaluation.every = "
                f"{experiments[0].evaluation.every} a run of {due[-1]} rounds has no evaluation "
                f"there."
            )
        at = due[: due.index(saved.done) + 1]
        for folder, digests in zip(folders, saved.rows, strict=True):
            if len(digests) != len(at):
                raise ConfigError(f"The state after round {saved.done} misses rows of metrics.")
            folder.check_rows(digests, at)

    remedy = _begin_again(checkpoints.folder.parent)
    saved = checkpoints.restore(anew.state, accept, remedy[0].upper() + remedy[1:])
    if saved is None and any(folder.has_rows for folder in folders):
        _log.warning("No checkpoint in %r: beginning anew.", str(checkpoints.folder))
    return saved or anew


def _summarize(prepared: Prepared, program, metrics, timing) -> dict:
    experiment, counts = prepared.experiment, prepared.source.describe()
    headline = prepared.task.headline
    best = best_evaluation(metrics, headline)

    def scalars(at: int) -> dict:
        return {name: float(values[at]) for name, values in metrics.items() if values.ndim == 1}

    final = scalars(-1)
    summary = {
        "data": {
            **counts,
            "unused_train": int(prepared.unused.total),
            "clients": experiment.data.num_clients,
        },
        "parameters": prepared.space.dim,
        "headline": headline,
        "final": final,
        "best": scalars(best),
        **{key: _total(metrics, name) for key, name in COUNTED.items() if name in metrics},
        **timing,
        **results.environment(),
    }
    counts_of = np.asarray(prepared.population.counts)
    given = experiment.complete_algorithm.client.privacy(counts_of, experiment.rounds)
    if given is not None:
        summary["privacy"] = given
    warnings = _warnings(prepared, metrics)
    return summary | ({"warnings": warnings} if warnings else {})


def _total(metrics, name: str) -> int:
    """The counts of every round, over all rounds."""
    return int(np.nansum(metrics[name]))


def _first(metrics, name: str) -> str:
    """The rounds, numbered from 1, between the evaluations where a count is first above zero."""
    at = int(np.argmax(np.nan_to_num(metrics[name]) > 0))
    begin, end = int(metrics["round"][at - 1]) + 1, int(metrics["round"][at])
    return f"round {end}" if begin == end else f"rounds {begin} to {end}"


def _warnings(prepared: Prepared, metrics) -> list[str]:
    """Warnings for the reader of the numbers; counts are over all rounds."""
    experiment = prepared.experiment
    warnings, counts, rounds = [], prepared.source.describe(), experiment.rounds
    if counts["subset"]:
        warnings.append(f"data: {counts['label']}, not the whole data set")
    if left_out := prepared.unused.left_out:
        warnings.append(
            f"data: {left_out} of {counts['train']} training examples belong to no client: "
            f"data.partition {experiment.data.partition.registered_name!r} deals them to none of "
            f"{experiment.data.num_clients}"
        )
    if len(bad := np.flatnonzero(~np.isfinite(metrics["loss"]))):
        first, number = int(metrics["round"][bad[0]]), len(metrics["loss"])
        warnings.append(
            f"the global model's loss is not finite at {len(bad)} of {number} evaluations, first "
            f"after round {first}"
        )
    if lost := _total(metrics, "excluded"):
        honest = _total(metrics, "excluded_honest")
        warnings.append(
            f"{lost} updates were left out since they held NaN or infinity, {honest} of them "
            f"honest clients', first in {_first(metrics, 'excluded')}"
        )
    if still := _total(metrics, "zero_aggregates"):
        warnings.append(
            f"the aggregate was zero in {still} of {rounds} rounds, first in "
            f"{_first(metrics, 'zero_aggregates')}"
        )
    if "attack_rounds" in metrics and not _total(metrics, "attack_rounds"):
        warnings.append(f"the attack changed no update in any of the {rounds} rounds")
    backdoors = experiment.attack.backdoors
    if experiment.evaluation.backdoor is None and len(backdoors) > 1:
        warnings.append(
            f"success is measured for the first of {len(backdoors)} backdoors, "
            f"{backdoors[0].registered_name!r}; evaluation.backdoor names another"
        )
    warnings += missing_bases(experiment, prepared.source, prepared.population)
    seen, pixels = prepared.pixels or (0, 0)
    if seen < pixels:
        warnings.append(f"the network sees {seen} of the {pixels} pixels of the attack's trigger")
    return warnings


def resolved(config: str | Path | Mapping | Experiment, overrides: Mapping) -> Experiment:
    """The experiment of a file, a mapping or an experiment, with overrides."""
    if isinstance(config, Experiment):
        config = config.to_dict(objects=True)
    read = config_lib.from_mapping if isinstance(config, Mapping) else config_lib.load
    return read(config, overrides)


def checked(
    config: str | Path | Mapping | Experiment, overrides: Mapping, out, on_evaluation, profile
) -> Experiment:
    """The experiment of a run with these arguments.

    Raises: `ConfigError` for arguments that are none, and for loggers that could not write.
    """
    if on_evaluation is not None and not callable(on_evaluation):
        raise ConfigError(f"on_evaluation must be a function, got {shown(on_evaluation)}.")
    for name, given in (("out", out), ("profile", profile)):
        if given is not None and not isinstance(given, (str, os.PathLike)):
            raise ConfigError(f"{name} must be the path of a folder, got {shown(given)}.")
    experiment = resolved(config, overrides)
    check_installed(experiment.logging)
    if out is None and experiment.logging:
        raise ConfigError(
            f"logging: {experiment.logging[0]!r} writes beside a run's folder; give out."
        )
    return experiment


def execute(
    config: str | Path | Mapping | Experiment,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    profile: str | Path | None = None,
    make_program: Callable[[Prepared], Program] | None = None,
    **overrides,
) -> Result:
    """As `fedjax_sec.run`, but draws no figures. `make_program` says what computes the rounds."""
    experiment = checked(config, overrides, out, on_evaluation, profile)
    if out is None:
        return train([prepare(experiment)], on_evaluation=on_evaluation, profile=profile)[0]
    folder, profile = results.RunFolder(out), profile and Path(profile).absolute()
    spec, how = experiment.to_dict(), {"resume": resume, "overwrite": overwrite}
    if not distributed.leads():
        return _follow(experiment, folder, on_evaluation)
    folder.check(spec, **how)
    if overwrite:
        _check_not_needed(experiment, folder)
    with contextlib.ExitStack() as places:
        for place in filter(None, (folder.path, profile)):
            places.enter_context(files.trying(place))
        prepared = prepare(experiment)  # before the folder is claimed
    with folder.locked():
        if folder.finished and not overwrite:
            _check_continuing(experiment, folder, how)
        folder.open(spec, **how)
        if distributed.agree(folder.finished):
            if profile is not None:
                raise ConfigError(f"profile: the run in {str(folder.path)!r} is finished.")
            result = read_result(experiment, folder)
        else:
            with _loggers(experiment, folder) as loggers:
                result = train(
                    [prepared],
                    [folder],
                    checkpoint_dir=folder.path / results.CHECKPOINTS,
                    on_evaluation=on_evaluation,
                    program=None if make_program is None else make_program(prepared),
                    profile=profile,
                    loggers=loggers,
                )[0]
    return result


def _loggers(experiment: Experiment, folder: results.RunFolder) -> Writing:
    """The loggers of a run in a folder of its own."""
    run = Run("", folder.path.name, None, {}, experiment.seed, experiment.to_dict())
    return Writing([run], [experiment.logging], folder.path)


def _follow(experiment: Experiment, folder: results.RunFolder, on_evaluation) -> Result:
    """A run whose folder another process keeps: it says whether there is anything to compute."""
    prepared = prepare(experiment)
    if distributed.agree():
        return read_result(experiment, folder)
    return train([prepared], on_evaluation=on_evaluation)[0]


def _check_not_needed(experiment: Experiment, folder: results.RunFolder) -> None:
    """Raises where the run that is to be replaced is one that the new run reads."""
    surrogates = surrogates_of(experiment.evaluation.evasions, "evaluation.evasions")
    for key, other in {"start_from": experiment.start_from, **surrogates}.items():
        if other is not None and Path(other).resolve() == folder.path.resolve():
            raise ConfigError(
                f"{key}: the run in {str(folder.path)!r} is needed by this one, so it cannot be "
                f"replaced by it. Choose another folder."
            )


def _check_continuing(experiment: Experiment, folder: results.RunFolder, how: Mapping) -> None:
    """Raises where a finished run shall have more rounds, but no state of it can go on."""
    folder.check(experiment.to_dict(), **how)
    if folder.experiment().rounds == experiment.rounds:
        return
    states = Checkpoints(folder.path / results.CHECKPOINTS, [experiment.to_dict()])
    if not set(states.rounds()) & set(results.evaluated(experiment)):
        raise ConfigError(
            f"rounds: the run in {str(folder.path)!r} is finished and has no checkpoint at a "
            f"multiple of evaluation.every = {experiment.evaluation.every}, from which it could go "
            f"on to round {experiment.rounds}. Choose another folder."
        )
