"""Odd arguments of the Python functions: one line that says what is wrong, or a finite result.

Derandomised and bounded: a failure is found again by running the test again.
"""

import decimal
import fractions
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_sec import aggregate, attack
from fedjax_sec.core import ConfigError, registry

pytestmark = pytest.mark.slow

CLIENTS, DIM = 7, 3
FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Odd:
    def __repr__(self):
        return "odd\nobject " * 200


class Broken:
    """An array only by its looks."""

    shape, ndim, dtype = (CLIENTS, DIM), 2, "float99"

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no\ndata")


def recursive():
    got = [1.0]
    got.append(got)
    return got


STACK = np.random.default_rng(0).normal(size=(CLIENTS, DIM)).astype(np.float32)
VECTOR = STACK[0].copy()
NUMBERS = [
    0,
    1,
    -1,
    2,
    0.5,
    -0.0,
    2**31,
    2**40,
    2**63,
    2**64,
    10**400,
    1e-50,
    1e-40,
    1e18,
    1e30,
    3e38,
    -3e38,
    1e39,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
]
THINGS = [
    None,
    True,
    False,
    "",
    "median",
    "krum",
    "alie",
    "zero",
    "omniscient",
    "nonsense",
    b"bytes",
    1j,
    [],
    (),
    {},
    set(),
    {1},
    [[]],
    [None],
    [1, 2],
    [True] * CLIENTS,
    [1.0] * DIM,
    [1] * CLIENTS,
    {"name": "krum"},
    {"name": None},
    {"name": ["krum"]},
    {"w": 1.0},
    {1: 2, "a": 3},
    object,
    Odd(),
    Broken(),
    recursive(),
    print,
    lambda w: w,
    lambda w: jnp.sum(w),
    np.median,
    range(3),
    decimal.Decimal(1),
    fractions.Fraction(1, 3),
    np.float32(2),
    np.int8(3),
    np.bool_(True),
    np.array(1.0),
    np.zeros(DIM),
    np.ones(CLIENTS),
    np.ones((CLIENTS, DIM), object),
    np.array(["a"]),
    np.ma.masked_array(np.ones(CLIENTS)),
    jnp.ones(DIM, jnp.bfloat16),
    np.datetime64("2020-01-01"),
    jax.random.key(1),
    jax.random.PRNGKey(1),
    registry.defenses.get("median"),
    registry.defenses.build("median"),
    registry.attacks.build("zero"),
    pd.Series(np.ones(CLIENTS)),
    *NUMBERS,
]

# By position, so that a report does not print all of them.
things = st.integers(0, len(THINGS) - 1).map(lambda i: THINGS[i])
numbers = st.sampled_from(NUMBERS)


def with_numbers(drawn):
    """The stack with some odd numbers in it, in a type that may not hold them."""
    values, dtype = drawn
    got = STACK.astype(np.float64).astype(object)
    for i, j, value in values:
        got[i, j] = value
    if dtype is None:
        return got.tolist()
    try:
        with np.errstate(all="ignore"):
            return got.astype(dtype)
    except (OverflowError, TypeError, ValueError):
        return got


places = st.tuples(st.integers(0, CLIENTS - 1), st.integers(0, DIM - 1), numbers)
#: Finite in float32, so that a call gets as far as computing with it.
LARGE = [-3e38, -1e30, -1e18, -1.0, 0.0, 1e-40, 1e-30, 1.0, 1e5, 1e18, 1e19, 1e30, 3e38]
large = st.tuples(
    st.integers(0, CLIENTS - 1), st.integers(0, DIM - 1), st.sampled_from([*LARGE, np.nan, np.inf])
)
DTYPES = [None, object, np.float16, jnp.bfloat16, np.float32, np.float64, np.int8, np.int64]
stacks = st.tuples(st.lists(places, max_size=4), st.sampled_from(DTYPES)).map(with_numbers)


