"""Label flipping with several pairs at once, and in the clients' own test data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same_bits, small, tiny_task
from programs import Apart, train

import fedjax_sec
from fedjax_sec import sweeps
from fedjax_sec.core import ConfigError, exact_share, registry
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.runs import loading
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.prepare import make_population, prepare
from fedjax_sec.runs.source import load_source
from fedjax_sec.testing import check_component

LABELS = np.random.default_rng(0).integers(0, 10, 200).astype(np.int32)
PAIRS = [[3, 9], [2, 1]]


def flip(pairs, **fields):
    return registry.attacks.build({"name": "label_flip", "pairs": pairs, **fields})


def flipped(pairs, labels=LABELS):
    """The definition: the target of the pair of an example's own class."""
    return np.array([dict(map(tuple, pairs)).get(label, label) for label in labels.tolist()])


def in_sequence(pairs, labels=LABELS):
    """FedML's: each pair on what the pairs before it left."""
    labels = labels.copy()
    for source, target in pairs:
        labels[labels == source] = target
    return labels


# --- Labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [PAIRS, [[3, 9], [9, 3]], [[0, 1], [1, 2], [2, 0]], [[4, 5]]])
def test_all_pairs_are_applied_at_once(pairs):
    part, x = flip(pairs), jnp.zeros((200, 2))
    poisoned = jax.jit(lambda y: part.poison(jax.random.key(0), (), x, y, 0, tiny_task()))
    same_x, y = poisoned(jnp.asarray(LABELS))
    same_bits(same_x, x)
    assert y.dtype == jnp.int32
    same_bits(np.asarray(y), flipped(pairs).astype(np.int32))
    collapses = pairs not in (PAIRS, [[4, 5]])
    assert np.array_equal(y, in_sequence(pairs)) != collapses
    _, target, include = part.probes((), x, jnp.asarray(LABELS), tiny_task())
    same_bits(np.asarray(target), flipped(pairs).astype(np.int32))
    same_bits(np.asarray(include), np.isin(LABELS, [source for source, _ in pairs]))
    assert part.bases == tuple(source for source, _ in pairs) and part.base is None


def test_each_class_has_its_share():
    """floor(fraction n) of the n examples of each class, not of all of them together."""
    held = np.arange(200) < 150
    for fraction in (1.0, 0.7, 0.25):
        part = flip([*PAIRS, [7, 0]], fraction=fraction)
        chosen = np.asarray(part.choose(jax.random.key(1), jnp.asarray(LABELS), jnp.asarray(held)))
        for label in range(10):
            number = (held & (label == LABELS)).sum()
            wanted = int(np.floor(fraction * number + 1e-9)) if label in (3, 2, 7) else 0
            assert (chosen & (label == LABELS)).sum() == wanted
        assert not chosen[~held].any()
    again = part.choose(jax.random.key(1), jnp.asarray(LABELS), jnp.asarray(held))
    same_bits(np.asarray(again), chosen)


def test_one_class_is_chosen_as_before():
    """Committed numbers of runs with base and target depend on these draws."""
    held = jnp.arange(200) < 150
    for base in (3, None):
        part = registry.attacks.build(
            {"name": "label_flip", "base": base, "target": 9, "fraction": 0.5}
        )
        candidates = held if base is None else held & (jnp.asarray(LABELS) == base)
        expected = exact_share(jax.random.key(4), candidates, 0.5)
        same_bits(part.choose(jax.random.key(4), jnp.asarray(LABELS), held), expected)
    assert registry.attacks.build("label_flip").bases is None


def test_examples_for_an_update_attack_are_flipped_by_pairs():
    class View:
        task = tiny_task()

        @staticmethod
        def sample(key, num):
            return jnp.zeros((num, 1)), jnp.asarray(LABELS[:num])

    _, y = flip(PAIRS, num_images=50).examples(jax.random.key(0), (), View)
    same_bits(np.asarray(y), flipped(PAIRS, LABELS[:50]).astype(np.int32))


def test_pairs_keep_the_contract():
    check_component(flip([[0, 2], [1, 0]]))


# --- Rounds and what is measured ------------------------------------------------------------------


