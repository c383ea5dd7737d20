"""Objects of a notebook in place of names: functions, classes that nobody registered, arrays."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, same_bits, small

import fedjax_sec
from fedjax_sec.core import (
    ConfigError,
    DataAttack,
    Monitor,
    Stage,
    UpdateAttack,
    numeric,
    objects,
    pytree,
    registry,
    static,
)
from fedjax_sec.defenses.krum import Krum
from fedjax_sec.runs import config
from fedjax_sec.runs.results import RunFolder
from fedjax_sec.sweeps import plan_arena
from fedjax_sec.sweeps.grid import label_of, make_cells
from fedjax_sec.sweeps.launchers.processes import Processes

BASE = small(threat={"num_malicious": 2}, checkpoint={"every": 1})
MASK = np.array([True, True, False, False])
STACK = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0], [8.0, -1.0]], np.float32)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test gives is forgotten."""
    for known in registry.KINDS.values():
        known.names()
        monkeypatch.setattr(known, "_given", {})


class Middle(Stage):
    """A median."""

    stage = "aggregate"

    def apply(self, key, updates, state, view):
        return jnp.median(updates, axis=0), state, {"kept": view.valid.astype(updates.dtype)}


@pytree
class Flip(UpdateAttack):
    """The updates reversed."""

    scale: float = numeric(1.0, "A factor.", low=0, high=10)
    times: int = static(1, "How often.", low=1, high=9)

    def apply(self, key, updates, state, view):
        return -self.scale * self.times * updates, state, {}


def flip(updates):
    return -updates


# --- Attacks as functions -----------------------------------------------------------------------


def test_a_function_is_an_attack(tmp_path):
    ours = fedjax_sec.run(BASE, attack=flip, out=tmp_path)
    # Without the rows that it does not see, which are then the others' mean.
    close(ours.params, fedjax_sec.run(BASE, attack="sign_flip").params)
    written = {"name": "update_function", "function": f"{__name__}.flip"}
    assert ours.experiment.to_dict()["attack"] == written
    assert config.read_yaml(tmp_path / "config.yaml")["attack"] == written
    piped = fedjax_sec.run(BASE, attack=[flip, {"name": "boost", "factor": 2.0}])
    named = fedjax_sec.run(BASE, attack=["sign_flip", {"name": "boost", "factor": 2.0}])
    close(piped.params, named.params)
    words = f"attack: the function '{__name__}.flip' is Python's and in no file; give it again"
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"it differs in attack\.function"):
        fedjax_sec.run(BASE | {"rounds": 5}, attack=lambda u: -u, out=tmp_path, resume=True)
    more = fedjax_sec.run(BASE | {"rounds": 5}, attack=flip, out=tmp_path, resume=True)
    same_bits(more.params, fedjax_sec.run(BASE | {"rounds": 5}, attack=flip).params)


@pytest.mark.parametrize(
    ("knowledge", "function", "expected"),
    [
        ("omniscient", lambda u: u.mean(axis=0), [4.25, 3.5]),
        ("corrupted", lambda u: u.mean(axis=0), [2.0, 3.0]),
        ("corrupted", lambda u, visible: u.sum(axis=0) / visible.sum(), [2.0, 3.0]),
        ("corrupted", lambda u, malicious: malicious.sum() * jnp.ones(u.shape[1]), [2.0, 2.0]),
        ("corrupted", lambda u, *, params, round: params + round, [7.0, 8.0]),
        ("corrupted", functools.partial(lambda scale, u: scale * u[0], 3.0), [3.0, 6.0]),
        ("corrupted", lambda u, scale=2.0: scale * u[0], [2.0, 4.0]),
    ],
)
def test_a_function_gets_what_it_names(knowledge, function, expected):
    sent = fedjax_sec.attack(
        STACK, function, malicious=MASK, knowledge=knowledge, params=[7.0, 8.0]
    )
    close(sent[:2], np.tile(np.array(expected, np.float32), (2, 1)))
    assert np.array_equal(sent[2:], STACK[2:])


def test_a_function_draws_from_its_key():
    def noise(updates, key):
        return jax.random.normal(key, updates.shape)

    one, other = (fedjax_sec.attack(STACK, noise, malicious=MASK, key=key) for key in (0, 1))
    assert not np.array_equal(one[:2], other[:2])
    same_bits(one, fedjax_sec.attack(STACK, noise, malicious=MASK, key=0))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda u, visable: u, "takes 'visable', which is none of .* Did you mean 'visible'"),
        (lambda u: u.sum(), r"must return a stack \[K, D\] = \[4, 8\] or one vector \[8\], got"),
        (np.median, r"numpy.median takes 'axis'|numpy.median fails on updates"),
        (lambda u: u @ u, r"fails on updates \[K, D\] = \[4, 8\] \(TypeError"),
    ],
)
def test_functions_that_are_no_attack(function, words):
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.attack(STACK, function, malicious=MASK)


