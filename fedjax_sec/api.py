"""The Python interface: `aggregate` and `attack` on a stack of updates, `run` and `sweep`."""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_sec import core, sweeps
from fedjax_sec import progress as progress_lib
from fedjax_sec.core import ConfigError, Setting, check_components, distributed, fill_defaults
from fedjax_sec.core.advice import one_line, shown, suggestion
from fedjax_sec.core.optional import require
from fedjax_sec.core.registry import headline_in
from fedjax_sec.core.types import AttackerView, Message, ServerData, ServerView
from fedjax_sec.data import Source
from fedjax_sec.data.arrays import NAME, named
from fedjax_sec.ops.moments import finite_rows, usable_rows
from fedjax_sec.round import known_defense
from fedjax_sec.round.pipeline import Attack, Defense
from fedjax_sec.runs import together as together_lib
from fedjax_sec.runs.config import Experiment, read_yaml
from fedjax_sec.runs.experiment import Result, execute, resolved
from fedjax_sec.runs.results import RunFolder
from fedjax_sec.stacks import Stack, as_key, as_mask, as_stack, as_vector, as_weights
from fedjax_sec.sweeps import Arena, Cell, Refusal


def aggregate(
    updates: Any,
    defense: Any,
    *,
    weights: Any = None,
    server_update: Any = None,
    server_loss: Any = None,
    params: Any = None,
    key: Any = None,
    **fields,
) -> Any:
    """Aggregates the clients' updates with a defence.

    Args:
      updates: [K, D], an array or nested lists; or a list with one pytree for each of the K clients
        (a list of layers, a dict, a model's variables), equal in structure, shapes and types; its
        leaves are the tensors for rules that act on single ones, as a vector is one. Integers and
        float64 are rounded to float32; float16, bfloat16 and float32 stay.
      defense: a name, a mapping with `name` and fields, a function `f(updates [K, D]) -> [D]` of
        `jax.numpy` (see the component `function`), or a list of them (a pipeline).
      weights: [K] non-negative, the clients' numbers of examples; None: all equal.
      server_update: like one client's update, what the server learned from its own examples, for
        the rules that compare clients with it (`fltrust`).
      server_loss: a function of parameters, the loss on the server's own examples, for the rules
        that evaluate clients on them. It is traced anew in every call.
      params: like one client's update, the global parameters, for rules that act on models or
        evaluate them; None: zeros.
      key: a seed or a JAX key, for defences that draw any randomness; None: seed 0.
      **fields: fields of the defence when it is given by its name alone.

    Returns: the aggregate, like one client's update. A row with NaN or infinity is left out, with a
    Python warning that says how many are, and whether the rule can still tolerate f; a defence with
    a state starts from its initial one.

    Raises: `ConfigError` (a `ValueError`) for wrong shapes and values, unknown names or fields, K
    and f that the rule cannot tolerate, and where no row, or no row with a weight, is finite.

    >>> print(aggregate([[1.0], [2.0], [9.0]], "median"))
    [2.]
    >>> clipped = [{"name": "clip_norm", "max_norm": 4.0}, "median"]
    >>> print(aggregate([[1.0], [2.0], [9.0]], clipped))
    [2.]
    >>> clients = [{"w": np.eye(2), "b": np.full(2, b)} for b in (1.0, 2.0, 9.0)]
    >>> print(aggregate(clients, "median")["b"])
    [2. 2.]
    """
    stack = as_stack(updates)
    pipeline = _defense(_with_fields(defense, fields, "defense"), Setting(stack.rows.shape[0]))
    weights = as_weights(weights, stack)
    needing = core.needing(pipeline.stages, "root")
    learned, loss, params = _server(
        stack, needing, "the defence", server_update, server_loss, params
    )
    key = as_key(key)
    finite = _finite_rows(stack.rows, np.ones(stack.rows.shape[0], bool), "are left out")
    if not np.asarray(weights)[finite].any():
        raise ConfigError(
            "weights: every row with a weight above 0 holds NaN or infinity, so no client would "
            "count."
        )
    if not finite.all():  # the rule then works on the rest, with f unchanged
        try:
            check_components(pipeline.stages, "defense", Setting(int(finite.sum())))
        except ConfigError as error:
            warnings.warn(f"with the rows that are left, {error}", stacklevel=2)
    pipeline = _shaped(pipeline, stack, updates)
    run = _compiled(_aggregate, pipeline, loss)
    output = run(pipeline, stack.rows, weights, key, params, learned, stack.space)
    _check_finite(output, pipeline, "the aggregate")
    return stack.restore(output)


