"""The contract of `contract.py` over every registered component; names none of them."""

import itertools

import contract
import jax
import pytest
from contract import BYZANTINE, CLIENTS
from fedjax_sec.evaluation.influence import Influence
from helpers import shallow

from fedjax_sec.core import Setting, fill_defaults, registry
from fedjax_sec.data.local_test import LocalTest
from fedjax_sec.data.root import Root
from fedjax_sec.runs import config
from fedjax_sec.sweeps import Sweep

SETTING = Setting(CLIENTS, BYZANTINE)
SECTIONS = [
    config.Experiment,
    config.Data,
    config.Server,
    config.Threat,
    config.Evaluation,
    config.Checkpoint,
    config.Execution,
    Root,
    LocalTest,
    Influence,
    Sweep,
]


def label(component):
    values = [str(v) for v in vars(component).values() if isinstance(v, (str, bool))]
    return "-".join([component.registered_name, *values])


def cases(found, checks):
    return [
        pytest.param(check, part, id=f"{label(part)}-{check.__name__[6:]}")
        for part in found
        for check in checks
    ]


DEFENSES = [
    part
    for name in registry.defenses.names()
    for part in contract.variants(registry.defenses, name, SETTING)
]
ATTACKS = [
    part
    for name in registry.attacks.names()
    for part in contract.variants(registry.attacks, name, SETTING, every_pair=False)
]
UPDATE_ATTACKS = [part for part in ATTACKS if part.stage == "update"]
DATA_ATTACKS = [part for part in ATTACKS if part.stage == "data"]
BOUNDED = {part.registered_name for part in DEFENSES if hasattr(part, "num_byzantine")}
CLIENTS_FOUND = [
    part
    for name in registry.clients.names()
    for part in contract.client_variants(registry.clients, name)
]
EVERYTHING = [
    pytest.param(found, name, id=f"{found.kind}-{name}")
    for found in registry.KINDS.values()
    for name in found.names()
]


@pytest.mark.parametrize(("found", "name"), EVERYTHING)
def test_described(found, name):
    contract.check_described(found.get(name))
    assert found.get(name).registered_name == name


@pytest.mark.parametrize(("found", "name"), EVERYTHING)
def test_dump_and_build(found, name):
    for part in contract.variants(found, name, SETTING):
        contract.check_round_trip(found, part)


@pytest.mark.parametrize(("found", "name"), EVERYTHING)
def test_gate(found, name):
    contract.check_ends(found.get(name))
    contract.check_gate(found, fill_defaults(found.build(name), {"num_malicious": BYZANTINE}))


@pytest.mark.parametrize("cls", SECTIONS)
def test_ends_of_sections(cls):
    contract.check_ends(cls)


@pytest.mark.parametrize(("check", "part"), cases(DEFENSES, contract.DEFENSE_CHECKS))
def test_defense(check, part):
    check(part)


@pytest.mark.parametrize("name", registry.defenses.names())
def test_defense_on_merged_rows(name):
    few = {"num_byzantine": 1} if name in BOUNDED else {}
    contract.check_merged_rows(registry.defenses.build({"name": name} | few))


@pytest.mark.parametrize(("check", "part"), cases(UPDATE_ATTACKS, contract.ATTACK_CHECKS))
def test_update_attack(check, part):
    check(part)


WRAPPERS = list(contract.wrappers(registry.attacks))


@pytest.mark.parametrize("name", dict.fromkeys(part.registered_name for part in UPDATE_ATTACKS))
@pytest.mark.parametrize(
    ("outer", "field"),
    [pytest.param(*pair, id=f"{pair[0].registered_name}.{pair[1]}") for pair in WRAPPERS],
)
def test_wrapped_attack(outer, field, name):
    contract.check_wrapped(outer, field, registry.attacks.build(name))


WRAPPED = [
    pytest.param(outer, id=f"{outer.registered_name}-{name}")
    for name in registry.attacks.names()
    if registry.attacks.get(name).stage == "update"
    for outer in contract.wrappings(registry.attacks, registry.attacks.build(name))
]


@pytest.mark.parametrize("outer", WRAPPED)
def test_update_attack_inside_another(outer):
    contract.check_attack_survives_bad_rows(outer)
    contract.check_attack_acts_or_is_refused(outer)


@pytest.mark.parametrize(("check", "part"), cases(DATA_ATTACKS, contract.DATA_ATTACK_CHECKS))
def test_data_attack(check, part):
    check(part)


# The slower checks run on one step and on epochs, the others on everything.
CLIENT_CASES = [
    pytest.param(check, part, id=f"{part.registered_name}-{i}-{check.__name__[6:]}")
    for i, part in enumerate(CLIENTS_FOUND)
    for check in (contract.CLIENT_CHECKS if i % 2 == 0 else contract.CLIENT_CHECKS[:2])
]


@pytest.mark.parametrize(("check", "part"), CLIENT_CASES)
def test_client(check, part):
    check(part)


@pytest.mark.parametrize("name", registry.models.names())
def test_model(name):
    contract.check_model(shallow(name))


@pytest.mark.parametrize("name", registry.datasets.names())
def test_dataset(name, tmp_path):
    contract.check_dataset(registry.datasets.build(name), tmp_path)


@pytest.mark.parametrize("name", registry.partitions.names())
def test_partition(name):
    contract.check_partitioner(registry.partitions.build(name))


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, id=f"{name}-{i}")
        for name in registry.evasions.names()
        for i, part in enumerate(contract.variants(registry.evasions, name, SETTING))
    ],
)
def test_evasion(part):
    contract.check_evasion(part)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_classes_differ_in_structure(kind):
    """Else a compiled function that takes either may run the program of the other."""
    found = registry.KINDS[kind]
    parts = [found.build(name) for name in found.names()]
    for one, other in itertools.combinations(parts, 2):
        assert jax.tree.structure(one) != jax.tree.structure(other)


def test_every_kind_is_there():
    assert {part.stage for part in DEFENSES} == {"before", "aggregate", "after"}
    assert UPDATE_ATTACKS and DATA_ATTACKS and CLIENTS_FOUND and WRAPPERS
    assert all(found.names() for found in registry.KINDS.values())
