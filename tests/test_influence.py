"""Net influence: finite differences, the author's steps in NumPy, runs, resuming, replicas."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NumpyMlp, same_bits, small, tiny_mlp, tiny_pool, tiny_task
from programs import program_of, replicas_of, task_on, train

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.core import ConfigError
from fedjax_sec.core.types import ServerView
from fedjax_sec.monitors import influence as module
from fedjax_sec.monitors.influence import Probes, importances, influence, sign_flipped
from fedjax_sec.round.pipeline import Attack, Defense
from fedjax_sec.runs import config
from fedjax_sec.runs.source import load_source

COUNT = 11
NAMES = ("honest_plus", "honest_minus", "adversary_plus", "adversary_minus")


# --- NumPy, in float64 --------------------------------------------------------------------------


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def differences(mlp, params, x, labels, outcome, step=1e-6):
    """[P, D]: every example's derivative of its label's outcome, by central differences."""
    params = np.asarray(params, np.float64)

    def value(at):
        return outcome(mlp.forward(at, x)[2])[np.arange(len(x)), labels]

    columns = []
    for j in range(len(params)):
        shift = np.zeros_like(params)
        shift[j] = step
        columns.append((value(params + shift) - value(params - shift)) / (2 * step))
    return np.stack(columns, axis=1)


def numpy_importance(mlp, params, x, labels, convention, batch_size):
    if convention == "fisher":
        return (differences(mlp, params, x, labels, log_softmax) ** 2).mean(0)
    gradients = differences(mlp, params, x, labels, lambda z: z)
    batches = [gradients[i : i + batch_size].sum(0) for i in range(0, len(x), batch_size)]
    return sum(g**2 for g in batches) / len(x)


def numpy_influence(mlp, before, after, flipped, x, target, base, top, convention, batch_size):
    """The steps of the author code, on Python sets of positions."""

    def most(labels):
        values = numpy_importance(mlp, before, x, labels, convention, batch_size)
        return set(np.argsort(values)[-top:].tolist())

    adversary, honest = most(target), most(base)
    minimised = set(np.flatnonzero(flipped).tolist())
    maximised = set(range(len(before))) - minimised
    move = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    norm = {}
    for sign, side in (("plus", maximised), ("minus", minimised)):
        for who, mine, others in (("adversary", adversary, honest), ("honest", honest, adversary)):
            only = sorted((mine & side) - (others & side))
            norm[f"{who}_{sign}"] = np.linalg.norm(move[only])
    net_honest = norm["honest_plus"] - norm["honest_minus"]
    net_adversary = norm["adversary_plus"] - norm["adversary_minus"]
    return norm | {"net": net_honest - net_adversary}


# --- The pure function --------------------------------------------------------------------------


def example():
    """Parameters, images, two labellings and a mask with gaps, on the tiny perceptron."""
    rng = np.random.default_rng(3)
    params = jnp.asarray(0.5 * rng.normal(size=tiny_task().dim), jnp.float32)
    x = tiny_pool().x[:COUNT].astype(jnp.float32) / 255
    labels = jnp.asarray(np.stack([np.full(COUNT, 2), rng.integers(0, 2, COUNT)]))
    return params, x, labels, jnp.arange(COUNT) % 4 != 1  # 8 of 11


def numpy_example():
    """The same, those that count only, in float64."""
    params, x, labels, include = (np.asarray(part) for part in example())
    return params.astype(np.float64), x[include], labels[:, include]


@pytest.mark.parametrize("batch_size", [3, 8, 256])
@pytest.mark.parametrize("convention", ["author", "fisher"])
def test_importance_equals_finite_differences(convention, batch_size):
    options = {"convention": convention, "batch_size": batch_size}
    result = jax.jit(lambda *args: importances(tiny_task(), *args, **options))(*example())
    params, x, labels = numpy_example()
    for row, kind in zip(result, labels, strict=True):
        expected = numpy_importance(tiny_mlp(), params, x, kind, convention, batch_size)
        assert (expected > 1e-3).sum() > 30
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-5)


def test_conventions_and_batches_differ():
    def result(convention, size):
        return importances(tiny_task(), *example(), convention=convention, batch_size=size)

    author, whole, fisher = result("author", 3), result("author", 8), result("fisher", 3)
    assert not np.allclose(author, whole, rtol=0.1) and not np.allclose(author, fisher, rtol=0.1)
    same_bits(fisher, result("fisher", 8))
    with pytest.raises(ValueError, match="convention must be one of.*Did you mean 'author'"):
        result("autor", 3)


def test_fisher_holds_the_gradients_of_few_images(monkeypatch):
    params, x, labels, include = example()
    many = (jnp.tile(x, (20, 1, 1, 1)), jnp.tile(labels, (1, 20)), jnp.tile(include, 20))

    def compiled():
        function = jax.jit(lambda *args: importances(tiny_task(), *args, convention="fisher"))
        return function.lower(params, *many).compile()

    whole = compiled()
    limit = 3 * 2 * tiny_task().dim  # three images at a time
    for name in ("_FLOATS", "_FLOATS_CPU"):
        monkeypatch.setattr(module, name, limit)
    few = compiled()
    np.testing.assert_allclose(few(params, *many), whole(params, *many), rtol=1e-4, atol=1e-7)
    matrix = 20 * COUNT * 2 * tiny_task().dim * 4  # bytes
    needs = [part.memory_analysis().temp_size_in_bytes for part in (few, whole)]
    assert needs[0] < matrix / 3 and needs[1] > matrix


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("convention", ["author", "fisher"])
def test_influence_equals_the_authors_steps(convention, flips):
    params, x, labels, include = example()
    rng = np.random.default_rng(5)
    after = params + jnp.asarray(rng.normal(size=len(params)), jnp.float32)
    flipped = rng.random(len(params)) < 0.4 if flips else np.zeros(len(params), bool)
    result = influence(
        tiny_task(),
        params,
        after,
        jnp.asarray(flipped) if flips else None,
        Probes(x, *labels, include),
        top=30,
        convention=convention,
        batch_size=3,
    )
    before, x, labels = numpy_example()
    expected = numpy_influence(tiny_mlp(), before, after, flipped, x, *labels, 30, convention, 3)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert all((expected[name] > 0.5) == (flips or "plus" in name) for name in NAMES)


def test_one_mapping_moves_nothing_of_its_own():
    params, x, labels, include = example()
    same = Probes(x, labels[0], labels[0], include)
    result = influence(tiny_task(), params, params + 1.0, None, same, top=30)
    assert all(float(value) == 0.0 for value in result.values())


# --- In a run -----------------------------------------------------------------------------------


@core.pytree
class Turn(core.Stage):
    """Turns the aggregate where it is below its mean, as a robust learning rate might."""

    stage = "after"
    registered_name = "turn"

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, aggregate, updates, state, view):
        return jnp.where(aggregate < aggregate.mean(), -aggregate, aggregate), state, {}


@core.pytree
class Stamp(core.DataAttack):
    """Images of class `base` with one pixel set are class `target`; only these are probes."""

    base: int
    target: int = 4
    stage = "data"
    registered_name = "stamp"

    def trigger(self, x):
        return x.at[:, 0, 0].set(1.0)

    def choose(self, key, labels, held):
        return held & (labels == self.base)

    def poison(self, key, state, x, y, rank, task):
        return self.trigger(x), jnp.full_like(y, self.target)

    def probes(self, state, x, y, task):
        return self.trigger(x), jnp.full_like(y, self.target), y == self.base


FIELDS = {"top": 40, "batch_size": 16}


def attacked(base=7, fields=FIELDS, defense=None, **changes):
    """Five clients, one of which trains on stamped images."""
    changes = {"threat": {"num_malicious": 1}, "attack": "pattern"} | changes
    changes["evaluation"] = {"influence": fields} | changes.get("evaluation", {})
    experiment = config.from_mapping(small(**changes))
    experiment = dataclasses.replace(experiment, attack=Attack((Stamp(base),)))
    if defense is not None:
        experiment = dataclasses.replace(experiment, defense=Defense(defense))
    return experiment


def single_rounds(experiment):
    """Parameters before each round and at the end, the sums, and the last state's sum."""
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    state = program.init(replicas)
    params, sums = [np.asarray(state.server.params[0])], []
    for index in range(experiment.rounds):
        state, metrics = program.advance(state, replicas, index, 1)
        params.append(np.asarray(state.server.params[0]))
        sums.append(float(metrics["net_influence"][0]))
    assert sums[-1] == float(state.monitors[1][0])
    return params, sums


