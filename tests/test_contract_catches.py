"""Components that are broken on purpose: the contract must notice each of them."""

import dataclasses
from types import SimpleNamespace
from typing import Any, ClassVar

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sec import core
from fedjax_sec.core import numeric, registry
from fedjax_sec.data import Source
from fedjax_sec.round import pipeline


def component(cls):
    """What `Registry.register` does, without registering."""
    cls.registered_name = "broken"
    return core.pytree(cls)


class Stage(core.Stage):
    stage = "aggregate"

    def init(self, num_clients, dim):
        return ()


@component
class Sound(Stage):
    scale: float = numeric(1.0, "One: a fixed point.", low=1, high=1)

    def apply(self, key, updates, state, view):
        kept = view.valid.astype(updates.dtype)
        valid = jnp.where(view.valid[:, None], updates, 0.0)
        mean = valid.sum(0) / jnp.maximum(kept.sum(), 1.0)
        return self.scale * mean, state, {"kept": kept}


@component
class NoUpperEnd(Stage):
    scale: float = numeric(1.0, "A factor.", above=0)


@component
class TakesAnything(Stage):
    scale: Any = numeric(1.0, "A factor.", low=0, high=1)


@component
class FirstRow(Stage):
    def apply(self, key, updates, state, view):
        return updates[0], state, {"kept": jnp.eye(updates.shape[0])[0]}


@component
class Doubled(Stage):
    def apply(self, key, updates, state, view):
        return 2 * updates.mean(0), state, {"kept": jnp.ones(updates.shape[0])}


@component
class CountsInvalidRows(Stage):
    def apply(self, key, updates, state, view):
        return updates.mean(0), state, {"kept": jnp.ones(updates.shape[0])}


@component
class NotFinite(Stage):
    def apply(self, key, updates, state, view):
        return updates.mean(0) / 0.0, state, {"kept": jnp.ones(updates.shape[0])}


@component
class ChangesState(Stage):
    def apply(self, key, updates, state, view):
        return updates.mean(0), (jnp.zeros(3),), {"kept": jnp.ones(updates.shape[0])}


@component
class KeptTooLarge(Stage):
    def apply(self, key, updates, state, view):
        return updates.mean(0), state, {"kept": 2 * jnp.ones(updates.shape[0])}


@component
class LosesPrecision(Stage):
    def apply(self, key, updates, state, view):
        return updates.mean(0).astype(jnp.float16), state, {"kept": jnp.ones(updates.shape[0])}


@component
class BakesField(Stage):
    scale: float = numeric(1.0, "Read too early.", low=0)

    def apply(self, key, updates, state, view):
        return float(self.scale) * updates.mean(0), state, {"kept": jnp.ones(updates.shape[0])}


@component
class BranchesOnValues(Stage):
    def apply(self, key, updates, state, view):
        first = updates[0] if float(updates[0, 0]) > 0 else updates.mean(0)
        return first, state, {"kept": jnp.ones(updates.shape[0])}


BROKEN_DEFENSES = [
    (FirstRow, contract.check_permutation_invariance),
    (Doubled, contract.check_fixed_point),
    (CountsInvalidRows, contract.check_bad_rows_are_left_out),
    (NotFinite, contract.check_defense_shapes),
    (ChangesState, contract.check_defense_shapes),
    (KeptTooLarge, contract.check_defense_shapes),
    (LosesPrecision, contract.check_defense_shapes),
    (BakesField, contract.check_defense_fields),
    (BranchesOnValues, contract.check_defense_shapes),
    (BranchesOnValues, contract.check_defense_over_seeds),
]


@pytest.mark.parametrize(("cls", "check"), BROKEN_DEFENSES)
def test_broken_defense(cls, check):
    with pytest.raises(AssertionError):
        check(cls())


@pytest.mark.parametrize("check", contract.DEFENSE_CHECKS)
def test_sound_defense(check):
    assert check(Sound()) is None


@component
class TakesRowsForClients(Stage):
    """A rule with a row of history for each client, which does not refuse merged rows."""

    def init(self, num_clients, dim):
        return jnp.zeros((num_clients, dim))

    def apply(self, key, updates, state, view):
        state = state.at[view.client_ids].add(updates)
        return updates.mean(0), state, {"kept": jnp.ones(updates.shape[0])}


