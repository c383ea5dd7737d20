"""CRFL against NumPy: clipping, smoothing, and the certificate."""

import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import close, same_bits, small
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import cli
from fedjax_sec.core import ConfigError, ServerView, registry
from fedjax_sec.evaluation import certificate
from fedjax_sec.report import certificate as report
from fedjax_sec.round.pipeline import Defense
from fedjax_sec.runs import config
from fedjax_sec.runs.loading import read_trained
from fedjax_sec.runs.prepare import prepare

# --- The stage ------------------------------------------------------------------------------------


def applied(index=0, rate=None, params=None, seed=0, updates=None, **fields):
    """The model that the server gets to, from the aggregate of a stack; and the metrics."""
    updates = jnp.asarray([[3.0, 0.0, 4.0], [5.0, 0.0, 8.0]]) if updates is None else updates
    clients, dim = updates.shape
    params = jnp.zeros(dim) if params is None else jnp.asarray(params, updates.dtype)
    view = ServerView(
        params=params,
        weights=jnp.ones(clients),
        client_ids=jnp.arange(clients),
        valid=jnp.ones(clients, bool),
        round=jnp.int32(index),
        rate=None if rate is None else jnp.float32(rate),
    )
    defense = Defense.build(["mean", {"name": "crfl"} | fields])
    done = defense.apply(jax.random.key(seed), updates, defense.init(clients, dim), view)
    return params + (1.0 if rate is None else rate) * done.aggregate, done.metrics


def by_hand(updates, params, rate, t, slope, offset, cap):
    model = params + rate * np.mean(np.asarray(updates, np.float64), axis=0)
    rho = slope * t + offset
    if cap is not None:
        rho = min(rho, cap)
    norm = np.sqrt(np.sum(model**2))
    return model * min(1.0, rho / norm)


@pytest.mark.parametrize("index", [0, 9, 29, 99])
@pytest.mark.parametrize("rate", [None, 0.5])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_clipping_is_that_of_numpy(index, rate, cap):
    rng = np.random.default_rng(index)
    updates = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    params = rng.normal(size=7).astype(np.float32)
    params *= 3.5 / np.linalg.norm(params)
    model, metrics = applied(index, rate, params, updates=updates, cap=cap, std=0.0)
    expected = by_hand(updates, params, rate or 1.0, index + 1, 0.1, 2.0, cap)
    close(model, expected.astype(np.float32), rtol=1e-5)
    unclipped = np.asarray(params) + (rate or 1.0) * np.asarray(updates).mean(0)
    close(metrics["crfl/model_norm"], np.float32(np.linalg.norm(unclipped)), rtol=1e-5)
    rho = min(0.1 * (index + 1) + 2, cap or np.inf)
    assert bool(metrics["crfl/clipped"]) == (np.linalg.norm(unclipped) > rho)


def test_the_model_is_clipped_and_not_the_update():
    """By hand: from (0, 3, 0) the mean (4, 0, 6) leads to a model of norm sqrt(61)."""
    fields = {"slope": 0.0, "offset": 1.0, "std": 0.0}
    model, _ = applied(params=[0.0, 3.0, 0.0], **fields)
    close(model, np.array([4, 3, 6], np.float32) / np.sqrt(61).astype(np.float32))
    close(applied(params=[-4.0, 0.5, -6.0], **fields)[0], np.array([0.0, 0.5, 0.0]), atol=1e-6)


def test_a_schedule_grows_round_by_round_up_to_its_cap():
    rule = registry.defenses.build({"name": "crfl", "slope": 0.5, "offset": 1.0, "cap": 3.0})
    radii = [float(rule.radius(index)) for index in range(6)]
    assert radii == [1.5, 2.0, 2.5, 3.0, 3.0, 3.0]


def test_noise_has_the_standard_deviation_and_is_drawn_anew():
    updates = jnp.zeros((3, 4000))
    drawn = np.stack([applied(seed=s, updates=updates, std=0.25)[0] for s in (0, 1)])
    assert np.all(np.abs(drawn.std(axis=1) - 0.25) < 0.01) and np.all(np.abs(drawn.mean(1)) < 0.02)
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.05
    halved = applied(seed=0, updates=updates, std=0.25, rate=0.5)[0]
    close(halved, drawn[0], atol=1e-6)  # the model's noise, whatever the server's rate


