"""Rounds against plain Python loops, participation, pairing of runs, batches, golden numbers."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NumpyMlp, close, small, tiny_mlp, tiny_pool, tiny_task
from jax.flatten_util import ravel_pytree
from programs import program_of, replicas_of, task_on, with_client

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.core import registry
from fedjax_sec.core.types import LocalData
from fedjax_sec.ops.permutation import permute
from fedjax_sec.round import init_state, run_round
from fedjax_sec.round.pipeline import Attack, Defense
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import make_population

GOLDEN = Path(__file__).parent / "golden"


def flat(result):
    return np.asarray(ravel_pytree(result.params)[0], np.float64)


def network(source, hidden=6):
    inputs = int(np.prod(source.x_train.shape[1:]))
    return NumpyMlp(inputs, hidden, source.num_classes, source.mean[0], source.std[0])


def start_of(experiment):
    """The program, its single replica, the first parameters, and every client's own examples."""
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    state = program.init(replicas)
    population, _ = make_population(experiment, program.source)
    source = program.source
    mine = []
    for row, count in zip(population.index, population.counts, strict=True):
        x = source.x_train[row[:count]].astype(np.float64) / source.scale
        mine.append((x, source.y_train[row[:count]]))
    return program, np.asarray(state.server.params[0], np.float64), mine


def loop(experiment, rounds, *, momentum=0.0, server_momentum=0.0, keep=False, l2=0.0):
    """Full-batch FedSGD by hand: a loop over clients, and the weighted mean of their updates."""
    program, params, mine = start_of(experiment)
    mlp = network(program.source)
    velocity, buffers = np.zeros_like(params), [np.zeros_like(params) for _ in mine]
    weights = np.array([len(y) for _, y in mine], np.float64)
    for _ in range(rounds):
        deltas = []
        for i, (x, y) in enumerate(mine):
            gradient = mlp.gradient(params, x, y) + l2 * params
            previous = buffers[i] if keep else 0.0
            buffers[i] = gradient + momentum * previous
            deltas.append(-0.2 * buffers[i])
        aggregate = (weights[:, None] * np.array(deltas)).sum(0) / weights.sum()
        velocity = aggregate + server_momentum * velocity
        params = params + velocity
    return params


def test_fedsgd_with_server_momentum_equals_a_loop():
    server = {"optimizer": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.9}}
    experiment = config.from_mapping(small(server=server, **{"client": client(l2=0.01)}))
    assert len({len(y) for _, y in start_of(experiment)[2]}) == 2  # so weights matter
    result = fedjax_sec.run(experiment)
    expected = loop(experiment, 3, server_momentum=0.9, l2=0.01)
    np.testing.assert_allclose(flat(result), expected, rtol=1e-4, atol=1e-5)


def client(momentum=None, **fields):
    optimizer = {"name": "sgd", "learning_rate": 0.2}
    optimizer |= {} if momentum is None else {"momentum": momentum}
    return {"name": "sgd", "steps": 1, "batch_size": 9, "optimizer": optimizer} | fields


@pytest.mark.parametrize("keep", [True, False])
def test_clients_keep_their_optimizer_state_if_told_to(keep):
    experiment = config.from_mapping(small(client=client(0.8, keep_optimizer_state=keep)))
    result = fedjax_sec.run(experiment)
    expected = loop(experiment, 3, momentum=0.8, keep=keep)
    np.testing.assert_allclose(flat(result), expected, rtol=1e-4, atol=1e-5)
    other = loop(experiment, 3, momentum=0.8, keep=not keep)
    assert np.abs(expected - other).max() > 1e-3


# --- One client ---------------------------------------------------------------------------------


def recorded(part, count, rounds=(0,), capacity=10):
    """Local training run step by step in Python, with the positions of every batch it fetched."""
    pool, batches, outputs = tiny_pool(), [], []
    params = 0.2 * jax.random.normal(jax.random.key(7), (tiny_task().dim,))

    def fetch(position):
        batches.append(np.asarray(position))
        return pool.x[position].astype(jnp.float32) / 255.0, pool.y[position]

    with jax.disable_jit():
        for number in rounds:
            local = LocalData(jnp.asarray(count), capacity, jnp.asarray(number), fetch)
            state = part.init(params.shape[0])
            outputs.append(part.apply(jax.random.key(3), params, state, local, tiny_task())[0])
    return np.asarray(params, np.float64), batches, outputs


