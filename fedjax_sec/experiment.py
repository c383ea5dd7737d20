"""Runs experiments: rounds and evaluations in turns, checkpoints, results."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import config as config_lib
from fedjax_sec import results
from fedjax_sec.advice import shown
from fedjax_sec.checkpoints import Checkpoints
from fedjax_sec.config import Experiment
from fedjax_sec.host import undisturbed
from fedjax_sec.preparation import (
    check_bases,
    check_on_data,
    check_trigger,
    load_source,
    make_population,
    malicious_clients,
    num_parameters,
    probe_positions,
    trigger_pixels,
)
from fedjax_sec.program import Program, tuned
from fedjax_sec.schema import ConfigError
from fedjax_sec.trained import CHECKPOINTS, load_surrogates
from fedjax_sec.tuning import Tuning

#: Keys of the summary -> metrics that count something in every round.
COUNTED = {
    "excluded_updates": "excluded",
    "excluded_honest_updates": "excluded_honest",
    "absent_clients": "absent",
    "zero_aggregate_rounds": "zero_aggregates",
    "attack_rounds": "attack_rounds",
}

#: The file that says how an interrupted run computed local training.
EXECUTION = "execution.json"


class Result(NamedTuple):
    """A finished run.

    `metrics[name]` holds one entry an evaluation, `metrics["round"]` the number of rounds done by
    then, 0 first; what is measured in training is NaN there. `params` are the final parameters as
    the model's tree, None when the run was finished before and only read back (`final_params` reads
    them); `summary` is what `summary.json` holds.
    """

    experiment: Experiment
    metrics: dict[str, np.ndarray]
    summary: dict
    params: Any


def read_result(experiment: Experiment, folder: results.RunFolder) -> Result:
    """A finished run read back from its folder."""
    return Result(experiment, stack_rows(folder.rows()), folder.summary(), None)


def stack_rows(rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """Metric rows as one array a metric, NaN where a row holds null or nothing.

    >>> stack_rows([{"round": 0}, {"round": 5, "train_loss": 0.5}])["train_loss"].tolist()
    [nan, 0.5]
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = {}
    for name in names:
        values = [np.asarray(row[name], dtype=float) for row in rows if name in row]
        nothing = np.full(values[0].shape, np.nan)
        given = iter(values)
        found[name] = np.stack([next(given) if name in row else nothing for row in rows])
    return found


def best_evaluation(metrics: Mapping, name: str = "accuracy", among=True) -> int:
    """The first evaluation with the highest value of a metric, where the loss is finite.

    `among` is a mask of evaluations. Where none is left, it is the first one.

    >>> nan = float("nan")
    >>> best_evaluation({"accuracy": np.array([0.1, 0.6, 0.9]), "loss": np.array([2, 1, nan])})
    1
    """
    values = metrics[name]
    usable = np.isfinite(values) & np.isfinite(metrics.get("loss", values)) & among
    return int(np.argmax(np.where(usable, values, -np.inf)))


def verify(experiment: Experiment) -> None:
    """Raises what would stop the experiment, before anything is written or compiled.

    On top of `Experiment.check`, that is missing data, a network or a pattern that does not fit
    the data, a batch size beyond the largest client's examples, a backdoor whose class nobody
    holds or of which the network sees nothing, and an influence that cannot be measured.
    """
    source = load_source(experiment)
    experiment.model.make(source.x_train.shape[1:], source.num_classes)
    population, _ = make_population(experiment, source)
    check_on_data(experiment, source, population)
    check_bases(experiment, source, population)
    check_trigger(experiment, source)
    probe_positions(experiment, source)
    load_surrogates(experiment)
    images = experiment.evaluation.evasion_images
    if images is not None and images > len(source.y_test):
        raise ConfigError(
            f"evaluation.evasion_images must be <= {len(source.y_test)}, the test examples of "
            f"{source.label}, got {images}."
        )