def test_the_last_round_adds_no_noise():
    quiet = applied(std=0.0, rounds=5)[0]
    assert all(np.any(applied(i, std=1.0, rounds=5)[0] != quiet) for i in (0, 3, 5))
    last = applied(4, std=1.0, rounds=5)[0]
    close(last, by_hand([[4.0, 0.0, 6.0]], np.zeros(3), 1.0, 5, 0.1, 2.0, 15.0).astype(np.float32))
    assert np.any(applied(4, std=1.0)[0] != last)  # without a last round there is noise


def test_half_precision_does_not_overflow():
    """The square of 300 is beyond float16."""
    updates = jnp.full((2, 4), 300.0, jnp.float16)
    out = fedjax_sec.aggregate(updates, ["mean", {"name": "crfl", "std": 0.0, "slope": 0.0}])
    assert out.dtype == jnp.float16
    close(out.astype(jnp.float32), np.full(4, 1.0), rtol=1e-3)


def test_an_experiment_says_which_round_is_the_last():
    base = small(defense=["mean", "crfl"], rounds=7)
    assert config.from_mapping(base).defense.stages[1].rounds == 7
    given = small(defense=["mean", {"name": "crfl", "rounds": 3}], rounds=7)
    assert config.from_mapping(given).defense.stages[1].rounds == 3
    loaded = config.from_mapping(config.from_mapping(base).to_dict())
    assert loaded.defense.stages[1].rounds == 7


def test_the_model_of_an_experiment_is_within_its_radius():
    """The first layer is as large as it wants: it is the whole model that is clipped."""
    rule = {"name": "crfl", "slope": 0.1, "offset": 0.5, "std": 0.05}
    run = fedjax_sec.run(small(defense=["mean", rule], rounds=3))
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run.params)])
    close(np.linalg.norm(flat), np.float32(0.8), rtol=1e-5)  # rho_3, and no noise on it
    assert run.metrics["crfl/clipped"][1:].tolist() == [1.0, 1.0, 1.0]


def test_servers_and_algorithms_that_have_no_such_model_are_refused():
    adam = {"optimizer": {"name": "adam", "learning_rate": 0.1}}
    with pytest.raises(ConfigError, match="defense: 'crfl' needs a server whose step is a rate"):
        config.from_mapping(small(defense=["mean", "crfl"], server=adam))
    joint = {"name": "scaffold", "joint": True}
    with pytest.raises(ConfigError, match="crfl clips the model of 460 parameters, and clients"):
        fedjax_sec.run(small(defense=["mean", "crfl"], algorithm=joint))


# --- The trigger ----------------------------------------------------------------------------------


def test_a_pattern_that_is_added():
    pixels = [[0, 1], [1, 0]]
    spec = {"name": "trojan", "pattern": "pixels", "pixels": pixels, "added": 0.25}
    images = jnp.array([[[0.0, 0.5], [0.9, 0.3]]])[..., None]
    stamped = registry.attacks.build(spec).trigger((), images)[0, :, :, 0]
    close(stamped, np.array([[0.0, 0.75], [1.0, 0.3]], np.float32))
    darker = registry.attacks.build(spec | {"added": -0.25}).trigger((), images)[0, :, :, 0]
    close(darker, np.array([[0.0, 0.25], [0.65, 0.3]], np.float32))
    base = small(attack=[spec | {"value": 0.5}], threat={"num_malicious": 1})
    with pytest.raises(ConfigError, match="attack.added is added .* in place of value"):
        config.from_mapping(base)
    base = small(attack={"name": "trojan", "pattern": "apple", "added": 0.1})
    with pytest.raises(ConfigError, match="attack.added is added to the pixels of plus"):
        config.from_mapping(base | {"threat": {"num_malicious": 1}})
    plain = registry.attacks.build(spec | {"added": None})
    same_bits(plain.trigger((), images)[0, 0, 1], jnp.ones(1))


# --- The certificate ------------------------------------------------------------------------------


