"""One gate for every value, by whatever way it enters: converted, then checked."""

import dataclasses
import enum
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

import fedjax_sec
from fedjax_sec import core, sweeps
from fedjax_sec.core import ConfigError, Setting, registry
from fedjax_sec.round.pipeline import Defense
from fedjax_sec.runs import checks, config
from fedjax_sec.runs.prepare import prepare

NORM = "max_norm"


def by_mapping(value):
    return config.from_mapping(small(defense=[{"name": "clip_norm", NORM: value}, "mean"]))


def by_override(value):
    mapping = small(defense=["clip_norm", "mean"])
    return config.from_mapping(mapping, {"defense.0.max_norm": value})


def by_instance(value):
    stage = dataclasses.replace(registry.defenses.build("clip_norm"), max_norm=value)
    return config.from_mapping(small(defense=[stage, "mean"]))


def by_pipeline(value):
    stage = dataclasses.replace(registry.defenses.build("clip_norm"), max_norm=value)
    pipeline = Defense((stage, registry.defenses.build("mean")))
    return Defense.build(pipeline)


def by_experiment(value):
    experiment = config.from_mapping(small(defense=["clip_norm", "mean"]))
    first, rest = experiment.defense.stages
    stages = (dataclasses.replace(first, max_norm=value), rest)
    return config.from_mapping(dataclasses.replace(experiment, defense=Defense(stages)).to_dict())


def by_schedule(value):
    points = {"schedule": "steps", "values": {0: 1.0, 2: value}}
    return by_mapping(points)


WAYS = [by_mapping, by_override, by_instance, by_pipeline, by_experiment, by_schedule]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float32(-1), "must be > 0, got -1.0."),
        (np.int64(0), "must be > 0, got 0.0."),
        (jnp.float32(-2), "must be > 0, got -2.0."),
        (np.float64("nan"), "must be a finite number, got nan."),
        (np.float32("inf"), "must be a finite number, got inf."),
        (jnp.array(np.nan), "must be a finite number, got nan."),
        (np.array(-3.0), "must be > 0, got -3.0."),
        (np.True_, "expected a number, got "),
        (True, "expected a number, got True (bool)."),
        (None, "expected a number, got null."),
        ("1", "expected a number, got '1' (str)."),
        (1e39, "1e+39 is beyond 3.403e+38, the largest number that is computed with (float32)."),
        pytest.param(10**400, "an integer of about 401 digits is beyond 3.403e+38", id="huge"),
        (1e-40, "1e-40 would be computed with as 0; the smallest number of float32 is 1.175e-38."),
        (np.ones(2), "expected a number, got "),
    ],
    ids=str,
)
def test_no_way_around_the_gate(way, value, message):
    with pytest.raises(ConfigError) as error:
        way(value)
    text = str(error.value)
    assert "max_norm" in text and message in text and "\n" not in text


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize(
    "value", [2, np.int64(2), np.float32(2), jnp.float32(2), np.array(2), jnp.array(2)]
)
def test_scalars_are_numbers(way, value):
    experiment = way(value)
    number = experiment.defense.stages[0].max_norm
    assert number == 2.0 and type(number) is float
    again = config.from_mapping(experiment.to_dict())
    assert again == experiment and again.structure() == experiment.structure()


class Rule(enum.Enum):
    KRUM = "krum"


