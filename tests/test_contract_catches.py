"""Components that are broken on purpose: the contract must notice each of them."""

import dataclasses
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sec import core
from fedjax_sec.algorithms import Averaging
from fedjax_sec.core import numeric, registry
from fedjax_sec.core.components import BASES, with_defaults
from fedjax_sec.data import Source
from fedjax_sec.round import monitors as observing
from fedjax_sec.round import pipeline, step
from fedjax_sec.tasks.classification import Classification
from fedjax_sec.testing import (
    check_component,
    clients,
    close,
    data_attacks,
    defenses,
    fields,
    looking,
    materials,
    same_bits,
    update_attacks,
)


def component(cls):
    """Does what `Registry.register` does, without registering."""
    cls.registered_name = "broken"
    return core.pytree(cls)


class Stage(core.Stage):
    stage = "aggregate"


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
    (FirstRow, defenses.check_permutation_invariance),
    (Doubled, defenses.check_fixed_point),
    (CountsInvalidRows, defenses.check_bad_rows_are_left_out),
    (NotFinite, defenses.check_shapes),
    (ChangesState, defenses.check_shapes),
    (KeptTooLarge, defenses.check_shapes),
    (LosesPrecision, defenses.check_shapes),
    (BakesField, defenses.check_fields),
    (BranchesOnValues, defenses.check_shapes),
    (BranchesOnValues, defenses.check_over_seeds),
]


@pytest.mark.parametrize(("cls", "check"), BROKEN_DEFENSES)
def test_broken_defense(cls, check):
    with pytest.raises(AssertionError):
        check(cls())


@pytest.mark.parametrize("check", defenses.CHECKS)
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
        defenses.check_merged_rows(TakesRowsForClients())
    assert defenses.check_merged_rows(Sound()) is None


class UpdateStage(core.UpdateAttack):
    pass


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
        mine = jnp.where(view.malicious[:, None], updates, 0.0)
        return jnp.broadcast_to(-mine.sum(0) / view.malicious.sum(), updates.shape), state, {}


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
        (DoesNothing, update_attacks.check_shapes),
        (SendsOneRow, update_attacks.check_shapes),
        (SendsNaN, update_attacks.check_shapes),
        (GrowsState, update_attacks.check_shapes),
        (BakesScale, update_attacks.check_fields),
        (CountsUnseenRows, update_attacks.check_ignores_unseen_rows),
        (DividesByNorms, update_attacks.check_survives_bad_rows),
        (SendsSeenMean, update_attacks.check_acts_or_is_refused),
        (RefusesItself, update_attacks.check_acts_or_is_refused),
        (StopsWithoutOwnRow, update_attacks.check_survives_bad_rows),
        (MixesReplicas, update_attacks.check_over_seeds),
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


@pytest.mark.parametrize("check", update_attacks.CHECKS)
def test_sound_attack(check):
    assert check(SoundAttack()) is None


def test_an_adversary_that_sees_bad_rows_is_noticed(monkeypatch):
    """As it was before `Attack.apply` hid them: the same sound attack then fails."""
    monkeypatch.setattr(pipeline, "usable_rows", lambda updates: jnp.ones(len(updates), bool))
    with pytest.raises(AssertionError, match="nan of client 0 reaches what the attack sends"):
        update_attacks.check_survives_bad_rows(SoundAttack())


@component
class WritesEverywhere(UpdateStage):
    def apply(self, key, updates, state, view):
        return jnp.ones_like(updates), state, {}


def test_an_attack_that_writes_honest_rows_has_no_effect_there():
    sent = update_attacks.assail(WritesEverywhere(), update_attacks.attack_updates())[0]
    assert (sent[update_attacks.MALICIOUS] == 1).all()
    same_bits(
        sent[~update_attacks.MALICIOUS], update_attacks.attack_updates()[~update_attacks.MALICIOUS]
    )


@component
class PeeksEverywhere(UpdateStage):
    def apply(self, key, updates, state, view):
        return jnp.broadcast_to(updates.mean(0), updates.shape), state, {}


def test_an_attack_that_reads_invisible_rows_finds_zeros_there():
    assert update_attacks.check_sees_visible_rows_only(PeeksEverywhere()) is None
    updates = update_attacks.attack_updates()
    sent = update_attacks.assail(PeeksEverywhere(), updates)[0]
    expected = updates[update_attacks.MALICIOUS].sum(0) / defenses.CLIENTS
    close(sent[1], expected)


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
        update_attacks.check_wrapped(cls(), "inner", scaling)


def test_sound_wrapper():
    scaling = registry.attacks.build({"name": "scaling", "backdoor": {"name": "pattern"}})
    assert update_attacks.check_wrapped(SoundWrapper(), "inner", scaling) is None


