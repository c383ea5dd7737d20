"""FL-WBC against NumPy, and defences in local training: who follows them, and beside what."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, same_bits, small, tiny_mlp

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.algorithms import Averaging
from fedjax_sec.core import NO_HOOKS, ClientView, ConfigError, Hooks, ServerView, Setting, registry
from fedjax_sec.core.components import with_defaults
from fedjax_sec.defenses import fl_wbc
from fedjax_sec.round import known_defense
from fedjax_sec.round.local import train_clients
from fedjax_sec.round.pipeline import Defense
from fedjax_sec.runs import config
from fedjax_sec.testing import local_defenses, worlds

RATE, COUNT = 0.1, worlds.CAPACITY


def wbc(**fields):
    return registry.defenses.build({"name": "fl_wbc", "strength": 0.5} | fields)


def view_of(**client):
    place = worlds.world()
    return ClientView(place.task, place.local_data(COUNT), worlds.plain_client(**client))


def kernels() -> np.ndarray:
    """Which parameters of the perceptron lie in a matrix: of its tensors the second and fourth."""
    shapes = tiny_mlp().shapes
    return np.concatenate([np.full(int(np.prod(s)), len(s) > 1) for s in shapes])


# --- The rule -------------------------------------------------------------------------------------


def by_hand(gradients, noises, convention, epoch=None):
    """The updates [steps, T] behind each step of plain SGD, coordinate by coordinate."""
    delta, updates = np.zeros(gradients.shape[1]), []
    change = np.zeros_like(delta)
    for i, (gradient, noise) in enumerate(zip(gradients, noises, strict=True)):
        start = delta.copy()
        for j in range(len(delta)):
            step = -RATE * gradient[j]
            delta[j] += step
            if i == 0 or (epoch and i % epoch == 0) or not kernels()[j]:
                continue
            if convention == "paper":
                acts = abs(step - change[j]) <= RATE * abs(noise[j])
            else:
                acts = abs(gradient[j] - gradients[i - 1][j]) <= abs(noise[j])
            if acts:
                delta[j] += RATE * noise[j]
        change = delta - start
        updates.append(delta.copy())
    return np.stack(updates)


def through_hooks(stage, gradients, **client):
    """The updates of the same gradients by the stage's hooks, and the noise of each step [T]."""
    hooks = stage.hooks(view_of(**client))
    delta, memory = jnp.zeros(gradients.shape[1]), hooks.memory
    updates, noises = [], []
    scale = stage.strength / (np.sqrt(2) if stage.convention == "paper" else 1)
    for i, gradient in enumerate(jnp.asarray(gradients, jnp.float32)):
        key = jax.random.fold_in(jax.random.key(5), i)
        noises.append(scale * np.asarray(jax.random.laplace(jax.random.clone(key), delta.shape)))
        delta, memory = hooks.after_step(key, delta - RATE * gradient, gradient, memory)
        updates.append(np.asarray(delta))
    return np.stack(updates), np.stack(noises)


@pytest.mark.parametrize(
    ("convention", "client", "epoch"),
    [
        ("paper", {}, None),
        ("author", {}, None),
        ("author", {"steps": None, "epochs": 2, "batch_size": 3}, 3),
        ("paper", {"steps": None, "epochs": 2, "batch_size": 3}, None),
    ],
)
def test_the_rule_is_that_of_numpy(convention, client, epoch):
    rng = np.random.default_rng(0)
    # Gradients that move by as much as the noise is large: some coordinates act, others do not.
    gradients = rng.normal(size=(6, len(kernels()))).cumsum(axis=0) * 0.5
    updates, noises = through_hooks(wbc(convention=convention), gradients, **client)
    expected = by_hand(gradients, noises, convention, epoch)
    close(updates, expected, rtol=1e-4, atol=1e-5)
    plain = -RATE * gradients.cumsum(axis=0)
    moved = np.abs(updates[-1] - plain[-1]) > 1e-4
    assert 0.2 < moved[kernels()].mean() < 1.0 and not moved[~kernels()].any()