@jax.jit
def _aggregate(pipeline, updates, weights, key, params, learned, space, loss=None):
    root, read = _server_data(pipeline.stages, learned, loss)
    view = _server_view(updates, weights, params, root, space)
    output = pipeline.apply(key, updates, pipeline.init(*updates.shape, space), view).aggregate
    _refuse_unread(read, pipeline.stages, learned, loss)
    return output


def attack(
    updates: Any,
    attack: Any,
    *,
    malicious: Any,
    knowledge: Any = "corrupted",
    defense: Any = None,
    server_update: Any = None,
    server_loss: Any = None,
    params: Any = None,
    key: Any = None,
    **fields,
) -> Any:
    """Rewrites the malicious clients' updates with an attack.

    Args:
      updates: [K, D] or a list of K pytrees, as in `aggregate`; the honest updates of all clients.
      attack: a name, a mapping with `name` and fields, or a list of them (a pipeline).
      malicious: [K] booleans, the adversary's clients.
      knowledge: `"corrupted"` shows the adversary its own updates only, `"omniscient"` all.
      defense: the server's rule, for attacks that adapt to it, as in `aggregate`.
      server_update, server_loss: as in `aggregate`, for the attacks and rules that use them; an
        adversary that is not omniscient does not see them.
      params: like one client's update, the global parameters; None: zeros.
      key: a seed or a JAX key, for attacks that draw any randomness; None: seed 0.
      **fields: fields of the attack when it is given by its name alone.

    Returns: what all clients send, [K, D] or a list of K pytrees; honest clients' updates are as
    they were. A Python warning names rows with NaN or infinity, which show the adversary nothing,
    and rows with numbers beyond 1e18, which are in none of its statistics. An attack that changes
    no row warns, too.

    Raises: `ConfigError` (a `ValueError`) for wrong shapes and values, unknown names or fields, no
    malicious client, no finite row that the adversary sees, and attacks that need a model and data
    (run those in an experiment).

    >>> updates = [[0.0], [2.0], [7.0]]
    >>> print(attack(updates, "alie", malicious=[True, True, False], z=1.0)[:, 0])
    [2. 2. 7.]
    """
    stack = as_stack(updates)
    clients = stack.rows.shape[0]
    mask = as_mask(malicious, clients)
    known = ("corrupted", "omniscient")
    if not isinstance(knowledge, str) or knowledge not in known:
        raise ConfigError(
            f"knowledge must be one of {known}, got {shown(knowledge)}."
            f"{suggestion(knowledge, known) if isinstance(knowledge, str) else ''}"
        )
    pipeline = Attack.build(_with_fields(attack, fields, "attack"))
    if not pipeline.stages:
        raise ConfigError("attack names no attack, so the updates would come back as they are.")
    _refuse_schedules(pipeline.stages, "attack")
    setting = Setting(clients, int(mask.sum()), knowledge=knowledge)
    check_components(pipeline.stages, "attack", setting)
    needing = [stage.registered_name for stage in pipeline.stages if stage.stage != "update"]
    if needing := needing + core.needing(pipeline.stages, "task"):
        raise ConfigError(
            f"attack: {needing[0]!r} needs a model and data; run it in an experiment "
            f"(fedjax_sec.run)."
        )
    core.refuse_warm_up(pipeline.stages, "attack", 1)
    rule = _known_rule(pipeline, defense, setting)
    learned, loss, params = _what_it_knows(
        stack, pipeline, rule, knowledge, server_update, server_loss, params
    )
    key = as_key(key)
    visible = np.ones(clients, bool) if knowledge == "omniscient" else np.asarray(mask)
    finite = _finite_rows(stack.rows, visible, "show the adversary nothing")
    huge = finite & ~np.asarray(usable_rows(stack.rows))
    _warn_of(huge, visible, "numbers too large to square and are in no statistic", 3)
    pipeline = _shaped(pipeline, stack, updates)
    run = functools.partial(_compiled(_attack, pipeline, loss), pipeline, rule)
    everything = knowledge == "omniscient"
    rows, seen = stack.rows, jnp.asarray(finite)
    sent = run(rows, mask, seen, key, params, learned, stack.space, everything=everything)
    bad = np.flatnonzero(mask)
    _check_finite(sent[bad], pipeline, "what the malicious clients would send")
    if not _is_traced(sent) and np.array_equal(sent[bad], stack.rows[bad]):
        names = [stage.registered_name for stage in pipeline.stages]
        warnings.warn(f"the attack {names} changed no update", stacklevel=2)
    if stack.like is None:
        return sent
    return [stack.restore(sent[i]) if i in bad else updates[i] for i in range(clients)]