class DataStage(core.DataAttack):
    def examples(self, key, state, view):
        return view.sample(key, 3)

    def probes(self, state, x, y, task):
        return x, y, jnp.ones_like(y, bool)


@component
class TooBright(DataStage):
    def poison(self, key, state, x, y, rank, task):
        return x + 1.0, y


@component
class DependsOnPlace(DataStage):
    def poison(self, key, state, x, y, rank, task):
        return x.at[0].set(0.0), y


@component
class DropsExamples(DataStage):
    def poison(self, key, state, x, y, rank, task):
        return x[1:], y[1:]


@pytest.mark.parametrize("cls", [TooBright, DependsOnPlace, DropsExamples])
def test_broken_data_attack(cls):
    with pytest.raises(AssertionError):
        data_attacks.check_poison(cls(), "pixels")


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
        data_attacks.check_choice(cls(), "pixels")


@component
class IgnoresCount(core.Client):
    def apply(self, key, params, state, data, task, hooks=core.NO_HOOKS):
        x, y = data.fetch(jnp.arange(data.capacity))
        gradient = jax.grad(task.loss)(params, x, y, jnp.ones(y.shape, bool))
        return core.Trained(-gradient, state, jnp.float32(1), None, {"train_loss": jnp.array(0.0)})


def test_a_client_that_trains_on_padding():
    assert clients.check_client_shapes(IgnoresCount(), "pixels") is None
    with pytest.raises(AssertionError):
        clients.check_client_ignores_padding(IgnoresCount(), "pixels")


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
        materials.check_dataset(Data(), tmp_path)
    else:
        with pytest.raises(AssertionError, match=message):
            materials.check_dataset(Data(), tmp_path)


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
    assert fields.check_described(documented(GOOD)) is None
    with pytest.raises(AssertionError):
        fields.check_described(documented(text))


def test_a_field_without_meaning():
    cls = documented(GOOD, __annotations__={"x": float}, x=dataclasses.field(default=0.0))
    with pytest.raises(AssertionError, match="field x"):
        fields.check_described(cls)


# --- Alike classes ------------------------------------------------------------------------------


def test_compiled_functions_tell_alike_classes_apart():
    """A signature is looked up by a few bits of its hash: many classes, so that some share them."""
    kinds = [component(type(f"Times{factor}", (), {"factor": factor})) for factor in range(100)]
    multiplied = jax.jit(lambda part, x: part.factor * x)
    assert [int(multiplied(kind(), 1)) for kind in kinds] == list(range(100))


def test_a_missing_end_is_noticed():
    with pytest.raises(AssertionError, match="scale has the ends .'> 0', ''., and gives no reason"):
        fields.check_ends(NoUpperEnd)
    fields.check_ends(Sound)


def test_a_hole_in_the_gate_is_noticed():
    gate = SimpleNamespace(build=lambda spec: core.rebuild(spec, "defense"))
    with pytest.raises(AssertionError, match="field scale takes"):
        fields.check_gate(gate, TakesAnything())
    with pytest.raises(AssertionError, match="field scale takes"):  # what `build` did once
        fields.check_gate(SimpleNamespace(build=lambda spec: spec), Sound())
    fields.check_gate(gate, Sound())


# --- Algorithms, tasks, monitors, evaluators, attacks on privacy ----------------------------------


@component
class LongMessage(Averaging):
    """It sends something other than it says."""

    def train(self, key, download, state, data, task):
        message, kept, metrics = super().train(key, download, state, data, task)
        return message._replace(vector=jnp.tile(message.vector, 2)), kept, metrics


@component
class MovesAlone(Averaging):
    """Its server moves where nobody sends anything."""

    def step(self, key, server, aggregate, messages, view, task):
        return self.moved(server, aggregate + 1.0), {}


@component
class ForgetsItsStart(Averaging):
    def params(self, server):
        return server.params + 1.0


@component
class AddsUpEverybody(Averaging):
    """Its server reads the vectors of rows that the defence left out."""

    def step(self, key, server, aggregate, messages, view, task):
        return self.moved(server, aggregate + 0.0 * messages.vector.sum(axis=0)), {}


@component
class GrowsServer(Averaging):
    def step(self, key, server, aggregate, messages, view, task):
        moved = self.moved(server, aggregate)
        return moved._replace(params=moved.params.astype(jnp.float16)), {}


