"""`fedml.wrap`: classes written for FedML's interface, run by `aggregate` and `attack`."""

import random
import warnings
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.core.types import AttackerView, ServerView
from fedjax_sec.fedml import wrap
from fedjax_sec.fedml.wrapping import average, form_of
from fedjax_sec.round.pipeline import Defense


def stack(clients=6, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(clients, dim)).astype(np.float32)


def flat(model):
    return np.concatenate([np.ravel(one) for one in model.values()])


class BaseDefenseMethod:
    """FedML's base class: all hooks are there and empty."""

    def defend_before_aggregation(self, raw_client_grad_list, extra_auxiliary_info=None):
        pass

    def defend_on_aggregation(
        self, raw_client_grad_list, base_aggregation_func=None, extra_auxiliary_info=None
    ):
        pass


class Krum(BaseDefenseMethod):
    """FedML's m-Krum, by plain loops over NumPy models."""

    def __init__(self, f, m):
        self.f, self.m = f, m

    def defend_before_aggregation(self, raw_client_grad_list, extra_auxiliary_info=None):
        vectors = [flat(model) for _, model in raw_client_grad_list]
        scores = []
        for i, one in enumerate(vectors):
            far = sorted(np.sum((one - two) ** 2) for j, two in enumerate(vectors) if j != i)
            scores.append(sum(far[: len(vectors) - self.f - 2]))
        return [raw_client_grad_list[i] for i in np.argsort(scores)[: self.m]]


class Slsgd(BaseDefenseMethod):
    def defend_on_aggregation(
        self, raw_client_grad_list, base_aggregation_func=None, extra_auxiliary_info=None
    ):
        mean = base_aggregation_func(args=self, raw_grad_list=raw_client_grad_list)
        old = extra_auxiliary_info
        return OrderedDict((k, 0.75 * old[k] + 0.25 * mean[k]) for k in mean)


class Clipping(BaseDefenseMethod):
    """As FedML's CClip: what one hook remembers the next one adds."""

    def defend_before_aggregation(self, raw_client_grad_list, extra_auxiliary_info=None):
        self.guess = raw_client_grad_list[0][1]
        return [
            (n, OrderedDict((k, (v - self.guess[k]) * 0.5) for k, v in model.items()))
            for n, model in raw_client_grad_list
        ]

    def defend_after_aggregation(self, global_model):
        return OrderedDict((k, v + self.guess[k]) for k, v in global_model.items())