@functools.partial(jax.jit, static_argnames="everything")
def _attack(
    pipeline, rule, updates, malicious, visible, key, params, learned, space, everything, loss=None
):
    clients, dim = updates.shape
    stages = (*pipeline.stages, *(rule.stages if rule else ()))
    root, read = _server_data(stages, learned, loss)
    view = AttackerView(
        malicious,
        visible,
        params,
        jnp.arange(clients),
        jnp.array(0),
        server_update=None if root is None else root.update,
        space=space,
    )
    if rule is not None:
        state = rule.init(clients, dim, space) if everything else None
        seen = _server_view(updates, jnp.ones(clients, updates.dtype), params, root, space)
        view = view._replace(defend=known_defense(rule, key, seen, state, clients)[0])
    message = Message(updates, jnp.ones(clients, updates.dtype))
    state = pipeline.init(clients, dim)
    sent = pipeline.apply(key, message, state, view)[0].vector
    _refuse_unread(read, stages, learned, loss)
    return sent


def _compiled(function, pipeline, loss):
    """The function, compiled once; not at all where a stage runs code of the user's."""
    if any(stage.on_host for stage in pipeline.stages):  # its errors come through as they are
        fixed = {} if loss is None else {"loss": loss}
        return functools.partial(function.__wrapped__, **fixed)
    return function if loss is None else _anew(function, loss=loss)


def _anew(function, **fixed):
    """The compiled function, traced anew: what a caller's function closes over may have changed."""
    return jax.jit(
        functools.partial(function.__wrapped__, **fixed),
        static_argnames="everything" if function is _attack else None,
    )


# --- Components ---------------------------------------------------------------------------------


def _with_fields(spec, fields, kind):
    if not fields:
        return spec
    if not isinstance(spec, str):
        raise ConfigError(
            f"{kind}: fields {sorted(fields)} can be given beside a name only; put them into the "
            f"mapping instead."
        )
    return {"name": spec, **fields}


def _defense(spec, setting) -> Defense:
    """The pipeline, checked, with f filled by the number of malicious clients where it is known."""
    built = Defense.build(spec)
    built = Defense(
        tuple(fill_defaults(s, {"num_malicious": setting.num_malicious}) for s in built.stages)
    )
    if built.client_stages:
        raise ConfigError(
            f"defense: {built.client_stages[0].registered_name!r} acts in the clients' local "
            f"training, and here the updates are given; leave it out, or run it in an experiment "
            f"(fedjax_sec.run)."
        )
    _refuse_schedules(built.stages, "defense")
    check_components(built.stages, "defense", setting)
    return built


def _shaped(pipeline, stack: Stack, updates):
    """The pipeline for clients that send pytrees, which the caller holds in his own order."""
    if stack.like is None:
        return pipeline
    return type(pipeline)(tuple(stage.shaped(updates[0]) for stage in pipeline.stages))


def _known_rule(pipeline, defense, setting):
    """The defence that the attack may use; refused where none does."""
    stages = pipeline.stages
    reads = core.needing(stages, "rule")
    if defense is None:
        if reads:
            raise ConfigError(
                f"defense is missing: {reads[0]!r} adapts to the server's rule; name it."
            )
        return None
    if not reads:
        raise ConfigError(
            f"defense would be ignored: none of {[s.registered_name for s in stages]} reads it."
        )
    rule = _defense(defense, setting)
    if any(stage.on_host for stage in rule.stages):
        raise ConfigError(
            f"defense: {reads[0]!r} takes gradients through the rule, and a wrapped object has "
            f"none; name a rule of ours."
        )
    return rule


