"""Where a model's tensors lie in the vector, in the views of server and adversary."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_traces, small
from jax.flatten_util import ravel_pytree

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.core import (
    Model,
    ServerView,
    Space,
    Stage,
    UpdateAttack,
    last_layer,
    make_space,
    registry,
    static,
    tensors,
    tree_space,
)
from fedjax_sec.stacks import as_stack


def names_of(space):
    return None if space is None else list(space.slices)


class Probe(Stage):
    """The mean of the last layer's updates, zero elsewhere; notes the spaces that it was given."""

    stage = "aggregate"
    needs = frozenset({"space"})
    seen: ClassVar[list] = []

    def init(self, num_clients, dim, space):
        place = last_layer(space, dim)
        self.seen.append(("init", num_clients, dim, names_of(space)))
        return jnp.zeros(place.stop - place.start)

    def apply(self, key, updates, state, view):
        self.seen.append(("apply", updates.shape, names_of(view.space)))
        place = last_layer(view.space, updates.shape[1])
        mean = jnp.where(view.valid[:, None], updates, 0.0)[:, place].mean(axis=0)
        aggregate = jnp.zeros(updates.shape[1]).at[place].set(mean)
        return aggregate, state + mean, {"kept": view.valid.astype(updates.dtype)}


class Spy(UpdateAttack):
    """Doubles the last layer of the malicious clients' updates, or sends the global model."""

    seen: ClassVar[list] = []
    sends_model: bool = static(False, "Whether it sends the global model.")

    def apply(self, key, updates, state, view):
        self.seen.append(names_of(view.space))
        if self.sends_model:
            return jnp.broadcast_to(view.params[None], updates.shape), state, {}
        place = last_layer(view.space, updates.shape[1])
        return updates.at[:, place].multiply(2.0), state, {}


@pytest.fixture
def registered():
    """The probe as a defence, the spy as an attack; nothing else is registered for longer."""
    registry.defenses.names(), registry.attacks.names()
    before = [dict(known._entries) for known in (registry.defenses, registry.attacks)]
    Probe.seen.clear(), Spy.seen.clear()
    probe = registry.defenses.register("probe")(type("Probe", (Probe,), {"__doc__": "A probe."}))
    fields = {"__doc__": "A spy.", "__annotations__": Spy.__annotations__}
    fields["sends_model"] = Spy.sends_model
    registry.attacks.register("spy")(type("Spy", (Spy,), fields))
    yield probe
    registry.defenses._entries, registry.attacks._entries = before


def clients(scale=(1.0, 2.0, 9.0)):
    """Two layers and a statistic; in the order of their names the last one is a bias."""
    return [
        {
            "batch_stats": np.full(2, 7 * s),
            "body": {"kernel": np.full((2, 2), s), "bias": np.full(2, s)},
            "head": {"kernel": np.full((2, 3), 10 * s), "bias": np.full(3, s)},
        }
        for s in scale
    ]


NAMES = ["batch_stats", "body/bias", "body/kernel", "head/bias", "head/kernel"]


# --- The space ----------------------------------------------------------------------------------


def test_a_space_is_structure_not_a_leaf():
    space = tree_space({"a": jnp.ones((2, 2)), "b": jnp.ones(3)})
    assert jax.tree.leaves(space) == []
    view = ServerView(
        jnp.zeros(7), jnp.arange(4.0), jnp.arange(4), jnp.ones(4, bool), jnp.array(0), space=space
    )
    moved = jax.jit(lambda view: view._replace(weights=view.weights * view.space.dim))(view)
    assert moved.space is space and moved.weights.tolist() == [0, 7, 14, 21]
    stacked = view._replace(weights=jnp.arange(8.0).reshape(2, 4))
    axes = jax.tree.map(lambda _: None, view)._replace(weights=0)
    read = jax.vmap(lambda view: view.weights.sum() + last_layer(view.space, 7).stop, (axes,))
    assert read(stacked).tolist() == [6 + 4, 22 + 4]
    assert jax.eval_shape(lambda view: view, view).space is space


def test_tensors_cover_the_vector_and_what_lies_behind_the_model():
    space = tree_space(clients()[0])
    places = tensors(space, space.dim)
    assert [p.start for p in places] == [0, 2, 4, 8, 11] and places[-1].stop == space.dim == 17
    assert tensors(space, 20) == [*places, slice(17, 20)]  # control variates, say
    assert tensors(None, 5) == [slice(0, 5)] and last_layer(None, 5) == slice(0, 5)
    assert last_layer(space, 17) == slice(11, 17)
    assert space.observed == slice(0, 2) and space.trained == slice(2, 17)


