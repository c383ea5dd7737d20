"""A run that several processes compute, from the process that starts them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedjax_sec.runs.checks import refuse_objects, refuse_unsharded
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result, checked
from fedjax_sec.runs.results import RunFolder
from fedjax_sec.runs.together.ray import Ray


def execute(
    starter: Ray,
    work: Callable[..., tuple[dict, dict, Any]],
    config: str | Path | Mapping | Experiment,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    profile: str | Path | None = None,
    **overrides,
) -> Result:
    """As `fedjax_sec.run`, by the processes that `starter` starts; JAX does nothing in this one.

    In each of them `work(spec, how)` runs the experiment in its written form, and returns a
    result's metrics, summary and parameters.
    """
    experiment = checked(config, overrides, out, on_evaluation, profile)
    refuse_objects(experiment)
    if starter.processes > 1:
        refuse_unsharded(experiment, starter.processes)
    spec, how = experiment.to_dict(), {"resume": resume, "overwrite": overwrite}
    if out is not None:
        RunFolder(out).check(spec, **how)
    places = {"out": out, "profile": profile}
    given = {name: str(Path(path).absolute()) for name, path in places.items() if path is not None}
    return Result(experiment, *starter.run(work, spec, how | given, on_evaluation=on_evaluation))