def _with_data(config: Any, data: Source, overrides: Mapping) -> dict:
    """The overrides that name the arrays, which no other data set may stand beside."""
    keys = {f"data.{key}": value for key, value in named(data).items()}
    if isinstance(config, Experiment):
        config = config.to_dict()
    mapping = config if isinstance(config, Mapping) else read_yaml(config)
    section = mapping.get("data") or {}
    name = section.get("name") if isinstance(section, Mapping) else None
    name = overrides.get("data.name", name)
    if name not in (None, NAME):
        raise ConfigError(
            f"data: the configuration names the data set {shown(name)}, and arrays are given "
            f"beside it; leave one of them out."
        )
    return {**overrides, **keys}


def _refuse_schedules(stages, kind):
    for stage in stages:
        if core.has_schedules(stage):
            raise ConfigError(
                f"{kind}: a field of {stage.registered_name!r} follows a schedule, but here are no "
                f"rounds; give a number, or run it in an experiment (fedjax_sec.run)."
            )


# --- What the server knows ----------------------------------------------------------------------


def _server(stack: Stack, needing, readers, update, loss, params):
    """The server's update, its loss as a function of a vector, and the global parameters."""
    for name, given in (("server_update", update), ("server_loss", loss)):
        if given is not None and not needing:
            raise ConfigError(f"{name} would be ignored: {readers} does not read it.")
    if needing and update is None and loss is None:
        raise ConfigError(
            f"server_update is missing: {needing[0]!r} uses what the server learned from its own "
            f"examples; give {stack.one} (or server_loss, where it evaluates clients only)."
        )
    learned = None if update is None else as_vector(update, "server_update", stack)
    flat = jnp.zeros(stack.rows.shape[1], stack.rows.dtype)
    flat = flat if params is None else as_vector(params, "params", stack)
    return learned, None if loss is None else _scalar_loss(loss, stack, flat), flat


def _scalar_loss(loss, stack: Stack, params):
    """The loss as a function of a vector, if it gives one real number for such parameters."""
    if not callable(loss):
        raise ConfigError(
            f"server_loss must be a function of parameters, {stack.one}, that returns a number, "
            f"got {shown(loss)}."
        )

    def of_vector(vector):
        return jnp.asarray(loss(stack.restore(vector)))

    try:
        shape = jax.eval_shape(of_vector, params)
    except Exception as error:  # the caller's own function
        raise ConfigError(
            f"server_loss fails on parameters that are {stack.one} ({type(error).__name__}: "
            f"{one_line(error, 200)})."
        ) from error
    if shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ConfigError(
            f"server_loss must return one real number, got {shape.dtype} with shape {shape.shape}."
        )
    return of_vector


def _what_it_knows(stack, pipeline, rule, knowledge, update, loss, params):
    """As `_server`, of an adversary: only an omniscient one knows what the server learns."""
    attacks, rules = (
        core.needing(part.stages if part else (), "root") for part in (pipeline, rule)
    )
    if knowledge != "omniscient":
        for name, given in (("server_update", update), ("server_loss", loss)):
            if given is not None:
                raise ConfigError(
                    f"{name} is known to an adversary with knowledge='omniscient' only."
                )
        attacks, rules = [], []
    if attacks and update is None:
        raise ConfigError(
            f"server_update is missing: {attacks[0]!r} aims at what the server learned from its "
            f"own examples; give {stack.one}."
        )
    return _server(stack, attacks + rules, "neither attack nor defense", update, loss, params)


def _server_data(stages, learned, loss) -> tuple[ServerData | None, set]:
    """(`ServerData`, the set of its parts that were read); reading a missing part raises."""
    read = set()
    if learned is None and loss is None:
        return None, read
    names = core.needing(stages, "root")

    def update():
        read.add("server_update")
        if learned is None:
            raise ConfigError(
                f"server_update is missing: {names[0]!r} reads what the server learned from its "
                f"own examples; give it beside server_loss."
            )
        return learned

    def evaluate(params):
        read.add("server_loss")
        if loss is None:
            raise ConfigError(
                f"server_loss is missing: {names[0]!r} evaluates parameters on the server's own "
                f"examples; give a function of parameters that returns their loss."
            )
        return loss(params)

    return ServerData(update, evaluate), read


def _refuse_unread(read, stages, learned, loss) -> None:
    names = core.needing(stages, "root")
    for name, given in (("server_update", learned), ("server_loss", loss)):
        if given is not None and name not in read:
            raise ConfigError(f"{name} would be ignored: none of {names} reads it.")