def within(vector, radius):
    return vector * min(1.0, radius / np.linalg.norm(vector))


def replay(params, batches, learning_rate, momentum, l2, max_norm=np.inf, clip=np.inf):
    """SGD over given batches, in NumPy; gradients clipped, and the update projected."""
    pool, start, buffer = tiny_pool(), params, np.zeros_like(params)
    for positions in batches:
        x = np.asarray(pool.x, np.float64)[positions] / 255.0
        gradient = tiny_mlp().gradient(params, x, np.asarray(pool.y)[positions])
        buffer = within(gradient, clip) + l2 * params + momentum * buffer
        params = start + within(params - learning_rate * buffer - start, max_norm)
    return params - start


@pytest.mark.parametrize("fields", [{"epochs": 2}, {"steps": 4}])
def test_local_training_equals_a_loop(fields):
    optimizer = {"name": "sgd", "learning_rate": 0.3, "momentum": 0.7}
    part = registry.clients.build(
        {"name": "sgd", "batch_size": 4, "optimizer": optimizer, "l2": 0.05} | fields
    )
    count = 6  # batches of 4 and 2; capacity is 10, but an empty third batch costs no step
    params, batches, (delta,) = recorded(part, count)
    assert len(batches) == 4
    full = [positions[: min(4, count - 4 * (step % 2))] for step, positions in enumerate(batches)]
    assert [len(b) for b in full] == [4, 2, 4, 2]
    expected = replay(params, full, 0.3, 0.7, 0.05)
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-6)
    for epoch in (full[:2], full[2:]):
        assert sorted(np.concatenate(epoch)) == list(range(count))
    assert np.concatenate(full[:2]).tolist() != np.concatenate(full[2:]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        ({"max_norm": 0.25}, (0.25, np.inf)),
        ({"clip_gradient": 0.3}, (np.inf, 0.3)),
        ({"max_norm": 0.2, "clip_gradient": 0.5}, (0.2, 0.5)),
    ],
)
def test_projected_training_stays_within_the_norm_after_every_step(fields, bounds):
    """With `steps`, a shorter round is the beginning of a longer one: every step is seen."""
    optimizer = {"name": "sgd", "learning_rate": 0.4, "momentum": 0.7}
    spec = {"name": "sgd", "batch_size": 4, "optimizer": optimizer, "l2": 0.05}
    limit = bounds[0] * (1 + 1e-6)
    for steps in range(1, 7):
        part = registry.clients.build(spec | {"steps": steps} | fields)
        params, batches, (delta,) = recorded(part, 8)
        assert np.linalg.norm(np.asarray(delta, np.float64)) <= limit
        expected = replay(params, batches, 0.4, 0.7, 0.05, *bounds)
        np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-6)
    free = replay(params, batches, 0.4, 0.7, 0.05)
    assert np.linalg.norm(free) > 1.5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["sgd", "adversarial"])
def test_no_update_of_a_projected_run_is_longer_than_m(name):
    client = {
        "name": name,
        "steps": 3,
        "batch_size": 4,
        "max_norm": {"schedule": "steps", "values": {0: 0.3, 2: 0.1}},
        "optimizer": {"name": "sgd", "learning_rate": 2.0},
    } | ({"pgd_steps": 2} if name == "adversarial" else {})
    norms = fedjax_sec.run(small(client=client)).metrics["update_norm"][1:]
    np.testing.assert_allclose(norms, np.repeat([[0.3], [0.3], [0.1]], 5, axis=1), rtol=1e-5)


def test_epochs_run_on_across_rounds():
    """With `steps`, a round goes on where the last one stopped: 3 batches an epoch, 2 a round."""
    part = registry.clients.build({"name": "sgd", "batch_size": 4, "steps": 2})
    _, batches, _ = recorded(part, 10, rounds=range(3))
    sizes = [4, 4, 2] * 2
    visited = [b[:size].tolist() for b, size in zip(batches, sizes, strict=True)]
    for epoch in (visited[:3], visited[3:]):
        assert sorted(itertools.chain(*epoch)) == list(range(10))
    assert visited[:3] != visited[3:]