def test_a_parameter_that_stays_moves_by_rate_times_noise():
    """Sign and size by hand: equal gradients differ by nothing, so every kernel gets the noise."""
    gradients = np.ones((2, len(kernels())))
    updates, noises = through_hooks(wbc(convention="author"), gradients)
    same_bits(updates[0], np.full_like(updates[0], -RATE))  # the first step is never perturbed
    close(updates[1][kernels()] + 2 * RATE, RATE * noises[1][kernels()], atol=1e-6)
    close(updates[1][~kernels()], np.full((~kernels()).sum(), -2 * RATE))


def test_the_paper_compares_with_the_last_change_and_its_noise(monkeypatch):
    """Noise of 1 in the second step is a change of 0.1 more: 0.5 in the third is less than that."""
    given = iter([0.0, 1.0, 0.5, 0.5])
    monkeypatch.setattr(
        fl_wbc.jax.random, "laplace", lambda key, shape, dtype: jnp.full(shape, next(given))
    )
    hooks = wbc(strength=np.sqrt(2)).hooks(view_of())
    memory, delta, gradient = hooks.memory, jnp.zeros(len(kernels())), jnp.ones(len(kernels()))
    first = int(np.flatnonzero(kernels())[0])
    after = []
    for i in range(4):
        key = jax.random.fold_in(jax.random.key(0), i)
        delta, memory = hooks.after_step(key, delta - RATE * gradient, gradient, memory)
        after.append(float(delta[first]))
    close(np.array(after), np.array([-0.1, -0.1, -0.2, -0.25]), atol=1e-6)


@pytest.mark.parametrize(("convention", "std"), [("paper", 0.5), ("author", 0.5 * np.sqrt(2))])
def test_what_the_strength_is(convention, std):
    gradients = np.ones((2, len(kernels())))
    drawn = []
    for seed in range(60):
        hooks = wbc(convention=convention).hooks(view_of())
        memory = hooks.memory
        keys = jax.random.split(jax.random.key(seed))
        delta = jnp.zeros(len(kernels()))
        for key, gradient in zip(keys, jnp.asarray(gradients), strict=True):
            delta, memory = hooks.after_step(key, delta - RATE * gradient, gradient, memory)
        drawn.append((np.asarray(delta) + 2 * RATE)[kernels()] / RATE)
    drawn = np.concatenate(drawn)
    assert abs(drawn.std() / std - 1) < 0.05 and abs(drawn.mean()) < 0.05 * std


# --- In training ----------------------------------------------------------------------------------


def noise_of(vector):
    """Fixed noise instead of random numbers: 0.3 and -0.02 in turn."""
    return np.where(np.arange(len(vector)) % 2 == 0, 0.3, -0.02).astype(np.float32)


def trained_by_hand(convention, mu=0.0, steps=4):
    """One client's update: full batches, plain SGD, FedProx with `mu`, and the rule."""
    place, mlp = worlds.world(), tiny_mlp()
    start = np.asarray(place.params(), np.float64)
    rows = np.arange(COUNT)
    x, y = np.asarray(place.pool.x)[rows] / 255.0, np.asarray(place.pool.y)[rows]
    scale = 1.0 if convention == "author" else 1 / np.sqrt(2)
    delta, change, last = np.zeros_like(start), np.zeros_like(start), None
    noise = scale * noise_of(start)
    for i in range(steps):
        before = delta.copy()
        gradient = mlp.gradient(start + delta, x, y) + mu * delta
        delta = delta - RATE * gradient
        if i > 0:
            if convention == "paper":
                still = np.abs(delta - before - change) <= RATE * np.abs(noise)
            else:
                still = np.abs(gradient - last) <= np.abs(noise)
            delta = np.where(still & kernels(), delta + RATE * noise, delta)
        change, last = delta - before, gradient
    return delta