def terms_by(**changes):
    """The paper's plot: one attacker of 20 in round 10 of 100, gamma 10, sigma 0.01."""
    later = tuple((0.1 * t + 2, 0.01) for t in range(11, 101))
    usual = certificate.Terms(1 / 20, 30, 0.001, 0.05, 10, 0.01, np.sqrt(17), later)
    return usual._replace(**changes)


def radius_by_hand(p_a, p_b, weights, gamma, tau, eta, share, sigma, lipschitz, later):
    """The theorem's formula as the author code computes it, attacker by attacker."""
    if p_a <= p_b:
        return None
    top = -np.log(1 - (np.sqrt(p_a) - np.sqrt(p_b)) ** 2) * sigma**2
    total = 0.0
    for weight in weights:
        total += (weight * gamma * tau * eta * share) ** 2
    bottom = 2 * len(weights) * lipschitz**2 * total
    for rho, noise in later:
        bottom *= 2 * statistics.NormalDist().cdf(rho / noise) - 1
    return np.sqrt(top / bottom)


@pytest.mark.parametrize("weights", [[0.05], [0.05, 0.05], [0.1, 0.02, 0.03]])
@pytest.mark.parametrize("later", [((2.0, 0.01),) * 5, ((1.0, 1.0), (0.5, 2.0))])
def test_the_radius_is_that_of_the_formula(weights, later):
    rng = np.random.default_rng(0)
    lower, upper = rng.uniform(0.2, 1.0, 40), rng.uniform(0.0, 0.8, 40)
    terms = certificate.Terms(np.array(weights), 30, 0.001, 0.05, 10, 0.01, 4.0, later)
    radii = certificate.radius(lower, upper, terms)
    one = [
        radius_by_hand(a, b, weights, 10, 30, 0.001, 0.05, 0.01, 4.0, later)
        for a, b in zip(lower, upper, strict=True)
    ]
    assert [r is None for r in one] == np.isnan(radii).tolist() and np.isnan(radii).any()
    np.testing.assert_allclose(radii[~np.isnan(radii)], [r for r in one if r], rtol=1e-9)


def test_the_largest_radius_of_the_papers_plot():
    """All 1,000 votes for one class: p_A = 1 - 0.0588, p_B = 0.0588, a radius of 1.986."""
    label, lower, upper = certificate.bounds(np.array([[0, 1000, 0]]), 0.001)
    assert label == 1 and abs(lower - (1 - np.sqrt(np.log(1000) / 2000))).max() < 1e-12
    np.testing.assert_allclose(upper, 1 - lower, rtol=1e-12)
    assert abs(certificate.radius(lower, upper, terms_by())[0] - 1.98583) < 1e-5


def test_bounds_of_votes():
    """With 200 votes and alpha 0.01 a bound is 0.1073 away."""
    apart = np.sqrt(np.log(100) / 400)
    counts = np.array([[120, 50, 30], [70, 65, 65], [100, 100, 0], [0, 0, 200]])
    label, lower, upper = certificate.bounds(counts, 0.01)
    assert label.tolist() == [0, 0, 0, 2]
    np.testing.assert_allclose(lower, np.array([0.6, 0.35, 0.5, 1.0]) - apart)
    np.testing.assert_allclose(upper, np.array([0.25, 0.325, 0.5, 0.0]) + apart)
    few = certificate.bounds(np.array([[2, 1]]), 0.001)
    assert few.lower == 0.0 and few.upper == 1.0
    kept = certificate.bounds(np.array([[2, 1]]), 0.001, floor=1e-8)
    assert kept.lower == 1e-8 and kept.upper == 1 - 1e-8


def test_it_abstains_where_the_bounds_meet():
    """The author code squares the difference of the roots and certifies any example."""
    lower, upper = np.array([0.3, 0.4, 0.41]), np.array([0.5, 0.4, 0.4])
    radii = certificate.radius(lower, upper, terms_by())
    assert np.isnan(radii).tolist() == [True, True, False] and radii[2] > 0
    never = certificate.radius(lower, upper, terms_by(), abstains=False)
    assert never[0] > 0.1 and never[1] == 0.0 and never[2] == radii[2]
    curve = certificate.certified(radii, [True, True, True], [0.0])
    assert curve.rate.tolist() == curve.accuracy.tolist() == [pytest.approx(1 / 3)]


