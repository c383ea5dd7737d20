"""`aggregate` and `attack`: what they take, what they refuse and in which words."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import same_bits

from fedjax_sec import aggregate, attack, core
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.round.pipeline import Attack, Defense

STACK = [[1.0, 2.0], [3.0, 4.0], [8.0, 6.0]]
MASK = [True, True, False]


def refused(call, *parts):
    """The call's `ConfigError`: one line that holds all parts and no array."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    for part in parts:
        assert part in message, message


@pytest.fixture
def register():
    """Registers components for one test."""
    made = []

    def add(result, name, cls):
        result.register(name)(type(cls.__name__, (cls,), {}))  # a class becomes a dataclass once
        made.append((result, name))

    yield add
    for result, name in made:
        del result._entries[name]


# --- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[2**40], [2**40]]), 2.0**40),
        (np.array([[2**63], [2**63]], np.uint64), 2.0**63),
        ([[2**70], [2**70]], 2.0**70),
        (np.array([[16777217], [16777217]]), 16777216.0),  # rounded once, from float64
        (np.array([[1 + 2.0**-30]], np.float64), 1.0),
        (pd.DataFrame({"a": [1, 5], "b": [2.0, 2.0]}), 3.0),
        (pd.DataFrame({"a": [1, 5], "b": [2.0, 2.0]}, dtype=object), 3.0),
        ([np.array([2.0]), np.array([4], np.int8)], 3.0),
    ],
)
def test_whole_and_wide_numbers_keep_their_value(values, expected):
    got = aggregate(values, "mean")
    assert got.dtype == jnp.float32 and got[0] == expected
    mask = np.arange(len(values)) < 1
    sent = attack(values, {"name": "boost", "factor": 1.5}, malicious=mask)
    assert sent.dtype == jnp.float32 and sent[0, 0] == np.float32(1.5) * np.float32(
        np.asarray(values)[0, 0]
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_floating_types_stay(dtype):
    got = aggregate(jnp.asarray(STACK, dtype), "median")
    assert got.dtype == dtype and got.tolist() == [3.0, 4.0]


class Tensor:
    """As other libraries' arrays: known by `__array__`, which may fail."""

    def __init__(self, values, error=None):
        self.values, self.error = np.asarray(values), error
        self.shape, self.ndim = self.values.shape, self.values.ndim

    def __array__(self, dtype=None, copy=None):
        if self.error:
            raise self.error
        return self.values


class Sparse:
    def toarray(self):
        return np.ones((2, 2))


def test_arrays_of_other_libraries():
    assert aggregate(Tensor(STACK), "median").tolist() == [3.0, 4.0]
    assert aggregate([Tensor(row) for row in STACK], "median").tolist() == [3.0, 4.0]
    hint = RuntimeError("Can't call numpy() on Tensor that requires grad.\nUse detach().")
    refused(
        lambda: aggregate(Tensor(STACK, hint), "mean"), "updates cannot be read", "Use detach()"
    )


def nested(depth):
    value = 1.0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("updates", "parts"),
    [
        (np.array([[0.0, 1.0], [1e300, 0.0]]), ("updates[1, 0] = 1.e+300", "range of float32")),
        ([[10**400]], ("beyond float64's range",)),
        ([[1.0, 2.0], [3.0]], ("updates[1] holds 1 numbers, updates[0] 2 numbers",)),
        ([np.ones(2), np.ones(3)], ("updates[1] holds 3 numbers",)),
        ([[1.0], 2.0], ("updates[1] holds one value",)),
        ([["a", "b"]], ("must hold real numbers, got <U1",)),
        ("abc", ("must hold real numbers",)),
        (None, ("got None",)),
        ([[None, 1.0]], ("got None (NoneType)",)),
        (np.array([[object()]]), ("must hold real numbers",)),
        ({"w": 1.0}, ("a list with one pytree for each client, got one dict",)),
        ({1.0, 2.0}, ("(set)",)),
        ((row for row in STACK), ("(generator)",)),
        (3.0, ("non-empty array [K, D], got shape ()",)),
        ([1.0, 2.0], ("got shape (2,)", "one row for each client", "updates[:, None]")),
        (np.ones((2, 2, 2)), ("got shape (2, 2, 2)", "updates.reshape(K, -1)")),
        ([[[1.0], [2.0]]], ("got shape (1, 2, 1)", "a list with one pytree")),
        (nested(40), ("nested more than 32 lists deep",)),
        ([], ("non-empty", "got shape (0,)")),
        ([[], []], ("non-empty", "got shape (2, 0)")),
        ([[1j]], ("must hold real numbers, got complex128",)),
        (np.array([[True]]), ("must hold real numbers, got bool",)),
        ([[True, 2.0]], ("updates[0] must hold real numbers, got true or false",)),
        (np.ma.masked_array([[1.0]], [[True]]), ("masked array", "updates.filled(0)")),
        (Sparse(), (".toarray()",)),
        (np.array([["2020-01-01"]], "datetime64[D]"), ("must hold real numbers",)),
        (jax.random.key(0), ("must hold real numbers",)),
        ([[np.nan, 1.0], [np.inf, 1.0]], ("holds NaN or infinity", "every row", "(2 of 2)")),
    ],
)
def test_what_is_no_stack_is_refused(updates, parts):
    refused(lambda: aggregate(updates, "mean"), *parts)
    refused(lambda: attack(updates, "zero", malicious=[True, False]), *parts[:1])