@pytest.mark.parametrize(
    ("cls", "check", "words"),
    [
        (LongMessage, clients.check_algorithm_message, "against what `message` says"),
        (MovesAlone, clients.check_algorithm_zeros, "."),
        (ForgetsItsStart, clients.check_algorithm_params, "."),
        (AddsUpEverybody, clients.check_algorithm_leaves_out, "is not finite"),
        (GrowsServer, clients.check_algorithm_zeros, "the server's state changes"),
    ],
)
def test_broken_algorithm(cls, check, words):
    with pytest.raises(AssertionError, match=words):
        check(cls(), "pixels")


@component
class IgnoresTheMask(Classification):
    def sums(self, outputs, y, mask):
        return super().sums(outputs, y, jnp.ones_like(mask))


@component
class HasNoHeadline(Classification):
    headline = "precision"


@component
class AnswersAlways(Classification):
    def right(self, outputs, y):
        return y == 0


@component
class LosesNothing(Classification):
    def losses(self, outputs, y):
        return jnp.zeros(y.shape[0]), jnp.zeros(y.shape[0])


@pytest.mark.parametrize(
    ("cls", "check", "words"),
    [
        (IgnoresTheMask, clients.check_task_sums, "."),
        (HasNoHeadline, clients.check_task_sums, "headline 'precision'"),
        (AnswersAlways, clients.check_task_answers, "does not depend on the outputs"),
        (LosesNothing, clients.check_task_losses, "units count nothing"),
    ],
)
def test_broken_task(cls, check, words):
    with pytest.raises(AssertionError, match=words):
        check(cls(), "pixels")


@component
class CosineToMean(core.Monitor):
    """A sound one."""

    def observe(self, key, state, trace, task):
        mean = trace.honest.vector.mean(axis=0)
        lengths = jnp.linalg.norm(trace.sent.vector, axis=1) * jnp.linalg.norm(mean)
        return state, {"cosine": trace.sent.vector @ mean / lengths}


@component
class GrowsMemory(CosineToMean):
    def observe(self, key, state, trace, task):
        return (*state, jnp.zeros(2)), {}


@component
class DividesByNothing(CosineToMean):
    def observe(self, key, state, trace, task):
        return state, {"share": jnp.zeros(()) / trace.sent.vector[0].sum() / 0.0}


@pytest.mark.parametrize(
    ("cls", "words"),
    [(GrowsMemory, "state changes its structure"), (DividesByNothing, "is not finite")],
)
def test_broken_monitor(cls, words):
    assert looking.check_monitor(CosineToMean(), "pixels") is None
    with pytest.raises(AssertionError, match=words):
        looking.check_monitor(cls(), "pixels")


def test_a_monitor_that_changes_the_round(monkeypatch):
    """The round would have to hand it the means: here it takes them."""
    seen = observing.observe

    def leaking(monitors, key, states, trace, task, probes, last):
        new, metrics = seen(monitors, key, states, trace, task, probes, last)
        return new, metrics | ({"aggregate_norm": jnp.zeros(())} if monitors else {})

    monkeypatch.setattr(step, "observe", leaking)
    with pytest.raises(AssertionError, match="aggregate_norm"):
        looking.check_monitor(CosineToMean(), "pixels")


@component
class MeasuresNothing(core.Evaluator):
    def measure(self, key, params, x, y, task, adversary):
        return {}


@component
class NeedsABackdoor(core.Evaluator):
    def measure(self, key, params, x, y, task, adversary):
        backdoor, state = adversary
        return {"probes": backdoor.probes(state, task.inputs.decode(x), y, task)[2].sum()}


@pytest.mark.parametrize("cls", [MeasuresNothing, NeedsABackdoor])
def test_broken_evaluator(cls):
    with pytest.raises((AssertionError, TypeError)):
        looking.check_evaluator(cls(), "pixels")


@component
class MeanImage(core.PrivacyAttack):
    """A sound one, if no good one: grey images of the class whose bias moved the most."""

    inputs = frozenset({"pixels"})

    def reconstruct(self, key, message, params, task, known):
        moved = message.vector[task.space.group("params/output")][: known.classes]
        label = jnp.argmax(moved).astype(jnp.int32)
        return jnp.full((known.batch, *task.inputs.shape), 0.5), jnp.full(known.batch, label)


@component
class TooManyImages(MeanImage):
    def reconstruct(self, key, message, params, task, known):
        _, y = super().reconstruct(key, message, params, task, known)
        return jnp.full((9, *task.inputs.shape), 0.5), y


@component
class TooManyTargets(MeanImage):
    def reconstruct(self, key, message, params, task, known):
        x, _ = super().reconstruct(key, message, params, task, known)
        return x, jnp.zeros(9, jnp.int32)


