"""The contract of `fedjax_sec.testing` over every registered component; names none of them."""

import itertools

import jax
import pytest

from fedjax_sec.core import Setting, registry
from fedjax_sec.data.local_test import LocalTest
from fedjax_sec.data.root import Root
from fedjax_sec.runs import config
from fedjax_sec.sweeps import Sweep
from fedjax_sec.testing import check_component, defenses, fields, update_attacks

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
    Sweep,
]
SETTING = Setting(defenses.CLIENTS, fields.BYZANTINE)
EVERYTHING = [
    pytest.param(known.get(name), name, id=f"{known.kind}-{name}")
    for known in registry.KINDS.values()
    for name in known.names()
    if known.get(name).stands_alone  # others are checked where their objects are made
]
UPDATE_ATTACKS = [
    name
    for name, cls in ((name, registry.attacks.get(name)) for name in registry.attacks.names())
    if cls.stage == "update" and cls.stands_alone
]


@pytest.mark.parametrize(("cls", "name"), EVERYTHING)
def test_contract(cls, name):
    assert cls.registered_name == name
    check_component(cls, choices=False)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "name"), EVERYTHING)
def test_contract_with_every_choice(cls, name):
    check_component(cls)


@pytest.mark.parametrize("cls", SECTIONS)
def test_ends_of_sections(cls):
    fields.check_ends(cls)


WRAPPERS = list(update_attacks.wrappers(registry.attacks))


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATE_ATTACKS)
@pytest.mark.parametrize(
    ("outer", "field"),
    [pytest.param(*pair, id=f"{pair[0].registered_name}.{pair[1]}") for pair in WRAPPERS],
)
def test_wrapped_attack(outer, field, name):
    update_attacks.check_wrapped(outer, field, registry.attacks.build(name))


WRAPPED = [
    pytest.param(outer, id=f"{outer.registered_name}-{name}")
    for name in UPDATE_ATTACKS
    for outer in update_attacks.wrappings(registry.attacks, registry.attacks.build(name))
]


@pytest.mark.slow
@pytest.mark.parametrize("outer", WRAPPED)
def test_update_attack_inside_another(outer):
    update_attacks.check_survives_bad_rows(outer)
    update_attacks.check_acts_or_is_refused(outer)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_classes_differ_in_structure(kind):
    """Else a compiled function that takes either may run the program of the other."""
    known = registry.KINDS[kind]
    parts = [known.build(name) for name in known.names()]
    for one, other in itertools.combinations(parts, 2):
        assert jax.tree.structure(one) != jax.tree.structure(other)


def test_every_kind_is_there():
    stages = {registry.defenses.get(name).stage for name in registry.defenses.names()}
    assert stages == {"client", "before", "aggregate", "after"}
    assert 0 < len(UPDATE_ATTACKS) < len(registry.attacks.names()) and WRAPPERS
    empty = {kind for kind, known in registry.KINDS.items() if not known.names()}
    assert empty <= {"privacy_attack"}