# --- Classes that nobody registered -------------------------------------------------------------


def test_instances_and_classes_are_components(tmp_path):
    ours = fedjax_sec.run(BASE, attack=Flip(2.0), defense=Middle(), out=tmp_path)
    close(ours.params, fedjax_sec.run(BASE, attack=Flip(2.0), defense="median").params)
    same_bits(ours.params, fedjax_sec.run(BASE, attack=Flip(scale=2.0), defense=Middle).params)
    spec = config.read_yaml(tmp_path / "config.yaml")
    assert spec["attack"] == {"name": f"{__name__}.Flip", "scale": 2.0, "times": 1}
    assert spec["defense"] == {"name": f"{__name__}.Middle"}
    assert f"{__name__}.Flip" not in registry.attacks.names()
    with pytest.raises(ConfigError, match="attack.scale must be <= 10|attack.scale must be >= 0"):
        fedjax_sec.run(BASE, attack=Flip(20.0))
    with pytest.raises(ConfigError, match=r"it differs in attack\.scale"):
        fedjax_sec.run(BASE, attack=Flip(3.0), defense=Middle, out=tmp_path, resume=True)
    longer = BASE | {"rounds": 5}
    more = fedjax_sec.run(longer, attack=Flip(2.0), defense=Middle, out=tmp_path, resume=True)
    assert len(more.metrics["round"]) == 6


def test_another_process_asks_for_the_class_again(tmp_path, monkeypatch):
    fedjax_sec.run(BASE, attack=Flip(2.0), out=tmp_path)
    monkeypatch.setattr(registry.attacks, "_given", {})  # as another process begins
    words = rf"attack.name: '{__name__}.Flip' is a class of Python's own and in no file; give an "
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(tmp_path / "config.yaml")
    assert len(fedjax_sec.load(tmp_path)) == 4  # measurements need no class


def test_they_stand_inside_others_and_in_every_kind():
    class Look(Monitor):
        def observe(self, key, state, trace, task):
            return state, {"seen": jnp.float32(7)}

    outer = {"name": "hybrid", "main": Flip(2.0), "data": None}
    try:
        spec = config.from_mapping(BASE | {"attack": outer}).to_dict()["attack"]
        assert spec["main"]["name"] == f"{__name__}.Flip"
    except ConfigError as error:  # hybrid asks for an attack on data
        assert "hybrid" in str(error) or "data" in str(error)
    result = fedjax_sec.run(BASE, **{"evaluation.monitors": [Look()]})
    name = next(key for key in result.metrics if key.endswith("/seen"))
    assert result.metrics[name][-1] == 7.0


def test_a_class_that_is_defined_again_counts():
    def made(sign):
        @pytree
        class Again(UpdateAttack):
            def apply(self, key, updates, state, view):
                return sign * updates, state, {}

        return Again

    first, second = made(-1.0), made(-2.0)
    got = [fedjax_sec.attack(STACK, one(), malicious=MASK)[0, 0] for one in (first, second)]
    assert got == [-1.0, -2.0]
    assert registry.attacks.gives(second) and not registry.attacks.gives(first)


def test_a_child_of_a_registered_class_is_not_taken_for_it():
    class Mine(Krum):
        """Krum, but the first client."""

        def apply(self, key, updates, state, view):
            kept = jnp.zeros(updates.shape[0]).at[0].set(1.0)
            return updates[0], state, {"kept": kept}

    built = config.from_mapping(BASE | {"defense": Mine(num_byzantine=1)})
    stage = built.defense.stages[0]
    assert type(stage) is Mine and stage.num_byzantine == 1
    assert stage.registered_name.endswith("Mine") and Krum.registered_name == "krum"
    assert fedjax_sec.aggregate(STACK, Mine(num_byzantine=0)).tolist() == [1.0, 2.0]