@undisturbed
def settle(experiment: Experiment, checkpoint_dir: str | Path | None) -> Tuning:
    """How to compute local training: as an interrupted run with this state did, else measured.

    It changes results by rounding, so it is written down beside the state: what resumes does not
    measure again.
    """
    path = None if checkpoint_dir is None else Path(checkpoint_dir).parent / EXECUTION
    if path is not None and path.exists():
        return Tuning.from_dict(json.loads(path.read_text()))
    tuning = tuned(experiment)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write_atomically(path, json.dumps(tuning.to_dict(), indent=2) + "\n")
    return tuning


@undisturbed
def train(
    experiments: Sequence[Experiment],
    folders: Sequence[results.RunFolder] | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    at_once: int | None = None,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    program: Program | None = None,
    profile: str | Path | None = None,
) -> list[Result]:
    """Runs experiments of one structure as replicas of one program.

    Args:
      experiments: equal in `Experiment.structure()`.
      folders: where each one's metrics and summary go; already claimed with `RunFolder.open`.
      checkpoint_dir: where the common state is saved, and from which it is taken up if there.
      at_once: replicas vmapped at a time; the others follow one after another in the same
        program. None: as many as fit the memory of an accelerator; on a CPU, whose cores one
        replica fills, 1.
      on_evaluation: called with the rounds done and the rows just measured.
      program: compiled functions to use again.
      profile: folder for a JAX profiler trace of the rounds between two evaluations: the second
        time, when everything is warm, or the only time.
    """
    if len({e.structure() for e in experiments}) != 1:
        raise ConfigError("These experiments differ in structure and cannot share a program.")
    if program is None:
        program = Program(experiments[0], at_once, settle(experiments[0], checkpoint_dir))
    replicas, unused = program.replicas(experiments)
    first = experiments[0]
    begin = time.perf_counter()

    checkpoints = Checkpoints(checkpoint_dir) if checkpoint_dir else None
    state, done, elapsed = program.init(replicas), 0, 0.0
    if checkpoints:
        state, done, elapsed = checkpoints.restore(state)
    if folders:
        for folder in folders:
            folder.truncate(done or -1)  # round 0 is measured again
    rows_of = [folder.rows() if folders and done else [] for folder in folders or experiments]

    def record(done, metrics):
        host = jax.device_get(metrics)
        new = [
            results.to_json({"round": done} | {name: values[i] for name, values in host.items()})
            for i in range(len(experiments))
        ]
        for i, row in enumerate(new):
            rows_of[i].append(row)
            if folders:
                folders[i].append(row)
        if on_evaluation:
            on_evaluation(done, new)

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
            checkpoints.save(done, state, elapsed + time.perf_counter() - begin)

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
        "tuning": program.tuning.to_dict(),
        "traces": program.traces,
    }
    found = []
    for i, experiment in enumerate(experiments):
        metrics = stack_rows(rows_of[i])
        summary = _summarize(experiment, program, metrics, unused[i], timing)
        finite = np.isfinite(summary["final"]["loss"]) and jnp.isfinite(state.params[i]).all()
        population = jax.tree.map(lambda leaf, i=i: leaf[i], replicas.population)
        summary |= {
            "diverged": not finite,
            "seed": experiment.seed,
            "placement": experiment.threat.placement,
            "malicious_clients": (
                None if experiment.threat.redraw else malicious_clients(population)
            ),
        }
        if folders:
            if first.checkpoint.keep_params:
                folders[i].write_params(state.params[i])
            folders[i].write_summary(summary)
        found.append(Result(experiment, metrics, summary, program.unravel(state.params[i])))
    return found