def test_inside_a_transformation_it_is_refused():
    refused(lambda: jax.jit(lambda u: aggregate(u, "mean"))(jnp.ones((2, 2))), "updates is traced")


def test_fields_may_be_traced():
    """Updates may not, since their values are checked; a field's values share one program."""

    def clipped(norm):
        return aggregate(STACK, [{"name": "clip_norm", "max_norm": norm}, "mean"])

    norms = jnp.array([0.5, 2.0])
    expected = jnp.stack([clipped(float(norm)) for norm in norms])
    np.testing.assert_allclose(jax.vmap(clipped)(norms), expected, rtol=1e-6)

    def flipped(scale):
        return attack(STACK, "sign_flip", malicious=MASK, scale=scale)

    sent = jax.vmap(flipped)(jnp.array([1.0, 2.0]))
    assert sent[:, 0, 0].tolist() == [-1.0, -2.0] and sent[1, 2].tolist() == STACK[2]


# --- Rows that are left out ---------------------------------------------------------------------


def test_a_warning_says_which_rows_are_left_out():
    rows = np.array([*STACK, [np.nan, 0.0], [0.0, -np.inf]])
    with pytest.warns(UserWarning, match="2 of 5 rows hold NaN or infinity and are left out: 3, 4"):
        got = aggregate(rows, "median")
    assert got.tolist() == [3.0, 4.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aggregate(STACK, "median")


def test_a_warning_says_what_the_rows_that_are_left_do_not_allow():
    rows = np.arange(7.0)[:, None] * np.ones(2)
    rows[0] = np.nan
    with pytest.warns(UserWarning, match="with the rows that are left, .* with K = 6 clients"):
        aggregate(rows, "krum", num_byzantine=2)


def test_weight_on_rows_that_are_left_out_only_is_refused():
    rows = [[np.nan], [1.0]]
    with pytest.warns(UserWarning):
        refused(lambda: aggregate(rows, "mean", weights=[2, 0]), "every row with a weight above 0")
    with pytest.warns(UserWarning):
        assert aggregate(rows, "mean", weights=[2, 1]).tolist() == [1.0]


def test_rows_that_show_the_adversary_nothing():
    rows = np.array([[np.nan], [1.0], [3.0], [9.0]])
    mask = [True, True, True, False]
    with pytest.warns(UserWarning, match="1 of 3 rows .* show the adversary nothing: 0"):
        sent = attack(rows, "alie", malicious=mask, z=1.0)
    assert sent[:, 0].tolist() == [3.0, 3.0, 3.0, 9.0]  # mean 2, deviation 1, of the other two
    rows[1:3] = np.inf
    refused(
        lambda: attack(rows, "alie", malicious=mask, z=1.0),
        "every row that the adversary sees holds NaN or infinity (3 of 3)",
    )
    with pytest.warns(UserWarning, match="1 of 2 rows hold numbers too large to square .*: 0"):
        sent = attack([[2e19], [1.0], [3.0]], "alie", malicious=MASK, z=1.0)
    assert sent[:, 0].tolist() == [1.0, 1.0, 3.0]
    rows = np.array([[1.0], [3.0], [np.nan]])
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        sent = attack(rows, "alie", malicious=MASK, z=1.0, knowledge="omniscient")
    np.testing.assert_array_equal(sent[:, 0], [3.0, 3.0, np.nan])


def test_what_overflows_is_refused():
    refused(
        lambda: attack(STACK, "sign_flip", malicious=MASK, scale=3e38),
        "what the malicious clients would send is not finite",
        "['sign_flip']",
        "scale them down",
    )


def test_an_attack_that_changes_nothing_says_so():
    same = [[1.0], [1.0], [4.0]]
    with pytest.warns(UserWarning, match=r"the attack \['alie'\] changed no update"):
        assert attack(same, "alie", malicious=MASK, z=1.0)[:, 0].tolist() == [1.0, 1.0, 4.0]


# --- Weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1, np.inf, 1], ("weights[1] = inf",)),
        ([1, 1, np.nan], ("weights[2] = nan",)),
        ([-1, 1, 1], ("weights[0] = -1", "must be 0 or between 1.2e-38 and 3.4e+38")),
        ([1e-40, 0, 0], ("weights[0] = 1e-40",)),
        ([0, 0, 0], ("weights are all zero",)),
        ([3e38, 3e38, 0], ("have the sum 6e+38", "only their ratios count")),
        ([10**40, 1, 1], ("weights[0] = 1.e+40 is beyond",)),
        ([[1, 1, 1]], ("weights must be [K] = [3], got shape (1, 3)",)),
        ([1, 1], ("weights must be [K] = [3], got shape (2,)",)),
        (1.0, ("weights must be [K] = [3], got shape ()",)),
        ("abc", ("weights must hold real numbers",)),
        ([[1], [1, 2]], ("weights cannot be read",)),
        (np.ma.masked_array([1.0, 2.0, 3.0]), ("masked array",)),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, parts):
    refused(lambda: aggregate(STACK, "mean", weights=weights), *parts)


