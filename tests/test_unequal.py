"""Clients of unequal size, and few of many clients in a round: padding, weights, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NumpyMlp, same_bits, small, tiny_pool, tiny_task
from jax.flatten_util import ravel_pytree
from programs import program_of, replicas_of

import fedjax_sec
from fedjax_sec.core import ConfigError, Partitioner, registry
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import AttackerView, BoundTask, LocalData, Message
from fedjax_sec.data import Source, take
from fedjax_sec.data.packing import pack_lists
from fedjax_sec.data.sources.digits import Digits
from fedjax_sec.round import make_task, run_round
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.runs import config
from fedjax_sec.runs import source as source_lib
from fedjax_sec.runs.prepare import make_population


def by_user(monkeypatch, source, sizes):
    """Experiments then see the first examples of `source`, of users with these sizes."""
    users = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    source = take(source, max_train=len(users))._replace(users_train=users)
    monkeypatch.setattr(source_lib, "_load", lambda *_: source)
    return source


def many(count, shape=(4, 4, 1), classes=10):
    """A source of `count` random images."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, *shape), np.uint8)
    y = rng.integers(0, classes, count).astype(np.int32)
    return Source(
        "many", x, y, x[:50], y[:50], classes, 255.0, (0.5,), (0.5,), (count, 50), "random"
    )


def natural(num_clients, **changes):
    data = {"num_clients": num_clients, "partition": "natural", "max_train": None}
    return small(**({"data": data} | changes))


# --- One client ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"epochs": 3}, {"epochs": 3, "sampling": "uniform"}, {"steps": 5}]
)
@pytest.mark.parametrize("name", ["sgd", "adversarial"])
def test_the_largest_client_does_not_change_a_smaller_one(name, fields):
    """Neither its batches nor its randomness depend on how far it is padded."""
    optimizer = {"name": "sgd", "learning_rate": 0.3, "momentum": 0.7}
    spec = {"name": name, "batch_size": 4, "optimizer": optimizer} | fields
    part = registry.clients.build(spec | ({"pgd_steps": 2} if name == "adversarial" else {}))
    plain, pool = tiny_task(), tiny_pool()

    class Noisy(BoundTask):
        """A task whose loss draws noise, as dropout would."""

        def loss(self, params, x, y, mask, *, train=False, key=None):
            noise = 0.0 if key is None else params @ jax.random.normal(key, params.shape)
            return plain.loss(params, x, y, mask) + noise

    def fetch(position):
        return pool.x[position].astype(jnp.float32) / 255.0, pool.y[position]

    def train(capacity, count=6):
        local = LocalData(jnp.asarray(count), capacity, jnp.asarray(2), fetch)
        params = 0.2 * jax.random.normal(jax.random.key(7), (plain.dim,))
        state = part.init(plain.dim)
        return part.apply(jax.random.key(3), params, state, local, Noisy(*plain)).delta

    alone = jax.jit(lambda: train(6))()
    np.testing.assert_allclose(jax.jit(lambda: train(23))(), alone, rtol=1e-5, atol=1e-6)
    assert not np.allclose(jax.jit(lambda: train(6, count=5))(), alone)


# --- A round ------------------------------------------------------------------------------------


def test_natural_sizes_give_steps_and_weights(monkeypatch):
    """Two epochs with batches of 8: one step each for 3 and 8 examples, two for 16."""
    sizes, rate, momentum = (3, 8, 16), 0.2, 0.9
    source = Digits().load()
    x, y = source.x_train[:27].copy(), source.y_train[:27].copy()
    x[11:], y[11:] = x[11], y[11]  # the large user's digits are all one: so are its batches
    source = by_user(monkeypatch, source._replace(x_train=x, y_train=y), sizes)
    client = {
        "name": "sgd",
        "epochs": 2,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "learning_rate": rate, "momentum": momentum},
    }
    result = fedjax_sec.run(natural(3, client=client, rounds=2))
    start = config.from_mapping(natural(3, client=client, rounds=2))
    program = program_of(start)
    params = np.asarray(program.init(replicas_of([start])).server.params[0], np.float64)
    mlp = NumpyMlp(64, 6, 10, source.mean[0], source.std[0])
    pixels = x.astype(np.float64) / source.scale
    parts = np.split(np.arange(27), np.cumsum(sizes)[:-1])
    for _ in range(2):
        deltas = []
        for part, steps in zip(parts, (2, 2, 4), strict=True):
            mine, buffer = params.copy(), 0.0
            for _ in range(steps):
                buffer = mlp.gradient(mine, pixels[part], y[part]) + momentum * buffer
                mine -= rate * buffer
            deltas.append(mine - params)
        params = params + np.average(deltas, axis=0, weights=sizes)
    actual = np.asarray(ravel_pytree(result.params)[0])
    np.testing.assert_allclose(actual, params, rtol=1e-3, atol=1e-5)


class EverySecond(Partitioner):
    """Deals every second example to the clients, the others to nobody."""

    def split(self, rng, labels, num_clients, users=None):
        dealt = np.arange(0, len(labels), 2)
        return pack_lists(np.array_split(dealt, num_clients), len(labels))