def tree(rows, change=None):
    clients = [{"w": row[:2].copy(), "b": [row[2:].copy()]} for row in rows]
    if change is not None:
        at, key, value = change
        clients[at] = value if key is None else clients[at] | {key: value}
    return clients


trees = st.tuples(
    st.integers(0, CLIENTS - 1), st.sampled_from([None, "w", "b", "c", 1]), things
).map(lambda change: tree(STACK, change))
several = st.lists(things, min_size=1, max_size=CLIENTS)
all_updates = st.one_of(
    st.just(STACK),
    st.just(tree(STACK)),
    stacks,
    trees,
    several,
    things,
    st.integers(0, 4).map(
        lambda i: [STACK.tolist(), list(STACK), pd.DataFrame(STACK), STACK[None], STACK[0]][i]
    ),
)


def specifications(kind, names):
    """A name, a mapping with fields that may not exist, an instance, a thing, or a list of them."""
    built = [registry.KINDS[kind].build(name) for name in names]
    fields = {"unknown"}.union(*map(vars, built))
    mapping = st.tuples(
        st.sampled_from(names),
        st.dictionaries(st.sampled_from(sorted(fields)), st.one_of(numbers, things), max_size=2),
    ).map(lambda drawn: {"name": drawn[0], **drawn[1]})
    one = st.one_of(st.sampled_from(names), mapping, things)
    return st.one_of(one, st.lists(one, max_size=3))


defenses = specifications("defense", registry.defenses.names())
QUICK = (
    "alie",
    "boost",
    "krum_attack",
    "mean_control",
    "random",
    "sign_flip",
    "trim_attack",
    "zero",
)
attacks = specifications("attack", (*QUICK, "hybrid", "gradient_adaptive", "pattern", "scaling"))


def optional(strategy, default):
    """Mostly the default, so that calls get beyond the first odd argument."""
    return st.one_of(st.just(default), st.just(default), st.just(default), strategy)


vectors = st.one_of(st.just(VECTOR), things, numbers.map(lambda v: [v, 0.0, 1.0]))
losses = st.one_of(things, st.just(lambda w: jnp.sum(w**2)), st.just(lambda w: w / 0))
weights = st.one_of(things, st.lists(numbers, min_size=CLIENTS, max_size=CLIENTS))
shared = {
    "server_update": optional(vectors, None),
    "server_loss": optional(losses, None),
    "params": optional(vectors, None),
    "key": optional(things, None),
}