def test_weights_are_counts_of_any_size():
    counts = np.array([2**33, 2**33, 2**34])
    assert aggregate(STACK, "mean", weights=counts).tolist() == [5.0, 4.5]
    near = 0.01 * np.array(STACK)
    huge = aggregate(near, "geometric_median", weights=[1e38, 1e-30, 1e38])
    expected = aggregate(near, "geometric_median", weights=[1, 0, 1])
    np.testing.assert_allclose(huge, expected, rtol=1e-5)
    half = jnp.asarray(STACK, jnp.float16)  # whose own range ends at 65504
    assert aggregate(half, "mean", weights=[100_000, 100_000, 200_000]).tolist() == [5.0, 4.5]


# --- Keys, masks and knowledge ------------------------------------------------------------------

NOISY = ["mean", {"name": "gaussian_noise", "std": 1.0}]


def test_a_key_is_a_seed_a_key_or_an_older_key():
    new, other = (aggregate(STACK, NOISY, key=jax.random.key(seed)) for seed in (7, 8))
    for key in (7, np.int64(7), jax.random.PRNGKey(7), np.asarray(jax.random.PRNGKey(7))):
        same_bits(aggregate(STACK, NOISY, key=key), new)
    assert not np.array_equal(new, other)
    same_bits(aggregate(STACK, NOISY), aggregate(STACK, NOISY, key=0))
    sent = attack(STACK, "random", malicious=MASK, key=7)
    same_bits(sent, attack(STACK, "random", malicious=MASK, key=jax.random.key(7)))


@pytest.mark.parametrize(
    "key", [-1, 2**32, True, 0.5, "a", [1, 2], np.ones(3), jax.random.split(jax.random.key(0))]
)
def test_what_is_no_key_is_refused(key):
    wanted = "key must be a seed from 0 to 2**32 - 1 or one JAX key such as jax.random.key(0)"
    refused(lambda: aggregate(STACK, NOISY, key=key), wanted)
    refused(lambda: attack(STACK, "random", malicious=MASK, key=key), wanted)