def federation(**changes):
    """Five clients with 60 digits each; two flip labels."""
    spec = small(
        data={"max_train": 300},
        client={
            "name": "sgd",
            "steps": 5,
            "batch_size": 30,
            "optimizer": {"name": "sgd", "learning_rate": 0.2},
        },
        attack={"name": "label_flip", "pairs": PAIRS},
        threat={"num_malicious": 2},
        evaluation={"every": 6},
        rounds=6,
    )
    for key, value in changes.items():
        spec[key] = spec[key] | value if key in ("data", "threat", "attack") else value
    return spec


def answers(result, x):
    """The final model's answers on stored digits, whose pixels are up to 16."""
    logits = loading.logits_of(result.experiment)
    return np.argmax(np.asarray(logits(result.params, jnp.asarray(x / 16.0))), axis=1)


def test_success_is_over_the_examples_of_all_pairs():
    result = fedjax_sec.run(federation(data={"max_test": 250}))  # 26 threes and 24 twos
    source, m = load_source(result.experiment), result.metrics
    read = answers(result, source.x_test)
    counted = np.isin(source.y_test, [3, 2])
    success = np.mean(read[counted] == flipped(PAIRS, source.y_test)[counted])
    assert m["attack_success_rate"][-1] == pytest.approx(success, abs=1e-6)
    each = [np.mean(read[source.y_test == s] == t) for s, t in PAIRS]
    np.testing.assert_allclose(m["per_base_attack_success_rate"][-1], each, atol=1e-6)
    assert each[0] != each[1] and 0 < success < 1
    right = np.mean(read[counted] == source.y_test[counted])
    assert m["base_class_accuracy"][-1] == pytest.approx(right, abs=1e-6)
    assert abs(m["per_class_accuracy"][-1, [3, 2]].mean() - right) > 1e-4  # not the classes' mean
    assert "attack_rounds" not in m


def test_everybody_flipping_teaches_the_pairs():
    spec = federation(threat={"num_malicious": 5}, rounds=30, evaluation={"every": 30})
    m = fedjax_sec.run(spec).metrics
    assert m["attack_success_rate"][-1] > 0.8 > 0.2 > m["base_class_accuracy"][-1]
    assert (m["per_base_attack_success_rate"][-1] > 0.7).all()


def test_one_class_is_measured_as_before():
    attack = {"name": "label_flip", "base": 3, "target": 9}
    spec = federation()
    m = fedjax_sec.run(spec | {"attack": attack}).metrics
    same_bits(m["base_class_accuracy"], m["per_class_accuracy"][:, 3])
    assert "per_base_attack_success_rate" not in m