def test_joining_what_was_split():
    tree = clients()[1]
    space = tree_space(tree)
    vector, frozen = space.split(tree)
    assert vector.shape == (17,) and frozen == ()
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(space.join(vector)), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(vector[space.slices["head/kernel"]], np.full(6, 20.0))


class Deep(nn.Module):
    """Eleven numbered layers, and one whose name comes first."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for _ in range(11):
            x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(10, name="a_last")(x)


class Numbered(nn.Module):
    """`Dense_10` is applied last, and `Dense_9` is the last of the sorted names."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for _ in range(11):
            x = nn.Dense(10)(x)
        return x


@pytest.mark.parametrize(
    ("spec", "shape", "last"),
    [
        ("mlp", (8, 8, 1), "params/output/kernel"),
        ("logistic_regression", (20,), "params/output/kernel"),
        ("char_lstm", (20,), "params/output/kernel"),
        ({"name": "resnet", "depth": 8}, (32, 32, 3), "params/output/kernel"),
        ({"name": "lora", "rank": 2}, (8, 8, 1), "lora/output/b"),
        ({"name": "module", "module": Deep()}, (8, 8, 1), "params/a_last/kernel"),
        ({"name": "module", "module": Numbered()}, (8, 8, 1), "params/Dense_10/kernel"),
    ],
    ids=str,
)
def test_the_last_layer_of_a_network_is_the_last_that_is_applied(spec, shape, last):
    space = make_space(registry.models.build(spec).make(shape, 10))
    assert space.last == last and space.slices[last] == last_layer(space, space.dim)
    size = space.slices[last].stop - space.slices[last].start
    assert size % 10 == 0 and 0 < size < space.dim


def test_without_a_kernel_it_is_the_last_tensor_but_one():
    """FedML's `list(state_dict.items())[-2]`."""
    init = lambda key: {"params": {"a": jnp.zeros(3), "b": jnp.zeros(4), "c": jnp.zeros(5)}}  # noqa: E731
    space = make_space(Model(init, None))
    assert space.last == "params/b" and last_layer(space, 12) == slice(3, 7)
    assert tree_space([np.ones(4)]).last == "0"
    frozen = make_space(Model(init, None, trainable=lambda name: name == "params/a"))
    assert frozen.last == "params/a" and last_layer(frozen, 3) == slice(0, 3)


# --- Pytrees and vectors ------------------------------------------------------------------------