@pytest.mark.parametrize(
    ("malicious", "parts"),
    [
        ([0, 2], ("got int64", "write numpy.isin(numpy.arange(3), [0, 2])")),
        ([1, 0, 1], ("got int64", "numpy.asarray(malicious, bool)")),
        ([2, 1, 0], ("numpy.isin(numpy.arange(3), [2, 1, 0])",)),
        ([True, False], ("got bool with shape (2,)",)),
        ([False] * 3, ("marks no client",)),
        (None, ("got object",)),
        ("yes", ("got <U3",)),
        ([[True], [True, False]], ("malicious cannot be read",)),
        (np.ma.masked_array(MASK), ("MaskedArray",)),
    ],
)
def test_what_is_no_mask_is_refused(malicious, parts):
    refused(lambda: attack(STACK, "zero", malicious=malicious), *parts)


def test_the_remedy_for_positions_marks_these_clients():
    stack = np.ones((10, 2), np.float32)
    with pytest.raises(ConfigError) as caught:
        attack(stack, "zero", malicious=[7, 8, 9])
    written = re.search(r"write (numpy\.isin\(.*\))\.$", str(caught.value))[1]
    mask = eval(written, {"numpy": np})
    assert attack(stack, "zero", malicious=mask)[:, 0].tolist() == [1.0] * 7 + [0.0] * 3


@pytest.mark.parametrize("knowledge", [None, 3, ["corrupted"], {}, np.ones(2), "omnicient"])
def test_unknown_knowledge_is_refused(knowledge):
    refused(
        lambda: attack(STACK, "zero", malicious=MASK, knowledge=knowledge),
        "knowledge must be one of ('corrupted', 'omniscient')",
    )


# --- Components ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (None, ("exactly one aggregator",)),
        ((), ("exactly one aggregator",)),
        ("", ("unknown defense ''",)),
        ("medain", ("Did you mean 'median'",)),
        ({"median"}, ("expected the name of a defense",)),
        (3, ("expected the name of a defense",)),
        (["median", "mean"], ("exactly one aggregator, got 2",)),
        ({"name": "median", "f": 1}, ("unknown key 'f'",)),
    ],
)
def test_what_names_no_defense_is_refused(given, parts):
    refused(lambda: aggregate(STACK, given), *parts)
    refused(
        lambda: attack(STACK, "gradient_adaptive", malicious=MASK, defense=given),
        *(("defense is missing",) if given is None else parts),
    )


@pytest.mark.parametrize("given", [None, [], ()])
def test_no_attack_is_refused(given):
    refused(lambda: attack(STACK, given, malicious=MASK), "attack names no attack")


def test_unknown_fields_are_refused():
    refused(lambda: aggregate(STACK, "krum", factor=1), "unknown key 'factor'")
    refused(lambda: aggregate(STACK, ["mean"], factor=1), "fields ['factor'] can be given beside")
    refused(lambda: attack(STACK, "zero", malicious=MASK, factor=1), "unknown key 'factor'")


def test_built_components_and_pipelines_are_taken_and_checked():
    median = registry.defenses.build("median")
    for given in (median, [median], (median,), Defense.build("median"), {"name": "median"}):
        assert aggregate(STACK, given).tolist() == [3.0, 4.0]
    flip = registry.attacks.build("sign_flip")
    for given in (flip, [flip], Attack.build("sign_flip")):
        same_bits(attack(STACK, given, malicious=MASK), attack(STACK, "sign_flip", malicious=MASK))
    unknown = Defense((core.pytree(type("Unregistered", (), {"stage": "aggregate"}))(),))
    refused(lambda: aggregate(STACK, unknown), "Unregistered")


def test_a_need_inside_another_attack_counts():
    outer = {"name": "hybrid", "main": "gradient_adaptive"}
    refused(lambda: attack(STACK, outer, malicious=MASK), "'gradient_adaptive' adapts")
    outer = {"name": "hybrid", "main": "fltrust_adaptive"}
    everything = {"malicious": MASK, "knowledge": "omniscient"}
    refused(lambda: attack(STACK, outer, **everything), "'fltrust_adaptive' aims at")
    outer = {"name": "hybrid", "main": "alie_backdoor"}
    refused(lambda: attack(STACK, outer, malicious=MASK), "needs a model and data")


def test_checks_are_told_what_the_adversary_sees(register):
    class Asks:
        stage = "update"

        def check(self, path, setting):
            raise ConfigError(f"{path} is told {setting.knowledge}, {setting.num_malicious}")

        def apply(self, key, updates, state, view):
            raise AssertionError("it is refused before")

    register(registry.attacks, "asks", Asks)
    for knowledge in ("corrupted", "omniscient"):
        refused(
            lambda knowledge=knowledge: attack(STACK, "asks", malicious=MASK, knowledge=knowledge),
            f"attack is told {knowledge}, 2",
        )