class Random:
    """Draws from the global generators, as FedML's classes do, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def defend_on_aggregation(self, local_models, auxiliary_info):
        self.calls += 1
        noise = self.calls + np.random.normal() + random.random()
        return {k: v * 0 + noise for k, v in local_models[0][1].items()}


def view_of(updates, params=None):
    clients, dim = updates.shape
    return ServerView(
        params=jnp.zeros(dim) if params is None else params,
        weights=jnp.ones(clients),
        client_ids=jnp.arange(clients),
        valid=jnp.ones(clients, bool),
        round=jnp.array(0),
    )


# --- Rules ----------------------------------------------------------------------------------------


def test_krum_of_fedml_is_ours():
    updates = stack()
    theirs = fedjax_sec.aggregate(updates, wrap(Krum(f=1, m=3)), params=stack(seed=1)[0])
    ours = fedjax_sec.aggregate(updates, "multi_krum", num_byzantine=1, num_selected=3)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6)
    other = fedjax_sec.aggregate(updates, "multi_krum", num_byzantine=1, num_selected=2)
    assert np.abs(theirs - other).max() > 0.1


def test_a_rule_sees_models_by_name_and_returns_one():
    seen = {}

    class Looking:
        def defend_before_aggregation(self, raw_client_grad_list, extra_auxiliary_info=None):
            seen["clients"], seen["global"] = raw_client_grad_list, extra_auxiliary_info
            return raw_client_grad_list

    rng = np.random.default_rng(0)
    clients = [
        {"z": {"w": rng.normal(size=(2, 3)), "b": rng.normal(size=3)}, "a": rng.normal(size=1)}
        for _ in range(3)
    ]
    params = {"z": {"w": np.ones((2, 3)), "b": np.full(3, 2.0)}, "a": np.full(1, 3.0)}
    result = fedjax_sec.aggregate(clients, wrap(Looking()), params=params, weights=[1, 2, 3])
    assert [number for number, _ in seen["clients"]] == [1, 2, 3]
    assert all(type(number) is int for number, _ in seen["clients"])
    for (_, model), client in zip(seen["clients"], clients, strict=True):
        assert isinstance(model, OrderedDict)
        assert list(model) == ["z.w", "z.b", "a"]  # the caller's order, not JAX's
        np.testing.assert_allclose(model["z.w"], client["z"]["w"] + 1, rtol=1e-6)
        np.testing.assert_allclose(model["a"], client["a"] + 3, rtol=1e-6)
    assert list(seen["global"]) == ["z.w", "z.b", "a"] and np.all(seen["global"]["z.b"] == 2)
    wanted = sum(w * client["z"]["w"] for w, client in zip((1, 2, 3), clients, strict=True)) / 6
    np.testing.assert_allclose(result["z"]["w"], wanted, rtol=1e-5)
    assert result["a"].shape == (1,)


def test_vectors_are_models_with_one_array():
    class Looking:
        def defend_on_aggregation(self, local_models, auxiliary_info):
            model = local_models[0][1]
            assert list(model) == ["model"] and model["model"].shape == (5,)
            return {"model": auxiliary_info["model"] + 7}

    assert np.all(fedjax_sec.aggregate(stack(), wrap(Looking()), params=stack()[0]) == 7)


def test_hooks_run_in_order_and_share_the_object():
    updates, old = stack(), stack(seed=1)[0]
    result = fedjax_sec.aggregate(updates, wrap(Slsgd()), params=old)
    np.testing.assert_allclose(result, 0.25 * updates.mean(0), atol=1e-6)
    result = fedjax_sec.aggregate(updates, wrap(Clipping()), params=old)
    np.testing.assert_allclose(result, updates[0] + 0.5 * (updates - updates[0]).mean(0), atol=1e-6)


def test_the_older_hook_stands_for_all():
    class Older:
        def run(self, raw_client_grad_list, base_aggregation_func=None, extra_auxiliary_info=None):
            return base_aggregation_func(self, raw_client_grad_list[:2])

    updates = stack()
    result = fedjax_sec.aggregate(updates, wrap(Older()))
    np.testing.assert_allclose(result, updates[:2].mean(0), atol=1e-6)


def test_the_average_is_by_numbers_of_examples():
    models = [(2, {"w": np.array([1.0, 0.0])}), (6, {"w": np.array([5.0, 4.0])})]
    for call in (lambda: average(None, models), lambda: average(models)):
        np.testing.assert_allclose(call()["w"], [4.0, 3.0])
    with pytest.raises(ConfigError, match="no models"):
        average(None, [])


def test_rows_that_are_not_finite_are_not_given():
    updates = stack()
    updates[2, 1] = np.nan
    with pytest.warns(UserWarning, match="1 of 6 rows hold NaN"):
        result = fedjax_sec.aggregate(updates, wrap(Slsgd()))
    np.testing.assert_allclose(result, 0.25 * np.delete(updates, 2, 0).mean(0), atol=1e-6)


def test_what_was_kept_is_seen_where_models_come_back():
    updates = jnp.asarray(stack())
    built = Defense.build(wrap(Krum(f=1, m=2)))
    kept = built.apply(jax.random.key(0), updates, ((),), view_of(updates)).metrics["kept"]
    scores = [sorted(np.sum((a - b) ** 2) for b in stack())[1:4] for a in stack()]
    chosen = np.argsort([sum(one) for one in scores])[:2]
    assert sorted(np.flatnonzero(kept)) == sorted(chosen) and kept.sum() == 2
    built = Defense.build(wrap(Clipping()))  # models of its own: nobody knows
    kept = built.apply(jax.random.key(0), updates, ((),), view_of(updates)).metrics["kept"]
    assert kept.tolist() == [1.0] * 6


def test_hooks_may_change_what_they_are_given():
    class Rude:
        def defend_before_aggregation(self, raw_client_grad_list, extra_auxiliary_info=None):
            for _, model in raw_client_grad_list:
                for name in model:
                    model[name] *= 0
            extra_auxiliary_info["model"] += 100
            return raw_client_grad_list

    updates, old = stack(), stack(seed=1)[0]
    before = updates.copy()
    np.testing.assert_allclose(
        fedjax_sec.aggregate(updates, wrap(Rude()), params=old), -old, atol=1e-6
    )
    assert np.array_equal(updates, before)


def test_memory_is_fresh_or_kept():
    updates = stack()
    fresh, kept = wrap(Random()), wrap(Random(), memory="kept")
    first = [fedjax_sec.aggregate(updates, fresh, key=3) for _ in range(3)]
    assert np.array_equal(first[0], first[1]) and np.array_equal(first[0], first[2])
    then = [fedjax_sec.aggregate(updates, kept, key=3) for _ in range(3)]
    np.testing.assert_allclose([one[0] - first[0][0] for one in then], [0, 1, 2], atol=1e-5)


def test_an_object_is_wrapped_as_it_is():
    rule = Random()
    rule.calls = 10
    wrapped = wrap(rule)
    early = fedjax_sec.aggregate(stack(), wrapped, key=3)
    rule.calls = 20  # too late
    assert np.array_equal(early, fedjax_sec.aggregate(stack(), wrapped, key=3))
    late = fedjax_sec.aggregate(stack(), wrap(rule), key=3)
    np.testing.assert_allclose(late - early, 10, atol=1e-5)


def test_the_key_seeds_the_global_generators_and_they_are_put_back():
    updates, rule = stack(), wrap(Random())
    np.random.seed(1)
    random.seed(1)
    one = fedjax_sec.aggregate(updates, rule, key=5)
    after = np.random.random(), random.random()
    np.random.seed(1)
    random.seed(1)
    assert after == (np.random.random(), random.random())
    assert np.array_equal(one, fedjax_sec.aggregate(updates, rule, key=5))
    assert not np.array_equal(one, fedjax_sec.aggregate(updates, rule, key=6))


def test_compiled_and_batched_it_is_the_loop():
    rule, batches = wrap(Random()), jnp.stack([jnp.asarray(stack(seed=s)) for s in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)

    def apply(key, updates):
        return rule.apply(key, updates, (), view_of(updates))[0]

    with jax.debug_key_reuse(False):  # the same keys again, on purpose
        _compare_with_loop(apply, keys, batches)


def _compare_with_loop(apply, keys, batches):
    loop = jnp.stack([apply(key, one) for key, one in zip(keys, batches, strict=True)])
    assert len({float(one) for one in loop[:, 0]}) == 3
    np.testing.assert_array_equal(jax.jit(jax.vmap(apply))(keys, batches), loop)
    np.testing.assert_array_equal(jax.vmap(apply, (0, None))(keys, batches[0]), loop)
    remembering = wrap(Random(), memory="kept")

    def kept(key, updates):
        return remembering.apply(key, updates, (), view_of(updates))[0]

    compiled = jax.jit(kept)
    values = [float(compiled(keys[0], batches[0])[0]) for _ in range(2)]
    np.testing.assert_allclose(values[1] - values[0], 1, atol=1e-5)
    with pytest.raises(ValueError, match="ordered"):
        jax.vmap(kept)(keys, batches)


# --- Attacks --------------------------------------------------------------------------------------


class Zero:
    """The paper's signature."""

    def poison_model(self, local_models, auxiliary_info):
        return [(n, {k: 0 * v for k, v in model.items()}) for n, model in local_models]