def _server_view(updates, weights, params, root, space):
    return ServerView(
        params=params,
        weights=weights.astype(updates.dtype),
        client_ids=jnp.arange(updates.shape[0]),
        valid=jnp.ones(updates.shape[0], bool),
        round=jnp.array(0),
        root=root,
        space=space,
    )


# --- Values -------------------------------------------------------------------------------------


def _finite_rows(rows, asked, consequence) -> np.ndarray:
    """Which of the rows `asked` for are finite [K]; a warning where some are not, else an error."""
    finite = np.asarray(finite_rows(rows))
    bad = asked & ~finite
    if bad.sum() == asked.sum():
        whose = "every row" if asked.all() else "every row that the adversary sees"
        raise ConfigError(
            f"updates: {whose} holds NaN or infinity ({bad.sum()} of {bad.sum()}), so nothing is "
            f"left to work with."
        )
    _warn_of(bad, asked, f"NaN or infinity and {consequence}")
    return asked & finite


def _warn_of(bad, asked, what, level=4) -> None:
    """A warning at the caller of `aggregate` or `attack` that names the rows `bad` [K]."""
    if bad.any():
        numbers = np.flatnonzero(bad)
        some = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        warnings.warn(
            f"updates: {len(numbers)} of {asked.sum()} rows hold {what}: {some}", stacklevel=level
        )


def _is_traced(array) -> bool:
    """Whether a field is a tracer, as under `vmap` over its values: the result has none then."""
    return isinstance(array, Tracer)


def _check_finite(array, pipeline, name) -> None:
    if not _is_traced(array) and not bool(jnp.all(jnp.isfinite(array))):
        names = [stage.registered_name for stage in pipeline.stages]
        raise ConfigError(
            f"{name} is not finite: the updates, or the fields of {names}, are too large for "
            f"{array.dtype}; scale them down."
        )


def run(
    config: str | Path | Mapping | Experiment,
    *,
    data: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    profile: str | Path | None = None,
    progress: bool | None = None,
    together: Any = None,
    **overrides,
) -> Result:
    """Runs one experiment.

    Args:
      config: a YAML file, a mapping, or an `Experiment`.
      data: arrays of your own, from `fedjax_sec.data.arrays`; `num_clients`, `partition` and all
        other keys of `data` are the configuration's. Or the section `data`, as an override.
      out: folder for `config.yaml`, `metrics.jsonl`, `summary.json`, figures and checkpoints; None
        writes nothing.
      resume: continue the run in `out`, to the same bits as if it had never stopped; it may have
        more `rounds` now, and nothing else may differ.
      overwrite: replace the run in `out`.
      on_evaluation: called with the rounds done and a list with the metrics just measured.
      profile: folder for a JAX profiler trace of the rounds between two evaluations.
      progress: whether rounds, speed, time left and newest metrics are shown, below the cell of a
        notebook, or on standard error (None: in a notebook).
      together: what starts several processes that compute each round together: `"ray"`, or a
        mapping with `name` and fields, `{"name": "ray", "processes": 4}` (None: this process).
      **overrides: top-level keys, or dotted ones as `**{"client.l2": 1e-4}`. `model=` takes an
        instance of a flax module, `defense=` and `attack=` a function of the stack of updates, and
        every key of a component an instance of a class of your own, registered or not; a
        configuration only names them, so give them again to resume. `logging=["tensorboard"]`
        writes the metrics for TensorBoard, too, `"wandb"` for W&B.

    Returns: `Result` with metrics as arrays over evaluations and the final parameters.

    Raises: `ConfigError` (a `ValueError`) for a configuration that cannot be run or a folder that
    cannot be used, before anything compiles.

    >>> result = run({"data": {"name": "digits"}, "rounds": 2})
    >>> result.metrics["round"].tolist()
    [0.0, 2.0]
    """
    if isinstance(out, (str, os.PathLike)):
        out = Path(out).absolute()  # a callback may change the working directory
    if out is not None:
        require("matplotlib.figure", "The figure in a results folder (out=)")  # before it computes
    if isinstance(data, Source) and data.name == NAME:
        overrides = _with_data(config, data, overrides)
    elif data is not None:
        overrides["data"] = data
    compute = execute
    if together is not None:
        compute = functools.partial(
            together_lib.execute, together_lib.build_starter(together), _in_each_process
        )
    with contextlib.ExitStack() as shown_in:
        if _wants_progress(progress) and distributed.leads():
            display = shown_in.enter_context(progress_lib.choose())
            watch = progress_lib.OfRun(display, resolved(config, overrides).rounds)
            shown_in.callback(watch.end)
            on_evaluation = _both(watch, on_evaluation)
        result = compute(
            config,
            out=out,
            resume=resume,
            overwrite=overwrite,
            on_evaluation=on_evaluation,
            profile=profile,
            **overrides,
        )
    if out is not None and together is None and distributed.leads():
        folder = RunFolder(out)
        if result.params is not None or folder.lacks_figures:
            from fedjax_sec.report import plotting  # slow to import, and not needed before

            with folder.locked():
                plotting.headline_curve(result, folder.path / "figures")
    return result


