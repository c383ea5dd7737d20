"""The advice of a message can be taken at the very values that it is given for."""

import numpy as np
import pytest
from helpers import small

from fedjax_sec import sweeps
from fedjax_sec.core import ConfigError, Setting, registry
from fedjax_sec.data.local_test import LocalTest
from fedjax_sec.runs import config, memory
from fedjax_sec.runs.checks import _away_from_edges


def test_a_rule_that_no_bound_would_satisfy_asks_for_clients():
    krum = registry.defenses.build({"name": "krum", "num_byzantine": 0})
    with pytest.raises(ConfigError, match="no num_byzantine at all, so more clients must"):
        krum.check("defense", Setting(2))
    krum.check("defense", Setting(3))


def test_a_hybrid_of_one_malicious_client_asks_for_another():
    hybrid = registry.attacks.build({"name": "hybrid", "main": "zero"})
    with pytest.raises(ConfigError, match="raise threat.num_malicious to 2 or more"):
        hybrid.check("attack", Setting(5, 1))
    hybrid.check("attack", Setting(5, 2))


def test_a_pattern_in_the_corner_cannot_be_moved():
    assert "attack.size" in _away_from_edges(registry.attacks.build("pattern"))
    assert "attack.place" in _away_from_edges(registry.attacks.build("trojan"))


def test_dlr_names_the_other_losses():
    pgd = registry.evasions.build({"name": "pgd", "loss": "dlr"})
    with pytest.raises(ConfigError, match="needs 3 classes, the data has 2; choose another of"):
        pgd.check("e", Setting(5, num_classes=2))


def test_what_is_dealt_to_too_many_clients():
    with pytest.raises(ConfigError, match="lower data.num_clients, or use 'held_out'"):
        LocalTest(data="dealt").of_test_part(np.random.default_rng(0), None, None, 3, 4)


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ("client", "Set client.keep_optimizer_state to false"),
        ("defense", "num_features of 'foolsgold'"),
        ("params", "Take a smaller model, or fewer runs at once."),
    ],
)
def test_memory_names_what_is_large(part, remedy):
    parts = dict.fromkeys(("params", "client", "defense"), 1) | {part: 2**34}
    with pytest.raises(ConfigError, match=remedy):
        memory.check_state(parts, 2**30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": [0, 0]}, r"seeds must differ, got \[0, 0\]."),
        ({"grid": {"seed": [1, 2]}}, r"so 1 would be ignored; give seeds: \[1\] instead."),
        ({"grid": {"(x)": {"a": {"seed": 3}}}}, r"so 3 would be ignored; give seeds: \[3\]"),
        ({"overrides": {"seed": 4}}, r"so 4 would be ignored; give seeds: \[4\] instead."),
        (
            {"grid": {"client.l2": {"a b": 0.1, "a/b": 0.2}}},
            "two cells have the same name 'a-b/seed0'; give labels, {label: value}, that differ",
        ),
    ],
)
def test_sweeps_whose_seeds_or_labels_clash(call, message):
    with pytest.raises(ConfigError, match=message):
        sweeps.from_mapping({"experiment": small()} | call)


@pytest.mark.parametrize("name", ["alie_cifar10", "fltrust_cnn", "madry_cnn", "rlr_cnn", "resnet"])
def test_images_too_small_for_a_network(name):
    experiment = config.from_mapping(small(model=name))
    with pytest.raises(ConfigError, match="choose another model such as 'mlp'"):
        experiment.model.make((3, 3, 1), 10)