@component
class BeyondWhite(MeanImage):
    def reconstruct(self, key, message, params, task, known):
        x, y = super().reconstruct(key, message, params, task, known)
        return 4 * x, y


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (TooManyImages, "inputs have shape"),
        (TooManyTargets, "targets have shape"),
        (BeyondWhite, "leaves its range"),
    ],
)
def test_broken_privacy_attack(cls, words):
    assert looking.check_privacy_attack(MeanImage(), "pixels") is None
    with pytest.raises(AssertionError, match=words):
        looking.check_privacy_attack(cls(), "pixels")


@component
class DiffersWithoutJit(Stage):
    def apply(self, key, updates, state, view):
        mean = jnp.where(view.valid[:, None], updates, 0.0).sum(0) / view.valid.sum()
        traced = isinstance(updates, jax.core.Tracer)
        return mean * (1.0 if traced else 1.5), state, {"kept": view.valid.astype(jnp.float32)}


def test_a_rule_that_differs_without_jit():
    with pytest.raises(AssertionError, match="with and without jit differ"):
        defenses.check_shapes(DiffersWithoutJit())


# --- Anybody's class ------------------------------------------------------------------------------

NOTEBOOK = '''
class MyMean:
    """The mean of the valid updates.

    Source: none, a cell of a notebook.

    Example:
        >>> 1
        1
    """

    stage = "aggregate"

    def apply(self, key, updates, state, view):
        kept = view.valid.astype(updates.dtype)
        valid = jnp.where(view.valid[:, None], updates, 0.0)
        return valid.sum(0) / jnp.maximum(kept.sum(), 1.0), state, {"kept": kept}
'''


def cell(text):
    """A class as a notebook defines it: in no file, without a base, and not registered."""
    names = {"__name__": "__main__", "jnp": jnp}
    exec(text, names)
    return names["MyMean"]


def test_a_class_of_a_notebook_is_checked():
    known = registry.defenses.names()
    assert check_component(cell(NOTEBOOK)) is None
    assert registry.defenses.names() == known, "it is registered afterwards"
    with pytest.raises(AssertionError, match="mymean, check_described: no 'Source:' section"):
        check_component(cell(NOTEBOOK.replace("Source", "From")))
    undescribed = NOTEBOOK.replace("Source", "From")
    assert check_component(cell(undescribed), described=False) is None
    with pytest.raises(AssertionError, match="mymean, check_fixed_point"):
        wrong = undescribed.replace("return valid", "return 2 * valid")
        check_component(cell(wrong), described=False)


def method(*args):
    """Any method: whether it is there is asked, nothing calls it."""


@pytest.mark.parametrize("base", [True, False], ids=["derived", "without a base"])
@pytest.mark.parametrize(
    ("kind", "members", "words"),
    [
        ("defense", {"stage": "after"}, "a defense must define apply"),
        ("defense", {"stage": "after", "aply": method}, "apply.* Did you mean 'aply'"),
        (
            "defense",
            {"stage": "last", "apply": method},
            "`stage` must be one of client, before, .*'last'",
        ),
        ("attack", {"stage": "update", "tamper": method}, "an attack must define apply"),
        (
            "attack",
            {"stage": "update", "rewrites": "message", "apply": method},
            "an attack must define tamper",
        ),
        (
            "attack",
            {"stage": "update", "rewrites": "messages", "tamper": method},
            "`rewrites` must be one of vector, message, got 'messages'. Did you mean 'message'",
        ),
        ("attack", {"stage": "data", "choose": method, "poison": method}, "must define examples"),
        ("algorithm", {"init": method, "train": method, "step": method}, "must define params"),
        ("monitor", {"look": method}, "a monitor must define observe"),
    ],
)
def test_a_class_without_a_method_of_its_kind_is_refused(kind, members, words, base):
    known = registry.KINDS[kind]
    names, bases = known.names(), BASES[kind]
    bases = bases[members["stage"]] if isinstance(bases, dict) else bases
    with pytest.raises(TypeError, match=f"Mine: .*{words}"):
        known.register("mine")(type("Mine", (bases,) if base else (), members))
    assert known.names() == names


@pytest.mark.parametrize("members", [{"apply": method}, {"rewrites": "message", "tamper": method}])
def test_an_attack_defines_the_method_that_is_called_of_it(members):
    with_defaults(type("Mine", (), {"stage": "update"} | members), "attack")
    with_defaults(type("Mine", (core.UpdateAttack,), members), "attack")


def test_a_class_whose_kind_cannot_be_seen():
    with pytest.raises(core.ConfigError, match="of what kind it is cannot be seen"):
        check_component(type("Thing", (), {}))
    with pytest.raises(core.ConfigError, match="kind must be one of dataset, .*got 'rule'"):
        check_component(Sound, "rule")