@pytest.mark.parametrize(("convention", "mu"), [("paper", 0.0), ("author", 0.0), ("paper", 2.0)])
def test_a_clients_training_is_that_of_numpy(convention, mu, monkeypatch):
    """Behind the algorithm's own correction, FedProx's, whichever batches are drawn."""
    monkeypatch.setattr(
        fl_wbc.jax.random, "laplace", lambda key, shape, dtype: jnp.asarray(noise_of(range(*shape)))
    )
    place = worlds.world()
    algorithm = registry.algorithms.build({"name": "fedprox", "mu": mu} if mu else "fedavg")
    client = worlds.plain_client(steps=4, batch_size=COUNT)
    algorithm = dataclasses.replace(worlds.complete(algorithm), client=client)
    data, defense = place.local_data(COUNT), Defense((wbc(strength=1.0, convention=convention),))
    hooks = defense.hooks(ClientView(place.task, data, client), jnp.array(True))
    train = jax.jit(
        lambda: algorithm.train(jax.random.key(0), place.params(), (), data, place.task, hooks)
    )
    update = train()[0].vector
    close(update, trained_by_hand(convention, mu), rtol=1e-4, atol=1e-5)
    assert np.abs(update - trained_by_hand(convention, mu + 1.0)).max() > 1e-3


def updates_of_a_round(defense, algorithm=None):
    """Updates of a tiny world's four clients before the attack; the second one is malicious."""
    rounds = worlds.make_rounds(worlds.world(), algorithm)
    components = rounds.replica.components._replace(defense=Defense.build(defense))
    replica = rounds.replica._replace(components=components)
    place, ids = rounds.world, jnp.arange(worlds.CLIENTS)

    @jax.jit
    def train(replica, state, pool):
        args = state.server, state.attack, state.client, ids, jnp.int32(0)
        return train_clients(place.problem, place.task, pool, replica, *args)[0]

    return train(replica, rounds.state, place.pool)


STRONG = {"name": "fl_wbc", "strength": 0.5}


def test_honest_clients_follow_and_malicious_ones_need_not():
    without = updates_of_a_round("mean").vector
    honest = updates_of_a_round([STRONG, "mean"]).vector
    everybody = updates_of_a_round([STRONG | {"malicious_follow": True}, "mean"]).vector
    close(honest[1], without[1])  # another program, so up to rounding
    close(np.delete(everybody, 1, 0), np.delete(honest, 1, 0))
    moved = np.abs(everybody - without).max(axis=1)
    assert (moved > 1e-3).all(), moved


def test_control_variates_are_of_uncorrected_gradients_with_the_noise_in_the_model():
    """SCAFFOLD's message has both: an update with noise, a variate that a first step does not see.

    Client 3 has one batch a round of two steps: the second gradient is at perturbed parameters.
    """
    scaffold = registry.algorithms.build("scaffold")
    without, sent = (updates_of_a_round(rule, scaffold) for rule in ("mean", [STRONG, "mean"]))
    assert jnp.abs(sent.vector - without.vector)[0].max() > 1e-3
    assert jnp.abs(sent.vector - without.vector)[1].max() < 1e-6
    assert jax.tree.structure(sent) == jax.tree.structure(without)
    close(sent.extra, without.extra, atol=0.5)


def test_two_stages_in_local_training_draw_apart():
    """Each has its own memory and its own random numbers."""
    stages = (wbc(convention="author"), wbc(convention="author"))
    hooks = Defense(stages).hooks(view_of(), jnp.array(True))
    memory, ones = hooks.memory, jnp.ones(len(kernels()))
    delta = jnp.zeros(len(kernels()))
    for i in range(2):
        delta, memory = hooks.after_step(jax.random.key(i), delta - RATE * ones, ones, memory)
    noise = (np.asarray(delta) + 2 * RATE)[kernels()]
    single = Defense(stages[:1]).hooks(view_of(), jnp.array(True))
    memory, delta = single.memory, jnp.zeros(len(kernels()))
    for i in range(2):
        delta, memory = single.after_step(jax.random.key(i), delta - RATE * ones, ones, memory)
    alone = (np.asarray(delta) + 2 * RATE)[kernels()]
    assert abs(np.corrcoef(noise, 2 * alone)[0, 1]) < 0.999  # not the same noise twice
    assert np.any(alone != noise)