def test_classes_that_are_no_components_are_refused():
    class Unfinished(Stage):
        stage = "aggregate"

    class Sets(UpdateAttack):
        def __init__(self):
            self.scale = 3.0

        def apply(self, key, updates, state, view):
            return updates, state, {}

    class Silent(Stage):
        stage = "aggregate"

        def apply(self, key, updates, state, view):
            return updates.mean(axis=0), state, {}

    class Bare(UpdateAttack):
        scale: float = numeric(1.0, "The scale.", low=0, high=1)

        def apply(self, key, updates, state, view):
            return self.scale * updates, state, {}

    @dataclasses.dataclass(frozen=True)
    class Plain(UpdateAttack):
        scale: float = 1.0

        def apply(self, key, updates, state, view):
            return updates, state, {}

    for given, words in (
        (Unfinished, "defense: Unfinished: a defense must define apply"),
        (Unfinished(), "defense: Unfinished: a defense must define apply"),
        (Silent(), "defense: its rule reports no 'kept', which diagnostics show"),
        (object(), "derive its class from Stage of fedjax_sec.core and give an instance"),
        (Flip(), r"defense must be a defense, and '.*Flip' is an attack"),
        (Stage, "To use a defense of your own"),
    ):
        with pytest.raises(ConfigError, match=words):
            fedjax_sec.run(BASE, defense=given)
    for given, words in (
        (Sets(), "attack: Sets sets 'scale' itself; declare it as a field"),
        (Plain(), "attack: Plain is a dataclass that JAX does not know; decorate it with"),
        (DataAttack, "To use an attack of your own"),
    ):
        with pytest.raises(ConfigError, match=words):
            fedjax_sec.run(BASE, attack=given)
    with pytest.raises(ConfigError, match=r"Bare takes no values as it is; decorate the class"):
        Bare(0.5)


# --- Experiments, sweeps and arenas of objects ---------------------------------------------------


class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(x.reshape(x.shape[0], -1))))


def test_an_experiment_keeps_its_objects():
    result = fedjax_sec.run(BASE, attack=flip, defense=Middle(), model=Net())
    again = fedjax_sec.run(result.experiment)
    same_bits(again.params, result.params)
    assert config.from_mapping(result.experiment.to_dict(objects=True)) == result.experiment
    assert result.experiment.in_no_file == [
        f"{__name__}.Net(width=4)",
        f"{__name__}.flip",
        f"{__name__}.Middle",
    ]
    assert config.from_mapping(BASE).in_no_file == []


def test_labels_of_objects():
    class Fresh(Stage):
        stage = "aggregate"

    assert label_of(Fresh()) == label_of(Fresh) == "Fresh"  # nothing has looked at it yet
    assert label_of(flip) == "flip" and label_of(Middle) == "Middle"
    assert label_of(Flip(2.0)) == "Flip scale=2.0" and label_of(Net(3)) == "Net width=3"
    registry.attacks.build(Flip(2.0))  # known from now on; its label stays
    assert label_of(Flip(2.0)) == "Flip scale=2.0"
    assert label_of([Flip(), functools.partial(flip)]) == "Flip + flip"
    assert label_of(Krum(num_byzantine=2)) == "krum num_byzantine=2"
    assert objects.described("krum") == "krum"


def test_a_sweep_takes_objects_a_grid_and_seeds(tmp_path):
    grid = {"attack": [flip, Flip(2.0), "sign_flip"], "defense": {"mine": Middle}}
    base = fedjax_sec.run(BASE).experiment
    done = fedjax_sec.sweep(base, grid, [0, 4], tmp_path, rounds=2, **{"client.l2": 0.1})
    assert [cell.name for cell in done.cells] == [
        f"{name}_mine/seed{seed}"
        for name in ("flip", "Flip-scale=2.0", "sign-flip")
        for seed in (0, 4)
    ]
    assert {(c.experiment.rounds, c.experiment.client.l2) for c in done.cells} == {(2, 0.1)}
    for place in (0, 1):
        ours, named = done.results[place].metrics, done.results[place + 4].metrics
        close(ours["accuracy"], named["accuracy"])
    spec = RunFolder(tmp_path / "cells" / done.cells[0].name).experiment().to_dict()
    assert spec["attack"]["function"] == f"{__name__}.flip"
    again = fedjax_sec.sweep(base, grid, [0, 4], tmp_path, rounds=2, **{"client.l2": 0.1})
    same_bits([r.metrics for r in again.results], [r.metrics for r in done.results])
    other = grid | {"attack": {"flip": lambda u: -u}}
    with pytest.raises(ConfigError, match=r"another configuration; it differs in attack\.function"):
        fedjax_sec.sweep(base, other, [0], tmp_path, rounds=2, **{"client.l2": 0.1})
    words = r"launcher: .* and '.*flip' of 'flip_mine/seed0' is Python's and in no file"
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.sweep(base, grid, [0], tmp_path / "other", launcher=Processes(2))


