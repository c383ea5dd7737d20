"""Running statistics judge nobody: norms and distances are of what is trained."""

import functools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import fedjax_sec
from fedjax_sec.core import ServerData, ServerView, Setting, registry, tree_space
from fedjax_sec.testing import defenses, fields

K, STATISTICS = defenses.CLIENTS, 3
SETTING, COUNTS = Setting(K, fields.BYZANTINE), np.arange(K) % 4 + 1.0
#: Three statistics, a bias and a kernel, the last layer's.
SPACE = tree_space(
    {"batch_stats": np.zeros(3), "params": {"bias": np.zeros(2), "kernel": np.zeros((3, 2))}}
)
RULES = [
    pytest.param(variant, id=f"{name}-{number}", marks=[pytest.mark.slow] if number else [])
    for name in registry.defenses.names()
    if registry.defenses.get(name).stands_alone and registry.defenses.get(name).stage != "client"
    for number, variant in enumerate(
        fields.variants(registry.defenses.build(name), SETTING, every_pair=False)
    )
]


def updates():
    rows = np.random.default_rng(0).normal(size=(K, SPACE.dim)).astype(np.float32)
    rows[: K // 4] += 2.0
    return rows


@functools.partial(jax.jit, static_argnames="space")
def _defend(part, rows, server, space=SPACE):
    defense, (clients, dim) = defenses.as_pipeline(part), rows.shape
    learned = slice(dim) if space is None else space.trained
    view = ServerView(
        params=jnp.zeros(dim),
        weights=jnp.asarray(COUNTS),
        client_ids=jnp.arange(clients),
        valid=jnp.ones(clients, bool),
        round=jnp.array(0),
        root=ServerData(lambda: server, lambda params: jnp.sum(params[learned] ** 2)),
        space=space,
    )
    done = defense.apply(jax.random.key(0), rows, defense.init(clients, dim, space), view)
    return done.aggregate, done.metrics


def defended(part, rows, server=None, space=SPACE):
    """(aggregate [D], metrics) of a rule, whose examples' loss knows of no statistics."""
    server = rows[0] if server is None else server
    return jax.tree.map(np.asarray, _defend(part, jnp.asarray(rows), jnp.asarray(server), space))


@pytest.mark.parametrize("part", RULES)
def test_statistics_judge_nobody(part):
    rows, server = updates(), np.linspace(1.0, -0.5, SPACE.dim, dtype=np.float32)
    large, larger = rows.copy(), server.copy()
    large[:, :STATISTICS] *= 1000.0  # as of a network whose data are that much wider
    larger[:STATISTICS] *= 1000.0
    plain, _ = defended(part, rows, server)
    shifted, _ = defended(part, large, larger)
    np.testing.assert_allclose(shifted[STATISTICS:], plain[STATISTICS:], rtol=1e-4, atol=1e-5)
    if part.registered_name != "sign":
        assert np.abs(shifted[:STATISTICS]).max() > 0


def rule(name, **changes):
    return registry.defenses.build({"name": name, **changes})


@pytest.mark.parametrize(
    "part", [rule("clip_norm", max_norm=1.0), rule("weak_dp", max_norm=1.0, std=0.0)]
)
def test_clipping_leaves_statistics(part):
    rows = updates()
    aggregate, _ = defended(part, rows)
    lengths = np.linalg.norm(rows[:, STATISTICS:], axis=1)
    short = rows.copy()
    short[:, STATISTICS:] *= np.minimum(1.0, 1.0 / lengths)[:, None]
    counts = COUNTS if part.registered_name == "weak_dp" else np.ones(K)
    np.testing.assert_allclose(aggregate, counts @ short / counts.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        rule("gaussian_noise", std=1.0),
        rule("crfl", slope=0.0, offset=1e6, cap=None, std=1.0),
        rule("weak_dp", max_norm=1e6, std=1.0, weighted=False),
    ],
)
def test_statistics_get_no_noise(part):
    rows = updates()
    aggregate, _ = defended(part, rows)
    apart = np.abs(aggregate - rows.mean(axis=0))
    assert apart[:STATISTICS].max() < 1e-5 and apart[STATISTICS:].min() > 1e-4