def test_hooks_compose():
    add = Hooks(
        after_step=lambda key, delta, gradient, memory: (delta + memory, memory), memory=1.0
    )
    double = Hooks(after_step=lambda key, delta, gradient, memory: (2 * delta, memory))
    key = jax.random.key(0)
    both, memory = add.then(double), (1.0, ())
    assert both.memory == memory and both.after_step(key, 3.0, 0.0, memory) == (8.0, memory)
    assert double.then(add).after_step(jax.random.clone(key), 3.0, 0.0, ((), 1.0))[0] == 7.0
    assert add.then(NO_HOOKS) == add == NO_HOOKS.then(add)
    assert NO_HOOKS.then(Hooks(mean_gradient=True)).mean_gradient
    assert float(add.where(jnp.array(False)).after_step(key, 3.0, 0.0, 1.0)[0]) == 3.0
    assert NO_HOOKS.where(jnp.array(True)) == NO_HOOKS


# --- Beside the other stages ----------------------------------------------------------------------


def server_view(updates):
    clients = updates.shape[0]
    return ServerView(
        params=jnp.zeros(updates.shape[1]),
        weights=jnp.ones(clients),
        client_ids=jnp.arange(clients),
        valid=jnp.ones(clients, bool),
        round=jnp.array(0),
    )


NOISE = {"name": "gaussian_noise", "std": 1.0}


@pytest.mark.parametrize(
    "others",
    [["mean", NOISE], [{"name": "bucketing", "size": 2}, "median"], ["foolsgold"], ["krum"]],
    ids=str,
)
def test_the_server_does_what_it_does_without(others):
    """The same aggregate, state, `kept` and random numbers, to the bit; so does `defend`."""
    others = [{"name": "krum", "num_byzantine": 1} if one == "krum" else one for one in others]
    updates = jax.random.normal(jax.random.key(1), (6, 5))
    outputs = []
    for rule in (others, ["fl_wbc", *others]):
        defense = Defense.build(rule)
        state, view = defense.init(6, 5), server_view(updates)
        done = defense.apply(jax.random.key(2), updates, state, view)
        defend, _ = known_defense(defense, jax.random.key(3), view, state, 6)
        outputs.append((done.aggregate, done.state, done.metrics, defend(updates)))
    same_bits(*outputs)