def by_hand(before, after, flipped):
    """One round's influence in NumPy, on the stamped test images of class 7."""
    source = load_source(attacked())
    x = source.x_test[source.y_test == 7] / source.scale
    x[:, 0, 0] = 1.0
    return numpy_influence(
        NumpyMlp(64, 6, 10, source.mean[0], source.std[0]),
        before,
        after,
        flipped,
        x,
        np.full(len(x), 4),
        np.full(len(x), 7),
        FIELDS["top"],
        "author",
        FIELDS["batch_size"],
    )


def test_a_run_adds_up_the_rounds():
    params, sums = single_rounds(attacked())
    nowhere = np.zeros(len(params[0]), bool)
    expected = [by_hand(*step, nowhere) for step in itertools.pairwise(params)]
    nets = np.array([one["net"] for one in expected])
    assert (np.abs(nets) > 1e-3).all()
    np.testing.assert_allclose(sums, np.cumsum(nets), rtol=1e-3, atol=1e-5)
    metrics = train([attacked()])[0].metrics
    assert np.isnan(metrics["net_influence"][0])
    np.testing.assert_allclose(metrics["net_influence"][1:], sums, rtol=1e-5)
    for name in NAMES:
        norms = [one[name] for one in expected]
        np.testing.assert_allclose(metrics[f"influence/{name}"][1:], norms, rtol=1e-3, atol=1e-6)