def test_a_rule_that_takes_merged_rows_for_clients():
    with pytest.raises(AssertionError, match="it takes rows for clients"):
        contract.check_merged_rows(TakesRowsForClients())
    assert contract.check_merged_rows(Sound()) is None


class UpdateStage(core.UpdateAttack):
    stage = "update"


@component
class DoesNothing(UpdateStage):
    def apply(self, key, updates, state, view):
        return updates, state, {}


@component
class SendsOneRow(UpdateStage):
    def apply(self, key, updates, state, view):
        return jnp.zeros((1, updates.shape[1])), state, {}


@component
class SendsNaN(UpdateStage):
    def apply(self, key, updates, state, view):
        return jnp.full_like(updates, jnp.nan), state, {}


@component
class GrowsState(UpdateStage):
    def apply(self, key, updates, state, view):
        return -updates, (*state, jnp.zeros(1)), {}


@component
class BakesScale(UpdateStage):
    scale: float = numeric(1.0, "Read too early.", low=0)

    def apply(self, key, updates, state, view):
        return -float(self.scale) * updates, state, {}


@component
class CountsUnseenRows(UpdateStage):
    def apply(self, key, updates, state, view):
        own = jnp.where(view.malicious[:, None], updates, 0.0)
        return jnp.broadcast_to(-own.sum(0) / view.malicious.sum(), updates.shape), state, {}


@component
class DividesByNorms(UpdateStage):
    def apply(self, key, updates, state, view):
        units = updates / jnp.linalg.norm(updates, axis=1, keepdims=True)
        return jnp.broadcast_to(-units.mean(0), updates.shape), state, {}


@component
class StopsWithoutOwnRow(UpdateStage):
    def apply(self, key, updates, state, view):
        complete = jnp.all(view.visible | ~view.malicious)
        return jnp.where(complete, -updates, updates), state, {}


@component
class SendsSeenMean(UpdateStage):
    def apply(self, key, updates, state, view):
        total = jnp.where(view.visible[:, None], updates, 0.0).sum(0)
        return jnp.broadcast_to(total / view.visible.sum(), updates.shape), state, {}


@component
class RefusesItself(UpdateStage):
    def idle(self, setting):
        return "it would do nothing, it says"

    def apply(self, key, updates, state, view):
        return -updates, state, {}


@component
class MixesReplicas(UpdateStage):
    calls: ClassVar[list] = []  # what a component must never have: memory outside its state

    def apply(self, key, updates, state, view):
        self.calls.append(None)
        return len(self.calls) * updates + 1.0, state, {}


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (DoesNothing, contract.check_attack_shapes),
        (SendsOneRow, contract.check_attack_shapes),
        (SendsNaN, contract.check_attack_shapes),
        (GrowsState, contract.check_attack_shapes),
        (BakesScale, contract.check_attack_fields),
        (CountsUnseenRows, contract.check_attack_ignores_unseen_rows),
        (DividesByNorms, contract.check_attack_survives_bad_rows),
        (SendsSeenMean, contract.check_attack_acts_or_is_refused),
        (RefusesItself, contract.check_attack_acts_or_is_refused),
        (StopsWithoutOwnRow, contract.check_attack_survives_bad_rows),
        (MixesReplicas, contract.check_attack_over_seeds),
    ],
)
def test_broken_attack(cls, check):
    with pytest.raises(AssertionError):
        check(cls())


@component
class SoundAttack(UpdateStage):
    scale: float = numeric(1.0, "Factor of the reversed mean.", low=0)

    def apply(self, key, updates, state, view):
        seen = jnp.where(view.visible[:, None], updates, 0.0)
        mean = seen.sum(0) / jnp.maximum(view.visible.sum(), 1)
        return jnp.broadcast_to(-self.scale * mean, updates.shape), state, {}


@pytest.mark.parametrize("check", contract.ATTACK_CHECKS)
def test_sound_attack(check):
    assert check(SoundAttack()) is None