def test_the_radius_grows_and_falls_as_it_should():
    def at(lower=0.8, upper=0.2, **changes):
        return float(certificate.radius([lower], [upper], terms_by(**changes))[0])

    base = at()
    lowers = certificate.radius(np.linspace(0.21, 1 - 1e-6, 50), np.full(50, 0.2), terms_by())
    assert np.all(np.diff(lowers) > 0)
    assert at(upper=0.1) > base > at(upper=0.3)
    for name in ("weight", "steps", "rate", "poisoned", "scale", "lipschitz"):
        assert at(**{name: 2 * getattr(terms_by(), name)}) == pytest.approx(base / 2), name
    assert at(std=0.02) == pytest.approx(2 * base)
    two = np.full(2, 1 / 20)  # R times the sum of R squares
    assert at(weight=two) == pytest.approx(base / 2)


def test_without_noise_the_radius_is_zero():
    radii = certificate.radius([0.9, 0.1], [0.1, 0.9], terms_by(std=0.0, later=((2.0, 0.0),)))
    assert radii[0] == 0.0 and np.isnan(radii[1])
    assert certificate.certified(radii, [True, True], [0.0, 1e-9]).rate.tolist() == [0.5, 0.0]


def test_the_product_over_rounds():
    """2 Phi(1) - 1 = 0.6827 a round; at sigma = 0.01 it is 1 to the last bit."""

    def at(later):
        return float(certificate.radius([0.8], [0.2], terms_by(later=later))[0])

    one = at(())
    assert at(((1.0, 1.0),)) == pytest.approx(one / np.sqrt(0.6826894921), rel=1e-9)
    assert at(((1.0, 1.0), (1.0, 0.5))) == pytest.approx(
        one / np.sqrt(0.6826894921 * 0.9544997361), rel=1e-9
    )
    assert at(((2.0, 0.01),)) == at(((2.0, 0.01),) * 90) == one
    # Where 2 Phi - 1 is 1 in float64 its logarithm still is not 0: -1.5e-23 at ten deviations.
    assert 2 * statistics.NormalDist().cdf(10) - 1 == 1.0
    assert certificate.log_contraction(10.0, 1.0) == pytest.approx(-1.52397e-23, rel=1e-4, abs=0)
    assert certificate.log_contraction(1e-9, 1.0) == pytest.approx(np.log(1e-9 * 0.79788456))


def test_rates_and_accuracies():
    radii, right = np.array([0.5, 1.0, np.nan, 2.0]), np.array([True, False, True, True])
    curve = certificate.certified(radii, right, [0.0, 0.5, 0.6, 1.5, 2.1])
    assert curve.rate.tolist() == [0.75, 0.75, 0.5, 0.25, 0.0]
    assert curve.accuracy.tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]


def linear(params, x):
    """Logits of a linear model with two features and three classes."""
    return x @ params.reshape(2, 3)


@pytest.mark.parametrize("together", [1, 4, 64])
def test_votes_are_those_of_a_loop(together):
    params = jnp.array([1.0, 0.0, -1.0, 0.0, 0.5, 0.0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(11, 2)), jnp.float32)
    options = {"copies": 10, "std": 0.8, "together": together, "batch_size": 4}
    counts = certificate.votes(linear, params, jax.random.key(3), x, 3, **options)
    expected = np.zeros((11, 3), int)
    for copy in range(10):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(3), copy), (6,))
        logits = np.asarray(x) @ (np.asarray(params) + 0.8 * np.asarray(noise)).reshape(2, 3)
        for i, row in enumerate(logits):
            expected[i, row.argmax()] += 1
    assert counts.tolist() == expected.tolist()
    assert (np.asarray(counts).max(axis=1) < 10).any()