def _summarize(experiment, program, metrics, unused, timing) -> dict:
    counts = program.source.describe()
    best = best_evaluation(metrics)

    def scalars(at: int) -> dict:
        return {name: float(values[at]) for name, values in metrics.items() if values.ndim == 1}

    final = scalars(-1)
    summary = {
        "data": {**counts, "unused_train": int(unused), "clients": experiment.data.num_clients},
        "parameters": num_parameters(program.problem),
        "final": final,
        "best": scalars(best),
        **{key: _total(metrics, name) for key, name in COUNTED.items() if name in metrics},
        **timing,
        **results.environment(),
    }
    warnings = _warnings(experiment, program.source, metrics)
    return summary | ({"warnings": warnings} if warnings else {})


def _total(metrics, name: str) -> int:
    """What is counted in every round, over all rounds."""
    return int(np.nansum(metrics[name]))


def _first(metrics, name: str) -> str:
    """The rounds, numbered from 1, between the evaluations where a count is first above zero."""
    at = int(np.argmax(np.nan_to_num(metrics[name]) > 0))
    begin, end = int(metrics["round"][at - 1]) + 1, int(metrics["round"][at])
    return f"round {end}" if begin == end else f"rounds {begin} to {end}"


def _warnings(experiment, source, metrics) -> list[str]:
    """What a reader must know before trusting the numbers; counts are over all rounds."""
    warnings, counts, rounds = [], source.describe(), experiment.rounds
    if counts["subset"]:
        warnings.append(f"data: {counts['label']}, not the whole data set")
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
    seen, pixels = trigger_pixels(experiment, source) or (0, 0)
    if seen < pixels:
        warnings.append(f"the network sees {seen} of the {pixels} pixels of the attack's trigger")
    return warnings


def run(
    config: str | Path | Mapping | Experiment,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    profile: str | Path | None = None,
    **overrides,
) -> Result:
    """Runs one experiment.

    Args:
      config: a YAML file, a mapping, or an `Experiment`.
      out: folder for `config.yaml`, `metrics.jsonl`, `summary.json`, figures and checkpoints; None
        writes nothing.
      resume: continue the run in `out`, to the same bits as if it had never stopped.
      overwrite: replace the run in `out`.
      on_evaluation: called with the rounds done and a list with the metrics just measured.
      profile: folder for a JAX profiler trace of the rounds between two evaluations.
      **overrides: top-level keys, or dotted ones as `**{"client.l2": 1e-4}`.

    Returns: `Result` with metrics as arrays over evaluations and the final parameters.

    Raises: `ConfigError` (a `ValueError`) for a configuration that cannot be run, before anything
    compiles.

    >>> result = run({"data": {"name": "digits"}, "rounds": 2})
    >>> result.metrics["round"].tolist()
    [0.0, 2.0]
    """
    if on_evaluation is not None and not callable(on_evaluation):
        raise ConfigError(f"on_evaluation must be a function, got {shown(on_evaluation)}.")
    for name, given in (("out", out), ("profile", profile)):
        if given is not None and not isinstance(given, (str, os.PathLike)):
            raise ConfigError(f"{name} must be the path of a folder, got {shown(given)}.")
    if isinstance(config, Experiment):
        config = config.to_dict()
    if isinstance(config, Mapping):
        experiment = config_lib.from_mapping(config, overrides)
    else:
        experiment = config_lib.load(config, overrides)
    if out is None:
        verify(experiment)
        return train([experiment], on_evaluation=on_evaluation, profile=profile)[0]
    verify(experiment)  # before the folder is claimed
    folder = results.RunFolder(out)
    folder.open(experiment.to_dict(), resume=resume, overwrite=overwrite)
    if folder.finished:
        if profile is not None:
            raise ConfigError(f"profile: the run in {str(folder.path)!r} is finished.")
        return read_result(experiment, folder)
    result = train(
        [experiment],
        [folder],
        checkpoint_dir=folder.path / CHECKPOINTS,
        on_evaluation=on_evaluation,
        profile=profile,
    )[0]
    from fedjax_sec import plotting  # slow to import, and not needed before

    plotting.accuracy_curve(result, folder.path / "figures")
    return result
