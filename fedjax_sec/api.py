"""Defences and attacks on a stack of updates, without an experiment around them."""
# ruff: noqa: F821

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fedjax_sec import schema
from fedjax_sec.pipeline import Attack, Defense, Setting, check_components, fill_num_byzantine
from fedjax_sec.round import known_defense
from fedjax_sec.schema import ConfigError
from fedjax_sec.types import AttackerView, ServerData, ServerView


def aggregate(
    updates: Any,
    defense: Any,
    *,
    weights: Any = None,
    server_update: Any = None,
    key: PRNGKeyArray | None = None,
    **fields,
) -> Float[Array, "D"]:
    """Aggregates a stack of updates with a defence.

    Args:
      updates: [K, D], a NumPy or JAX array or nested lists.
      defense: a name, a mapping with `name` and fields, or a list of them (a pipeline).
      weights: [K] non-negative, the clients' numbers of examples; None: all equal.
      server_update: [D], what the server learned from its own examples, for the rules that compare
        clients with it (`fltrust`).
      key: randomness for defences that draw any; None: `jax.random.key(0)`.
      **fields: fields of the defence when it is given by its name alone.

    Returns: the aggregate [D]. Clients whose row is not finite are left out; a defence with a
    state starts from its initial one.

    Raises: `ConfigError` (a `ValueError`) for wrong shapes, unknown names or fields, and K and f
    that the rule cannot tolerate.

    >>> print(aggregate([[1.0], [2.0], [9.0]], "median"))
    [2.]
    >>> clipped = [{"name": "clip_norm", "max_norm": 4.0}, "median"]
    >>> print(aggregate([[1.0], [2.0], [9.0]], clipped))
    [2.]
    """
    updates = _as_stack(updates)
    pipeline = Defense.build(_with_fields(defense, fields, "defense"))
    _refuse_schedules(pipeline.stages, "defense")
    check_components(pipeline.stages, "defense", Setting(updates.shape[0]))
    weights = jnp.ones(updates.shape[0]) if weights is None else jnp.asarray(weights, jnp.float32)
    if weights.shape != (updates.shape[0],):
        raise ConfigError(f"weights must be [K] = [{updates.shape[0]}], got {weights.shape}.")
    if not bool(jnp.all(weights >= 0)) or not bool(jnp.any(weights > 0)):
        raise ConfigError("weights must be >= 0 and not all zero.")
    needing = [stage for stage in pipeline.stages if _needs_root(stage)]
    if server_update is not None and not needing:
        names = [stage.registered_name for stage in pipeline.stages]
        raise ConfigError(f"server_update would be ignored: none of {names} reads it.")
    server_update = _server_update(needing, server_update, updates)
    key = jax.random.key(0) if key is None else key
    return _aggregate(pipeline, updates, weights, key, server_update)


def _server_update(needing, given, updates):
    """[D] in the updates' type, or None where no stage needs it."""
    if not needing:
        return None
    if given is None:
        raise ConfigError(
            f"server_update is missing: {needing[0].registered_name!r} compares the clients with "
            f"it; give a vector [D] = [{updates.shape[1]}]."
        )
    given = jnp.asarray(given, updates.dtype)
    if given.shape != updates.shape[1:] or not bool(jnp.all(jnp.isfinite(given))):
        raise ConfigError(
            f"server_update must be [D] = [{updates.shape[1]}] finite numbers, got shape "
            f"{given.shape}{'' if given.shape != updates.shape[1:] else ' with NaN or infinity'}."
        )
    return given


@jax.jit
def _aggregate(pipeline, updates, weights, key, server_update=None):
    view = _server_view(updates, weights, server_update)
    return pipeline.apply(key, updates, pipeline.init(*updates.shape), view)[0]