def gradients_apart(weights, bias, x, moved, y):
    """How far the gradients of an example and of its changed inputs are, by their lengths."""
    grads = []
    for inputs in (x, moved):
        logits = inputs @ weights + bias
        p = np.exp(logits - logits.max())
        p = p / p.sum() - np.eye(len(bias))[y]
        grads.append(np.concatenate([np.outer(inputs, p).ravel(), p]))
    return np.linalg.norm(grads[0] - grads[1]) / np.linalg.norm(x - moved)


def test_the_constants_of_logistic_regression():
    """Ours holds for inputs of any length; the paper's does not for those of MNIST's length."""
    assert certificate.lipschitz_constant(3.0) ** 2 == pytest.approx(2 + 2 * 3 + 9)
    rng, over = np.random.default_rng(0), 0
    for _ in range(300):
        length, rho = rng.choice([0.5, 1.0, 9.0]), rng.choice([0.5, 3.0])
        flat = rng.normal(size=5 * 3 + 3)
        flat *= rho / np.linalg.norm(flat)
        x = rng.normal(size=5)
        x *= length / np.linalg.norm(x)
        # Towards the class, along the weights: where the gradient changes fastest.
        weights, bias = flat[:15].reshape(5, 3), flat[15:]
        moved = x + 1e-3 * (weights[:, 0] - weights[:, 1]) + 1e-4 * rng.normal(size=5)
        apart = gradients_apart(weights, bias, x, moved, rng.integers(3))
        assert apart <= certificate.lipschitz_on_inputs(rho, length + 0.1)
        over += apart > certificate.lipschitz_constant(rho)
        if length < 1.5:
            assert apart <= certificate.lipschitz_constant(rho)
    assert over > 0


# --- A run's certificate --------------------------------------------------------------------------


def crfl_run(**changes):
    """Digits, five clients of 9 or 8 examples, one attack in round 2 of 3."""
    corner = {"name": "trojan", "pattern": "pixels", "pixels": [[7, 7]], "added": 0.2}
    base = small(
        model="logistic_regression",
        attack=[corner | {"fraction": 0.4}, {"name": "boost", "factor": 3.0}],
        threat={"num_malicious": 2, "start": 1, "every": 9},
        defense=["mean", {"name": "crfl", "cap": 2.15}],
        checkpoint={"keep_params": True},
    )
    base["client"] = base["client"] | {"steps": None, "epochs": 2, "batch_size": 4}
    return base | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crfl") / "run"
    fedjax_sec.run(crfl_run(), out=folder)
    return folder