def _in_each_process(spec: dict, how: dict, on_evaluation: Callable | None) -> tuple:
    """What each of several processes does: the run, whose result is given as plain arrays."""
    result = run(spec, **how, on_evaluation=on_evaluation)
    return result.metrics, result.summary, jax.device_get(result.params)


class SweepResult(NamedTuple):
    """A finished sweep: the cells of its grid, and the result of each in the same order.

    The results are read from the folder: their `params` are None (`checkpoint.keep_params` and
    `fedjax_sec.runs.loading.final_params` give them). A notebook shows the tables.
    """

    cells: list[Cell]
    results: list[Result]

    @property
    def frame(self):
        """One row a run as a pandas frame: labels, seed, final metrics; as `runs.csv`."""
        from fedjax_sec.report import tables  # pandas is slow to import

        return tables.to_frame(self.cells, self.results)

    def __repr__(self) -> str:
        axes = ", ".join(self.cells[0].labels) or "no axis"
        return f"SweepResult({len(self.cells)} runs over {axes}; {_range_of(self.results)})"

    def _repr_html_(self) -> str:
        from fedjax_sec.report import notebook, tables  # pandas is slow to import

        return notebook.page(repr(self), tables.tables(self.cells, self.results).values())


def _range_of(results: Sequence[Result]) -> str:
    """The lowest and the highest final headline."""
    name = headline_in(results[0].summary["final"])
    values = [result.summary["final"][name] for result in results]
    values = [value for value in values if value is not None]
    if not values:
        return f"{name} nowhere finite"
    return f"{name.replace('_', ' ')} {min(values):.1%} to {max(values):.1%}"


def sweep(
    base: str | Path | Mapping | Experiment,
    grid: Mapping | None = None,
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    *,
    data: Any = None,
    launcher: Any = None,
    workers: int | None = None,
    progress: bool | None = None,
    on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
    on_wait: Callable[[list[Cell]], None] | None = None,
    on_status: Callable[[Any], None] | None = None,
    **overrides,
) -> SweepResult:
    """Runs a sweep: a grid of experiments and seeds, with one compilation for each structure.

    What is finished in `out` is kept and not run again, and several processes may share the folder.

    Args:
      base: an experiment, as in `run`, beside a `grid` or `seeds`; or a whole sweep, a YAML file or
        a mapping with the keys of `fedjax-sec show sweep`.
      grid: axis -> a list of values, or {label: value}; an axis is a dotted key. Values of
        `attack`, `defense`, `model` and `data` may be objects, as in `run`.
      seeds: of every cell (None: the experiment's own).
      out: folder for the runs (`cells/`), the tables (`runs.csv`, `table.csv`, `table.md`) and the
        figure of the task's headline, such as `accuracy`.
      data: as in `run`, for every cell.
      launcher: where the groups of runs are computed: `local` (processes of this machine), `ray`,
        `slurm`, a mapping with `name` and fields, or an object with a method `launch` (None: as the
        sweep says, else in this process).
      workers: how many workers it has.
      progress: as in `run`.
      on_group: called as `on_group(number, total, cells)` when a group starts; what it returns is
        called after every evaluation with the rounds done and the rows just measured.
      on_wait: called once when all that is left, these cells, is run by other processes.
      on_status: called every now and then with the state of all runs while workers compute them.
      **overrides: keys of the sweep, such as `at_once=1`, or of every experiment, such as
        `rounds=20` and `**{"client.l2": 1e-4}`.

    Returns: `SweepResult` with `cells`, `results` and, as a pandas frame, `frame`.

    Raises: `ConfigError` (a `ValueError`) for a sweep that cannot be run or a folder that cannot be
    used, before anything compiles.

    >>> import tempfile
    >>> base, grid = {"rounds": 2}, {"client.l2": [0.0, 0.1]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = sweep(base, grid, seeds=[0, 1], out=folder)
    >>> done.frame[["client.l2", "seed", "rounds"]].values.tolist()
    [['0.0', 0, 2], ['0.0', 1, 2], ['0.1', 0, 2], ['0.1', 1, 2]]
    >>> [len(result.metrics["accuracy"]) for result in done.results]
    [2, 2, 2, 2]
    """
    out = _absolute(out)
    settings, cells = _load_sweep(base, grid, seeds, data, overrides)
    with _watching(progress, cells, out, on_group, on_wait, on_status) as callbacks:
        results = sweeps.run_cells(
            cells,
            out,
            at_once=settings.at_once,
            group_size=settings.group_size,
            launcher=sweeps.build_launcher(
                settings.launcher if launcher is None else launcher,
                settings.workers if workers is None else workers,
            ),
            **callbacks,
        )
    from fedjax_sec.report import sweeps as files_lib  # slow to import, and not needed before

    files_lib.write(cells, results, out, settings.title)
    return SweepResult(cells, results)