def test_arrays_are_values_of_an_axis(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 2, 40)
    many = {
        "small": fedjax_sec.data.arrays(x, y, x, y),
        "large": fedjax_sec.data.arrays(3 * x, y, x, y),
    }
    base = {"data": {"num_clients": 4}, "client": {"batch_size": 4}, "rounds": 2}
    done = fedjax_sec.sweep(base, {"data": many}, out=tmp_path / "s")
    alone = [fedjax_sec.run(base, data=one) for one in many.values()]
    for one, other in zip(done.results, alone, strict=True):
        same_bits(one.metrics["loss"], other.metrics["loss"])
    given = fedjax_sec.sweep(base, seeds=[3], out=tmp_path / "t", data=many["small"])
    assert given.cells[0].experiment.data.name == "arrays"
    assert given.cells[0].experiment.in_no_file == ["arrays"]
    with pytest.raises(ConfigError, match="names the data set 'digits', and arrays are given"):
        fedjax_sec.sweep(
            {"data": {"name": "digits"}}, seeds=[0], out=tmp_path / "u", data=many["small"]
        )


def test_a_sweep_is_given_whole_or_in_parts(tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text(config.dump_yaml(BASE | {"rounds": 1}))
    whole = tmp_path / "sweep.yaml"
    whole.write_text(config.dump_yaml({"experiment": "base.yaml", "grid": {"client.l2": [0.0]}}))
    grid = {"defense": ["mean", "median"]}
    names = [
        [cell.name for cell in fedjax_sec.api._load_sweep(*given, None, {})[1]]
        for given in (
            (file, grid, None),
            (str(file), grid, [7]),
            (whole, None, [7]),
            (whole, grid, None),
            ({}, grid, [7]),
            ({"experiment": {}, "grid": {"client.l2": [0.0]}}, grid, None),
        )
    ]
    assert names == [
        ["mean/seed0", "median/seed0"],
        ["mean/seed7", "median/seed7"],
        ["0.0/seed7"],
        ["mean/seed0", "median/seed0"],
        ["mean/seed7", "median/seed7"],
        ["mean/seed0", "median/seed0"],
    ]
    with pytest.raises(ConfigError, match="is an experiment, not a sweep"):
        fedjax_sec.sweep(file, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="out must be the path of a folder, got None"):
        fedjax_sec.sweep({}, grid)
    with pytest.raises(ConfigError, match="Did you mean 'rounds'"):
        fedjax_sec.sweep({}, grid, out=tmp_path / "out", ruonds=3)
    assert not (tmp_path / "out").exists()


def test_an_arena_takes_objects():
    base = BASE | {"client": {"batch_size": 4}, "data": {"num_clients": 8}}
    backdoor = {"name": "pattern", "target": 0}
    arena = plan_arena(base, [flip, Flip(2.0), backdoor], [Middle(), lambda u: u.mean(axis=0)])
    assert arena.attacks == ("no attack", "flip", "Flip scale=2.0", "pattern target=0")
    assert arena.defenses == ("mean", "Middle", "<lambda>")
    clean = [cell for cell in arena.cells if cell.labels["attack"] == "no attack"]
    assert clean[2].experiment.in_no_file[0].endswith("<lambda>")
    assert clean[2].experiment.backdoor.registered_name == "pattern"  # made anew with its function
    assert callable(clean[2].experiment.defense.stages[0].function)


def test_cells_share_programs_where_only_numbers_differ():
    cells = make_cells(BASE, {"attack": [Flip(1.5), Flip(2.0)]})
    assert len({cell.experiment.structure() for cell in cells}) == 1


# --- Representations ----------------------------------------------------------------------------


def test_results_show_themselves(tmp_path):
    result = fedjax_sec.run(BASE, attack=Flip(2.0))
    final = result.summary["final"]["accuracy"]
    assert repr(result).startswith("Result(digits") and len(repr(result)) < 200
    assert f"accuracy {final:.1%} after 3 rounds" in repr(result)
    page = result._repr_html_()
    assert "<svg" in page and f"<td>{final:.4g}</td>" in page and page.count("<table") == 1
    base = BASE | {
        "client": {"batch_size": 4},
        "data": {"num_clients": 8, "max_train": 200},
        "rounds": 1,
    }
    done = fedjax_sec.sweep(base, {"defense": {"<b>": Middle, "mean": "mean"}}, out=tmp_path / "s")
    assert repr(done).startswith("SweepResult(2 runs over defense; accuracy ")
    assert "&lt;b&gt;" in done._repr_html_() and "<b>Sweep" in done._repr_html_()
    arena = fedjax_sec.arena(base, attacks=[flip], defenses=["bulyan"], out=tmp_path / "a")
    assert repr(arena).startswith("ArenaResult(2 attacks x 2 defences, 2 runs, 2 refused; ")
    assert "<h4>Refused</h4>" in arena._repr_html_() and "bulyan needs" in arena._repr_html_()