def test_classes_that_nobody_holds():
    """All are missing: nothing would happen. Some are missing: the summary says so."""
    by_label = {"name": "by_label", "shards_per_client": 2}
    data = {"max_train": None, "num_clients": 20, "partition": by_label, "max_test": 5}
    spec = federation(data=data, threat={"num_malicious": 1}, rounds=1)

    def flipping(*pairs):
        return from_mapping(spec | {"attack": {"name": "label_flip", "pairs": pairs}})

    source = load_source(flipping([0, 1]))
    population, _ = make_population(flipping([0, 1]), source)
    bad = np.flatnonzero(population.malicious)[0]
    held = set(source.y_train[population.index[bad, : population.counts[bad]]].tolist())
    tested = set(source.y_test.tolist())
    unheld, untested = set(range(10)) - held, set(range(10)) - tested
    (one, other, *_), holds = unheld & tested, min(held)
    message = (
        f"no malicious client holds an example of base classes {one}, {other}, so 'label_flip'"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(flipping([one, other], [other, one]))
    here, there, *_ = untested
    message = f"has no test example of base classes {here}, {there}, so the backdoor's success"
    with pytest.raises(ConfigError, match=message):
        prepare(flipping([here, there], [there, here]))
    result = train([flipping([one, here], [holds, here], [here, one])])[0]
    warnings = result.summary["warnings"]
    lacking = sorted({one, here} - held, key=[one, here].index)
    named = ("es " if len(lacking) > 1 else " ") + ", ".join(map(str, lacking))
    said = f"no malicious client holds an example of base class{named}, which 'label_flip' would"
    assert any(line.startswith(said) for line in warnings)
    missing = [c for c in (one, holds, here) if c not in tested]
    assert any(line.startswith("success is not measured on base class") for line in warnings)
    rates = result.metrics["per_base_attack_success_rate"][-1]
    assert np.isnan(rates).sum() == len(missing) and np.isnan(rates[2])
    assert np.isfinite(result.metrics["base_class_accuracy"]).all()


# --- The clients' own test data -------------------------------------------------------------------


def local_shares(result, malicious, pairs=PAIRS):
    """Each client's share of its own test examples that the model reads as they are labelled."""
    experiment = result.experiment
    source = load_source(experiment)
    population, _ = make_population(experiment, source)
    held_out = experiment.data.local_test.data == "held_out"
    x, y = (source.x_train, source.y_train) if held_out else (source.x_test, source.y_test)
    shares = []
    for client, row in enumerate(population.local):
        row = row[row >= 0]
        labels = flipped(pairs, y[row]) if malicious[client] else y[row]
        shares.append(np.mean(answers(result, x[row]) == labels))
    return np.array(shares), population


@pytest.mark.parametrize("data", ["held_out", "dealt"])
def test_local_test_labels_of_malicious_clients_are_flipped(data):
    local = {"data": "held_out", "share": 0.3} if data == "held_out" else data
    spec = federation(data={"local_test": local})
    plain = fedjax_sec.run(spec)
    shares, population = local_shares(plain, np.zeros(5, bool))
    np.testing.assert_allclose(plain.metrics["per_client_accuracy"][-1], shares, atol=1e-6)
    both = fedjax_sec.run(federation(data={"local_test": local}, attack={"local_test": True}))
    for name in ("accuracy", "attack_success_rate", "base_class_accuracy"):
        same_bits(both.metrics[name], plain.metrics[name])  # training and test part are as before
    expected, _ = local_shares(both, population.malicious)
    np.testing.assert_allclose(both.metrics["per_client_accuracy"][-1], expected, atol=1e-6)
    counts = (population.local >= 0).sum(axis=1)
    average = np.average(expected, weights=counts)
    assert both.metrics["local_accuracy"][-1] == pytest.approx(average, abs=1e-6)
    changed = expected != shares
    assert changed[population.malicious].any() and not changed[~population.malicious].any()


def test_a_share_of_the_local_test_labels_is_flipped_and_no_padding():
    attack = {"name": "label_flip", "pairs": PAIRS, "fraction": 0.5, "local_test": True}
    labels, held = jnp.asarray(LABELS), jnp.arange(200) < 150

    def tests_of(spec, who):
        args = (jnp.zeros((200, 1)), labels, held, jnp.array([who]), jnp.array([0]), tiny_task())
        pipeline = Attack.build(spec)
        return np.asarray(pipeline.poison_tests(jax.random.key(0), pipeline.init(1, 1), *args)[1])

    y = tests_of(attack, True)
    for source, target in PAIRS:
        mine = y[:150][LABELS[:150] == source]
        assert (mine == target).sum() == len(mine) // 2 and set(mine) == {source, target}
    others = ~np.isin(LABELS, [3, 2]) | (np.arange(200) >= 150)
    same_bits(y[others], LABELS[others])
    same_bits(tests_of(attack, False), LABELS)
    same_bits(tests_of(attack | {"local_test": False}, True), LABELS)


def test_models_of_the_clients_are_measured_on_the_labels_that_they_learn():
    shares = {}
    for local_test in (False, True):
        attack = {"name": "label_flip", "local_test": local_test}  # every label l as 9 - l
        spec = federation(data={"max_train": 600, "local_test": True}, rounds=20) | {
            "attack": attack,
            "evaluation": {"every": 20},
        }
        experiment = dataclasses.replace(from_mapping(spec), algorithm=Apart())
        shares[local_test] = train([experiment])[0].metrics["per_client_accuracy"][-1]
    bad = prepare(from_mapping(spec)).population.malicious
    assert (shares[True] > 0.5).all() and (shares[False][bad] < 0.3).all()
    same_bits(shares[True][~bad], shares[False][~bad])


def test_local_test_follows_the_malicious_clients_of_the_last_round():
    spec = federation(
        data={"local_test": "dealt"},
        attack={"local_test": True},
        threat={"redraw": True},
        rounds=3,
        evaluation={"every": 3},
        seed=1,
    )
    result = fedjax_sec.run(spec)
    first = prepare(result.experiment).population.malicious
    key = stream(jax.random.fold_in(jax.random.key(1), 2), Stream.REDRAW)  # of the third round
    last = np.asarray(jax.random.permutation(key, jnp.asarray(first)))
    assert not np.array_equal(last, first)
    expected, _ = local_shares(result, last)
    np.testing.assert_allclose(result.metrics["per_client_accuracy"][-1], expected, atol=1e-6)
    rested = federation(
        data={"local_test": "dealt"},
        attack={"local_test": True},
        threat={"every": 3},
        rounds=3,
        evaluation={"every": 3},
    )
    result = fedjax_sec.run(rested)  # the last round had no attack
    expected, _ = local_shares(result, np.zeros(5, bool))
    np.testing.assert_allclose(result.metrics["per_client_accuracy"][-1], expected, atol=1e-6)


def test_local_test_without_test_data_is_refused():
    with pytest.raises(ConfigError, match="local_test of 'label_flip' poisons the clients' own"):
        from_mapping(federation(attack={"local_test": True}))
    taught = {"name": "label_flip", "pairs": PAIRS, "local_test": True}
    spec = federation(data={"local_test": True})
    spec["attack"] = {"name": "alie_backdoor", "backdoor": taught}
    with pytest.raises(ConfigError, match="would do nothing, since no client's data is poisoned"):
        from_mapping(spec)


def test_a_sweep_measures_its_backdoor_without_an_attack():
    """Cells without an attack get it as `evaluation.backdoor`, and poison nothing."""
    attack = {"name": "label_flip", "pairs": PAIRS, "local_test": True}
    base = federation(data={"local_test": True}) | {"attack": None}
    clean, attacked = sweeps.make_cells(base, {"attack": {"clean": None, "flip": attack}})
    backdoor = clean.experiment.evaluation.backdoor
    assert not clean.experiment.attack.stages
    assert backdoor == attacked.experiment.attack.backdoor and backdoor.bases == (3, 2)
    m = train([dataclasses.replace(clean.experiment, rounds=1)])[0].metrics
    assert m["per_base_attack_success_rate"].shape == (2, 2)


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": [[3, 9], [3, 1]]}, r"pairs\[1\]: each class has one target, got class 3 twice"),
        ({"pairs": [[2, 1], [4, 4]]}, r"pairs\[1\] must hold two different classes, got \[4, 4\]"),
        ({"pairs": [[3, 10]]}, r"pairs\[0\] must hold classes < 10, the number of classes, got"),
        ({"pairs": [[10, 3]]}, r"pairs\[0\] must hold classes < 10, the number of classes, got"),
        ({"pairs": [[3, 9, 1]]}, r"pairs\[0\] must be \[class, target\], got \[3, 9, 1\]"),
        ({"pairs": [[3]]}, r"pairs\[0\] must be \[class, target\], got \[3\]"),
        ({"pairs": []}, r"pairs must hold one \[class, target\] or more, got \[\]"),
        ({"pairs": [[-1, 2]]}, r"pairs\[0\]\[0\] must be >= 0, got -1"),
        ({"pairs": [3, 9]}, r"pairs\[0\]: expected a list"),
        ({"pairs": [["a", 1]]}, r"pairs\[0\]\[0\]: expected an integer"),
        (
            {"pairs": [[3, 9]], "base": 2},
            r"pairs stand in place of base and target, got pairs=\[\[3, 9\]\], base=2; set base to",
        ),
        ({"pairs": [[3, 9]], "target": 2}, r"pairs stand in .*, target=2; set target to null"),
    ],
)
def test_wrong_pairs_are_refused(fields, message):
    attack = {"name": "label_flip", **fields}
    spec = small(attack=attack, threat={"num_malicious": 1})
    with pytest.raises(ConfigError, match=r"attack\." + message):
        prepare(from_mapping(spec))