def test_examples_that_a_partition_deals_to_nobody_are_warned_of(monkeypatch):
    by_user(monkeypatch, many(27), (3, 8, 16))
    rest = {"name": "iid", "equal": True}  # a remainder is nobody's either, and needs no warning

    def left_out(number, partition, name):
        spec = natural(number, rounds=1)
        spec["data"]["partition"] = partition
        spec["client"]["batch_size"] = 4
        summary = fedjax_sec.run(spec).summary
        left = summary["data"]["unused_train"]
        said = [one for one in summary.get("warnings", []) if "no client" in one]
        warning = (
            f"data: {left} of 27 training examples belong to no client: data.partition {name!r} "
            f"deals them to none of {number}"
        )
        assert said == ([warning] if name else [])
        return left

    assert left_out(3, "natural", "") == 0 and left_out(2, rest, "") == 1
    assert left_out(2, "natural", "natural") in (3, 8, 16)
    assert left_out(2, EverySecond(), f"{__name__}.EverySecond") == 13


@pytest.mark.parametrize(
    ("knowledge", "total"), [("omniscient", 27), ("corrupted", 9)], ids=["omniscient", "corrupted"]
)
def test_a_boost_by_weights_and_rate_replaces_the_model(monkeypatch, knowledge, total):
    """One of three clients, of 3, 8 and 16 examples, and a server with learning rate 0.5.

    The new model is the malicious client's, plus what the honest ones add; an adversary that takes
    the others for as large as itself falls short by 9 of 27.
    """
    sizes, rate, server = (3, 8, 16), 0.2, 0.5
    source = by_user(monkeypatch, Digits().load(), sizes)
    spec = natural(
        3,
        client={
            "name": "sgd",
            "epochs": 1,
            "batch_size": 16,
            "optimizer": {"name": "sgd", "learning_rate": rate},
        },
        server={"optimizer": {"name": "sgd", "learning_rate": server}},
        threat={"num_malicious": 1, "placement": "first", "knowledge": knowledge},
        attack={"name": "boost", "accounts_for": "weights_and_rate"},
        rounds=1,
    )
    result = fedjax_sec.run(spec)
    one = config.from_mapping(spec)
    program = program_of(one)
    before = np.asarray(program.init(replicas_of([one])).server.params[0], np.float64)
    mlp = NumpyMlp(64, 6, 10, source.mean[0], source.std[0])
    parts = np.split(np.arange(27), np.cumsum(sizes)[:-1])
    x, y = source.x_train.astype(np.float64) / source.scale, source.y_train
    deltas = np.stack([-rate * mlp.gradient(before, x[part], y[part]) for part in parts])
    honest = server * np.asarray(sizes[1:]) @ deltas[1:] / 27
    expected = before + total / 27 * deltas[0] + honest
    actual = np.asarray(ravel_pytree(result.params)[0])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(deltas[0]).max() > 0.01


@pytest.mark.parametrize("name", ["boost", "scaling"])
def test_without_honest_updates_the_model_is_the_attacker_s_own(name):
    rng = np.random.default_rng(0)
    before, update, weights = rng.normal(size=5), rng.normal(size=5), jnp.array([2.0, 7.0, 11.0])
    stack, malicious = jnp.zeros((3, 5)).at[1].set(update), jnp.arange(3) == 1
    view = AttackerView(
        malicious,
        malicious | True,
        jnp.asarray(before),
        jnp.arange(3),
        jnp.array(0),
        weights=weights,
        server_rate=0.5,
    )
    attack = Attack.build({"name": name, "accounts_for": "weights_and_rate"})
    message = Message(stack, jnp.ones(len(stack)))
    sent = attack.apply(jax.random.key(0), message, attack.init(3, 5), view)[0].vector
    after = before + 0.5 * np.asarray(fedjax_sec.aggregate(sent, "mean", weights=weights))
    np.testing.assert_allclose(after, before + update, rtol=1e-6)


@pytest.mark.parametrize("name", ["boost", "scaling"])
@pytest.mark.parametrize(
    ("fields", "optimizer", "message"),
    [
        ({"factor": 3.0}, {}, r"attack.accounts_for 'weights_and_rate' computes the factor"),
        ({}, {"momentum": 0.9}, "sgd with a learning_rate alone, got .*'momentum': 0.9"),
        ({}, {"name": "adam"}, "needs a server whose step is a rate times the aggregate"),
        (
            {},
            {"learning_rate": {"name": "constant_schedule", "value": 0.5}},
            "needs a server whose",
        ),
    ],
)
def test_a_boost_by_weights_and_rate_needs_a_known_rate(name, fields, optimizer, message):
    attack = {"name": name, "accounts_for": "weights_and_rate"} | fields
    server = {"optimizer": {"name": "sgd", "learning_rate": 1.0} | optimizer}
    spec = small(attack=attack, server=server, threat={"num_malicious": 2})
    with pytest.raises(ConfigError, match=message):
        config.from_mapping(spec)
    hidden = {"name": "hybrid", "main": attack}
    if name == "boost":
        with pytest.raises(ConfigError, match=message.replace("attack.", "attack.main.")):
            config.from_mapping(spec | {"attack": hidden})


