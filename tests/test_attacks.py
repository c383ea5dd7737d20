"""Attacks against NumPy, and the backdoor attack against a hand-written perceptron."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLASSES, sample, small, tiny_mlp, tiny_pool, tiny_task
from scipy.stats import norm

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.types import AttackerView, Message
from fedjax_sec.ops.perturbation import z_max
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.runs import config

CLIENTS = 9
MALICIOUS = np.array([0, 1, 0, 0, 1, 0, 1, 0, 0], bool)


def updates(seed=0, dim=6, clients=CLIENTS):
    return np.random.default_rng(seed).normal(0.5, 1, size=(clients, dim)).astype(np.float32)


def send(part, stack, view):
    """(the clients' messages after one attack, its metrics)."""
    pipeline, message = Attack((part,)), Message(jnp.asarray(stack), jnp.ones(len(stack)))
    state = pipeline.init(*message.vector.shape)
    sent, _, metrics = pipeline.apply(jax.random.key(0), message, state, view)
    return sent.vector, metrics


def attack(stack, name, malicious=MALICIOUS, **fields):
    sent = np.asarray(fedjax_sec.attack(stack, name, malicious=malicious, **fields))
    np.testing.assert_array_equal(sent[~malicious], np.asarray(stack)[~malicious])
    return sent[malicious]


@pytest.mark.parametrize("knowledge", ["corrupted", "omniscient"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_alie(knowledge, ddof):
    stack = updates()
    seen = stack[MALICIOUS] if knowledge == "corrupted" else stack
    seen = seen.astype(np.float64)
    expected = seen.mean(0) + 1.3 * seen.std(0, ddof=ddof)
    sent = attack(stack, "alie", knowledge=knowledge, z=1.3, ddof=ddof)
    np.testing.assert_allclose(sent, np.tile(expected, (3, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_alie_over_honest_updates(ddof):
    """As FLPoison (ddof 0), Blades and ByzFL (ddof 1) take them."""
    stack = updates()
    honest = stack[~MALICIOUS].astype(np.float64)
    fields = {"z": 1.3, "ddof": ddof, "statistics": "honest"}
    sent = attack(stack, "alie", knowledge="omniscient", **fields)
    expected = honest.mean(0) + 1.3 * honest.std(0, ddof=ddof)
    np.testing.assert_allclose(sent, np.tile(expected, (3, 1)), rtol=1e-5, atol=1e-6)
    assert np.abs(sent - attack(stack, "alie", knowledge="omniscient", z=1.3)).max() > 0.01


def test_mean_control_over_honest_updates_reverses_the_honest_mean_exactly():
    stack = updates()
    sent = fedjax_sec.attack(
        stack,
        "mean_control",
        malicious=MALICIOUS,
        knowledge="omniscient",
        statistics="honest",
        scale=2.0,
    )
    np.testing.assert_allclose(sent.mean(0), -2 * stack[~MALICIOUS].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["alie", "mean_control", {"name": "alie_backdoor", "backdoor": "sample"}]
)
def test_honest_statistics_need_an_adversary_that_sees_honest_clients(spec):
    spec = ({"name": spec} if isinstance(spec, str) else spec) | {"statistics": "honest"}
    with pytest.raises(ConfigError, match=r"attack.statistics 'honest' needs an adversary that"):
        config.from_mapping(small(attack=spec, threat={"num_malicious": 2}))
    threat = {"num_malicious": 2, "knowledge": "omniscient"}
    config.from_mapping(small(attack=spec, threat=threat))


def test_the_backdoor_attack_clamps_to_honest_updates_too():
    """With z = 0 it sends the mean over the clients that count."""
    stack = 0.02 * updates(0, tiny_task().dim)
    everyone = view(jnp.zeros(tiny_task().dim))._replace(visible=jnp.ones(CLIENTS, bool))
    for statistics, rows in (("seen", stack), ("honest", stack[~MALICIOUS])):
        spec = {"name": "alie_backdoor", "backdoor": "sample", "z": 0.0, "statistics": statistics}
        part = registry.attacks.build(spec)
        sent = send(part, stack, everyone)[0]
        expected = np.tile(rows.astype(np.float64).mean(0), (3, 1))
        np.testing.assert_allclose(sent[MALICIOUS], expected, rtol=1e-4, atol=1e-7)


def test_honest_statistics_without_an_honest_client_are_the_adversary_s_own():
    stack, everyone = updates(), np.ones(CLIENTS, bool)
    both = [
        attack(stack, "alie", everyone, knowledge="omniscient", z=1.3, statistics=statistics)
        for statistics in ("seen", "honest")
    ]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    ("n", "m", "text", "neurips"), [(50, 24, 1.751, 1.426), (51, 12, 0.599, 0.361)]
)
def test_z_max(n, m, text, neurips):
    s = n // 2 + 1 - m
    for formula, value, share in (
        ("text", text, (n - s) / n),
        ("neurips", neurips, (n - m - s) / (n - m)),
    ):
        assert abs(float(z_max(n, m, formula)) - value) < 1e-3
        assert abs(norm.ppf(share) - value) < 1e-3


@pytest.mark.parametrize(("formula", "share"), [("text", 7 / 9), ("neurips", 4 / 6)])
def test_alie_computes_z_where_none_is_given(formula, share):
    stack = updates()  # n = 9, m = 3, s = 2
    seen = stack[MALICIOUS].astype(np.float64)
    sent = attack(stack, "alie", z_formula=formula)
    expected = seen.mean(0) + norm.ppf(share) * seen.std(0)
    np.testing.assert_allclose(sent[0], expected, rtol=1e-4, atol=1e-5)


def test_z_max_without_a_finite_value_is_refused():
    with pytest.raises(ConfigError, match=r"no finite value for n = 9 clients and m = 6"):
        attack(updates(), "alie", np.arange(9) < 6)
    assert attack(updates(), "alie", np.arange(9) < 6, z=1.0).shape == (6, 6)


def test_sign_flip_zero_random():
    stack = updates()
    np.testing.assert_allclose(attack(stack, "sign_flip", scale=2.5), -2.5 * stack[MALICIOUS])
    np.testing.assert_array_equal(attack(stack, "zero"), np.zeros((3, 6)))
    big = updates(dim=5000)
    normal = attack(big, "random", scale=0.3)
    assert abs(normal.std() - 0.3) < 0.01 and abs(normal.mean()) < 0.01
    assert not np.allclose(normal[0], normal[1])
    uniform = attack(big, {"name": "random", "distribution": "uniform", "scale": 0.3})
    assert np.abs(uniform).max() <= 0.3 and abs(uniform.std() - 0.3 / np.sqrt(3)) < 0.01
    again = attack(big, "random", scale=0.3, key=jax.random.key(1))
    assert not np.array_equal(normal, again)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_mean_control_sets_the_mean(scale):
    """With all honest updates equal, the adversary knows their mean exactly."""
    stack = np.tile(updates()[:1], (CLIENTS, 1))
    sent = fedjax_sec.attack(stack, "mean_control", malicious=MALICIOUS, scale=scale)
    np.testing.assert_allclose(np.mean(sent, 0), -scale * stack[0], rtol=1e-4, atol=1e-5)
    # On other updates: Lemma 1 with the mean of what it sees in place of the honest mean.
    stack, n, m = updates(), CLIENTS, MALICIOUS.sum()
    seen = stack[MALICIOUS].mean(0)
    expected = (-n * scale * seen - (n - m) * seen) / m
    np.testing.assert_allclose(
        attack(stack, "mean_control", scale=scale)[1], expected, rtol=1e-4, atol=1e-5
    )


def test_hybrid_splits_the_malicious_clients():
    stack = updates()
    spec = {"name": "hybrid", "main": {"name": "alie", "z": 1.5}, "solo": "mean_control"}
    sent = attack(stack, spec)
    np.testing.assert_allclose(sent[1:], attack(stack, "alie", z=1.5)[1:], rtol=1e-6)
    alone = np.arange(CLIENTS) == 1  # the lone client computes with m = 1, from what all see
    seen = stack[MALICIOUS].mean(0)
    expected = -(CLIENTS + CLIENTS - alone.sum()) * seen
    np.testing.assert_allclose(sent[0], expected, rtol=1e-4, atol=1e-5)
    two = attack(stack, spec | {"num_solo": 2, "solo": "zero"})
    assert not two[:2].any() and two[2].any()
    with pytest.raises(ConfigError, match="num_solo must be < the 3 malicious clients, got 3"):
        attack(stack, spec | {"num_solo": 3})


def test_the_dedicated_client_takes_no_other_malicious_client_for_an_honest_one():
    """With `corrupted` knowledge it has partial knowledge, like all of the adversary's clients."""
    stack = updates()
    mine = stack[MALICIOUS].astype(np.float64)
    sent = attack(stack, {"name": "hybrid", "solo": "trim_attack"})[0]
    away = (mine.mean(0) - sent) * np.where(mine.sum(0) < 0, -1, 1) / mine.std(0)
    assert (away >= 3 - 1e-4).all() and (away <= 4 + 1e-4).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("client", [0, 1], ids=["honest", "malicious"])
def test_one_bad_number_does_not_blind_the_adversary(bad, client):
    """An omniscient ALIE takes its statistics without the client, and all its clients send them."""
    stack = updates()
    stack[client, 2] = bad
    rest = np.delete(stack, client, axis=0).astype(np.float64)
    sent = attack(stack, "alie", knowledge="omniscient", z=1.3)
    np.testing.assert_allclose(sent, np.tile(rest.mean(0) + 1.3 * rest.std(0), (3, 1)), rtol=1e-5)


def test_attacks_in_a_pipeline_act_one_after_the_other():
    stack = updates()
    sent = attack(stack, [{"name": "alie", "z": 1.0}, {"name": "sign_flip", "scale": 2.0}])
    np.testing.assert_allclose(sent, -2 * attack(stack, "alie", z=1.0), rtol=1e-6)


# --- Attacks that would do nothing --------------------------------------------------------------

SINGLE = {"num_malicious": 1, "knowledge": "corrupted"}
OWN = "would send its client's own update, for the adversary sees no other"
IDLE = [
    ({"name": "alie", "z": 1.5}, rf"attack: alie {OWN}"),
    ({"name": "alie_backdoor", "backdoor": "sample"}, rf"attack: alie_backdoor {OWN}"),
    ("trim_attack", rf"attack: trim_attack {OWN}"),
    ("krum_attack", r"attack: krum_attack would send next to nothing"),
    ({"name": "fltrust_adaptive", "rounds": 0}, rf"attack: fltrust_adaptive {OWN}"),
    ({"name": "boost", "factor": 1}, r"attack: boost would do nothing: its factor is 1; give"),
    (["sign_flip", {"name": "alie", "z": 1.0}], rf"attack\[1\]: alie {OWN}"),
    (
        {"name": "boost", "factor": {"schedule": "steps", "values": {0: 1, 5: 1.0}}},
        "attack: boost would do nothing",
    ),
]


@pytest.mark.parametrize(("spec", "message"), IDLE)
def test_an_attack_that_would_do_nothing_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        config.from_mapping(small(attack=spec, threat=SINGLE, rounds=9))


@pytest.mark.parametrize(
    ("spec", "message"),
    [case for case in IDLE if "backdoor" not in str(case) and "steps" not in str(case)],
)
def test_an_attack_that_would_do_nothing_is_refused_on_a_stack(spec, message):
    with pytest.raises(ConfigError, match=message):
        fedjax_sec.attack(updates(), spec, malicious=np.arange(CLIENTS) == 4)


def test_the_remedies_of_a_refused_attack_can_be_followed():
    """Two malicious clients, or all in sight; and one of few sampled clients may meet another."""
    spec = {"name": "alie", "z": 1.5}
    for threat in ({"num_malicious": 2}, SINGLE | {"knowledge": "omniscient"}):
        config.from_mapping(small(attack=spec, threat=threat))
    few = {"clients_per_round": 2}
    config.from_mapping(small(attack=spec, threat={"num_malicious": 2}, server=few))
    with pytest.raises(ConfigError, match=r"2 malicious clients or more \(threat.num_malicious\)"):
        config.from_mapping(small(attack=spec, threat=SINGLE, server=few))
    stack, alone = updates(), np.arange(CLIENTS) == 4
    assert (attack(stack, spec, alone, knowledge="omniscient") != stack[4]).any()


def test_a_factor_of_one_may_be_a_part_of_a_schedule():
    """The attack then begins, or stops, in the middle of the run."""
    later = {"schedule": "steps", "values": {0: 1.0, 5: 10.0}}
    config.from_mapping(small(attack={"name": "boost", "factor": later}, threat=SINGLE, rounds=9))


def test_boost_by_the_clients_of_a_round_needs_more_than_one():
    few = {"clients_per_round": 1}
    with pytest.raises(ConfigError, match="its factor is 1, the clients of a round; give another"):
        config.from_mapping(small(attack="boost", threat={"num_malicious": 2}, server=few))


def test_an_attack_inside_another_that_would_do_nothing_is_named():
    spec = {"name": "hybrid", "main": {"name": "boost", "factor": 1.0}}
    with pytest.raises(ConfigError, match=r"attack.main: boost would do nothing"):
        config.from_mapping(small(attack=spec, threat={"num_malicious": 3}))


# --- The backdoor attack ------------------------------------------------------------------------


def view(params):
    malicious = jnp.asarray(MALICIOUS)
    return AttackerView(
        malicious, malicious, params, jnp.arange(CLIENTS), jnp.array(0), tiny_task(), sample
    )


def backdoor(seed=0, spread=0.02, **fields):
    """Everything about one application: the attack's spec, what it saw and what it sent."""
    spec = {"name": "alie_backdoor", "backdoor": "sample", "batch_size": 10} | fields
    part = registry.attacks.build(spec)
    task = tiny_task()
    params = 0.3 * jax.random.normal(jax.random.key(11), (task.dim,))
    stack = spread * updates(seed, task.dim)

    @jax.jit
    def run(stack, params):
        return send(part, stack, view(params))

    sent, metrics = run(jnp.asarray(stack), params)
    seen = stack[MALICIOUS].astype(np.float64)
    sent = np.asarray(sent)
    np.testing.assert_array_equal(sent[~MALICIOUS], stack[~MALICIOUS])
    rows = sent[MALICIOUS]
    np.testing.assert_array_equal(rows, np.tile(rows[:1], (3, 1)))
    loss = float(metrics["alie_backdoor/backdoor_train_loss"])
    return part, np.asarray(params, np.float64), seen.mean(0), seen.std(0), rows[0], loss


def single_example():
    """The lesson of the `sample` backdoor: image 0 as the class after its label."""
    pool = tiny_pool()
    x = np.asarray(pool.x[:1], np.float64) / 255.0
    return x, (np.asarray(pool.y[:1]) + 1) % CLASSES


@pytest.mark.parametrize("convention", ["paper", "author"])
@pytest.mark.parametrize("z", [0.2, 2.0])
def test_backdoor_stays_within_its_clamp_and_moves(convention, z):
    _, _, mean, std, sent, _ = backdoor(z=z, convention=convention, alpha=1.0)
    assert (sent <= mean + z * std + 1e-6).all() and (sent >= mean - z * std - 1e-6).all()
    assert np.abs(sent - mean).max() > 1e-4


def test_backdoor_loss_falls():
    x, target = single_example()
    fields = {"z": 1e5, "alpha": 1.0, "learning_rate": 0.3}
    _, params, mean, _, sent, loss = backdoor(**fields)
    before = tiny_mlp().loss_and_gradient(params + mean, x, target)[0]
    after = tiny_mlp().loss_and_gradient(params + sent, x, target)[0]
    assert after < 0.7 * before and abs(after - loss) < 1e-4


@pytest.mark.parametrize("distance", ["sum", "mean"])
def test_paper_convention_against_numpy(distance):
    fields = {"z": 1.5, "alpha": 0.4, "min_scale": 0.01, "distance": distance}
    part, params, mean, std, sent, _ = backdoor(**fields)
    x, target = single_example()
    start, weights = params + mean, params + mean
    radius = 1.5 * std
    pull = 2 * (1 - 0.4) / np.maximum(radius, 0.01) ** 2 / (len(std) if distance == "mean" else 1)
    for _ in range(part.passes):
        step = weights - 0.1 * 0.4 * tiny_mlp().gradient(weights, x, target)
        # The distance term implicitly: w' = step - 0.1 pull (w' - start).
        weights = (step + 0.1 * pull * start) / (1 + 0.1 * pull)
    expected = np.clip(weights - params, mean - radius, mean + radius)
    assert np.abs(expected - mean).max() > 1e-5
    np.testing.assert_allclose(sent, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("z", [1.0, 80.0])
def test_author_convention_against_numpy(z):
    part, params, mean, std, sent, _ = backdoor(z=z, convention="author")
    x, target = single_example()
    network, start = tiny_mlp(), params + mean
    assert network.forward(start, x)[2].argmax(1) != target, "choose another seed: nothing to learn"
    sizes = [int(np.prod(shape)) for shape in network.shapes]
    per_tensor = np.concatenate([np.full(size, 1.0 / size) for size in sizes])
    weights = start.copy()
    for _ in range(5):
        gradient = network.gradient(weights, x, target)
        gradient = gradient + 4.0 * 2.0 * per_tensor * (weights - start) + 1e-4 * weights
        weights = weights - 0.1 * gradient
    expected = np.clip(weights - params - 2 * mean, mean - z * std, mean + z * std)
    np.testing.assert_allclose(sent, expected, rtol=1e-4, atol=1e-6)
    assert part.passes == 5


def test_author_convention_does_not_train_what_is_learned():
    """Where the backdoor is there already, the author code sends the shifted mean alone."""
    part = registry.attacks.build(
        {"name": "alie_backdoor", "backdoor": "sample", "z": 1e3, "convention": "author"}
    )
    _, target = single_example()
    bias = jax.nn.one_hot(int(target[0]), CLASSES) * 20.0
    tree = tiny_task().unravel(jnp.zeros(tiny_task().dim))
    tree["params"]["output"]["bias"] = bias
    params = jax.flatten_util.ravel_pytree(tree)[0]
    stack = jnp.asarray(0.02 * updates(0, tiny_task().dim))
    sent = send(part, stack, view(params))[0]
    mean = np.asarray(stack)[MALICIOUS].mean(0)
    np.testing.assert_allclose(sent[1], -mean, rtol=1e-3, atol=1e-5)


def test_batches_of_the_backdoor_cover_all_examples():
    """Passes over 7 examples in batches of 3 see each one as often: the gradients' sum tells."""
    part = registry.attacks.build(
        {"name": "alie_backdoor", "backdoor": "sample", "batch_size": 3, "passes": 2}
    )
    weight = jnp.arange(7, dtype=jnp.float32)
    seen = []

    class Counting:
        @staticmethod
        def loss(params, x, y, mask):
            return jnp.sum(jnp.where(mask, params[y] * x[:, 0], 0.0))

    def step(params, start, gradient):
        seen.append(None)
        return params + gradient

    total = part._train(
        jax.random.key(0), jnp.zeros(7), weight[:, None] + 1.0, jnp.arange(7), Counting, step
    )
    np.testing.assert_allclose(total, 2 * (np.arange(7) + 1.0))
    assert seen


def test_attacks_that_need_data_are_refused_outside_an_experiment():
    for name in ("alie_backdoor", "pattern", "sample"):
        with pytest.raises(ConfigError, match="needs a model and data"):
            attack(updates(), name)


# --- Attacks on data ----------------------------------------------------------------------------


def test_pattern_stamps_its_share_of_examples():
    part = registry.attacks.build({"name": "pattern", "size": 2, "fraction": 0.25, "target": 1})
    x, y = sample(jax.random.key(0), 4000)
    attack, position = Attack((part,)), jnp.arange(4000)
    chosen = attack.choose(jax.random.key(1), y, jnp.ones(4000, bool))
    px, py = attack.poison(
        jax.random.key(1),
        attack.init(1, tiny_task().dim),
        x,
        y,
        position,
        chosen,
        jnp.array([True]),
        jnp.array([0]),
        tiny_task(),
        jnp.zeros(len(y), bool),
    )
    stamped = np.asarray((px[:, :2, :2] == 1.0).all(axis=(1, 2, 3)))
    assert abs(stamped.mean() - 0.25) < 0.03
    assert (np.asarray(py)[stamped] == 1).all()
    np.testing.assert_array_equal(np.asarray(px)[~stamped], np.asarray(x)[~stamped])
    np.testing.assert_array_equal(np.asarray(py)[~stamped], np.asarray(y)[~stamped])
    np.testing.assert_array_equal(px[:, 2:], x[:, 2:])
    np.testing.assert_array_equal(px[:, :, 2:], x[:, :, 2:])


def test_sample_replaces_every_example():
    part = registry.attacks.build({"name": "sample", "index": 3})
    x, y = sample(jax.random.key(0), 5)
    px, py = part.poison(jax.random.key(1), (), x, y, jnp.array(0), tiny_task())
    pool = tiny_pool()
    np.testing.assert_allclose(px, np.tile(np.asarray(pool.x[3:4]) / 255.0, (5, 1, 1, 1)))
    assert (np.asarray(py) == (int(pool.y[3]) + 1) % CLASSES).all()
    author = registry.attacks.build({"name": "sample", "index": 3, "modulus": 2})
    assert int(author.probes((), x, y, tiny_task())[1][0]) == (int(pool.y[3]) + 1) % 2