def test_a_clipped_model_keeps_its_statistics():
    rows = updates()
    aggregate, metrics = defended(rule("crfl", slope=0.0, offset=0.5, std=0.0), rows)
    mean = rows.mean(axis=0)
    length = np.linalg.norm(mean[STATISTICS:])
    np.testing.assert_allclose(metrics["crfl/model_norm"], length, rtol=1e-5)
    np.testing.assert_allclose(aggregate[:STATISTICS], mean[:STATISTICS], rtol=1e-5)
    np.testing.assert_allclose(
        aggregate[STATISTICS:], 0.5 / length * mean[STATISTICS:], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "part",
    [
        rule("krum", num_byzantine=3),
        rule("bulyan", num_byzantine=3, selection="geometric_median"),
        *map(rule, ("geometric_median", "fltrust", "foolsgold")),
    ],
)
def test_statistics_follow_the_weights(part):
    """The rule on the trained columns alone gives the weights of all."""
    rows = updates()
    rows[:, :STATISTICS] *= 1000.0
    aggregate, metrics = defended(part, rows)
    alone, other = defended(part, rows[:, STATISTICS:], space=None)
    np.testing.assert_allclose(aggregate[STATISTICS:], alone, rtol=1e-4, atol=1e-5)
    if part.registered_name != "bulyan":  # whose `kept` is a share of the coordinates
        np.testing.assert_allclose(metrics["kept"], other["kept"], rtol=1e-4, atol=1e-5)


def test_m_krum_of_fedml_weights_the_chosen_by_examples():
    rows = updates()
    part = rule("multi_krum", num_byzantine=4, num_selected=5, weighted=True)
    aggregate, metrics = defended(part, rows)
    counts = np.where(np.asarray(metrics["kept"]) > 0, COUNTS, 0.0)
    assert (counts > 0).sum() == 5 and len(set(counts[counts > 0])) > 1
    np.testing.assert_allclose(aggregate, counts @ rows / counts.sum(), rtol=1e-4, atol=1e-5)


# --- Attacks --------------------------------------------------------------------------------------

#: Attacks on updates that need no model and no data.
ATTACKS = [
    name
    for name in registry.attacks.names()
    if registry.attacks.get(name).stands_alone
    and registry.attacks.get(name).stage == "update"
    and "task" not in registry.attacks.build(name).needs
]


def as_tree(row):
    kernel = row[5:].reshape(3, 2)
    return {"batch_stats": row[:STATISTICS], "params": {"bias": row[3:5], "kernel": kernel}}


def aims_at(name, rows):
    """What an adaptive attack needs besides the clients' updates."""
    if name == "fltrust_adaptive":
        return {"server_update": as_tree(rows[-1])}
    return {"defense": "median"} if name == "gradient_adaptive" else {}


@pytest.mark.parametrize("name", ATTACKS)
def test_statistics_steer_no_attack(name):
    """What the malicious clients send of the trained parameters, whatever statistics are."""
    rows, malicious, crafted = updates(), np.arange(K) < 4, []
    for scale in (1.0, 1000.0):
        wide = np.where(np.arange(SPACE.dim) < STATISTICS, scale * rows, rows)
        sent = fedjax_sec.attack(
            [as_tree(row) for row in wide],
            name,
            malicious=malicious,
            knowledge="omniscient",
            key=jax.random.key(0),
            **aims_at(name, wide),
        )
        crafted.append([sent[i]["params"] for i in np.flatnonzero(malicious)])
    close(crafted[1], crafted[0], rtol=1e-5, atol=1e-6)
    honest = [as_tree(row)["params"] for row in rows[malicious]]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), crafted[0], honest)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_the_gradient_adaptive_attack_leaves_statistics():
    rows, malicious = updates(), np.arange(K) < 4
    attack = {"name": "gradient_adaptive", "begin": "own"}
    sent = fedjax_sec.attack(
        [as_tree(row) for row in rows], attack, malicious=malicious, defense="mean"
    )
    for one, row in zip(sent, rows, strict=True):
        np.testing.assert_array_equal(one["batch_stats"], row[:STATISTICS])