class Replacement:
    """As FedML's model replacement: the code's name and signature."""

    def attack_model(self, raw_client_grad_list, extra_auxiliary_info=None):
        new, old = [], extra_auxiliary_info
        for n, model in raw_client_grad_list:
            new.append((n, {k: 4 * (model[k] - old[k]) + old[k] for k in model}))
        return new


MALICIOUS = np.array([False, True, False, False, True, False])


def test_attacks_change_malicious_clients_only():
    updates, old = stack(), stack(seed=1)[0]
    sent = fedjax_sec.attack(updates, wrap(Zero()), malicious=MALICIOUS, params=old)
    np.testing.assert_allclose(sent[MALICIOUS], np.tile(-old, (2, 1)), atol=1e-6)
    assert np.array_equal(sent[~MALICIOUS], updates[~MALICIOUS])
    sent = fedjax_sec.attack(updates, wrap(Replacement()), malicious=MALICIOUS, params=old)
    np.testing.assert_allclose(sent[MALICIOUS], 4 * updates[MALICIOUS], atol=1e-5)


@pytest.mark.parametrize("knowledge", ["corrupted", "omniscient"])
def test_an_attack_is_given_what_the_adversary_sees(knowledge):
    seen = []

    class Looking(Zero):
        def poison_model(self, local_models, auxiliary_info):
            seen.append(len(local_models))
            return super().poison_model(local_models, auxiliary_info)

    given = {"malicious": MALICIOUS, "knowledge": knowledge, "params": stack(seed=1)[0]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sent = fedjax_sec.attack(stack(), wrap(Looking()), **given)
    said = [str(one.message) for one in caught]
    if knowledge == "corrupted":
        assert seen == [2] and not said
    else:
        assert seen == [6] and "changed the models of clients 0, 2, 3, 5" in said[0]
    assert np.array_equal(sent[~MALICIOUS], stack()[~MALICIOUS])


def test_attacks_on_pytrees_batch_and_compile():
    clients = [{"w": row[:4].reshape(2, 2), "b": row[4:]} for row in stack()]
    sent = fedjax_sec.attack(clients, wrap(Replacement()), malicious=MALICIOUS)
    np.testing.assert_allclose(sent[1]["w"], 4 * clients[1]["w"], atol=1e-5)
    assert sent[0] is clients[0]
    attack, keys = wrap(Replacement()), jax.random.split(jax.random.key(0), 2)
    batches = jnp.stack([jnp.asarray(stack(seed=s)) for s in range(2)])

    def apply(key, updates):
        mask = jnp.asarray(MALICIOUS)
        view = AttackerView(mask, mask, jnp.zeros(5), jnp.arange(6), jnp.array(0))
        return attack.apply(key, updates, (), view)[0]

    loop = jnp.stack([apply(key, one) for key, one in zip(keys, batches, strict=True)])
    with jax.debug_key_reuse(False):
        np.testing.assert_array_equal(jax.jit(jax.vmap(apply))(keys, batches), loop)
    np.testing.assert_allclose(loop[1][MALICIOUS], 4 * batches[1][MALICIOUS], atol=1e-5)


def test_no_attack_adapts_to_a_wrapped_rule():
    with pytest.raises(ConfigError, match="gradients through the rule"):
        fedjax_sec.attack(
            stack(),
            "gradient_adaptive",
            malicious=MALICIOUS,
            knowledge="omniscient",
            defense=wrap(Slsgd()),
        )


# --- What is refused ------------------------------------------------------------------------------


class Nothing(BaseDefenseMethod):
    def defend_befor_aggregation(self, raw_client_grad_list):
        return raw_client_grad_list


class Both(Zero, Krum):
    pass


class Poisoner:
    def poison_data(self, dataset):
        return dataset


class RunAndMore(Krum):
    def run(self, raw_client_grad_list, base_aggregation_func=None, extra_auxiliary_info=None):
        return raw_client_grad_list


@pytest.mark.parametrize(
    ("instance", "said"),
    [
        (Krum, r"got the class Krum; write wrap\(Krum\(...\)\)"),
        (Nothing(), "none of FedML's hooks .* Did you mean 'defend_before_aggregation'"),
        (Both(1, 1), "hooks of a defence, .* and of an attack, poison_model"),
        (Poisoner(), "Poisoner.poison_data poisons data"),
        (RunAndMore(1, 1), "has `run` beside defend_before_aggregation"),
        (3, "int has none of FedML's hooks"),
    ],
)
def test_objects_without_proper_hooks_are_refused(instance, said):
    with pytest.raises(ConfigError, match=said):
        wrap(instance)


def test_memory_and_copies_are_checked():
    with pytest.raises(ConfigError, match="memory must be one of .* Did you mean 'kept'"):
        wrap(Krum(1, 1), memory="keep")
    rule = Random()
    rule.open = (i for i in range(3))
    with pytest.raises(ConfigError, match="cannot be copied .*memory='kept'"):
        wrap(rule)
    assert fedjax_sec.aggregate(stack(), wrap(rule, memory="kept")).shape == (5,)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda models: None, "returns None; it must return what it made"),
        (lambda models: 3.0, "must return a list of"),
        (lambda models: [models[0][1]], "must return pairs .* at position 0"),
        (lambda models: [(1, {"w": np.ones(5)})], "model 0 of .* lacks 'model'"),
        (lambda models: [(1, {"model": np.ones(4)})], "must hold numbers of shape"),
        (lambda models: [(1, {"model": np.array(["a"] * 5)})], "must hold numbers of shape"),
        (lambda models: [], "left no model to average"),
        (lambda models: 1 / 0, r"fails \(ZeroDivisionError"),
        (lambda models: [(1, {"model": np.full(5, np.nan)})], "model of .* holds NaN or infinity"),
        (lambda models: [("x", models[0][1])], "numbers of examples >= 0, got 'x' at position 0"),
        (lambda models: [(-1, models[0][1])], "numbers of examples >= 0, got -1 at position 0"),
        (lambda models: [(np.nan, models[0][1])], "numbers of examples >= 0, got nan"),
    ],
)
def test_what_hooks_return_is_checked(output, said):
    class Wrong:
        def defend_before_aggregation(self, raw_client_grad_list, extra_auxiliary_info=None):
            return output(raw_client_grad_list)

    with pytest.raises(ConfigError, match=said):
        fedjax_sec.aggregate(stack(), wrap(Wrong()))