# --- What the server knows ----------------------------------------------------------------------


class Rule:
    """An aggregator that does nothing until told."""

    stage = "aggregate"
    needs = frozenset({"root"})

    def init(self, num_clients, dim):
        return ()


class ByLoss(Rule):
    """The row whose parameters have the smallest loss on the server's examples."""

    def apply(self, key, updates, state, view):
        losses = jax.vmap(lambda u: view.root.loss(view.params + u))(updates)
        return updates[jnp.argmin(losses)], state, {}


class ByBoth(Rule):
    def apply(self, key, updates, state, view):
        losses = jax.vmap(view.root.loss)(updates)
        return updates[jnp.argmin(losses)] + view.root.update(), state, {}


def test_a_rule_that_evaluates_clients_on_the_servers_examples(register):
    register(registry.defenses, "by_loss", ByLoss)

    def loss(w):
        return jnp.sum((w - 4.0) ** 2)

    assert aggregate(STACK, "by_loss", server_loss=loss).tolist() == [3.0, 4.0]
    at = [-5.0, -2.0]  # where updates lead from there
    assert aggregate(STACK, "by_loss", server_loss=loss, params=at).tolist() == [8.0, 6.0]
    refused(lambda: aggregate(STACK, "by_loss"), "'by_loss'", "or server_loss")
    refused(
        lambda: aggregate(STACK, "by_loss", server_update=[1.0, 1.0]),
        "server_loss is missing: 'by_loss' evaluates parameters",
    )
    refused(
        lambda: aggregate(STACK, "by_loss", server_update=[1.0, 1.0], server_loss=loss),
        "server_update would be ignored: none of ['by_loss'] reads it",
    )


def test_a_function_that_changes_is_traced_anew(register):
    register(registry.defenses, "by_loss", ByLoss)
    goal = {"at": 1.0}

    def loss(w):
        return jnp.sum((w - goal["at"]) ** 2)

    first = aggregate(STACK, "by_loss", server_loss=loss).tolist()
    goal["at"] = 8.0
    assert (first, aggregate(STACK, "by_loss", server_loss=loss).tolist()) == (STACK[0], STACK[2])


def test_each_reader_of_the_servers_examples_says_what_it_lacks(register):
    register(registry.defenses, "by_both", ByBoth)

    def loss(w):
        return jnp.sum(w**2)

    got = aggregate(STACK, "by_both", server_loss=loss, server_update=[1.0, 1.0])
    assert got.tolist() == [2.0, 3.0]
    refused(lambda: aggregate(STACK, "by_both", server_loss=loss), "server_update is missing")
    refused(lambda: aggregate(STACK, "fltrust", server_loss=loss), "server_update is missing")
    mine = {"server_update": [1.0, 1.0]}
    refused(lambda: aggregate(STACK, "by_both", **mine), "server_loss is missing")
    refused(lambda: aggregate(STACK, "fltrust", server_loss=loss, **mine), "would be ignored")
    refused(lambda: aggregate(STACK, "mean", server_loss=loss), "server_loss would be ignored")


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        (3.0, ("must be a function of parameters", "got 3.0")),
        (lambda w: w, ("must return one real number, got float32 with shape (2,)",)),
        (lambda w: 1, ("must return one real number, got int32",)),
        (lambda w: w @ np.ones(3), ("server_loss fails on parameters", "TypeError")),
        (lambda w: float(w.sum()), ("server_loss fails", "ConcretizationTypeError")),
        (lambda: 1.0, ("server_loss fails", "TypeError")),
        (lambda w: jnp.nan * w.sum() + "a", ("server_loss fails",)),
    ],
)
def test_a_loss_that_is_none_is_refused(register, loss, parts):
    register(registry.defenses, "by_loss", ByLoss)
    refused(lambda: aggregate(STACK, "by_loss", server_loss=loss), *parts)