def _absolute(out: Any) -> Path:
    """The folder of a sweep; a callback may change the working directory."""
    if not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"out must be the path of a folder, got {shown(out)}.")
    return Path(out).absolute()


def _load_sweep(base, grid, seeds, data, overrides) -> tuple[sweeps.Sweep, list[Cell]]:
    """The settings and the cells of a sweep that is given whole, or as an experiment and a grid."""
    whole: Any = base.to_dict(objects=True) if isinstance(base, Experiment) else base
    if grid is not None or seeds is not None:
        is_file = isinstance(whole, (str, os.PathLike))
        content = read_yaml(Path(whole)) if is_file else whole
        if isinstance(content, Mapping) and not _is_sweep(content):
            whole = {"experiment": dict(content)}  # of a sweep's file, what is beside it matters
    given = {"grid": grid, "seeds": seeds}
    changes = {key: value for key, value in given.items() if value is not None}
    keys = {field.name for field in dataclasses.fields(sweeps.Sweep)}
    for key, value in overrides.items():
        changes[key if str(key).partition(".")[0] in keys else f"overrides.{key}"] = value
    if isinstance(data, Source) and data.name == NAME:
        inside = whole.get("experiment") if isinstance(whole, Mapping) else None
        keys_of = _with_data(inside if isinstance(inside, Mapping) else {}, data, {})
        changes |= {f"overrides.{key}": value for key, value in keys_of.items()}
    elif data is not None:
        changes["overrides.data"] = data
    return sweeps.load(whole, changes)


def _is_sweep(content: Mapping) -> bool:
    """Whether a mapping has a key of a sweep that no experiment has."""
    keys = {field.name for field in dataclasses.fields(sweeps.Sweep)}
    return bool(content.keys() & (keys - {field.name for field in dataclasses.fields(Experiment)}))


@contextlib.contextmanager
def _watching(
    progress: bool | None, cells, out: Path, on_group, on_wait, on_status=None
) -> Iterator[dict[str, Callable | None]]:
    """The caller's callbacks, and those that show the progress where it is wanted."""
    given = {"on_group": on_group, "on_wait": on_wait, "on_status": on_status}
    if not _wants_progress(progress):
        yield given
        return
    with progress_lib.choose() as display:
        watch = progress_lib.OfSweep(display, cells, sweeps.unfinished(cells, out), out)
        yield {
            "on_group": _both(watch.on_group, on_group),
            "on_wait": _both(watch.on_wait, on_wait),
            "on_status": _both(watch.on_status, on_status),
        }


def _wants_progress(progress: bool | None) -> bool:
    if not isinstance(progress, bool | None):
        raise ConfigError(f"progress must be true, false or null, got {shown(progress)}.")
    return progress_lib.in_notebook() if progress is None else progress


def _both(first: Callable, second: Any) -> Any:
    """Both functions one after the other; of what they return, too."""
    if not callable(second):  # what is none is refused by who calls it
        return first if second is None else second

    def both(*args):
        results = [one for one in (first(*args), second(*args)) if callable(one)]
        return _both(*results) if len(results) == 2 else next(iter(results), None)

    return both