def test_a_runs_own_numbers():
    prepared = prepare(config.from_mapping(crfl_run()))
    terms, index = report.terms_of(prepared)
    bad = np.flatnonzero(prepared.population.malicious)
    counts = np.asarray(prepared.population.counts)
    assert sorted(counts) == [8, 8, 9, 9, 9] and index == 1
    np.testing.assert_allclose(terms.weight, counts[bad] / 43)
    assert terms.steps.tolist() == [2.0 * -(-n // 4) for n in counts[bad]]
    # exact_share takes floor(0.4 n) of a client's n examples: 3 of 8, 3 of 9.
    np.testing.assert_allclose(terms.poisoned, 3 / counts[bad])
    assert (terms.scale, terms.std) == (3.0, pytest.approx(0.01))
    assert terms.rate == pytest.approx(0.2)
    std = prepared.source.std[0]
    assert terms.lipschitz == pytest.approx(np.sqrt(2 + 2 * 2.15 + 2.15**2) / std)
    assert terms.later == ((pytest.approx(2.15), pytest.approx(0.01)),)
    author, _ = report.terms_of(prepared, author=True, std=0.03)
    assert author.later == ((pytest.approx(2.3), 0.03),)  # no cap, and the smoothing's noise
    np.testing.assert_allclose(author.steps, 2 * counts[bad] / 4)
    np.testing.assert_allclose(author.weight, np.full(2, 0.2))
    assert author.lipschitz == pytest.approx(np.sqrt(17) / std)


def terms_with(**changes):
    return report.terms_of(prepare(config.from_mapping(crfl_run(**changes))))[0]


def test_attacks_weights_and_rounds_of_other_runs():
    corner = crfl_run()["attack"][0]
    assert terms_with(attack=corner).scale == 1.0
    assert terms_with(attack=[corner, "boost"]).scale == 5.0
    counted = terms_with(attack=[corner, {"name": "boost", "accounts_for": "weights_and_rate"}])
    assert counted.scale == pytest.approx(1 / np.sum(counted.weight))
    even = terms_with(defense=[{"name": "mean", "weighted": False}, "crfl"])
    np.testing.assert_allclose(even.weight, np.full(2, 0.2))
    half = {"optimizer": {"name": "sgd", "learning_rate": 0.5}}
    np.testing.assert_allclose(terms_with(server=half).weight, 0.5 * counted.weight)
    late = terms_with(threat={"num_malicious": 2, "start": 2, "every": 9})
    assert late.later == () and late.std == pytest.approx(0.01)  # attacked in the last round
    rates = {"schedule": "steps", "values": {0: 0.5, 1: 0.25}}
    client = crfl_run()["client"] | {"optimizer": {"name": "sgd", "learning_rate": rates}}
    assert terms_with(client=client).rate == pytest.approx(0.25)
    growing = {"name": "crfl", "std": {"schedule": "steps", "values": {0: 0.1, 2: 0.3}}}
    scheduled = terms_with(defense=["mean", growing])
    assert scheduled.std == pytest.approx(0.1) and scheduled.later[0][1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defense": "mean"}, r"its defence \['mean'\] has no 'crfl'"),
        ({"defense": ["mean", "crfl", "gaussian_noise"]}, "the run's defence is"),
        ({"defense": ["clip_norm", "mean", "crfl"]}, "the run's defence is"),
        ({"attack": None, "threat": {"num_malicious": 0}}, "it has no attack"),
        ({"attack": "sign_flip"}, "a backdoor in the malicious clients' own examples"),
        ({"attack": "scaling"}, "a backdoor in the malicious clients' own examples"),
        ({"threat": {"num_malicious": 2}}, "of an attack in one round, and this one is in 3"),
        ({"threat": {"num_malicious": 1, "start": 1}}, "this one is in 2"),
        ({"server": {"clients_per_round": 4}}, "needs all clients in every round"),
        ({"server": {"dropout": 0.1}}, "needs all clients in every round"),
        (
            {"threat": {"num_malicious": 2, "start": 1, "every": 9, "redraw": True}},
            "nobody knows who attacked",
        ),
        ({"algorithm": "fedprox"}, "FedAvg with SGD, this is 'fedprox'"),
        ({"defense": ["mean", {"name": "crfl", "rounds": 2}]}, "was 2 of 3; train with"),
    ],
)
def test_what_the_theorem_says_nothing_of(changes, words):
    with pytest.raises(ConfigError, match=words):
        report.check(config.from_mapping(crfl_run(**changes)))


def test_other_training_rules_and_networks():
    client = crfl_run()["client"]
    momentum = {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}}
    beside = {"clip_gradient": 1.0, "max_norm": 2.0, "l2": 0.001, "augmentation": "flip"}
    for field, change in [("optimizer", momentum), *((f, {f: v}) for f, v in beside.items())]:
        with pytest.raises(ConfigError, match=rf"a learning rate alone; client\.{field} is"):
            report.check(config.from_mapping(crfl_run(client=client | change)))
    followed = {"name": "gradient_sign", "malicious_follow": True}
    for stage in (followed, "fl_wbc", "gradient_noise"):
        with pytest.raises(ConfigError, match="of the run's defence change what clients do"):
            report.check(config.from_mapping(crfl_run(defense=[stage, "mean", "crfl"])))
    network = prepare(config.from_mapping(crfl_run(model={"name": "mlp", "hidden": [4]})))
    with pytest.raises(ConfigError, match="the network is 'mlp'; give one \\(--lipschitz\\)"):
        report.terms_of(network)
    assert report.terms_of(network, lipschitz=7.0)[0].lipschitz == 7.0
    median = prepare(config.from_mapping(crfl_run(defense=["median", "crfl"])))
    with pytest.raises(ConfigError, match="under 'median' depends on the updates"):
        report.terms_of(median)
    assert report.terms_of(median, weight=0.1)[0].weight.tolist() == [0.1, 0.1]
    attack = [crfl_run()["attack"][0], "sign_flip"]
    flipped = prepare(config.from_mapping(crfl_run(attack=attack)))
    with pytest.raises(ConfigError, match=r"\['sign_flip'\] make of them may be anything"):
        report.terms_of(flipped)
    assert report.terms_of(flipped, scale=1.0)[0].scale == 1.0


