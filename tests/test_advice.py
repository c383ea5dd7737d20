"""Suggestions in messages: the right name, of the right kind, with its whole dotted key."""

import pytest
from helpers import small

import fedjax_sec
from fedjax_sec import sweeps
from fedjax_sec.core import ConfigError, advice, optimizers, registry
from fedjax_sec.runs import config


@pytest.mark.parametrize(
    ("kind", "name", "names"),
    [
        ("defense", "trmean", ["trimmed_mean"]),
        ("defense", "trimmedmean", ["trimmed_mean"]),
        ("defense", "Trimmed-Mean", ["trimmed_mean"]),
        ("defense", "fedavg", ["mean"]),
        ("defense", "geomed", ["geometric_median"]),
        ("defense", "rfa", ["geometric_median"]),
        ("defense", "cc", ["centered_clipping"]),
        ("defense", "centeredclipping", ["centered_clipping"]),
        ("defense", "clip", ["clip_norm"]),
        ("defense", "multikrum", ["multi_krum"]),
        ("defense", "kurm", ["krum"]),
        ("defense", "KRUM", ["krum"]),
        ("defense", "signguard", []),
        ("defense", "alie", []),
        ("defense", "zzz", []),
        ("attack", "labelflip", ["label_flip"]),
        ("attack", "lie", ["alie"]),
        ("attack", "signflip", ["sign_flip"]),
        ("attack", "ipm", []),
        ("attack", "backdoor", ["pattern", "trojan"]),
        ("attack", "median", []),
        ("model", "cnn", ["small_cnn"]),
        ("model", "resnet20", ["resnet"]),
        ("model", "logistic", ["logistic_regression"]),
        ("dataset", "fashionmnist", ["fashion_mnist"]),
        ("dataset", "cifar-10", ["cifar10"]),
        ("dataset", "cifar", ["cifar10"]),
        ("partition", "noniid", ["dirichlet", "label_groups"]),
        ("partition", "dir", ["dirichlet"]),
        ("client", "fedavg", ["sgd"]),
        ("evasion", "autopgd", ["apgd"]),
    ],
)
def test_the_nearest_name(kind, name, names):
    known = registry.KINDS[kind].names()
    assert advice.nearest(name, known) == names
    with pytest.raises(ConfigError) as error:
        registry.KINDS[kind].get(name)
    said = f" Did you mean {' or '.join(map(repr, names))}?" if names else ". Known: "
    assert said in str(error.value)


def test_synonyms_lead_somewhere():
    names = {name for result in registry.KINDS.values() for name in result.names()}
    keys = {place.rpartition(".")[2] for place in config._places({})} | set(optimizers.RANGES)
    keys |= {field for cls in (config.Experiment, sweeps.Sweep) for field in cls.__annotations__}
    keys |= {"num_byzantine", "eps", "step_size"} | set(optimizers.OPTIMIZERS)
    for word, meant in advice.SYNONYMS.items():
        assert advice.letters(word) == word
        assert set(meant) <= names | keys, word


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"lr": 0.1}, "Did you mean 'client.optimizer.learning_rate' or 'server.optimizer.learn"),
        ({"client.lr": 0.1}, "client: unknown key 'lr'. Did you mean 'client.optimizer.learni"),
        ({"client.learning_rate": 1}, "Did you mean 'client.optimizer.learning_rate'? Known"),
        ({"client.momentum": 0.9}, "Did you mean 'client.optimizer.momentum'? Known"),
        ({"server.lr": 1}, "Did you mean 'server.optimizer.learning_rate'? Known"),
        ({"batch_size": 3}, "Did you mean 'client.batch_size' or 'evaluation.batch_size'?"),
        ({"num_malicious": 1}, "Did you mean 'threat.num_malicious'?"),
        ({"num_clients": 9}, "Did you mean 'data.num_clients'?"),
        ({"epochs": 9}, "Did you mean 'client.epochs'?"),
        ({"hidden": [9]}, "Did you mean 'model.hidden'?"),
        ({"f": 1}, "Did you mean 'threat.num_malicious'?"),
        ({"num_rounds": 1}, "unknown key 'num_rounds'. Did you mean 'rounds'?"),
        ({"aggregator": "krum"}, "Did you mean 'defense'?"),
        ({"data.clients": 3}, "data: unknown key 'clients'. Did you mean 'num_clients'"),
        ({"client.batchsize": 3}, "client: unknown key 'batchsize'. Did you mean 'batch_size'?"),
        (
            {"attack": "none"},
            "attack.name: unknown attack 'none'. null (None in Python) means no attack. Known: ",
        ),
        ({"attack": False}, "got False. null (None in Python) means no attack."),
        ({"defense": "none"}, "unknown defense 'none'. Without a defence the rule is 'mean'."),
        (
            {"grid": {}},
            "This is a sweep, not an experiment: it has the key 'grid'. Run it with "
            "`fedjax-sec sweep FILE --out DIR`.",
        ),
    ],
)
def test_the_whole_key_is_named(change, part):
    with pytest.raises(ConfigError) as error:
        config.from_mapping(small(), change)
    assert part in str(error.value)


def test_files_for_the_other_command(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seeds: [0, 1]\nexperiment: {rounds: 3}")
    with pytest.raises(
        ConfigError,
        match="This is a sweep, not an experiment: it has the key "
        "'seeds'. Run it with `fedjax-sec sweep FILE --out DIR`.",
    ):
        fedjax_sec.run(path)
    path.write_text("rounds: 3")
    with pytest.raises(
        ConfigError,
        match="is an experiment, not a sweep: it has the key 'rounds'. "
        "Run it with `fedjax-sec run .*a.yaml --out DIR`",
    ):
        sweeps.load(path)
    path.write_text("grid: {defense: [mean]}\nsedes: [1]")
    with pytest.raises(ConfigError, match="The sweep: unknown key 'sedes'. Did you mean 'seeds'?"):
        sweeps.load(path)


def test_epochs_take_the_place_of_the_default_steps():
    result = config.from_mapping({}, ["client.epochs=2"]).client
    assert (result.steps, result.epochs, result.batch_size) == (None, 2, 32)
    written = config.from_mapping({"client": {"epochs": 2}}).to_dict()["client"]
    assert written["steps"] is None and written["epochs"] == 2
    kept = config.from_mapping({"client": {"epochs": None}}).client
    assert (kept.steps, kept.epochs) == (1, None)
    with pytest.raises(
        ConfigError, match="got steps=1, epochs=2; set client.steps or client.epochs to null"
    ):
        config.from_mapping({"client": {"name": "sgd", "steps": 1}}, ["client.epochs=2"])
    with pytest.raises(ConfigError, match="got steps=None, epochs=None; such as client.steps=1"):
        config.from_mapping({"client": "sgd"})


def test_a_value_is_shown_in_one_short_line():
    class Odd:
        def __repr__(self):
            return "a\nb" * 1000

    nested = []
    nested.append(nested)
    for value in (Odd(), nested, "x\n" * 9999, 10**9999, {"a": list(range(9999))}):
        assert len(advice.shown(value)) <= 80 and "\n" not in advice.shown(value)