def outcome(call):
    """The result, or None where a `ValueError` of one line says what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except ConfigError as error:
            message = str(error)
            assert message.strip() and "\n" not in message and len(message) < 1000, message
            return None


def leaves(result):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(result)]


@FUZZ
@given(
    all_updates,
    optional(defenses, "median"),
    optional(weights, None),
    st.fixed_dictionaries(shared),
)
def test_aggregate(updates, defense, weights, others):
    got = outcome(lambda: aggregate(updates, defense, weights=weights, **others))
    if got is not None:
        assert all(np.isfinite(leaf).all() for leaf in leaves(got))
        like = updates[0] if isinstance(updates, list) and isinstance(updates[0], dict) else None
        if like is None:
            assert got.ndim == 1 and got.shape == np.shape(updates)[1:]
        else:
            assert jax.tree.structure(got) == jax.tree.structure(like)
            shapes = [np.shape(leaf) for leaf in jax.tree.leaves(like)]
            assert [leaf.shape for leaf in leaves(got)] == shapes


def sound(kind, names, base):
    """A component as it can be used, sometimes with an odd number in one of its fields."""
    built = {n: registry.KINDS[kind].build({"name": n} | base.get(n, {})) for n in names}
    fields = {n: sorted(vars(one)) or ["unknown"] for n, one in built.items()}
    changes = st.sampled_from(names).flatmap(
        lambda n: st.one_of(
            st.just({}),
            st.dictionaries(st.sampled_from(fields[n]), numbers, max_size=1),
        ).map(lambda change: {"name": n} | base.get(n, {}) | change)
    )
    return changes


BOUNDED = {n: {"num_byzantine": 1} for n in ("bulyan", "krum", "multi_krum", "trimmed_mean")}
AGGREGATORS = [
    name for name in registry.defenses.names() if registry.defenses.get(name).stage == "aggregate"
]
aggregators = sound("defense", AGGREGATORS, BOUNDED)
before = sound("defense", ["clip_norm"], {"clip_norm": {"max_norm": 1.0}})
after = sound("defense", ["gaussian_noise", "rlr"], {"rlr": {"threshold": 3}})
pipelines = st.tuples(st.lists(before, max_size=1), aggregators, st.lists(after, max_size=1)).map(
    lambda parts: [*parts[0], parts[1], *parts[2]]
)
odd_numbers = st.tuples(
    st.lists(large, max_size=6),
    st.sampled_from([np.float16, jnp.bfloat16, np.float32, np.float64]),
).map(with_numbers)
odd_weights = st.lists(
    st.sampled_from([0, 1, 3, 1e-30, 1e18, 1e38]), min_size=CLIENTS, max_size=CLIENTS
)


@FUZZ
@given(odd_numbers, pipelines, optional(odd_weights, None))
def test_aggregate_of_odd_numbers(updates, pipeline, weights):
    root = {"server_update": VECTOR} if "fltrust" in {p["name"] for p in pipeline} else {}
    got = outcome(lambda: aggregate(updates, pipeline, weights=weights, **root))
    assert got is None or (got.shape == (DIM,) and np.isfinite(leaves(got)[0]).all())


@FUZZ
@given(
    odd_numbers,
    sound("attack", QUICK, {"alie": {"z": 1.0}}),
    st.sampled_from(["corrupted", "omniscient"]),
)
def test_attack_on_odd_numbers(updates, name, knowledge):
    got = outcome(lambda: attack(updates, name, malicious=MASK, knowledge=knowledge))
    assert got is None or np.isfinite(np.asarray(got, np.float64)[MASK]).all()


MASK = [True, True, False, False, False, False, True]
masks = st.one_of(things, st.lists(st.booleans(), min_size=CLIENTS, max_size=CLIENTS))


@FUZZ
@given(
    all_updates,
    optional(attacks, {"name": "alie", "z": 1.0}),
    optional(masks, MASK),
    optional(st.one_of(st.just("omniscient"), things), "corrupted"),
    optional(defenses, None),
    st.fixed_dictionaries(shared),
)
def test_attack(updates, name, malicious, knowledge, defense, others):
    got = outcome(
        lambda: attack(
            updates, name, malicious=malicious, knowledge=knowledge, defense=defense, **others
        )
    )
    if got is None:
        return
    mask = np.asarray(malicious)
    assert len(got) == len(mask)
    for i, client in enumerate(got):
        if mask[i]:
            assert all(np.isfinite(leaf).all() for leaf in leaves(client))
        elif isinstance(got, list):
            assert client is updates[i]
        else:
            given = np.asarray(np.asarray(updates)[i], np.float64).astype(client.dtype)
            np.testing.assert_array_equal(client, given)


@FUZZ
@given(st.sampled_from(["defense", "attack", "model", "client", "partition", "dataset"]), st.data())
def test_build(kind, data):
    got = registry.KINDS[kind]
    spec = data.draw(specifications(kind, [name for name in got.names() if name != "resnet"]))
    built = outcome(lambda: got.build(spec))
    assert built is None or hasattr(built, "registered_name")


def test_the_odd_arguments_reach_results():
    """Else the fuzz would look at refusals only."""
    reached = {"aggregate": 0, "refused": 0}

    @settings(FUZZ, max_examples=60)
    @given(odd_numbers, pipelines)
    def count(updates, pipeline):
        got = outcome(lambda: aggregate(updates, pipeline, server_update=None))
        reached["refused" if got is None else "aggregate"] += 1

    count()
    assert min(reached.values()) >= 10, reached