def test_integers_lists_names_and_paths_are_converted(tmp_path):
    mapping = small(
        data={"num_clients": np.int64(5), "max_train": np.array(43), "data_dir": tmp_path},
        model={"name": np.str_("mlp"), "hidden": np.array([6, 4])},
        defense={"name": Rule.KRUM, "num_byzantine": np.int32(1)},
        rounds=jnp.int32(3),
        seed=np.uint32(2**32 - 1),
        server={"root": {"size": np.int64(4)}},
    )
    experiment = config.from_mapping(mapping)
    assert experiment.model.hidden == (6, 4) and experiment.data.data_dir == str(tmp_path)
    assert experiment.defense.stages[0].num_byzantine == 1 and experiment.seed == 2**32 - 1
    for number in (experiment.data.num_clients, experiment.rounds, *experiment.model.hidden):
        assert type(number) is int
    path = tmp_path / "config.yaml"
    path.write_text(config.dump_yaml(experiment.to_dict()))
    assert config.load(path) == experiment
    assert isinstance(core.plain(pathlib.Path("x")), str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 3.0}, "rounds: expected an integer, got 3.0 (float); write 3."),
        ({"rounds": np.True_}, "rounds: expected an integer, got np.True_ (bool)."),
        ({"rounds": 1e18}, "rounds: expected an integer, got 1e+18 (float)."),
        ({"rounds": 2**31}, "rounds must be >= 1 and <= 2147483647, got 2147483648."),
        ({"rounds": 10**5000}, "rounds must be >= 1 and <= 2147483647, got an integer of about "),
        ({"rounds": 0}, "rounds must be >= 1, got 0."),
        ({"seed": 2**63}, "seed must be >= 0 and <= 4294967295, got 9223372036854775808."),
        ({"seed": 2**32}, "seed must be >= 0 and <= 4294967295, got 4294967296."),
        ({"seed": np.int64(-1)}, "seed must be >= 0, got -1."),
        ({"model": {"name": "mlp", "hidden": b"ab"}}, "model.hidden: expected a list"),
        ({"threat": {"knowledge": ["corrupted"]}}, "threat.knowledge: expected a string, got ["),
        ({"data": {"data_dir": "${oc.env:HOME}"}}, "data.data_dir: '${...}' in '${oc.env:HOME}'"),
        (
            {"evaluation": {"evasions": {"name": "pgd", "eps": 8}}},
            "evaluation.evasions.eps must be >= 0 and <= 1, got 8.0. "
            "Pixels are in [0, 1]: 8 of 255 is 0.03137.",
        ),
        (
            {
                "client": {
                    "name": "adversarial",
                    "steps": 1,
                    "eps": {"schedule": "steps", "values": {0: 0.1, 3: 8}},
                }
            },
            "client.eps.values.3 must be >= 0 and <= 1, got 8.0. Pixels are in [0, 1]: 8 of 255",
        ),
    ],
)
def test_types_and_ends(change, message):
    with pytest.raises(ConfigError) as error:
        config.from_mapping(small(**change))
    assert message in str(error.value)


@pytest.mark.parametrize("name", registry.evasions.names())
def test_a_radius_in_units_of_255_is_refused_by_every_evasion(name):
    if not hasattr(registry.evasions.build(name), "eps"):
        pytest.skip("takes the radius of another attack")
    with pytest.raises(ConfigError, match=r"eps must be >= 0 and <= 1, got 8.0. Pixels are in"):
        registry.evasions.build({"name": name, "eps": 8})


def test_the_sign_of_a_clipping_norm_cannot_reverse_an_aggregate():
    updates = np.ones((3, 2))
    stages = [{"name": "clip_norm", "max_norm": np.float32(-1)}, "mean"]
    with pytest.raises(ConfigError, match=r"defense\[0\].max_norm must be > 0, got -1.0"):
        fedjax_sec.aggregate(updates, stages)
    with pytest.raises(ConfigError, match=r"attack.scale must be > 0, got -4.0"):
        fedjax_sec.attack(
            updates, "sign_flip", malicious=[True, False, False], scale=np.float32(-4)
        )
    krum = registry.defenses.build("krum")
    with pytest.raises(ConfigError, match="defense.num_byzantine must be >= 0, got -1"):
        fedjax_sec.aggregate(np.ones((5, 2)), dataclasses.replace(krum, num_byzantine=-1))


def test_seeds_of_a_sweep_have_the_same_ends():

    with pytest.raises(ConfigError, match="seed must be >= 0 and <= 4294967295, got 4294967296"):
        sweeps.make_cells(small(), {}, seeds=[0, 2**32])
    cells = sweeps.make_cells(small(), {}, seeds=np.arange(2))
    assert [cell.name for cell in cells] == ["run/seed0", "run/seed1"]