@pytest.mark.parametrize("name", ["server_update", "params"])
@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ([1.0], ("must be a vector [D] = [2], got shape (1,)",)),
        ([[1.0, 1.0]], ("got shape (1, 2)",)),
        ([np.nan, 1.0], ("must be finite",)),
        ("ab", ("must hold real numbers",)),
        ([True, False], ("must hold real numbers",)),
        ([1e300, 0.0], ("[0] = 1.e+300 is beyond",)),
        ({"w": 1.0}, ("must hold real numbers",)),
    ],
)
def test_vectors_that_do_not_fit_are_refused(name, given, parts):
    mine = {"server_update": [1.0, 1.0]} | {name: given}
    refused(lambda: aggregate(STACK, "fltrust", **mine), name, *parts)
    everything = {"malicious": MASK, "knowledge": "omniscient"}
    refused(lambda: attack(STACK, "fltrust_adaptive", **everything, **mine), name, *parts)


def test_an_adversary_that_knows_the_servers_loss(register):
    register(registry.defenses, "by_loss", ByLoss)
    told = {"malicious": MASK, "defense": "by_loss", "begin": "own", "steps": 1}

    def loss(w):
        return jnp.sum((w - 8.0) ** 2)

    sent = attack(STACK, "gradient_adaptive", knowledge="omniscient", server_loss=loss, **told)
    assert sent.shape == (3, 2) and sent[2].tolist() == STACK[2]
    refused(
        lambda: attack(STACK, "gradient_adaptive", knowledge="omniscient", **told),
        "'by_loss'",
        "or server_loss",
    )
    refused(
        lambda: attack(STACK, "gradient_adaptive", server_loss=loss, **told),
        "server_loss is known to an adversary with knowledge='omniscient' only",
    )
    refused(
        lambda: attack(STACK, "gradient_adaptive", **told),
        "does not see the loss on the server's examples",
        "omniscient",
    )


# --- Stages that change the rows ----------------------------------------------------------------


class Bucketing:
    """Means of neighbours: half as many rows."""

    stage = "before"

    def after(self, setting):
        return setting._replace(num_clients=setting.num_clients // 2, merged=True)

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        pairs = updates.reshape(-1, 2, updates.shape[1]).mean(axis=1)
        view = view._replace(
            weights=view.weights.reshape(-1, 2).sum(axis=1),
            valid=view.valid.reshape(-1, 2).all(axis=1),
            members=jnp.repeat(jnp.eye(len(pairs)), 2, axis=1),
        )
        return pairs, view, state, {}


@pytest.mark.parametrize("rule", ["mean", "median", "geometric_median", "sign", "krum"])
def test_a_stage_may_change_the_number_of_rows(register, rule):
    register(registry.defenses, "tested_bucketing", Bucketing)
    rule = {"name": rule, "num_byzantine": 1} if rule == "krum" else rule
    stack = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    got = aggregate(stack, ["tested_bucketing", rule])
    expected = aggregate(stack.reshape(6, 2, 3).mean(axis=1), rule)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# --- Pytrees ------------------------------------------------------------------------------------


def client(seed, make=np.asarray):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": make(rng.normal(size=(2, 3)), np.float32), "bias": make([seed, 1.0])},
        "layers": [make(rng.normal(size=4), np.float32), (make(rng.normal(), np.float32),)],
    }


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)])


def rows_of(clients):
    return np.stack([flat(one) for one in clients])


def test_pytrees_are_aggregated_leaf_by_leaf():
    clients = [client(seed) for seed in range(5)]
    for rule in ("mean", "median", {"name": "krum", "num_byzantine": 1}, "sign"):
        got = aggregate(clients, rule)
        assert jax.tree.structure(got) == jax.tree.structure(clients[0])
        assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, clients[0])
        np.testing.assert_array_equal(flat(got), aggregate(rows_of(clients), rule))
    by_weight = aggregate(clients, "mean", weights=[1, 0, 0, 0, 0])
    np.testing.assert_array_equal(flat(by_weight), flat(clients[0]))


def test_layers_keep_their_types_and_whole_numbers_become_floats():
    layers = [[np.full((2, 2), i), jnp.full(3, i, jnp.bfloat16), np.full(1, i)] for i in range(3)]
    got = aggregate(layers, "median")
    assert isinstance(got, list) and [leaf.shape for leaf in got] == [(2, 2), (3,), (1,)]
    assert [leaf.dtype for leaf in got] == [jnp.float32, jnp.bfloat16, jnp.float32]
    assert all((leaf == 1).all() for leaf in got)