def test_uniform_batches_draw_with_replacement():
    part = registry.clients.build(
        {"name": "sgd", "batch_size": 8, "steps": 3, "sampling": "uniform"}
    )
    _, batches, _ = recorded(part, 5, rounds=range(2))
    drawn = np.concatenate(batches)
    assert set(drawn) == set(range(5)) and len(batches) == 6
    assert len({tuple(b) for b in batches}) == 6


# --- The permutation ----------------------------------------------------------------------------


def test_permutation_is_a_bijection_for_every_count():
    counts = jnp.arange(1, 201)
    images = jax.jit(
        jax.vmap(lambda n: permute(jax.random.fold_in(jax.random.key(0), n), jnp.arange(200), n))
    )(counts)
    for count, image in zip(range(1, 201), np.asarray(images), strict=True):
        assert sorted(image[:count]) == list(range(count))
        assert image.min() >= 0 and image.max() < count


def test_permutations_are_roughly_uniform():
    keys, draws = jnp.arange(6000), 6000
    images = np.asarray(
        jax.jit(jax.vmap(lambda s: permute(jax.random.key(s), jnp.arange(4), jnp.array(4))))(keys)
    )
    for position in range(4):
        share = np.bincount(images[:, position], minlength=4) / draws
        assert np.abs(share - 0.25).max() < 0.03
    orders, times = np.unique(images, axis=0, return_counts=True)
    assert len(orders) == 24 and times.min() > 0.5 * draws / 24 and times.max() < 1.5 * draws / 24


# --- Participation ------------------------------------------------------------------------------


@core.pytree
class Recorder(core.Stage):
    """An unweighted mean that keeps what the server showed it; its state has a row a client."""

    stage = "aggregate"
    registered_name = "recorder"

    def init(self, num_clients, dim):
        return {"rows": jnp.zeros(num_clients)}

    def apply(self, key, updates, state, view):
        assert state["rows"].shape == (5,)
        new = {"ids": view.client_ids, "weights": view.weights, "updates": updates}
        return updates.mean(0), new, {"kept": jnp.ones(updates.shape[0])}


def test_clients_are_drawn_without_replacement():
    server = {"clients_per_round": 3}
    experiment = config.from_mapping(small(server=server, rounds=1))
    experiment = dataclasses.replace(experiment, defense=Defense((Recorder(),)))
    program, params, mine = start_of(experiment)
    replicas = replicas_of([experiment])
    replica, start = jax.tree.map(lambda a: a[0], (replicas, program.init(replicas)))

    @jax.jit
    def step(index):
        task = task_on(program)
        return run_round(program.problem, task, program.pool, replica, start, index)

    mlp, seen = network(program.source), []
    for index in range(12):
        state, metrics = step(index)
        record = state.defense[0]
        ids = np.asarray(record["ids"])
        assert len(set(ids)) == 3 and set(ids) <= set(range(5))
        np.testing.assert_array_equal(record["weights"], [len(mine[i][1]) for i in ids])
        assert metrics["update_norm"].shape == metrics["kept"].shape == (3,)
        seen.append(tuple(ids))
    # A drawn client's update is its own, and parameters move by their mean.
    expected = [-0.2 * mlp.gradient(params, *mine[i]) for i in seen[-1]]
    np.testing.assert_allclose(record["updates"], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        state.server.params - params, np.mean(expected, axis=0), rtol=1e-3, atol=1e-5
    )
    assert len(set(seen)) > 3 and {i for ids in seen for i in ids} == set(range(5))


def test_attacked_and_clean_runs_are_paired():
    """Honest clients draw the same batches whether or not the others attack."""
    common = small(
        threat={"num_malicious": 2}, client=client(batch_size=4, sampling="uniform"), rounds=1
    )
    clean = fedjax_sec.run(common)
    attacked = fedjax_sec.run(common | {"attack": "zero"})
    norms, other = (r.metrics["update_norm"][-1] for r in (clean, attacked))
    assert (other == 0).sum() == 2 and (norms > 0).all()
    np.testing.assert_allclose(other[other > 0], norms[other > 0], rtol=1e-6)
    assert attacked.metrics["attack_shift"][-1] > 0
    assert attacked.metrics["update_norm_malicious"][-1] == 0
    np.testing.assert_allclose(
        attacked.metrics["update_norm_honest"][-1], norms[other > 0].mean(), rtol=1e-5
    )
    seeds = fedjax_sec.run(common | {"seed": 1}).metrics["update_norm"][-1]
    assert not np.allclose(seeds, norms)