def test_an_adversary_that_sees_bad_rows_is_noticed(monkeypatch):
    """As it was before `Attack.apply` hid them: the same sound attack then fails."""
    monkeypatch.setattr(pipeline, "usable_rows", lambda updates: jnp.ones(len(updates), bool))
    with pytest.raises(AssertionError, match="nan of client 0 reaches what the attack sends"):
        contract.check_attack_survives_bad_rows(SoundAttack())


@component
class WritesEverywhere(UpdateStage):
    def apply(self, key, updates, state, view):
        return jnp.ones_like(updates), state, {}


def test_an_attack_that_writes_honest_rows_has_no_effect_there():
    sent = contract.assail(WritesEverywhere(), contract.attack_updates())[0]
    assert (sent[contract.MALICIOUS] == 1).all()
    contract.same_bits(sent[~contract.MALICIOUS], contract.attack_updates()[~contract.MALICIOUS])


@component
class PeeksEverywhere(UpdateStage):
    def apply(self, key, updates, state, view):
        return jnp.broadcast_to(updates.mean(0), updates.shape), state, {}


def test_an_attack_that_reads_invisible_rows_finds_zeros_there():
    assert contract.check_attack_sees_visible_rows_only(PeeksEverywhere()) is None
    updates = contract.attack_updates()
    sent = contract.assail(PeeksEverywhere(), updates)[0]
    expected = updates[contract.MALICIOUS].sum(0) / contract.CLIENTS
    contract.close(sent[1], expected)


class Wraps(UpdateStage):
    """Gives every malicious client to the attack inside."""

    def shares(self, ranks):
        return {"inner": ranks >= 0}

    def init(self, num_clients, dim):
        return self.inner.init(num_clients, dim)

    def apply(self, key, updates, state, view):
        return self.inner.apply(key, updates, state, view)


@component
class SoundWrapper(Wraps):
    inner: Any = core.component("attack", registry.attacks.build("zero"), "What is sent.")


@component
class HiddenInside(Wraps):
    """Its field is no component, so nobody can look into it."""

    inner: Any = core.static(registry.attacks.build("zero"), "What is sent.")


@component
class NobodyPoisons(SoundWrapper):
    def shares(self, ranks):
        return {"inner": ranks < 0}


@component
class SendsTheHonestUpdates(SoundWrapper):
    def apply(self, key, updates, state, view):
        return updates, state, {}


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (HiddenInside, "is lost"),
        (NobodyPoisons, "no client poisons"),
        (SendsTheHonestUpdates, "does nothing"),
    ],
)
def test_broken_wrapper(cls, words):
    scaling = registry.attacks.build({"name": "scaling", "backdoor": {"name": "pattern"}})
    with pytest.raises(AssertionError, match=words):
        contract.check_wrapped(cls(), "inner", scaling)


def test_sound_wrapper():
    scaling = registry.attacks.build({"name": "scaling", "backdoor": {"name": "pattern"}})
    assert contract.check_wrapped(SoundWrapper(), "inner", scaling) is None


class DataStage(core.DataAttack):
    stage = "data"
    base = None

    def examples(self, key, view):
        return view.sample(key, 3)

    def probes(self, x, y, task):
        return x, y, jnp.ones_like(y, bool)


@component
class TooBright(DataStage):
    def poison(self, key, x, y, position, rank, task):
        return x + 1.0, y


@component
class DependsOnPlace(DataStage):
    def poison(self, key, x, y, position, rank, task):
        return x.at[0].set(0.0), y


@component
class DropsExamples(DataStage):
    def poison(self, key, x, y, position, rank, task):
        return x[1:], y[1:]


@pytest.mark.parametrize("cls", [TooBright, DependsOnPlace, DropsExamples])
def test_broken_data_attack(cls):
    with pytest.raises(AssertionError):
        contract.check_poison(cls())


@component
class PoisonsPadding(DataStage):
    def choose(self, key, labels, held):
        return jnp.ones_like(held)


@component
class PoisonsNothing(DataStage):
    def choose(self, key, labels, held):
        return jnp.zeros_like(held)


@component
class ReadsPadding(DataStage):
    def choose(self, key, labels, held):
        return held & (labels == labels[-1])