def test_variables_of_a_network():
    model = registry.models.build({"name": "mlp", "hidden": [4]}).make((3, 3, 1), 2)
    clients = [model.init(jax.random.key(seed)) for seed in range(3)]
    got = aggregate(clients, "median")
    assert model.apply(got, jnp.ones((1, 3, 3, 1)), train=False, key=None).shape == (1, 2)
    expected = jax.tree.map(lambda *leaves: np.median(leaves, axis=0), *clients)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_an_attack_on_pytrees_leaves_honest_clients_as_they_are():
    clients = [client(seed) for seed in range(4)]
    clients[3]["layers"][0] = clients[3]["layers"][0].astype(np.float64) + 1e-12
    for one in clients[:3]:
        one["layers"][0] = one["layers"][0].astype(np.float64)
    mask = np.array([True, False, True, False])
    sent = attack(clients, "alie", malicious=mask, z=1.5)
    assert sent[1] is clients[1] and sent[3] is clients[3]
    rows = attack(rows_of(clients), "alie", malicious=mask, z=1.5)
    for i in (0, 2):
        assert jax.tree.structure(sent[i]) == jax.tree.structure(clients[i])
        np.testing.assert_array_equal(flat(sent[i]), rows[i])
    assert aggregate(sent, "median")["dense"]["kernel"].shape == (2, 3)


def test_the_servers_update_and_parameters_have_the_clients_form(register):
    clients = [client(seed) for seed in range(4)]
    rows = rows_of(clients)
    got = aggregate(clients, "fltrust", server_update=client(9))
    np.testing.assert_array_equal(
        flat(got), aggregate(rows, "fltrust", server_update=flat(client(9)))
    )
    register(registry.defenses, "by_loss", ByLoss)
    zeros = jax.tree.map(np.zeros_like, clients[0])

    def loss(tree):
        return (tree["dense"]["bias"][0] - 2.0) ** 2

    got = aggregate(clients, "by_loss", server_loss=loss, params=zeros)
    np.testing.assert_array_equal(flat(got), flat(clients[2]))
    refused(
        lambda: aggregate(clients, "fltrust", server_update=flat(client(9))),
        "server_update has no leaf ['dense']['bias'], which updates[0] has",
    )


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        ({"w": np.ones(2)}, ("updates[1] has no leaf ['b'], which updates[0] has",)),
        ({"w": np.ones(2), "b": 0.0, "c": 1.0}, ("updates[1] has a leaf ['c']",)),
        (
            {"w": np.ones(3), "b": 0.0},
            ("updates[1]['w'] must be", "shape (2,); got float32"),
        ),
        ({"w": np.ones(2, np.float16), "b": 0.0}, ("updates[1]['w']", "got float16")),
        ({"w": (np.ones(1), np.ones(1)), "b": 0.0}, ("updates[1] has no leaf ['w']",)),
        ({"w": "a", "b": 0.0}, ("updates[1]['w'] must hold real numbers",)),
        ({"w": np.ones(2) * 1e300, "b": 0.0}, ("updates[1]['w'][0] = 1.e+300 is beyond",)),
        ({"w": np.ones(2), "b": True}, ("updates[1]['b'] must hold real numbers",)),
        ([np.ones(2), 0.0], ("updates[1] has no leaf ['b']",)),
        (None, ("updates[1] holds no numbers",)),
        ({}, ("updates[1] holds no numbers",)),
        ({1: 1.0, "a": 2.0}, ("updates[1] is no pytree",)),
        (np.ones((2, 2)), ("updates[1] has shape (2, 2)", "wrap it: [[update] for update in")),
    ],
)
def test_the_client_and_the_leaf_that_differ_are_named(second, parts):
    first = {"w": np.ones(2), "b": 0.0}
    refused(lambda: aggregate([first, second], "mean"), *parts)
    refused(lambda: attack([first, second], "zero", malicious=[True, False]), *parts)


def test_containers_of_other_types_are_refused():
    pair = [np.ones((2, 2)), np.ones(1)]
    refused(lambda: aggregate([pair, tuple(pair)], "mean"), "updates[1]", "other types")


def test_matrices_stacked_by_layer_are_not_taken_for_clients():
    layers = [np.ones((5, 3)), np.ones((5, 3))]
    refused(
        lambda: aggregate(layers, "mean"), "updates[0] has shape (5, 3)", "in a list each client"
    )