def test_the_certificate_of_a_run(finished):
    one = report.certify(finished, copies=60, std=0.2, images=50)
    assert one.radius.shape == one.correct.shape == (50,) and one.attacked == 2
    assert one.terms.later[-1] == (pytest.approx(2.15), 0.2)
    trained = read_trained(finished)
    prepared = prepare(trained.experiment)
    x = prepared.source.x_test[:50].reshape(50, -1) / prepared.source.scale
    x = (x - prepared.source.mean[0]) / prepared.source.std[0]
    counts = np.zeros((50, 10), int)
    for copy in range(60):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), copy), trained.flat.shape)
        noisy = trained.flat + 0.2 * np.asarray(noise)  # bias first, then the kernel
        read = (x @ noisy[10:].reshape(64, 10) + noisy[:10]).argmax(axis=1)
        counts[np.arange(50), read] += 1
    label, lower, upper = certificate.bounds(counts, 0.001)
    np.testing.assert_allclose(one.radius, certificate.radius(lower, upper, one.terms))
    assert one.correct.tolist() == (label == prepared.source.y_test[:50]).tolist()
    assert 0 < one.abstained == int((lower <= upper).sum()) < 50
    close(np.linalg.norm(trained.flat), np.float32(2.15), rtol=1e-5)  # clipped, without noise
    author = report.certify(finished, copies=60, std=0.2, convention="author")
    assert author.abstained == 0 and len(author.radius) == len(prepared.source.y_test) < 1632


def test_the_command(finished, tmp_path):
    def call(*args):
        return CliRunner().invoke(cli.app, ["certify", *map(str, args)])

    done = call(finished, "--copies", "40", "--images", "30")
    assert done.exit_code == 0, done.output
    written = {path.name for path in finished.glob("certificate.*")}
    assert written == {f"certificate.{kind}" for kind in ("json", "csv", "png", "pdf")}
    content = json.loads((finished / "certificate.json").read_text())
    frame = pd.read_csv(finished / "certificate.csv")
    assert content["examples"] == 30 and content["copies"] == 40 and len(frame) == 211
    assert content["terms"]["scale"] == 3.0 and len(content["terms"]["steps"]) == 2
    assert content["abstained"] == round(30 * (1 - frame["certified_rate"][0]))
    assert frame["certified_rate"].iloc[-1] == 0.0  # beyond the largest radius
    assert "abstained" in done.output and "short inputs only" in done.output
    unlike = tmp_path / "other"
    fedjax_sec.run(crfl_run(attack=crfl_run()["attack"][0]), out=unlike)
    assert "--out" in call(finished, unlike).output
    both = call(finished, unlike, "--out", tmp_path / "both", "--copies", "20", "--images", "9")
    assert both.exit_code == 0, both.output
    content = json.loads((tmp_path / "both" / "certificate.json").read_text())
    assert len(content["certificates"]) == 2
    for args, words in (
        ((tmp_path / "nothing",), "holds no finished run"),
        ((finished, "--images", "99999"), "images must be between 1 and"),
        ((finished, "--convention", "papers"), "Did you mean 'paper'"),
        ((finished, "--alpha", "1"), "alpha in (0, 1)"),
        ((finished, "--lipschitz", "0"), "lipschitz must be > 0"),
    ):
        refused = call(*args)
        assert refused.exit_code == 2 and words in " ".join(refused.output.split()), refused.output


def test_runs_are_told_apart_by_what_differs():
    ten, two = ({"name": "boost", "factor": f} for f in (10.0, 2.0))
    corner = crfl_run()["attack"][0]
    runs = [config.from_mapping(crfl_run(attack=[corner, one])) for one in (ten, two)]
    assert report.labels(runs) == ["factor = 10.0", "factor = 2.0"]
    assert report.labels(runs[:1]) == ["run"]
