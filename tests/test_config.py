"""Bad configurations are refused in words, before anything compiles; good ones round-trip."""

import pytest
from helpers import small

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.data import MissingDataError
from fedjax_sec.runs import config, results
from fedjax_sec.runs.program import Program


@pytest.fixture
def nothing_compiles(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("something was compiled or run")

    for step in ("init", "advance", "evaluate"):
        monkeypatch.setattr(Program, step, fail)


BAD = {
    "unknown key": (
        {"clients": 3},
        [
            "The experiment: unknown key 'clients'.",
            "Did you mean 'client' or 'execution.clients'?",
            "Known keys",
        ],
    ),
    "unknown nested key": (
        {"client": {"name": "sgd", "steps": 1, "batchsize": 2}},
        ["client: unknown key 'batchsize'.", "Did you mean 'batch_size'?"],
    ),
    "misspelt name": (
        {"defense": {"name": "kurm"}},
        ["defense.name: unknown defense 'kurm'.", "Did you mean 'krum'?", "Known: ", "median"],
    ),
    "f too large": (
        {"defense": {"name": "krum", "num_byzantine": 2}},
        ["defense.num_byzantine: krum needs 2 f + 2 < K", "K = 5", "num_byzantine <= 1, got 2"],
    ),
    "f taken from the threat": (
        {"defense": "bulyan", "threat": {"num_malicious": 1}},
        ["bulyan needs 4 f + 3 <= K", "K = 5", "<= 0, got 1"],
    ),
    "negative rounds": ({"rounds": -3}, ["rounds must be >= 1, got -3."]),
    "wrong type": (
        {"rounds": "many"},
        ["rounds: expected an integer, got 'many' (str)."],
    ),
    "true is no number": ({"seed": True}, ["seed: expected an integer, got True (bool)."]),
    "attack without attackers": (
        {"attack": "alie"},
        ["attack: alie would do nothing, since threat.num_malicious is 0", "1..5"],
    ),
    "more malicious clients than clients": (
        {"threat": {"num_malicious": 6}},
        ["threat.num_malicious must be <= data.num_clients = 5, got 6."],
    ),
    "more participants than clients": (
        {"server": {"clients_per_round": 6}},
        ["server.clients_per_round must be <= data.num_clients = 5, got 6."],
    ),
    "not one of the choices": (
        {"threat": {"knowledge": "omnicient"}},
        ["threat.knowledge must be one of 'corrupted', 'omniscient'", "Did you mean 'omniscient'"],
    ),
    "steps and epochs": (
        {"client": {"name": "sgd", "steps": 1, "epochs": 1}},
        ["client: give exactly one of 'steps' and 'epochs'", "steps=1, epochs=1"],
    ),
    "batch size over the data": (
        {"client": {"name": "sgd", "steps": 1, "batch_size": 10}},
        ["client.batch_size must be <= 9, the examples of the largest client, got 10."],
    ),
    "optimizer": (
        {"client": {"name": "sgd", "steps": 1, "optimizer": {"name": "adm"}}},
        ["client.optimizer.name: optax has no optimizer 'adm'.", "Did you mean 'adam'?"],
    ),
    "optimizer's argument": (
        {"server": {"optimizer": {"name": "sgd", "learning_rate": 1.0, "momentun": 0.9}}},
        ["server.optimizer: optax.sgd has no argument 'momentun'.", "Did you mean 'momentum'?"],
    ),
    "rate missing": (
        {"server": {"optimizer": "sgd"}},
        ["server.optimizer.learning_rate is required by optax.sgd."],
    ),
    "data set": (
        {"data": {"name": "digit"}},
        ["unknown dataset 'digit'.", "Did you mean 'digits'?"],
    ),
    "chunk without chunks": (
        {"execution": {"clients": "map", "chunk": 4}},
        ["execution.chunk belongs to execution.clients 'chunked'", "clients='map', chunk=4"],
    ),
    "chunks without their size": (
        {"execution": {"clients": "chunked"}},
        ["execution.chunk belongs to execution.clients 'chunked'", "chunk=None"],
    ),
    "max_train": (
        {"data": {"max_train": 2000}},
        ["max_train must be between 1 and 1437", "got 2000"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations(name, nothing_compiles, tmp_path):
    changes, parts = BAD[name]
    with pytest.raises(ValueError) as error:
        fedjax_sec.run(small(**changes), out=tmp_path / "out")
    for part in parts:
        assert part in str(error.value)


def test_missing_data(nothing_compiles, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    data = {"name": "mnist", "data_dir": str(empty), "download": False}
    with pytest.raises(MissingDataError) as error:
        fedjax_sec.run(small(data=data), out=tmp_path / "out")
    message = str(error.value)
    assert "'mnist'" in message and str(empty / "mnist") in message
    for way in ("data.data_dir=DIR", "--data-dir DIR", "TFDS_DATA_DIR=DIR", "'digits'"):
        assert way in message
    assert not (tmp_path / "out").exists()  # the folder is still free


@pytest.mark.parametrize("text", ["rounds: [1, 2", "a: b: c", "\t- x", "- 1\n- 2\n"])
def test_unreadable_files(text, nothing_compiles, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        fedjax_sec.run(path)
    assert str(path) in str(error.value)
    with pytest.raises(ConfigError, match="No configuration file"):
        fedjax_sec.run(tmp_path / "absent.yaml")


def test_folder_in_use(nothing_compiles, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("important")
    with pytest.raises(ConfigError, match=r"in use by something else.*Choose another folder"):
        fedjax_sec.run(small(), out=tmp_path / "out")
    config.from_mapping(small())
    (tmp_path / "run").mkdir()
    results.write_mark(tmp_path / "run", "run")
    (tmp_path / "run" / "config.yaml").write_text(config.dump_yaml(small()))
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        fedjax_sec.run(small(), out=tmp_path / "run")


# --- Overrides ----------------------------------------------------------------------------------


def test_overrides_of_dotted_paths():
    experiment = config.from_mapping(
        small(),
        ["client.l2=1e-4", "threat.num_malicious=2", "attack=alie", "attack.z=0.5", "seed=7"],
    )
    assert experiment.client.l2 == 1e-4 and experiment.client.steps == 1
    assert experiment.attack.stages[0].z == 0.5 and experiment.seed == 7
    same = config.from_mapping(
        small(),
        {"client.l2": 1e-4, "threat.num_malicious": 2, "attack": "alie", "attack.z": 0.5}
        | {"seed": 7},
    )
    assert same == experiment


def test_a_bare_name_is_overridden_inside():
    mapping = small(defense="krum", data={"num_clients": 9})
    experiment = config.from_mapping(mapping, ["defense.num_byzantine=2"])
    assert experiment.defense.stages[0].num_byzantine == 2
    assert mapping["defense"] == "krum"  # the caller's mapping stays as it was


def test_a_mapping_without_name_changes_the_default():
    result = config.from_mapping({}, ["client.batch_size=5", "client.optimizer.learning_rate=0.5"])
    default = config.from_mapping({})
    assert result.client.registered_name == default.client.registered_name == "sgd"
    assert (result.client.batch_size, result.client.steps) == (5, default.client.steps)
    assert result.client.optimizer.transformation().init is not None
    spec = result.to_dict()["client"]["optimizer"]
    assert spec == {"name": "sgd", "learning_rate": 0.5}
    weighted = config.from_mapping({"defense": {"weighted": False}}).defense.stages[0]
    assert weighted.registered_name == "mean" and not weighted.weighted
    with pytest.raises(ConfigError, match="attack: 'name' is missing"):  # there is no default
        config.from_mapping({"attack": {"z": 1.0}})
    with pytest.raises(ConfigError, match="defense: unknown key 'num_byzantine'"):
        config.from_mapping({"defense": {"num_byzantine": 1}})


def test_overrides_inside_a_list():
    mapping = small(defense=["clip_norm", "median"])
    experiment = config.from_mapping(mapping, ["defense.0.max_norm=3.5"])
    assert experiment.defense.stages[0].max_norm == 3.5
    assert experiment.to_dict()["defense"][0] == {"name": "clip_norm", "max_norm": 3.5}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rounds", "must look like key.path=value"),
        ("=3", "must look like key.path=value"),
        ("rounds.x=3", "rounds is 3, which has no keys"),
        ("defense.5.f=3", "a list of 2 has no entry '5'"),
        ("defense.first.f=3", "a list of 2 has no entry 'first'"),
        ("defense.7=mean", "a list of 2 has no entry '7'"),
        ("seed=[1", "not readable YAML"),
        ("rouns=3", "Did you mean 'rounds'?"),
    ],
)
def test_bad_overrides(override, part, nothing_compiles):
    with pytest.raises(ConfigError) as error:
        config.from_mapping(small(defense=["clip_norm", "median"]), [override])
    assert part in str(error.value)


# --- Round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attack": None, "defense": ["clip_norm", "median", {"name": "gaussian_noise"}]},
        {
            "attack": {"name": "hybrid", "main": {"name": "alie", "z": 0.3}, "solo": "zero"},
            "threat": {"num_malicious": 2},
        },
        {
            "attack": {"name": "alie_backdoor", "backdoor": {"name": "sample", "index": 3}},
            "threat": {"num_malicious": 2},
            "data": {"num_clients": 11},
            "defense": "bulyan",
        },
        {
            "server": {
                "clients_per_round": 3,
                "optimizer": {
                    "name": "adam",
                    "learning_rate": {
                        "name": "cosine_decay_schedule",
                        "init_value": 0.1,
                        "decay_steps": 100,
                    },
                },
            }
        },
        {
            "client": {
                "name": "sgd",
                "epochs": 2,
                "batch_size": 3,
                "optimizer": {
                    "name": "sgd",
                    "learning_rate": 0.1,
                    "momentum": 0.9,
                    "nesterov": True,
                },
            }
        },
    ],
)
def test_dump_and_load(changes, tmp_path):
    experiment = config.from_mapping(small(**changes))
    path = tmp_path / "config.yaml"
    path.write_text(config.dump_yaml(experiment.to_dict()))
    again = config.load(path)
    assert again == experiment and again.to_dict() == experiment.to_dict()
    assert again.structure() == experiment.structure()
    assert hash(again.structure()) == hash(experiment.structure())


def test_structure_leaves_out_what_is_traced():
    base = config.from_mapping(
        small(threat={"num_malicious": 2}, attack={"name": "alie", "z": 1.0})
    )

    def structure(**changes):
        return config.from_mapping(base.to_dict(), changes).structure()

    for same in ({"seed": 5}, {"attack.z": 2.0}, {"client.l2": 0.1}, {"threat.num_malicious": 3}):
        assert structure(**same) == base.structure(), same
    for other in (
        {"rounds": 9},
        {"defense": "median"},
        {"client.batch_size": 3},
        {"attack.z": None},
    ):
        assert structure(**other) != base.structure(), other


def test_f_is_filled_from_the_threat_only_when_all_take_part():
    mapping = small(defense="trimmed_mean", threat={"num_malicious": 2})
    assert config.from_mapping(mapping).defense.stages[0].num_byzantine == 2
    with pytest.raises(ConfigError, match="num_byzantine is required"):
        config.from_mapping(mapping, ["server.clients_per_round=4"])


def test_defaults_are_a_runnable_experiment():
    experiment = config.from_mapping({})
    assert experiment.data.name == "digits" and experiment.clients_per_round == 20
    assert config.from_mapping(experiment.to_dict()) == experiment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client": {"name": "sgd", "steps": 1, "batch_size": 5000}}, "batch_size must be <= 72"),
        ({"model": "alie_cifar10"}, "24 x 24"),
    ],
)
def test_what_only_the_data_shows_is_found_before_the_folder_is_claimed(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fedjax_sec.run(change, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