def attack(
    updates: Any,
    attack: Any,
    *,
    malicious: Any,
    knowledge: str = "corrupted",
    defense: Any = None,
    server_update: Any = None,
    key: PRNGKeyArray | None = None,
    **fields,
) -> Float[Array, "K D"]:
    """Rewrites the malicious rows of a stack of updates with an attack.

    Args:
      updates: [K, D], a NumPy or JAX array or nested lists; the honest updates of all clients.
      attack: a name, a mapping with `name` and fields, or a list of them (a pipeline).
      malicious: [K] booleans, the adversary's rows.
      knowledge: `"corrupted"` shows the adversary its own rows only, `"omniscient"` all.
      defense: the server's rule, for attacks that adapt to it, as in `aggregate`.
      server_update: [D], what the server learned from its own examples, for the attacks and rules
        that use it; an adversary that is not omniscient does not see it.
      key: randomness for attacks that draw any; None: `jax.random.key(0)`.
      **fields: fields of the attack when it is given by its name alone.

    Returns: [K, D]; honest rows are unchanged.

    Raises: `ConfigError` (a `ValueError`) for wrong shapes, unknown names or fields, no malicious
    row, and attacks that need a model and data (run those in an experiment).

    >>> updates = [[0.0], [2.0], [7.0]]
    >>> print(attack(updates, "alie", malicious=[True, True, False], z=1.0)[:, 0])
    [2. 2. 7.]
    """
    updates = _as_stack(updates)
    mask = np.asarray(malicious)
    if mask.dtype != bool or mask.shape != (updates.shape[0],):
        raise ConfigError(
            f"malicious must be {updates.shape[0]} booleans, one a client, got {mask.dtype} "
            f"{mask.shape}."
        )
    if not mask.any():
        raise ConfigError("malicious marks no client, so the attack would do nothing.")
    if knowledge not in ("corrupted", "omniscient"):
        known = ("corrupted", "omniscient")
        raise ConfigError(
            f"knowledge must be one of {known}, got {knowledge!r}."
            f"{schema.suggestion(knowledge, known)}"
        )
    pipeline = Attack.build(_with_fields(attack, fields, "attack"))
    _refuse_schedules(pipeline.stages, "attack")
    setting = Setting(updates.shape[0], int(mask.sum()), knowledge=knowledge)
    check_components(pipeline.stages, "attack", setting)
    for stage in pipeline.stages:
        if stage.stage != "update" or getattr(stage, "needs_task", False):
            raise ConfigError(
                f"attack: {stage.registered_name!r} needs a model and data; run it in an "
                f"experiment (fedjax_sec.run)."
            )
    rule, own = _known_rule(pipeline, defense, server_update, knowledge, updates, int(mask.sum()))
    key = jax.random.key(0) if key is None else key
    return _attack(pipeline, rule, updates, jnp.asarray(mask), own, key, knowledge)


def _known_rule(pipeline, defense, server_update, knowledge, updates, num_malicious):
    """The defence and the server's update that the attack may use; refused where none does."""
    stages = pipeline.stages
    reads = [s.registered_name for s in stages if getattr(s, "needs_defense", False)]
    if defense is None:
        if reads:
            raise ConfigError(
                f"defense is missing: {reads[0]!r} adapts to the server's rule; name it."
            )
        rule = None
    else:
        if not reads:
            raise ConfigError(
                f"defense would be ignored: none of {[s.registered_name for s in stages]} reads it."
            )
        rule = Defense.build(defense, "defense")
        rule = Defense(tuple(fill_num_byzantine(s, num_malicious) for s in rule.stages))
        _refuse_schedules(rule.stages, "defense")
        check_components(rule.stages, "defense", Setting(updates.shape[0], num_malicious))
    needing = [s for s in (*stages, *(rule.stages if rule else ())) if _needs_root(s)]
    if knowledge != "omniscient":
        if server_update is not None:
            raise ConfigError(
                "server_update is known to an adversary with knowledge='omniscient' only."
            )
        return rule, None
    if server_update is not None and not needing:
        raise ConfigError("server_update would be ignored: neither attack nor defense reads it.")
    return rule, _server_update(needing, server_update, updates)


def _needs_root(stage) -> bool:
    return getattr(stage, "needs_root", False)


@functools.partial(jax.jit, static_argnames="knowledge")
def _attack(pipeline, rule, updates, malicious, own, key, knowledge):
    clients, dim = updates.shape
    everything = knowledge == "omniscient"
    view = AttackerView(
        malicious, jnp.ones_like(malicious) if everything else malicious,
        jnp.zeros(dim, updates.dtype), jnp.arange(clients), jnp.array(0),
        server_update=None if own is None else lambda: own,
    )  # fmt: skip
    if rule is not None:
        state = rule.init(clients, dim) if everything else None
        seen = _server_view(updates, jnp.ones(clients, updates.dtype), own)
        view = view._replace(defend=known_defense(rule, key, seen, state, clients)[0])
    return pipeline.apply(key, updates, pipeline.init(clients, dim), view)[0]


def _server_view(updates, weights, own):
    clients, dim = updates.shape
    return ServerView(
        params=jnp.zeros(dim, updates.dtype),
        weights=weights.astype(updates.dtype),
        client_ids=jnp.arange(clients),
        valid=jnp.ones(clients, bool),
        round=jnp.array(0),
        with_kept=False,
        root=None if own is None else ServerData(lambda: own, None),
    )


def _as_stack(updates) -> Array:
    array = jnp.asarray(updates)
    if array.ndim != 2 or 0 in array.shape:
        raise ConfigError(f"updates must be a non-empty [K, D] array, got shape {array.shape}.")
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or array.dtype == bool:
        raise ConfigError(f"updates must be real numbers, got {array.dtype}.")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def _with_fields(spec, fields, kind):
    if not fields:
        return spec
    if not isinstance(spec, str):
        raise ConfigError(
            f"{kind}: fields {sorted(fields)} can be given beside a name only; put them into the "
            f"mapping instead."
        )
    return {"name": spec, **fields}


def _refuse_schedules(stages, kind):
    for stage in stages:
        if schema.has_schedules(stage):
            raise ConfigError(
                f"{kind}: a field of {stage.registered_name!r} follows a schedule, but here are no "
                f"rounds; give a number, or run it in an experiment (fedjax_sec.run)."
            )