# --- Golden rounds ------------------------------------------------------------------------------

CONFIGURATIONS = {
    "fedsgd": small(server={"optimizer": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.9}}),
    "alie_trimmed_mean": small(
        data={"num_clients": 8},
        client=client(batch_size=5),
        threat={"num_malicious": 2},
        attack={"name": "alie", "z": 1.5},
        defense="trimmed_mean",
    ),
    "pattern_clip_krum": small(
        data={"num_clients": 8, "partition": "by_label"},
        client=client(steps=None, epochs=2, batch_size=3),
        threat={"num_malicious": 2, "placement": "first"},
        attack={"name": "pattern", "size": 2},
        defense=[{"name": "clip_norm", "max_norm": 0.5}, "krum"],
    ),
}
HOW = (
    "The numbers of {name} have changed. That is legitimate only when the change was meant to "
    "alter results (other randomness, another default, a corrected formula), never for a "
    "refactoring or a faster kernel. If it was meant, say why in the commit and write the new "
    "numbers with\n"
    "    FEDJAX_SEC_UPDATE_GOLDEN=1 python -m pytest tests/test_round.py -k golden\n{detail}"
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_golden_rounds(name):
    metrics = fedjax_sec.run(CONFIGURATIONS[name]).metrics
    numbers = {key: np.asarray(value, float).round(6).tolist() for key, value in metrics.items()}
    numbers = json.loads(json.dumps(numbers).replace("NaN", "null"))
    path = GOLDEN / f"{name}.json"
    if os.environ.get("FEDJAX_SEC_UPDATE_GOLDEN") == "1":
        lines = (f"  {json.dumps(key)}: {json.dumps(numbers[key])}" for key in sorted(numbers))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    expected = json.loads(path.read_text())
    try:
        assert sorted(numbers) == sorted(expected)
        for key, values in expected.items():
            got, wanted = (np.array(v, float) for v in (numbers[key], values))
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=key)
    except AssertionError as error:
        pytest.fail(HOW.format(name=name, detail=error))


def test_a_round_of_no_change_keeps_the_parameters():
    experiment = config.from_mapping(
        small(client=client() | {"optimizer": {"name": "sgd", "learning_rate": 0.0}})
    )
    _, params, _ = start_of(experiment)
    close(flat(fedjax_sec.run(experiment)), params, atol=0.0)


def test_the_adversary_draws_no_example_of_a_client_whose_update_is_not_finite():
    """Such a client may hold NaN; here the first two of six send it, and nobody else's are left."""
    experiment = config.from_mapping(
        small(
            data={"num_clients": 6, "max_train": None},
            attack="zero",
            threat={"num_malicious": 2, "knowledge": "omniscient"},
        )
    )
    program = program_of(experiment)
    replica = jax.tree.map(lambda leaf: leaf[0], replicas_of([experiment]))
    drawn = []

    class Broken(core.Client):
        def apply(self, key, params, state, local, task, hooks=core.NO_HOOKS):
            first = local.fetch(jnp.arange(1))[0].sum()
            bad = jnp.isclose(first, sums[:2]).any()
            delta = jnp.where(bad, jnp.nan, jnp.zeros_like(params))
            return core.Trained(delta, state, 1, None, {"train_loss": jnp.array(0.0)})

    @core.pytree
    class Spy(core.UpdateAttack):
        registered_name = "spy"

        def apply(self, key, updates, state, view):
            drawn.append(np.asarray(view.sample(key, 400)[0]))
            return updates, state, {}

    task = task_on(program)
    images = np.asarray(task.example(replica.population.index)[0])  # [N, M, ...]
    sums = jnp.asarray(images[:, 0].reshape(6, -1).sum(1))
    assert len(set(np.asarray(sums))) == 6, "the first images must tell the clients apart"
    components = with_client(replica.components, Broken())._replace(attack=Attack((Spy(),)))
    params = jnp.zeros(task.dim)
    state = init_state(program.problem, task, components, params, replica.key)
    run_round(
        program.problem,
        task,
        program.pool,
        replica._replace(components=components),
        state,
        jnp.int32(0),
    )
    holders = {image.tobytes(): i for i, row in enumerate(images) for image in row}
    assert {holders[image.tobytes()] for image in drawn[0]} == {2, 3, 4, 5}