def test_the_server_s_rate_may_follow_a_schedule():
    later = {"schedule": "steps", "values": {0: 1.0, 2: 0.5}}
    spec = small(
        attack={"name": "boost", "accounts_for": "weights_and_rate"},
        server={"optimizer": {"name": "sgd", "learning_rate": later}},
        threat={"num_malicious": 2},
    )
    assert np.isfinite(fedjax_sec.run(spec).metrics["accuracy"]).all()


def sampled_malicious(experiment_, source, rounds):
    """How many malicious clients each round draws."""
    data, k = experiment_.data, experiment_.clients_per_round
    population, _ = make_population(experiment_, source)
    key = jax.random.key(experiment_.seed)
    drawn = []
    for number in range(rounds):
        mine = stream(jax.random.fold_in(key, number), Stream.SAMPLE)
        ids = jax.random.choice(mine, data.num_clients, (k,), replace=False)
        drawn.append(int(population.malicious[np.asarray(ids)].sum()))
    return drawn


@pytest.mark.slow
def test_the_papers_share_of_3383_users(monkeypatch):
    sizes = np.random.default_rng(0).integers(1, 4, 3383)
    source = by_user(monkeypatch, many(int(sizes.sum())), sizes)
    spec = natural(
        3383,
        server={"clients_per_round": 33},
        threat={"num_malicious": 338},
        attack={"name": "pattern", "size": 1},
        client={"name": "sgd", "epochs": 2, "batch_size": 2},
        rounds=4,
    )
    result = fedjax_sec.run(spec)
    drawn = sampled_malicious(config.from_mapping(spec), source, 4)
    assert len(set(drawn)) > 1 and min(drawn) > 0 and max(drawn) < 12
    assert result.summary["traces"] == 1 and result.summary["data"]["unused_train"] == 0
    for metric in ("train_loss", "loss", "update_norm_malicious"):
        assert np.isfinite(result.metrics[metric][1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["alie", "sign_flip", {"name": "pattern", "size": 1}])
def test_a_round_that_draws_no_malicious_client_is_clean(monkeypatch, attack):
    sizes = np.random.default_rng(1).integers(1, 12, 30)
    source = by_user(monkeypatch, many(int(sizes.sum())), sizes)
    common = {
        "server": {"clients_per_round": 4},
        "client": {"name": "sgd", "epochs": 1, "batch_size": 4},
        "rounds": 3,
    }
    attacked = common | {"attack": attack, "threat": {"num_malicious": 4}}
    seed = next(
        seed
        for seed in range(100)
        if (
            drawn := sampled_malicious(
                config.from_mapping(natural(30, seed=seed, **attacked)), source, 3
            )
        )[0]
        == 0
        and drawn[1] > 0
        and drawn[2] != drawn[1]
    )
    clean, dirty = (
        fedjax_sec.run(natural(30, seed=seed, **how)).metrics for how in (common, attacked)
    )
    for metric in ("loss", "aggregate_norm"):
        same_bits(clean[metric][:2], dirty[metric][:2])
        assert np.isfinite(dirty[metric][1:]).all() and clean[metric][3] != dirty[metric][3]


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("clients", ["vmap", "map"])
def test_data_of_clients_that_are_not_drawn_is_not_copied(monkeypatch, clients):
    """The working memory of a round with 5 clients is the same for 50 and for 400 of them."""
    width, shape = 20, (28, 28, 1)

    def temporary(num_clients):
        source = by_user(monkeypatch, many(num_clients * width, shape), [width] * num_clients)
        spec = natural(
            num_clients,
            server={"clients_per_round": 5},
            client={"name": "sgd", "epochs": 2, "batch_size": 4},
            threat={"num_malicious": 10},
            attack={"name": "pattern", "size": 2},
            execution={"clients": clients},
        )
        one = config.from_mapping(spec)
        program = program_of(one)
        replicas = replicas_of([one])
        replica = jax.tree.map(lambda leaf: leaf[0], replicas)
        state = jax.tree.map(lambda leaf: leaf[0], program.init(replicas))
        assert replica.population.index.shape == (num_clients, width)

        def advance(state, replica, pool):
            task = make_task(program.problem, pool, program.prepared.task)
            return run_round(program.problem, task, pool, replica, state, jnp.int32(0))

        compiled = jax.jit(advance).lower(state, replica, program.pool).compile()
        assert program.pool.x.nbytes == num_clients * width * source.x_train[0].nbytes
        return compiled.memory_analysis().temp_size_in_bytes

    few, lots = temporary(50), temporary(400)
    one_client = width * int(np.prod(shape))  # bytes of its images as they are stored
    # What grows is drawing the clients: a few numbers for each.
    assert lots - few < 350 * 32 < one_client, (few, lots)