@component
class MissesItsClass(DataStage):
    base = 1

    def choose(self, key, labels, held):
        return held


@component
class DependsOnWidth(DataStage):
    def choose(self, key, labels, held):
        return held & (jnp.arange(labels.shape[0])[::-1] % 3 == 0)


@pytest.mark.parametrize(
    "cls", [PoisonsPadding, PoisonsNothing, ReadsPadding, MissesItsClass, DependsOnWidth]
)
def test_broken_choice(cls):
    with pytest.raises(AssertionError):
        contract.check_choice(cls())


@component
class IgnoresCount(core.Client):
    keeps_state = False

    def init(self, dim):
        return ()

    def apply(self, key, params, state, local, task):
        x, y = local.fetch(jnp.arange(local.capacity))
        gradient = jax.grad(task.loss)(params, x, y, jnp.ones(y.shape, bool))
        return -gradient, state, {"train_loss": jnp.array(0.0)}


def test_a_client_that_trains_on_padding():
    assert contract.check_client_shapes(IgnoresCount()) is None
    with pytest.raises(AssertionError):
        contract.check_client_ignores_padding(IgnoresCount())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"y_train": np.array([1, 2, 1], np.int32)}, "labels from 1 to 2"),
        ({"y_train": np.array([0, 1], np.int32)}, "2 labels for 3 examples"),
        ({"scale": 100.0}, "must lie in"),
        ({"name": "another"}, "name under which it is registered"),
    ],
)
def test_a_source_that_no_experiment_can_use(change, message, tmp_path):
    x = np.arange(20, dtype=np.uint8).reshape(5, 2, 2, 1) * 13
    y = np.array([0, 1, 0, 1, 0], np.int32)
    whole = Source(
        "broken", x[:3], y[:3], x[3:], y[3:], 2, 255.0, (0.5,), (0.5,), (3, 2), "nowhere"
    )

    @component
    class Data:
        def load(self, data_dir=None, download=True):
            return whole._replace(**change)

    if message is None:
        contract.check_dataset(Data(), tmp_path)
    else:
        with pytest.raises(AssertionError, match=message):
            contract.check_dataset(Data(), tmp_path)


def documented(text, **members):
    cls = type("Documented", (), {"__doc__": text, **members})
    return dataclasses.dataclass(frozen=True)(cls)


GOOD = "One line.\n\nSource: a paper.\n\nExample:\n    >>> 1\n    1\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("One line.", "One line."[:-1]),
        GOOD.replace("One line.\n", "One\n"),
        GOOD.replace("Source", "From"),
        GOOD.replace("Example", "So"),
        GOOD.replace(">>> 1", "1"),
    ],
)
def test_missing_description(text):
    assert contract.check_described(documented(GOOD)) is None
    with pytest.raises(AssertionError):
        contract.check_described(documented(text))


def test_a_field_without_meaning():
    cls = documented(GOOD, __annotations__={"x": float}, x=dataclasses.field(default=0.0))
    with pytest.raises(AssertionError, match="field x"):
        contract.check_described(cls)


# --- Alike classes ------------------------------------------------------------------------------


def test_compiled_functions_tell_alike_classes_apart():
    """A signature is looked up by a few bits of its hash: many classes, so that some share them."""
    kinds = [component(type(f"Times{factor}", (), {"factor": factor})) for factor in range(100)]
    multiplied = jax.jit(lambda part, x: part.factor * x)
    assert [int(multiplied(kind(), 1)) for kind in kinds] == list(range(100))


def test_a_missing_end_is_noticed():
    with pytest.raises(AssertionError, match="scale has the ends .'> 0', ''., and gives no reason"):
        contract.check_ends(NoUpperEnd)
    contract.check_ends(Sound)


def test_a_hole_in_the_gate_is_noticed():
    gate = SimpleNamespace(build=lambda spec: core.rebuild(spec, "defense"))
    with pytest.raises(AssertionError, match="field scale takes"):
        contract.check_gate(gate, TakesAnything())
    with pytest.raises(AssertionError, match="field scale takes"):  # what `build` did once
        contract.check_gate(SimpleNamespace(build=lambda spec: spec), Sound())
    contract.check_gate(gate, Sound())