def test_what_the_defence_turned_counts_as_minus():
    mean = config.from_mapping(small()).defense.stages
    plain, turned = (single_rounds(attacked(defense=d))[0] for d in (mean, (*mean, Turn())))
    move = plain[1] - plain[0]
    flipped = move < move.mean()
    np.testing.assert_allclose(turned[1] - turned[0], np.where(flipped, -move, move), atol=1e-6)
    expected = by_hand(turned[0], turned[1], flipped)
    metrics = train([attacked(defense=(*mean, Turn()))])[0].metrics
    for name in NAMES:
        assert expected[name] > 1e-3
        assert metrics[f"influence/{name}"][1] == pytest.approx(expected[name], rel=1e-3)
    assert metrics["net_influence"][1] == pytest.approx(expected["net"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["noise, turn", "turn, noise", "turn, turn", "noise"])
def test_only_turns_count_as_turned(order):
    mean, noise = Defense.build(["mean", {"name": "gaussian_noise", "std": 1.0}]).stages
    after = [{"noise": noise, "turn": Turn()}[name] for name in order.split(", ")]
    updates = jax.random.normal(jax.random.key(1), (4, 1000))
    view = ServerView(jnp.zeros(1000), jnp.ones(4), jnp.arange(4), jnp.ones(4, bool), jnp.array(0))

    def apply(*stages):
        part = Defense((mean, *stages))
        defended = jax.jit(part.apply)(jax.random.key(0), updates, part.init(4, 1000), view)
        return defended.aggregate, sign_flipped(defended.aggregates)

    assert apply()[1] is None
    expected, steps = np.zeros(1000, bool), [apply(*after[:i])[0] for i in range(len(after) + 1)]
    for stage, before in zip(after, steps[:-1], strict=True):
        if stage is not noise:
            expected ^= np.asarray(before < before.mean())
    np.testing.assert_array_equal(apply(*after)[1], expected)
    assert (100 < expected.sum() < 900) == ("turn" in order)
    opposite = np.sign(steps[-1]) != np.sign(steps[0])
    assert ("noise" not in order) or (opposite != expected).sum() > 50


def test_stretches_of_rounds_change_only_rounding():
    single = train([attacked()])[0].metrics["net_influence"]
    whole = train([attacked(evaluation={"every": 3})])[0].metrics["net_influence"]
    assert len(whole) == 2
    assert whole[-1] == pytest.approx(single[-1], rel=1e-4)


class Stop(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_sum(tmp_path):
    spec = small(
        threat={"num_malicious": 1},
        attack="pattern",
        rounds=6,
        checkpoint={"every": 2},
        evaluation={"influence": FIELDS},
    )
    whole = fedjax_sec.run(spec, out=tmp_path / "whole")

    def stop(done, rows):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        fedjax_sec.run(spec, out=tmp_path / "cut", on_evaluation=stop)
    resumed = fedjax_sec.run(spec, out=tmp_path / "cut", resume=True)
    same_bits(resumed.metrics, whole.metrics)
    same_bits(resumed.params, whole.params)
    assert len(set(whole.metrics["net_influence"][1:])) == 6
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert rows[0] == rows[1] and rows[0].count("net_influence") == 6


def test_off_costs_nothing():
    on, off = attacked(), attacked(fields=None)
    plain, result = (train([e])[0] for e in (off, on))
    extra = {f"influence/{name}" for name in NAMES} | {"net_influence"}
    assert result.metrics.keys() - plain.metrics.keys() == extra
    assert plain.metrics.keys() <= result.metrics.keys()
    for name, values in plain.metrics.items():
        np.testing.assert_allclose(values, result.metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for experiment, needed in ((off, False), (on, True)):
        program = program_of(experiment)
        replicas = replicas_of([experiment])
        state = program.state_shapes(replicas)
        assert (len(state.monitors) == 2) == (replicas.probes[-1] is not None) == needed
        args = state, replicas, program.pool, jnp.int32(0), program.test
        text = jax.jit(program._advance(1)).lower(*args).as_text()
        assert ("360x8x8" in text) == needed  # the test images: what nobody reads is no argument


@pytest.mark.slow
def test_replicas_side_by_side_keep_their_own_sums():
    cells = [
        dataclasses.replace(attacked(base=base), seed=seed)
        for base, seed in ((7, 0), (7, 1), (8, 0))
    ]
    alone = [train([cell])[0].metrics for cell in cells]
    assert len({one["net_influence"][-1] for one in alone}) == 3
    program = program_of(cells[0])
    probes = np.asarray(replicas_of(cells).probes[1])
    labels = program.source.y_test
    for row, base in zip(probes, (7, 7, 8), strict=True):
        assert row[row >= 0].tolist() == np.flatnonzero(labels == base).tolist()
    assert (probes < 0).any()  # the classes differ in size
    for at_once in (1, 3):
        together = train(cells, at_once=at_once)
        for one, other in zip(alone, together, strict=True):
            for name in ("net_influence", *(f"influence/{name}" for name in NAMES)):
                np.testing.assert_allclose(
                    one[name], other.metrics[name], rtol=1e-3, atol=1e-6, err_msg=name
                )


def test_padding_is_no_probe(monkeypatch):
    """Position -1 is the last test image, whose own class is stamped here."""
    source = load_source(attacked())
    last = int(source.y_test[-1])
    cell = dataclasses.replace(attacked(), attack=Attack((Stamp(last, (last + 1) % 10),)))
    program = program_of(cell)
    replica = jax.tree.map(lambda leaf: leaf[0], replicas_of([cell]))
    task, seen = task_on(program), []

    def look(task, before, after, flipped, probes, **options):
        seen.append(probes)
        return {name: jnp.zeros(()) for name in (*NAMES, "net")}

    monkeypatch.setattr(module, "influence", look)
    monitor, positions = cell.evaluation.influence, replica.probes[1]
    padded = jnp.concatenate([positions, jnp.array([-1, -1])])
    backdoor = replica.components.attack.backdoor
    trace = SimpleNamespace(
        backdoor=(backdoor, ()),
        probes=padded,
        test=program.test,
        before=None,
        after=None,
        aggregates=(jnp.zeros(3),),
    )
    monitor.observe(jax.random.key(0), jnp.zeros(()), trace, task)
    (probes,) = seen
    assert probes.include[:-2].all() and not probes.include[-2:].any()
    assert set(probes.base.tolist()) == {last}
    assert (probes.x[:, 0, 0] == 1).all() and set(probes.target.tolist()) == {(last + 1) % 10}


def test_only_the_first_images():
    cells = attacked(), attacked(fields=FIELDS | {"max_images": 5})
    programs = [replicas_of([cell]).probes[1] for cell in cells]
    assert programs[1].shape == (1, 5)
    np.testing.assert_array_equal(programs[0][:, :5], programs[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attack": None}, "evaluation.influence compares a backdoor"),
        ({"attack": "sign_flip"}, "evaluation.influence compares a backdoor"),
        ({"attack": "sample"}, "probes with true labels; those of attack 'sample'"),
        ({"evaluation.influence.top": 461}, "top must be <= 460.*got 461"),
        ({"evaluation.influence.top": 0}, "influence.top must be >= 1, got 0"),
        ({"evaluation.influence.tpo": 1}, "unknown key 'tpo'. Did you mean 'top'"),
        ({"evaluation.influence.convention": "fishr"}, "Did you mean 'fisher'"),
        ({"evaluation.influence": 3}, "must be true, false, null or a mapping"),
        ({"attack": {"name": "pattern", "target": 2}, "data.max_test": 1}, "nothing to measure on"),
    ],
)
def test_what_cannot_be_measured_is_an_error(changes, message):
    spec = small(threat={"num_malicious": 1}, attack="pattern", evaluation={"influence": {}})
    with pytest.raises(ConfigError, match=message):
        fedjax_sec.run(spec, **changes)


def test_the_configuration_is_written_out():
    spec = small(threat={"num_malicious": 1}, attack="pattern")
    experiment = config.from_mapping(spec, {"evaluation.influence": True})
    result = experiment.to_dict()["evaluation"]["influence"]
    fields = {"top": 100, "convention": "author", "batch_size": 256, "max_images": None}
    assert result == {"name": "influence", **fields}
    assert config.from_mapping(experiment.to_dict()) == experiment
    off = config.from_mapping(spec, {"evaluation.influence": False})
    assert off.evaluation.influence is None and off == config.from_mapping(spec)