def test_either_side_refuses_the_other():
    with pytest.raises(ConfigError, match="defense must be a defense, and 'fedml_attack' is an"):
        fedjax_sec.aggregate(stack(), wrap(Zero()))
    with pytest.raises(ConfigError, match="attack must be an attack, and 'fedml_defense' is a"):
        fedjax_sec.attack(stack(), wrap(Krum(1, 1)), malicious=MALICIOUS)


def test_an_attack_returns_a_model_for_each_client():
    class Short(Zero):
        def poison_model(self, local_models, auxiliary_info):
            return super().poison_model(local_models, auxiliary_info)[1:]

    with pytest.raises(ConfigError, match="a model for each of the 2 clients .* got 1"):
        fedjax_sec.attack(stack(), wrap(Short()), malicious=MALICIOUS)


def test_experiments_refuse_wrapped_objects():
    for key, one in (("defense", Krum(1, 1)), ("attack", Zero())):
        with pytest.raises(ConfigError, match="wrapped for fedjax_sec.aggregate"):
            fedjax_sec.run({"rounds": 1, "threat": {"num_malicious": 1}}, **{key: wrap(one)})


def test_forms():
    form = form_of(OrderedDict(b=np.ones((2, 2)), a=[np.ones(1), np.ones(())]))
    assert form.names == ("b", "a.0", "a.1") and form.order == (0, 1, 2)
    vector = np.arange(6.0)
    assert np.array_equal(form.join(form.cut(vector), "it"), vector)