class ArenaResult(NamedTuple):
    """A finished arena: what was run, the result of each of its cells, and what was refused.

    A notebook shows the tables.
    """

    arena: Arena
    results: list[Result]

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """The combinations that were not run, each with its reason."""
        return self.arena.refused

    @property
    def frame(self):
        """One row a combination and one for each defence's worst attack; as `arena.csv`."""
        from fedjax_sec.report import arena as report_lib  # pandas is slow to import

        return report_lib.to_frame(report_lib.score(self.arena, self.results))

    def __repr__(self) -> str:
        rows, columns = len(self.arena.attacks), len(self.arena.defenses)
        said = f"{rows} attacks x {columns} defences, {len(self.results)} runs"
        said += f", {len(self.refused)} refused" if self.refused else ""
        return f"ArenaResult({said}; {_range_of(self.results)})"

    def _repr_html_(self) -> str:
        from fedjax_sec.report import arena as report_lib  # pandas is slow to import
        from fedjax_sec.report import notebook

        sections = report_lib.sections(report_lib.score(self.arena, self.results))
        return notebook.page(repr(self), sections, map(str, self.refused))


def arena(
    base: str | Path | Mapping | Experiment,
    *,
    attacks: Any,
    defenses: Any,
    out: str | Path,
    seeds: int | Sequence[int] = 1,
    data: Any = None,
    launcher: Any = None,
    workers: int | None = None,
    progress: bool | None = None,
    on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
    on_wait: Callable[[list[Cell]], None] | None = None,
    **overrides,
) -> ArenaResult:
    """Runs every attack against every defence.

    No attack and plain mean are always among them. A combination that cannot be run, such as Bulyan
    with too few clients, is named in a Python warning before anything runs, and in the tables, and
    stops no other. What is finished in `out` is kept and not run again, and several processes may
    share the folder, as of any sweep.

    Args:
      base: the experiment, as in `run`; its own `attack` and `defense` are replaced.
      attacks, defenses: a list of names, mappings with `name`, objects as in `run`, and lists of
        them (pipelines); a mapping of labels to these; or text, such as `"krum,median"` or the
        path of a YAML file.
      out: folder for the runs, the tables `arena.md`, `arena.csv` (one row a combination, and one
        for each defence's worst attack) and `runs.csv`, and the heat maps.
      seeds: how many seeds each combination has, from the base's on, or which.
      data: as in `run`.
      launcher, workers, progress, on_group, on_wait: as in `sweep`.
      **overrides: keys of every experiment, dotted ones as `**{"client.l2": 1e-4}`.

    Returns: `ArenaResult` with `arena` (labels and cells), `results`, `refused` and, as a pandas
    frame, `frame`.

    Raises: `ConfigError` (a `ValueError`) for unknown names, and where plain mean without an attack
    cannot be run.

    >>> import tempfile
    >>> base = {"threat": {"num_malicious": 2}, "data": {"num_clients": 8}, "rounds": 2}
    >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     done = arena(base, attacks=["zero"], defenses=["median", "bulyan"], out=folder)
    >>> done.frame[["attack", "defense", "seeds"]].values.tolist()[:3]
    [['no attack', 'mean', 1], ['no attack', 'median', 1], ['no attack', 'bulyan', 0]]
    >>> [(one.attack, one.defense) for one in done.refused]
    [('no attack', 'bulyan'), ('zero', 'bulyan')]
    """
    out = _absolute(out)
    if isinstance(data, Source) and data.name == NAME:
        overrides = _with_data(base, data, overrides)
    elif data is not None:
        overrides["data"] = data
    planned = sweeps.plan_arena(base, attacks, defenses, seeds, overrides)
    planned, prepared = sweeps.admit(planned, out)
    for one in planned.refused:
        warnings.warn(f"refused and not run: {one}", stacklevel=2)
    with _watching(progress, planned.cells, out, on_group, on_wait) as callbacks:
        results = sweeps.run_cells(
            planned.cells,
            out,
            launcher=sweeps.build_launcher(launcher, workers),
            prepared=prepared,
            **callbacks,
        )
    from fedjax_sec.report import arena as report_lib  # slow to import, and not needed before

    report_lib.write(report_lib.score(planned, results), results, out)
    return ArenaResult(planned, results)