def test_a_built_experiment_is_checked_again(tmp_path):
    experiment = config.from_mapping(small())
    for wrong in (np.float64("nan"), np.float32(-1)):
        broken = dataclasses.replace(
            experiment, client=dataclasses.replace(experiment.client, l2=wrong)
        )
        with pytest.raises(ConfigError, match="client.l2 must be"):
            fedjax_sec.run(broken, out=tmp_path / "run")
        with pytest.raises(ConfigError, match="client.l2 must be"):
            broken.check()  # which sweeps of built cells call
    assert not (tmp_path / "run").exists()


def test_a_component_without_a_name_is_checked_too():
    @core.pytree
    class Unregistered(core.Stage):
        stage = "before"
        scale: float = core.numeric(1.0, "A factor.", low=0, high=2)

    experiment = config.from_mapping(small())
    for scale, message in ((1.5, None), (3.0, r"defense.scale must be >= 0 and <= 2, got 3.0")):
        stages = (Unregistered(scale), *experiment.defense.stages)
        changed = dataclasses.replace(experiment, defense=Defense(stages))
        if message is None:
            changed.check()
            continue
        with pytest.raises(ConfigError, match=message):
            changed.check()
    with pytest.raises(ConfigError, match="model: expected a component that is built, got 'mlp'"):
        dataclasses.replace(experiment, model="mlp").check()


def test_tracers_do_not_pass_the_gate():
    @jax.jit
    def norms(stage):
        return jax.tree.map(lambda leaf: 2 * leaf, stage)

    stage = registry.defenses.build({"name": "clip_norm", "max_norm": 3})
    assert norms(stage).max_norm == 6.0  # rebuilt by JAX with a tracer, then with an array
    updates = jnp.ones((3, 2))

    def aggregate(norm):
        return fedjax_sec.aggregate(updates, [{"name": "clip_norm", "max_norm": norm}, "mean"])

    result = jax.vmap(aggregate)(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), [0.5, 1.0], rtol=1e-6)


M = {"threat.num_malicious": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.hidden": [2**31 - 1]}, "parameters are beyond 2147483647, the largest position"),
        ({"rounds": 2**30, "client.steps": 3}, "rounds = 1073741824 times client.steps = 3 is 32"),
        ({"rounds": 2**30, "client.steps": None, "client.epochs": 2}, "times client.epochs = 2 is"),
        ({"client.steps": 2**29 + 1}, "client.steps must be >= 1 and <= 536870912, got 536870913"),
        ({"client.steps": None, "client.epochs": 2**14}, "client.epochs must be >= 1 and <= 16383"),
        ({"data.num_clients": 10**6 + 1}, "num_clients must be >= 1 and <= 1000000, got 1000001."),
        (M | {"attack": "pattern", "attack.size": 9}, "attack.size must be <= 8, the side of an"),
        (M | {"attack": "pattern", "attack.target": 10}, "attack.target must be < 10, the number"),
        (M | {"attack": "sample", "attack.index": 43}, "attack.index must be < 43, the training"),
        (M | {"attack": "sample", "attack.modulus": 11}, "attack.modulus must be <= 10, the numb"),
        (M | {"attack": "trojan", "attack.place": [1024, 0]}, "attack.place[0] must be >= 0 and "),
        (
            {"defense": {"name": "foolsgold", "num_features": 461}},
            "defense.num_features must be <= 460, the parameters, got 461.",
        ),
    ],
)
def test_sizes_are_refused_before_anything_compiles(change, message):
    with pytest.raises(ConfigError) as error:
        prepare(config.from_mapping(small(), change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_updates_beyond_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "device_memory", lambda: 8 * 2**30)
    message = (
        r"of a round \[K, D\] = \[5, 1001750010\] need 18.66 GiB, of which 6.80 GiB can be used"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(config.from_mapping(small(), {"model.hidden": [10**4, 10**5]}))


def test_more_batches_than_an_epoch_has_numbers_for():
    client = registry.clients.build({"name": "sgd", "epochs": 1, "batch_size": 1})
    with pytest.raises(ConfigError, match="client.batch_size must be >= 2 with epochs, which have"):
        client.check("client", Setting(5, capacity=2**16 + 1))
    client.check("client", Setting(5, capacity=2**16))