def test_a_stack_has_no_local_training():
    for call in (
        lambda: fedjax_sec.aggregate([[1.0], [2.0]], ["fl_wbc", "mean"]),
        lambda: fedjax_sec.attack(
            [[1.0], [2.0], [3.0]],
            "gradient_adaptive",
            malicious=[True, False, False],
            defense=["fl_wbc", "mean"],
        ),
    ):
        with pytest.raises(ConfigError, match="defense: 'fl_wbc' acts in the clients' local"):
            call()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defense": ["mean", "fl_wbc"]}, "order client, before, aggregate, after"),
        ({"defense": "fl_wbc"}, "exactly one aggregator"),
        ({"client.steps": 1}, "never acts on the first local step of a round"),
        ({"defense": [STRONG | {"strength": 0.0}, "mean"]}, "its strength is 0"),
        (
            {
                "defense": [STRONG | {"convention": "author"}, "mean"],
                "client.steps": None,
                "client.epochs": 3,
            },
            "first local step of an epoch",
        ),
        (
            {
                "client.optimizer": {
                    "name": "sgd",
                    "learning_rate": {
                        "name": "cosine_decay_schedule",
                        "init_value": 0.1,
                        "decay_steps": 9,
                    },
                }
            },
            "a number or a schedule over rounds as learning_rate",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(changes, words):
    base = small(defense=["fl_wbc", "mean"])
    base["client"] = base["client"] | {"steps": 2}
    with pytest.raises(ConfigError, match=words):
        experiment = config.from_mapping(base, changes)
        experiment.check(capacity=9)


def test_a_projection_between_the_steps_is_refused():
    base = small(defense=["fl_wbc", "mean"])
    base["client"] = base["client"] | {"steps": 2, "max_norm": 1.0}
    with pytest.raises(ConfigError, match=r"client.max_norm = 1.0 projects between them"):
        config.from_mapping(base)


def test_epochs_are_counted():
    """Of three epochs of one batch, the paper's rule skips one step, the author's all of them."""
    setting = Setting(4, capacity=9, client=view_of(steps=None, epochs=3, batch_size=9).client)
    assert wbc().idle(setting) is None
    assert "epoch" in wbc(convention="author").idle(setting)
    assert wbc(convention="author").idle(setting._replace(capacity=10)) is None
    assert wbc(convention="author").idle(Setting(4)) is None  # nothing is known


@core.pytree
class Deaf(Averaging):
    """An algorithm that takes hooks and forgets them."""

    registered_name = "deaf"

    def train(self, key, download, state, data, task, hooks=NO_HOOKS):
        return super().train(key, download, state, data, task)


@core.pytree
class Older(Averaging):
    """An algorithm without the argument."""

    registered_name = "older"

    def train(self, key, download, state, data, task):
        return super().train(key, download, state, data, task)


def test_an_algorithm_that_hands_no_hooks_on_is_refused():
    base = small(defense=["fl_wbc", "mean"])
    base["client"] = base["client"] | {"steps": 2}
    experiment = config.from_mapping(base)
    with pytest.raises(ConfigError, match="'fl_wbc' acts in local training, .* 'older' hands no"):
        dataclasses.replace(experiment, algorithm=Older()).check()
    with pytest.raises(ConfigError, match=r"\['fl_wbc'\] act in local training.*'deaf'"):
        updates_of_a_round(["fl_wbc", "mean"], Deaf())


# --- The protocol ---------------------------------------------------------------------------------


def method(*args):
    """Any method: whether it is there is asked, nothing calls it."""


@pytest.mark.parametrize("base", [True, False], ids=["derived", "without a base"])
def test_what_a_stage_of_local_training_must_define(base):
    def made(**members):
        return type("Mine", (core.Stage,) if base else (), members)

    with_defaults(made(stage="client", hooks=method), "defense")
    with_defaults(made(stage="after", apply=method), "defense")
    with pytest.raises(TypeError, match="Mine: a defense must define hooks"):
        with_defaults(made(stage="client", apply=method), "defense")
    with pytest.raises(TypeError, match="hooks.* Did you mean 'hook'"):
        with_defaults(made(stage="client", hook=method), "defense")
    with pytest.raises(TypeError, match="Mine: a defense must define apply"):
        with_defaults(made(stage="aggregate", hooks=method), "defense")


@core.pytree
class Broken(core.Stage):
    """A stage of local training whose hooks are given."""

    registered_name = "broken"
    stage = "client"
    made: types.FunctionType = core.static(None, "Hooks of a view.")

    def hooks(self, view):
        return self.made(view)


def test_the_contract_notices_a_broken_stage():
    idle = Broken(lambda view: Hooks(after_step=lambda key, delta, *rest: (delta, ())))
    with pytest.raises(AssertionError, match="it changes nothing"):
        local_defenses.check_local_acts(idle)
    grows = Broken(lambda view: Hooks(after_step=lambda key, delta, g, m: (delta, (m,))))
    with pytest.raises(AssertionError, match="the memory changes its structure"):
        local_defenses.check_local_shapes(grows)
    halves = Broken(lambda view: Hooks(correct=lambda gradient, delta: gradient / 2))
    for check in (local_defenses.check_local_acts, local_defenses.check_local_malicious):
        check(halves)
    everybody = types.SimpleNamespace(hooks=halves.hooks, malicious_follow=False, stage="client")
    assert Defense((everybody,)).client_stages == (everybody,)