def test_aggregate_gives_rules_the_leaves_of_a_pytree(registered):
    out = fedjax_sec.aggregate(clients(), "probe")
    assert Probe.seen == [("init", 3, 17, NAMES), ("apply", (3, 17), NAMES)]
    np.testing.assert_allclose(out["head"]["kernel"], np.full((2, 3), 40.0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves([out["body"], out["head"]["bias"]]))


def test_a_plain_stack_is_one_layer(registered):
    out = fedjax_sec.aggregate([[1.0, 3.0], [3.0, 5.0]], "probe")
    assert Probe.seen == [("init", 2, 2, None), ("apply", (2, 2), None)]
    assert out.tolist() == [2.0, 4.0]


def test_equal_trees_compile_once(registered):
    for scale in ((1.0, 2.0), (3.0, 5.0), (4.0, 4.0)):
        fedjax_sec.aggregate(clients(scale), "probe")
    assert len(Probe.seen) == 2
    assert as_stack(clients()).space is as_stack(clients((5.0, 6.0))).space
    assert as_stack([[np.ones((2, 2))], [np.ones((2, 2))]]).space.last == "0"


def test_mappings_keep_the_order_of_their_layers():
    """JAX sorts the names; the caller's mapping tells which layer is last."""
    tree = {"z_first": np.ones((2, 2)), "bias": np.ones(2), "a_last": {"w": np.ones((2, 4))}}
    stack = as_stack([tree, tree])
    assert list(stack.space.slices) == ["a_last/w", "bias", "z_first"]
    assert stack.space.last == "a_last/w"
    listed = [[np.ones((2, 3)), np.ones(3), np.ones((3, 4)), np.ones(4)]] * 2
    assert last_layer(as_stack(listed).space, 25) == slice(9, 21)


class Unhashable(dict):
    """A node of the caller's own, whose description cannot be hashed."""


jax.tree_util.register_pytree_node(
    Unhashable,
    lambda node: (list(node.values()), Names(node)),
    lambda names, values: Unhashable(zip(names, values, strict=True)),
)


class Names(list):
    """Equal as lists are, and without a hash."""

    __hash__ = None


def test_nodes_that_cannot_be_hashed():
    updates = [Unhashable(a=np.full(2, s), b=np.full((2, 2), s)) for s in (1.0, 3.0, 4.0)]
    out = fedjax_sec.aggregate(updates, {"name": "three_sigma"})
    assert out["a"].shape == (2,) and np.isfinite(out["b"]).all()


def test_rules_inside_others_get_the_space(registered):
    rule = {"name": "bulyan", "num_byzantine": 0, "selection": "probe"}
    fedjax_sec.aggregate(clients((1.0, 2.0, 3.0, 4.0)), rule)
    assert ("init", 4, 17, NAMES) in Probe.seen
    assert all(name == NAMES for kind, *_, name in Probe.seen)


def test_merged_rows_have_the_same_space(registered):
    rule = [{"name": "bucketing", "size": 2}, "probe"]
    out = fedjax_sec.aggregate(clients((2.0, 2.0, 2.0, 2.0)), rule)
    assert Probe.seen == [("init", 4, 17, NAMES), ("apply", (2, 17), NAMES)]
    np.testing.assert_allclose(out["head"]["kernel"], np.full((2, 3), 20.0))


def test_attacks_see_the_leaves(registered):
    sent = fedjax_sec.attack(clients(), "spy", malicious=[True, False, False])
    assert Spy.seen == [NAMES]
    np.testing.assert_allclose(sent[0]["head"]["kernel"], np.full((2, 3), 20.0))
    np.testing.assert_allclose(sent[0]["body"]["kernel"], np.full((2, 2), 1.0))
    assert sent[1]["head"]["kernel"] is not None and np.all(sent[1]["head"]["kernel"] == 20.0)
    out = fedjax_sec.attack([[1.0, 2.0]] * 3, "spy", malicious=[True, False, False])
    assert Spy.seen[-1] is None and out[0].tolist() == [2.0, 4.0]


def test_an_attack_knows_the_rule_with_its_layers(registered):
    for knowledge in ("corrupted", "omniscient"):
        Probe.seen.clear()
        fedjax_sec.attack(
            clients((1.0, 2.0, 9.0, 4.0)),
            {"name": "gradient_adaptive", "steps": 1},
            malicious=[True, False, True, False],
            knowledge=knowledge,
            defense="probe",
        )
        assert {entry[-1] == NAMES for entry in Probe.seen} == {True}


# --- Experiments --------------------------------------------------------------------------------

LAYERS = [
    f"params/{layer}/{leaf}" for layer in ("hidden_0", "output") for leaf in ("bias", "kernel")
]


def test_a_round_gives_rules_and_attacks_the_model_s_layers(registered):
    spec = small(defense="probe", attack="spy", threat={"num_malicious": 1})
    one, two = (ravel_pytree(fedjax_sec.run(spec, rounds=rounds).params)[0] for rounds in (1, 2))
    assert {entry[-1] == LAYERS for entry in Probe.seen} == {True}
    assert ("init", 5, 460, LAYERS) in Probe.seen
    assert set(map(tuple, Spy.seen)) == {tuple(LAYERS)}
    assert (one != two)[400:].any()
    assert not (one != two)[:400].any()  # 64 * 6 weights, 6 and 10 biases lie before


@pytest.mark.parametrize(
    "rule",
    [
        "three_sigma",
        "cross_round",
        {"name": "geometric_median", "convention": "fedsecurity"},
    ],
    ids=str,
)
def test_vectors_longer_than_the_model(rule):
    """SCAFFOLD's control variates may travel in the vector, behind the model."""
    algorithm = {"name": "scaffold", "joint": True}
    result = fedjax_sec.run(small(algorithm=algorithm, defense=rule, rounds=2))
    assert np.isfinite(result.metrics["loss"]).all()


# --- params= ------------------------------------------------------------------------------------

AGGREGATORS = [
    name
    for name in registry.defenses.names()
    if registry.defenses.get(name).stage == "aggregate" and registry.defenses.get(name).stands_alone
]
ATTACKS = [
    name
    for name in registry.attacks.names()
    if registry.attacks.get(name).stage == "update"
    and "task" not in registry.attacks.build(name).needs
]
MODELS = {"three_sigma", "cross_round", "zeno"}  # read the global model


def options(name):
    cls = registry.defenses.get(name)
    fields = {f for f in cls.__dataclass_fields__} & {"num_byzantine", "num_removed"}
    return {"name": name} | dict.fromkeys(fields, 1)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_rule_accepts_the_global_model(name):
    rng = np.random.default_rng(0)
    updates, params = rng.normal(size=(9, 4)), rng.normal(size=4)
    known = {}
    if "root" in registry.defenses.build(name).needs:
        known["server_update"] = rng.normal(size=4)
        if name == "zeno":
            known = {"server_loss": lambda w: jnp.sum((w - 3.0) ** 2)}
    plain = fedjax_sec.aggregate(updates, options(name), **known)
    given = fedjax_sec.aggregate(updates, options(name), params=params, **known)
    assert given.shape == (4,) and np.isfinite(given).all()
    if name not in MODELS:
        np.testing.assert_allclose(given, plain, rtol=1e-6)
    trees = [[row[:3].reshape(3, 1), row[3:]] for row in updates]
    tree = [params[:3].reshape(3, 1), params[3:]]
    if name != "zeno":
        out = fedjax_sec.aggregate(
            trees,
            options(name),
            params=tree,
            **({"server_update": [np.ones((3, 1)), np.ones(1)]} if known else {}),
        )
        assert [leaf.shape for leaf in out] == [(3, 1), (1,)]


def test_rules_on_models_read_it():
    """The memory of a round lies where the models do."""
    updates = np.array([[1.0], [1.1], [0.9], [1.0], [9.0]])
    part = registry.defenses.build("three_sigma")
    state = part.init(5, 1, None)
    ends = []
    for model in (0.0, 100.0):
        view = ServerView(
            jnp.full(1, model), jnp.ones(5), jnp.arange(5), jnp.ones(5, bool), jnp.array(0)
        )
        ends.append(jax.jit(part.apply)(None, jnp.asarray(updates), state, view)[1].reference)
    np.testing.assert_allclose(np.subtract(*ends[::-1]), [100.0], rtol=1e-6)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_accepts_the_global_model(name):
    rng = np.random.default_rng(1)
    updates, params = rng.normal(size=(12, 4)).astype(np.float32), rng.normal(size=4)
    malicious = np.arange(12) < 4
    known = {}
    needs = {need for _, one, _ in core.walk(registry.attacks.build(name)) for need in one.needs}
    if "rule" in needs:
        known["defense"] = "median"
    if "root" in needs:
        known |= {"server_update": rng.normal(size=4), "knowledge": "omniscient"}
    try:
        sent = fedjax_sec.attack(updates, name, malicious=malicious, params=params, **known)
    except fedjax_sec.ConfigError as error:
        assert "params" not in str(error)
        pytest.skip(f"{name} is not for a stack alone")
    assert sent.shape == (12, 4) and np.isfinite(sent).all()
    np.testing.assert_array_equal(sent[~malicious], updates[~malicious])


def test_an_attack_gets_the_global_model(registered):
    spy, bad = {"name": "spy", "sends_model": True}, [True, False, False]
    sent = fedjax_sec.attack(np.ones((3, 2)), spy, malicious=bad, params=[5.0, 6.0])
    assert sent.tolist() == [[5, 6], [1, 1], [1, 1]]
    sent = fedjax_sec.attack(clients(), spy, malicious=[True, False, False], params=clients()[2])
    np.testing.assert_array_equal(sent[0]["head"]["kernel"], clients()[2]["head"]["kernel"])


def test_a_model_of_another_form_is_refused():
    for call in (
        lambda: fedjax_sec.aggregate(np.ones((4, 3)), "three_sigma", params=np.ones(2)),
        lambda: fedjax_sec.attack(
            np.ones((4, 3)), "sign_flip", malicious=[True] * 4, params=np.ones(2)
        ),
    ):
        with pytest.raises(fedjax_sec.ConfigError, match=r"params must be a vector \[D\] = \[3\]"):
            call()


def test_counting_traces_of_a_rule_with_a_space(registered):
    traced, traces = count_traces(Probe.apply)
    cls = registry.defenses.get("probe")
    cls.apply = traced
    for seed in range(3):
        fedjax_sec.aggregate(clients((1.0, 2.0, float(seed))), "probe", key=seed)
    assert len(traces) == 1 and isinstance(as_stack(clients()).space, Space)
