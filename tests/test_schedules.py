"""Schedules of numeric fields: their values, what they do to a run, errors, and round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, same_bits, small
from jax.flatten_util import ravel_pytree
from programs import program_of, replicas_of, task_on, train

import fedjax_sec
from fedjax_sec import core, sweeps
from fedjax_sec.core import ConfigError, Schedule, Setting, check_components, registry
from fedjax_sec.runs import config

CLIP = [{"name": "clip_norm", "max_norm": 0.05}, "mean"]


def steps(**values):
    return {"schedule": "steps", "values": {int(k[1:]): v for k, v in values.items()}}


def linear(**values):
    return steps(**values) | {"schedule": "linear"}


def flat(result):
    return np.asarray(ravel_pytree(result.params)[0])


# --- Values -------------------------------------------------------------------------------------


def test_steps_hold_from_their_round_on():
    outcome = core.build_schedule(steps(r0=1, r3=5, r7=2), float, "x", {})
    expected = [1, 1, 1, 5, 5, 5, 5, 2, 2]
    assert [outcome.number_at(i) for i in range(9)] == expected
    np.testing.assert_array_equal(jax.jit(jax.vmap(outcome.at))(jnp.arange(9)), expected)


def test_lines_between_the_points():
    outcome = core.build_schedule(linear(r2=1.0, r6=3.0, r8=0.1), float, "x", {})
    expected = np.interp(np.arange(11), [2, 6, 8], [1.0, 3.0, 0.1])
    np.testing.assert_allclose([outcome.number_at(i) for i in range(11)], expected)
    got = np.asarray(jax.jit(jax.vmap(outcome.at))(jnp.arange(11)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # Exactly the given numbers at the points and beyond them.
    assert got[[0, 2, 6, 8, 10]].tolist() == np.float32([1, 1, 3, 0.1, 0.1]).tolist()


def test_the_order_in_the_file_does_not_matter():
    one, other = ({"schedule": "steps", "values": v} for v in ({5: 2, 0: 1}, {"0": 1, "5": 2}))
    a, b = (core.build_schedule(spec, float, "x", {}) for spec in (one, other))
    assert a == b == Schedule("steps", (0, 5), (1.0, 2.0))


def test_resolve_reaches_nested_components_only_where_there_is_a_schedule():
    spec = {"name": "hybrid", "main": {"name": "alie", "z": steps(r0=1, r2=3)}, "solo": "zero"}
    part = registry.attacks.build(spec)
    assert [float(core.resolve(part, i).main.z) for i in (0, 1, 2)] == [1, 1, 3]
    assert core.has_schedules(part) and not core.has_schedules(core.resolve(part, 0))
    plain = registry.attacks.build("hybrid")
    assert core.resolve(plain, 5) == plain


# --- Runs ---------------------------------------------------------------------------------------

# Every kind of component: (dotted key, value before round 2, value from then on).
FIELDS = [
    ("client.l2", 0.0, 0.7),
    ("client.optimizer.learning_rate", 0.2, 0.05),
    ("server.optimizer.learning_rate", 1.0, 0.3),
    ("attack.scale", 1.0, 4.0),
    ("defense.0.max_norm", 0.05, 0.4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "before", "after"), FIELDS)
def test_a_scheduled_run_is_two_runs_in_a_row(key, before, after):
    """Two rounds with the first value and two with the second, carried over by hand."""
    base = config.from_mapping(
        small(threat={"num_malicious": 1}, attack="sign_flip", defense=CLIP, rounds=4)
        | {"evaluation": {"every": 4}}
    ).to_dict()
    base["defense"][0]["max_norm"] = 50.0  # so that learning rates matter
    scheduled = fedjax_sec.run(base, **{key: steps(r0=before, r2=after)})
    first, second = (config.from_mapping(base, {key: value}) for value in (before, after))
    program = program_of(first)
    one, two = (replicas_of([e]) for e in (first, second))

    def in_a_row(*phases):
        state = program.init(one)
        for number, replicas in enumerate(phases):
            state, _ = program.advance(state, replicas, 2 * number, 2)
        return np.asarray(state.server.params[0])

    close(flat(scheduled), in_a_row(one, two), rtol=1e-5, atol=1e-6)
    for constant in (one, two):  # and the schedule matters
        assert np.abs(in_a_row(constant, constant) - flat(scheduled)).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["alie", "label_flip"])
def test_an_attack_that_begins_later_leaves_the_rounds_before_as_they_were(attack):
    base = small(rounds=4, threat={"num_malicious": 2}, evaluation={"every": 1})
    later = fedjax_sec.run(base | {"attack": attack}, **{"threat.start": 2})
    shares = later.metrics["kept_malicious"]
    assert np.isnan(shares[:3]).all() and np.isfinite(shares[3:]).all()

    programs = [program_of(config.from_mapping(base, {"attack": each})) for each in (None, attack)]

    def two_rounds(program, first, params=None):
        replicas = replicas_of([program.experiment])
        state = program.init(replicas)
        if params is not None:
            state = state._replace(server=state.server._replace(params=jnp.array(params)))
        return np.array(program.advance(state, replicas, first, 2)[0].server.params)

    honest, attacked = programs
    by_hand = two_rounds(attacked, 2, two_rounds(honest, 0))
    close(flat(later), by_hand[0], rtol=1e-5, atol=1e-6)
    for first, second in ((honest, honest), (attacked, attacked)):  # and the round matters
        other = two_rounds(second, 2, two_rounds(first, 0))
        assert np.abs(other[0] - flat(later)).max() > 1e-4


def test_attacks_that_begin_in_different_rounds_share_a_program():
    base = small(threat={"num_malicious": 2}, attack="sign_flip")
    cells = sweeps.make_cells(base, {"threat.start": {"a": 0, "b": 1, "c": 2}})
    first, *others = (cell.experiment for cell in cells)
    assert first.structure() != others[0].structure() == others[1].structure()
    program = program_of(others[0], at_once=2)
    together = train(others, program=program)
    assert program.traces == 1
    for one, result in zip(others, together, strict=True):
        close(flat(fedjax_sec.run(one)), flat(result), rtol=1e-4, atol=1e-5)
    assert np.abs(flat(together[0]) - flat(together[1])).max() > 1e-4


@pytest.mark.parametrize("threat", [{"num_malicious": 2, "start": 3}, {"start": 1}])
def test_an_attack_that_would_never_begin_is_refused(threat):
    with pytest.raises(ConfigError, match=r"threat\.start = . would leave no round.*rounds = 3"):
        config.from_mapping(small(threat=threat))


def test_a_backdoor_is_measured_as_it_was_in_the_last_round():
    """Whole images of one grey: the class of the white one is found only when it is white."""
    attack = {"name": "pattern", "size": 8, "value": steps(r0=0.0, r1=1.0)}
    base = small(threat={"num_malicious": 2}, attack=attack, rounds=2, seed=1)
    program = program_of(config.from_mapping(base))
    state = program.init(replicas_of([program.experiment]))
    images = jnp.stack([jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))])
    task = task_on(program)
    black, white = np.argmax(task.outputs(state.server.params[0], images), axis=1)
    assert black != white
    program = program_of(config.from_mapping(base, {"attack.target": int(white)}))
    replicas = replicas_of([program.experiment])
    rates = [program.evaluate(state, replicas, n)["attack_success_rate"][0] for n in (0, 1, 2)]
    np.testing.assert_array_equal(rates, [0.0, 0.0, 1.0])


def test_schedules_of_one_shape_share_a_program_and_run_as_replicas():
    values = {
        "early": steps(r0=0.05, r1=0.4),
        "late": steps(r0=0.1, r2=0.02),
        "line": linear(r0=0.05, r2=0.4),
        "plain": 0.05,
    }
    cells = sweeps.make_cells(small(defense=CLIP), {"defense.0.max_norm": values}, seeds=(0, 1))
    structures = [cell.experiment.structure() for cell in cells]
    assert len(set(structures)) == 3 and structures[0] == structures[3]
    pair = [cells[0].experiment, cells[3].experiment]
    program = program_of(pair[0], at_once=2)
    together = train(pair, program=program)
    assert program.traces == 1
    for one, result in zip(pair, together, strict=True):
        close(flat(fedjax_sec.run(one)), flat(result), rtol=1e-4, atol=1e-5)


def test_a_label_names_a_schedule_in_a_list():
    cells = sweeps.make_cells(small(defense=CLIP), {"defense.0.max_norm": [1.0, steps(r0=1, r5=2)]})
    assert [cell.experiment.defense.stages[0].max_norm for cell in cells] == [
        1.0,
        Schedule("steps", (0, 5), (1.0, 2.0)),
    ]


class Stop(Exception):
    """Ends a run from its own callback."""


def test_a_run_is_resumed_across_a_step(tmp_path):
    spec = small(
        defense=[{"name": "clip_norm", "max_norm": steps(r0=0.05, r2=0.4)}, "mean"],
        rounds=4,
        checkpoint={"every": 1},
    )

    def stop(done, rows):
        if done == 2:
            raise Stop

    whole = fedjax_sec.run(spec, out=tmp_path / "whole")
    with pytest.raises(Stop):
        fedjax_sec.run(spec, out=tmp_path / "part", on_evaluation=stop)
    resumed = fedjax_sec.run(spec, out=tmp_path / "part", resume=True)
    same_bits(resumed.params, whole.params)
    changed = spec | {
        "defense": [{"name": "clip_norm", "max_norm": steps(r0=0.05, r3=0.4)}, "mean"]
    }
    with pytest.raises(ConfigError, match="it differs in defense"):
        fedjax_sec.run(changed, out=tmp_path / "part", resume=True)


def test_an_optimizer_with_a_state_follows_a_schedule():
    client = {
        "name": "sgd",
        "steps": 1,
        "batch_size": 9,
        "keep_optimizer_state": True,
        "optimizer": {"name": "adam", "learning_rate": linear(r0=0.1, r2=0.0)},
    }
    two, three = (fedjax_sec.run(small(client=client, rounds=n)) for n in (2, 3))
    same_bits(flat(three), flat(two))  # the rate is zero by round 2
    assert np.abs(flat(two) - flat(fedjax_sec.run(small(client=client, rounds=1)))).max() > 1e-3


# --- Checks and errors --------------------------------------------------------------------------


@core.pytree
class Checked(core.Component):
    """A component that notes what its check is given."""

    value: float
    other: float

    def check(self, path, setting):
        SEEN.append((self.value, self.other))


SEEN: list = []


def test_checks_see_every_value_and_no_schedule():
    SEEN.clear()
    part = Checked(Schedule("steps", (0, 4), (1.0, 9.0)), Schedule("linear", (0, 8), (0.0, 1.0)))
    check_components((part, Checked(1, 2)), "x", Setting(3))
    assert SEEN == [(1.0, 0.0), (9.0, 0.5), (9.0, 1.0), (1, 2)]


CHANGES = [
    ({"name": "clip_norm", "max_norm": steps(r0=1, r5=0)}, ["max_norm.values.5 must be > 0, got"]),
    ({"name": "clip_norm", "max_norm": steps(r0=1, r5=None)}, ["values.5: expected a number"]),
    ({"name": "clip_norm", "max_norm": steps(r1=1)}, ["value for round 0", "first is for round 1"]),
    ({"name": "clip_norm", "max_norm": linear(r1=1)}, ["at least two rounds"]),
    (
        {"name": "clip_norm", "max_norm": {"schedule": "step", "values": {0: 1}}},
        ["max_norm.schedule: unknown 'step'.", "Did you mean 'steps'?", "linear"],
    ),
    (
        {"name": "clip_norm", "max_norm": {"schedule": "steps", "value": {0: 1}}},
        ["no key 'value'", "Did you mean 'values'?"],
    ),
    ({"name": "clip_norm", "max_norm": {"schedule": "steps"}}, ["values must map rounds to"]),
    (
        {"name": "clip_norm", "max_norm": {"schedule": "steps", "values": {-1: 1}}},
        ["a round must be an integer >= 0, got -1"],
    ),
    (
        {"name": "clip_norm", "max_norm": {"schedule": "steps", "values": {"0": 1, 0: 2}}},
        ["round 0 is given twice"],
    ),
    ({"name": "clip_norm", "max_norm": {0: 1}}, ["expected a number, or a schedule such as"]),
]


@pytest.mark.parametrize(("stage", "parts"), CHANGES)
def test_bad_schedules(stage, parts):
    with pytest.raises(ConfigError) as error:
        config.from_mapping(small(defense=[stage, "mean"]))
    for part in ("defense[0].max_norm", *parts):
        assert part in str(error.value)


def test_static_and_integer_fields():
    with pytest.raises(ConfigError, match="client.batch_size fixes shapes or control flow"):
        config.from_mapping(small(), {"client.batch_size": steps(r0=3, r1=4)})
    with pytest.raises(ConfigError, match="client.optimizer.nesterov is no number"):
        config.from_mapping(small(), {"client.optimizer.nesterov": steps(r0=3, r1=4)})
    with pytest.raises(ConfigError, match="learning_rate.values.1 must be >= 0, got -1.0"):
        config.from_mapping(small(), {"client.optimizer.learning_rate": steps(r0=1, r1=-1)})
    sample = {"name": "sample", "index": linear(r0=1, r5=2)}
    with pytest.raises(ConfigError, match="attack.index is an integer"):
        registry.attacks.build(sample, "attack")
    one = registry.attacks.build({"name": "sample", "index": steps(r0=1, r5=2)})
    assert one.index.values == (1, 2) and core.resolve(one, 5).index == 2


def test_outside_an_experiment_there_are_no_rounds():
    clip = {"name": "clip_norm", "max_norm": steps(r0=1, r5=2)}
    with pytest.raises(ConfigError, match="'clip_norm' follows a schedule, but here are no rounds"):
        fedjax_sec.aggregate([[1.0]], [clip, "mean"])
    flip = {"name": "sign_flip", "scale": steps(r0=1, r5=2)}
    with pytest.raises(ConfigError, match="'sign_flip' follows a schedule"):
        fedjax_sec.attack([[1.0]], flip, malicious=[True])


# --- Round trip ---------------------------------------------------------------------------------


def test_yaml_and_overrides(tmp_path):
    experiment_ = config.from_mapping(
        small(defense=CLIP),
        [
            "defense.0.max_norm={schedule: steps, values: {0: 0.1, 100: 4}}",
            "defense.0.max_norm.values.100=5",
            "server.optimizer.learning_rate={schedule: linear, values: {0: 1, 50: 0.1}}",
        ],
    )
    assert experiment_.defense.stages[0].max_norm == Schedule("steps", (0, 100), (0.1, 5.0))
    path = tmp_path / "config.yaml"
    path.write_text(config.dump_yaml(experiment_.to_dict()))
    again = config.load(path)
    assert again == experiment_ and again.to_dict() == experiment_.to_dict()
    assert hash(again.structure()) == hash(experiment_.structure())
    assert experiment_.to_dict()["server"]["optimizer"]["learning_rate"] == {
        "schedule": "linear",
        "values": {0: 1.0, 50: 0.1},
    }
