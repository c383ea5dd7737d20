"""FLTrust: the rule against NumPy, the root data set, and the server's own update in a round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import program_of, replicas_of, task_on

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.data.root import Root
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import make_population
from fedjax_sec.runs.source import load_source


def oracle(updates, mine):
    """Algorithm 2 in float64, a client at a time."""
    total, result = 0.0, np.zeros(len(mine))
    for update in np.asarray(updates, np.float64):
        norm = np.sqrt((update**2).sum())
        if norm == 0:
            continue
        cosine = update @ mine / (norm * np.sqrt((mine**2).sum()))
        score = max(cosine, 0.0)
        result += score * update * (np.sqrt((mine**2).sum()) / norm)
        total += score
    return result / total if total > 0 else result


@pytest.mark.parametrize("clients", [1, 2, 7, 100])
def test_against_numpy(clients):
    rng = np.random.default_rng(clients)
    updates, mine = rng.normal(size=(clients, 30)), rng.normal(size=30)
    updates[0] = mine + 0.1 * rng.normal(size=30)  # somebody is trusted
    got = fedjax_sec.aggregate(updates, "fltrust", server_update=mine)
    np.testing.assert_allclose(got, oracle(updates, mine), rtol=2e-5, atol=1e-6)


def test_length_is_the_servers_whatever_the_clients_send():
    mine = np.array([3.0, 4.0, 0.0])
    small = fedjax_sec.aggregate([[3.0, 4.0, 0.0], [0, 0, 0.0]], "fltrust", server_update=mine)
    huge = fedjax_sec.aggregate([[3e30, 4e30, 0.0], [0, 0, 0.0]], "fltrust", server_update=mine)
    np.testing.assert_allclose(small, mine, rtol=1e-6)
    np.testing.assert_allclose(huge, mine, rtol=1e-6)


def test_nobody_trusted_is_no_step():
    updates = [[-1.0, 0.0], [-2.0, 1.0], [0.0, 0.0]]
    got = fedjax_sec.aggregate(updates, "fltrust", server_update=[1.0, 0.0])
    assert got.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fedjax_sec.aggregate([[1.0]], "fltrust"), "server_update is missing"),
        (lambda: fedjax_sec.aggregate([[1.0]], "mean", server_update=[1.0]), "would be ignored"),
        (lambda: fedjax_sec.aggregate([[1.0]], "fltrust", server_update=[1.0, 2.0]), r"\[D\]"),
        (lambda: fedjax_sec.aggregate([[1.0]], "fltrust", server_update=[np.nan]), "NaN"),
        (lambda: config.from_mapping({"defense": "fltrust"}), "set server.root"),
        (lambda: config.from_mapping({"server": {"root": {"bias": 0.5}}}), "sampling 'biased'"),
        (
            lambda: config.from_mapping({"server": {"root": {"size": 4, "batch_size": 5}}}),
            "root.batch_size must be <= 4",
        ),
        (
            lambda: config.from_mapping(
                {"server": {"root": True}, "client": {"keep_optimizer_state": True, "steps": 1}}
            ),
            "keep_optimizer_state",
        ),
    ],
)
def test_what_is_missing_or_unused_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


# --- The root data set --------------------------------------------------------------------------

LABELS = np.random.default_rng(0).choice(5, 1000, p=[0.4, 0.2, 0.2, 0.1, 0.1])


def draw(**fields):
    root = Root(**fields)
    root.check("server.root")
    return root.draw(np.random.default_rng(1), LABELS)


def test_uniform_root_follows_the_training_set():
    outcome = draw(size=300)
    assert len(np.unique(outcome)) == 300
    expected = np.bincount(LABELS) * 0.3
    assert np.abs(np.bincount(LABELS[outcome]) - expected).max() < 20


def test_stratified_root_holds_equally_many_of_each_class():
    assert np.bincount(LABELS[draw(size=50, sampling="stratified")]).tolist() == [10] * 5
    uneven = np.bincount(LABELS[draw(size=52, sampling="stratified")])
    assert uneven.sum() == 52 and sorted(uneven) == [10, 10, 10, 11, 11]


def test_biased_root_holds_the_share_and_the_rest_is_uniform():
    outcome = np.bincount(LABELS[draw(size=200, sampling="biased", bias=0.4, biased_class=2)])
    assert outcome[2] == 80 and outcome.sum() == 200
    # Class 0 is half of what is not class 2: 60 of 120, standard deviation below 6.
    assert 40 <= outcome[0] <= 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 1000}, "size must be < 1000"),
        ({"size": 900, "sampling": "stratified"}, "180 examples of class"),
        ({"size": 10, "sampling": "biased", "bias": 0.5, "biased_class": 7}, "class 7"),
    ],
)
def test_a_root_that_cannot_be_drawn_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        draw(**fields)


EXPERIMENT = {
    "data": {"name": "digits", "num_clients": 8},
    "client": {"name": "sgd", "steps": 2, "batch_size": 16},
    "server": {"root": {"size": 40}},
    "defense": "fltrust",
    "rounds": 3,
    "evaluation": {"every": 3},
}


def population(**changes):
    experiment = config.from_mapping(EXPERIMENT, changes)
    source = load_source(experiment)
    return make_population(experiment, source)[0], source


def test_no_client_holds_an_example_of_the_server():
    outcome, source = population()
    held = np.concatenate(
        [row[:count] for row, count in zip(outcome.index, outcome.counts, strict=True)]
    )
    assert len(outcome.root) == 40 and not set(outcome.root) & set(held)
    assert len(held) + 40 == len(source.y_train) == len(set(held) | set(outcome.root))


def test_the_class_table_counts_everything_once():
    from fedjax_sec.report.inspection import class_table

    outcome = class_table(
        config.from_mapping(EXPERIMENT, {"threat.num_malicious": 2, "attack": "zero"})
    )
    labels = np.asarray(load_source(config.from_mapping(EXPERIMENT)).y_train)
    assert (
        outcome.clients.shape == (8, 10)
        and outcome.malicious.sum() == 2
        and outcome.root.sum() == 40
    )
    np.testing.assert_array_equal(outcome.clients.sum(0) + outcome.root, np.bincount(labels))


def test_the_seed_decides_the_root_and_the_root_leaves_the_malicious_alone():
    one, _ = population()
    again, _ = population()
    other, _ = population(seed=1)
    without, _ = population(**{"server.root": None, "defense": "mean"})
    np.testing.assert_array_equal(one.root, again.root)
    assert set(one.root) != set(other.root)
    np.testing.assert_array_equal(one.malicious, without.malicious)


@pytest.mark.slow
def test_the_round_uses_the_servers_own_update():
    """With one client whose examples the rule trusts, the step has the server update's length."""
    from fedjax_sec.round.server import server_data

    experiment = config.from_mapping(EXPERIMENT, {"rounds": 1, "evaluation.every": 1})
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    replica = jax.tree.map(lambda leaf: leaf[0], replicas)
    state = program.init(replicas)
    before = np.asarray(state.server.params[0])
    task = task_on(program)
    root = server_data(task, program.pool, replica, jnp.asarray(before), jnp.int32(0))
    mine = np.asarray(root.update())
    # The server's training, by hand: two steps on all of its 40 examples.
    x = program.pool.x[replica.population.root] / np.float32(program.problem.inputs.scale)
    y = program.pool.y[replica.population.root]
    params = jnp.asarray(before)
    for _ in range(2):
        params -= 0.1 * jax.grad(task.loss)(params, x, y, jnp.ones(40, bool))
    np.testing.assert_allclose(mine, params - before, rtol=1e-3, atol=1e-6)
    assert float(root.loss(before + mine)) < float(root.loss(before))
    state, metrics = program.advance(state, replicas, 0, 1)
    step = np.asarray(state.server.params[0]) - before
    # The mean of vectors of one length is no longer than they are, and all are near it here.
    assert 0.5 * np.linalg.norm(mine) < np.linalg.norm(step) <= 1.0001 * np.linalg.norm(mine)
    assert metrics["fltrust/no_trust"].tolist() == [0.0]


def test_a_run_learns_and_two_of_its_seeds_share_a_program():
    result = fedjax_sec.run(EXPERIMENT, rounds=30, **{"evaluation.every": 30})
    assert result.metrics["accuracy"][-1] > 0.6
    one, two = (config.from_mapping(EXPERIMENT, {"seed": seed}) for seed in (0, 1))
    biased = config.from_mapping(
        EXPERIMENT, {"server.root": {"size": 40, "sampling": "biased", "bias": 0.8}}
    )
    larger = config.from_mapping(EXPERIMENT, {"server.root.size": 41})
    assert one.structure() == two.structure() == biased.structure() != larger.structure()