# --- Models of other libraries --------------------------------------------------------------------


def state_dict(row, scale=1.0):
    """A row as PyTorch holds it, whose running statistics are neither first nor together."""
    return OrderedDict(
        [
            ("conv.weight", row[:2].reshape(2, 1)),
            ("bn.running_mean", scale * row[2:4]),
            ("bn.num_batches_tracked", np.int64(round(scale))),
            ("bn.bias", row[4:5]),
            ("bn.running_var", scale * row[5:6]),
            ("fc.weight", row[6:].reshape(1, -1)),
        ]
    )


def test_pytorchs_statistics_come_first():
    space = tree_space(state_dict(np.arange(9.0)))
    assert list(space.slices)[:3] == ["bn.running_mean", "bn.num_batches_tracked", "bn.running_var"]
    assert (space.observed, space.trained) == (slice(0, 4), slice(4, 10))
    assert space.last == "fc.weight"
    state = jax.tree.map(jnp.float32, state_dict(np.arange(9.0)))
    close(space.join(space.split(state)[0]), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["batch_stats", "bn.running_mean"])
def test_where_there_is_nothing_else_statistics_count(name):
    rows = updates()
    alone = fedjax_sec.aggregate([{name: row} for row in rows], "krum", num_byzantine=4)[name]
    expected = fedjax_sec.aggregate(rows, "krum", num_byzantine=4)
    np.testing.assert_array_equal(alone, expected)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "multi_krum", "num_byzantine": 4, "num_selected": 5},
        "geometric_median",
        "foolsgold",
        [{"name": "clip_norm", "max_norm": 1.0}, "mean"],
    ],
)
def test_pytorchs_statistics_judge_nobody(spec):
    rows = updates()
    plain, wide = (
        fedjax_sec.aggregate([state_dict(row, scale) for row in rows], spec)
        for scale in (1.0, 1000.0)
    )
    for name in ("conv.weight", "bn.bias", "fc.weight"):
        np.testing.assert_allclose(wide[name], plain[name], rtol=1e-4, atol=1e-5)
    for name in ("bn.running_mean", "bn.running_var"):
        np.testing.assert_allclose(wide[name], 1000.0 * plain[name], rtol=1e-4)
    assert list(wide) == list(state_dict(rows[0]))


class _ConvolutionAlone:
    """FedML's mean of one tensor, by the name that it sees, and nothing of the others."""

    def defend_on_aggregation(
        self, raw_client_grad_list, base_aggregation_func, extra_auxiliary_info
    ):
        total = sum(count for count, _ in raw_client_grad_list)
        mean = {name: 0.0 * value for name, value in raw_client_grad_list[0][1].items()}
        mean["conv.weight"] = sum(c * m["conv.weight"] for c, m in raw_client_grad_list) / total
        return mean


def test_fedmls_objects_see_each_tensor_under_its_name():
    rows = updates()
    states = [state_dict(row) for row in rows]
    params = jax.tree.map(np.zeros_like, states[0])
    sent = fedjax_sec.aggregate(states, fedjax_sec.fedml.wrap(_ConvolutionAlone()), params=params)
    mean = state_dict(rows.mean(axis=0))["conv.weight"]
    expected = jax.tree.map(np.zeros_like, states[0]) | {"conv.weight": mean}
    assert list(sent) == list(states[0])
    close(dict(sent), dict(expected), rtol=1e-5, atol=1e-6)
