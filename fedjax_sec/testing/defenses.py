"""The contract of a defence's stages."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import (
    ConfigError,
    ServerData,
    ServerView,
    Setting,
    Stage,
    check_components,
    tree_space,
)
from fedjax_sec.round.pipeline import Defense
from fedjax_sec.testing.compare import (
    both_ways,
    close,
    differs,
    expect,
    finite,
    no_concrete_values,
    same_bits,
    same_form,
)
from fedjax_sec.testing.fields import BYZANTINE, check_numeric_fields_are_traced, fixed_counts

CLIENTS, DIM = 16, 6
SETTING = Setting(CLIENTS, BYZANTINE)
#: A statistic, a bias and a kernel, the last layer's.
SPACE = tree_space(
    {"batch_stats": jnp.zeros(1), "params": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 1))}}
)


@core.pytree
class PlainMean(Stage):
    """An aggregator for stages that need one: the unweighted mean of the valid rows."""

    stage = "aggregate"
    registered_name = "plain_mean"

    def apply(self, key, updates, state, view):
        kept = view.valid.astype(updates.dtype)
        total = jnp.sum(jnp.where(view.valid[:, None], updates, 0.0), axis=0)
        return total / jnp.maximum(kept.sum(), 1.0), state, {"kept": kept}


@core.pytree
class Pairs(Stage):
    """A stage that makes one row of every two clients."""

    stage = "before"
    registered_name = "pairs"

    def after(self, setting):
        return setting._replace(num_clients=setting.num_clients // 2, merged=True)

    def apply(self, key, updates, state, view):
        rows = updates.shape[0] // 2
        members = jnp.repeat(jnp.eye(rows, dtype=updates.dtype), 2, axis=1)
        view = view._replace(
            valid=view.valid.reshape(rows, 2).all(1),
            weights=members @ view.weights,
            members=members,
        )
        return members @ updates / 2, view, state, {}


def as_pipeline(part) -> Defense:
    """The component in its place beside a plain mean."""
    if part.stage in ("client", "before"):
        return Defense((part, PlainMean()))
    return Defense((part,)) if part.stage == "aggregate" else Defense((PlainMean(), part))


def stack_of_updates(seed: int = 0, clients: int = CLIENTS):
    """Normal updates, and proof that they arrived: of zeros most checks hold for any rule."""
    drawn = np.random.default_rng(seed).normal(size=(clients, DIM)).astype(np.float32)
    updates = jnp.asarray(drawn)
    if not isinstance(updates, jax.core.Tracer):
        np.testing.assert_array_equal(updates, drawn, err_msg="JAX's copy of the updates differs")
    return updates


def defend(part, updates, seed=0, ids=None, server=None):
    """(aggregate, state, metrics) of the component in its pipeline; `ids` decide the weights.

    `server` is what the server learned itself, for rules that ask.
    """
    ids = np.arange(updates.shape[0]) if ids is None else ids
    server = jnp.linspace(1.0, -0.5, updates.shape[1]) if server is None else server
    return _jitted(part, updates, seed, jnp.asarray(ids), server)


def _defend(part, updates, seed, ids, server):
    defense = as_pipeline(part)
    view = ServerView(
        params=jnp.zeros(updates.shape[1]),
        weights=(ids % 4 + 1).astype(updates.dtype),
        client_ids=ids,
        valid=jnp.ones(updates.shape[0], bool),
        round=jnp.array(0),
        root=ServerData(lambda: server, lambda params: jnp.sum(params**2)),
        space=SPACE if updates.shape[1] == DIM else None,
    )
    state = defense.init(CLIENTS, updates.shape[1], view.space)
    done = defense.apply(jax.random.key(seed), updates, state, view)
    return done.aggregate, done.state, done.metrics


_jitted = jax.jit(_defend)


def draws(part) -> bool:
    """Whether the result depends on the key."""
    one, other = (defend(part, stack_of_updates(), seed)[0] for seed in (0, 1))
    return differs(one, other)


def check_shapes(part) -> None:
    """Shape, dtype, a finite aggregate and a state that keeps its form, with and without jit.

    `kept` lies in [0, 1] for each client, and is not zero for all.
    """
    updates, ids = stack_of_updates(), jnp.arange(CLIENTS)
    server = jnp.linspace(1.0, -0.5, DIM)
    run = lambda u: _defend(part, u, 0, ids, server)  # noqa: E731
    aggregate, state, metrics = both_ways(run, updates)
    expect(aggregate.shape == (DIM,), f"the aggregate has shape {aggregate.shape}, not {(DIM,)}")
    expect(aggregate.dtype == updates.dtype, f"the aggregate is {aggregate.dtype}")
    finite(aggregate, "the aggregate of finite updates")
    same_form(as_pipeline(part).init(CLIENTS, DIM, SPACE), state, "the state")
    if part.stage == "aggregate":
        expect("kept" in metrics, "an aggregator reports `kept`")
        kept = np.asarray(metrics["kept"])
        expect(kept.shape == (CLIENTS,), f"kept has shape {kept.shape}, not {(CLIENTS,)}")
        expect(((kept >= 0) & (kept <= 1)).all(), "kept lies outside [0, 1]")
        expect(kept.sum() > 0, "nothing is kept of sound updates")


def check_fixed_point(part) -> None:
    """Small identical updates, the server's too, are their own aggregate.

    Noise is exempt where it is added after; the mean over many keys is that of an aggregator that
    adds some. A rule that does not keep the updates' scale keeps at least their signs.
    """
    if part.stage == "after" and draws(part):
        return
    row = 0.01 * stack_of_updates()[0]
    rows = jnp.tile(row[None], (CLIENTS, 1))
    aggregate = defend(part, rows, server=row)[0]
    if part.noisy:
        expect(draws(part), "it adds no noise")
        many = jax.vmap(lambda seed: defend(part, rows, seed, server=row)[0])(jnp.arange(1000))
        close(many.mean(axis=0), row, atol=0.2 * float(many.std()))  # 6 standard errors
    elif part.keeps_scale:
        close(aggregate, row, rtol=1e-4, atol=1e-7)
    else:
        same_bits(jnp.sign(aggregate), jnp.sign(row))
        expect(not np.allclose(aggregate, row, rtol=0.1), "it does keep the scale")


def check_permutation_invariance(part) -> None:
    """The order of the clients does not matter; rules that draw randomness are exempt.

    Where a rule says that it does (`symmetric`), it does.
    """
    if draws(part):
        return
    updates, order = stack_of_updates(), np.random.default_rng(1).permutation(CLIENTS)
    aggregate, _, metrics = defend(part, updates)
    moved, _, moved_metrics = defend(part, updates[order], ids=order)
    if not part.symmetric:
        expect(not np.allclose(moved, aggregate, rtol=1e-3), "the order does not matter to it")
        return
    close(moved, aggregate)
    if part.stage == "aggregate":
        close(moved_metrics["kept"], metrics["kept"][order])


def check_bad_rows_are_left_out(part) -> None:
    """Any one row of NaN or infinity: as if the client had not taken part."""
    part = fixed_counts(part)
    updates = stack_of_updates()
    for row, bad in ((0, np.nan), (5, np.inf), (CLIENTS - 1, -np.inf)):
        aggregate = defend(part, updates.at[row, row % DIM].set(bad))[0]
        finite(aggregate, f"the aggregate beside a row of {bad}")
        if part.stage == "before" and draws(part):
            continue  # with fewer clients it draws other groups of them
        rest = np.delete(np.arange(CLIENTS), row)
        close(aggregate, defend(part, updates[rest], ids=rest)[0])


def check_over_seeds(part) -> None:
    """vmap over seeds and updates equals a loop over them."""
    stacks = jnp.stack([stack_of_updates(seed) for seed in range(3)])
    with no_concrete_values("an array"):
        mapped = jax.jit(jax.vmap(lambda u, s: defend(part, u, s)[0]))(stacks, jnp.arange(3))
    looped = jnp.stack([defend(part, u, s)[0] for s, u in enumerate(stacks)])
    close(mapped, looped)


def check_fields(part) -> None:
    """Numeric fields are traced."""
    updates = 5 * stack_of_updates()
    check_numeric_fields_are_traced(part, lambda one: defend(one, updates)[0], SETTING)


def check_merged_rows(part) -> None:
    """Behind a stage that merges rows a rule works, or its check refuses it."""
    stages = (Pairs(), *as_pipeline(part).stages)
    try:
        check_components(stages, "defense", SETTING)
    except ConfigError:
        return
    updates = stack_of_updates()
    view = ServerView(
        jnp.zeros(DIM),
        jnp.ones(CLIENTS),
        jnp.arange(CLIENTS),
        jnp.ones(CLIENTS, bool),
        jnp.array(0),
        root=ServerData(lambda: updates[0], lambda params: jnp.sum(params**2)),
        space=SPACE,
    )
    defense = Defense(stages)
    try:
        state = defense.init(CLIENTS, DIM, SPACE)
        done = defense.apply(jax.random.key(0), updates, state, view)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"it takes rows for clients: {error}") from error
    expect(done.aggregate.shape == (DIM,), "it takes rows for clients")
    finite(done.aggregate, "the aggregate of merged rows")
    kept = done.metrics["kept"].shape
    expect(kept == (CLIENTS,), f"kept has shape {kept} behind merged rows, not {(CLIENTS,)}")


CHECKS = (
    check_shapes,
    check_fixed_point,
    check_permutation_invariance,
    check_bad_rows_are_left_out,
    check_over_seeds,
    check_fields,
)
