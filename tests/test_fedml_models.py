"""FedML's networks against NumPy: residual networks, CNN with dropout, LeNets and LSTMs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, count_traces, small
from programs import program_of, task_on

from fedjax_sec.core import ConfigError, choices, registry
from fedjax_sec.core.space import make_space
from fedjax_sec.models import _residual
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.tuning import Choice, candidates
from fedjax_sec.testing import world

# --- By hand, in float64 ----------------------------------------------------------------------


def convolved(x, kernel, stride=1, padding=0, bias=0.0):
    """The cross-correlation [B, H, W, C] * [h, w, C, F], output by output."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    high, wide, _, features = kernel.shape
    rows = (x.shape[1] - high) // stride + 1
    columns = (x.shape[2] - wide) // stride + 1
    out = np.zeros((len(x), rows, columns, features))
    for r in range(rows):
        for s in range(columns):
            window = x[:, r * stride : r * stride + high, s * stride : s * stride + wide]
            out[:, r, s] = np.einsum("bijc,ijcf->bf", window, kernel)
    return out + bias


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pooled(x, size=2):
    rows, columns = x.shape[1] // size, x.shape[2] // size
    x = x[:, : rows * size, : columns * size]
    return x.reshape(len(x), rows, size, columns, size, -1).max(axis=(2, 4))


class NumpyResNet:
    """FedML's residual network, as its class `ResNet` describes it."""

    def __init__(self, variables, blocks, block, train):
        as_double = lambda leaf: np.asarray(leaf, np.float64)  # noqa: E731
        self.params = jax.tree.map(as_double, variables["params"])
        self.statistics = jax.tree.map(as_double, variables.get("batch_stats", {}))
        self.blocks, self.block, self.train = blocks, block, train
        self.moved = {}

    def layer(self, x, name, stride=1):
        """Convolution and batch normalisation; in training running statistics move by a tenth."""
        kernel = self.params[f"conv_{name}"]["kernel"]
        x = convolved(x, kernel, stride, (kernel.shape[0] - 1) // 2)
        held = self.statistics[f"norm_{name}"]
        mean, var = held["mean"], held["var"]
        if self.train:
            mean, var, n = x.mean((0, 1, 2)), x.var((0, 1, 2)), x[..., 0].size
            self.moved[f"norm_{name}"] = {
                "mean": 0.9 * held["mean"] + 0.1 * mean,
                "var": 0.9 * held["var"] + 0.1 * var * n / (n - 1),
            }
        norm = self.params[f"norm_{name}"]
        return (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]

    def __call__(self, x):
        x = relu(self.layer(np.asarray(x, np.float64), "0"))
        for stage in range(3):
            for number in range(self.blocks):
                name, stride = f"{stage}{number}", 2 if stage and not number else 1
                if self.block == "basic":
                    y = relu(self.layer(x, name + "a", stride))
                    y = self.layer(y, name + "b")
                else:
                    y = relu(self.layer(x, name + "a"))
                    y = relu(self.layer(y, name + "b", stride))
                    y = self.layer(y, name + "c")
                if f"conv_{name}s" in self.params:
                    x = self.layer(x, name + "s", stride)
                x = relu(x + y)
        output = self.params["output"]
        return x.mean((1, 2)) @ output["kernel"] + output["bias"]


def stirred(variables, seed=7):
    """The variables with scales, biases and statistics that are not ones and zeros."""
    rng = np.random.default_rng(seed)

    def stir(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return leaf
        noise = rng.normal(0.0, 0.2, leaf.shape).astype(np.float32)
        return jnp.abs(leaf + noise) + 0.1 if name in ("scale", "var") else leaf + noise

    return jax.tree_util.tree_map_with_path(stir, variables)


def build(classes=4, shape=(8, 8, 3), **fields):
    model = registry.models.build({"convolution": "patches"} | fields).make(shape, classes)
    return model, stirred(jax.jit(model.init)(jax.random.key(0)))


# --- Residual networks ----------------------------------------------------------------------------

NETWORKS = [(8, "basic", 1), (11, "bottleneck", 1), (32, "basic", 5), (38, "bottleneck", 4)]


@pytest.mark.parametrize(("depth", "block", "blocks"), NETWORKS)
@pytest.mark.parametrize("train", [False, True])
def test_fedml_resnet_is_what_numpy_computes(depth, block, blocks, train):
    """Deeper ones run as loops over their equal blocks; statistics are each block's own."""
    model, variables = build(name="fedml_resnet", depth=depth, block=block)
    x = np.random.default_rng(1).random((3, 8, 8, 3)).astype(np.float32)
    numpy = NumpyResNet(variables, blocks, block, train)
    expected = numpy(x)
    if not train:
        np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-3, atol=1e-3)
        return
    outputs, moved = jax.jit(lambda v, x: model.observe(v, x, None, None))(variables, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=2e-3)
    assert numpy.moved.keys() == moved["batch_stats"].keys()
    close(dict(moved["batch_stats"]), numpy.moved, rtol=1e-3, atol=1e-3)


def test_shortcuts_are_where_the_shape_changes():
    for block, depth, stages in (("basic", 14, "12"), ("bottleneck", 20, "012")):
        _, variables = build(name="fedml_resnet", depth=depth, block=block)
        names = {name for name in variables["params"] if name.endswith("s")}
        assert names == {f"{part}_{s}0s" for s in stages for part in ("conv", "norm")}


def test_padding_moves_no_statistics():
    """Examples that do not count change neither the others' outputs nor the statistics."""
    model, variables = build(name="fedml_resnet", depth=8)
    x = np.random.default_rng(1).random((3, 8, 8, 3)).astype(np.float32)
    padded = np.concatenate([x, 9 * x[:2]])
    mask = jnp.arange(5) < 3
    observe = jax.jit(model.observe, static_argnums=3)
    outputs, moved = observe(variables, padded, mask, None)
    expected, held = observe(variables, x, jnp.ones(3, bool), None)
    np.testing.assert_allclose(outputs[:3], expected, rtol=1e-4, atol=1e-4)
    close(dict(moved), dict(held), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "fedml_resnet"])
def test_a_loop_over_equal_blocks_computes_what_is_written_out(name, monkeypatch):
    """Logits, statistics and gradients; the variables are the same, whichever way."""
    x, results = jax.random.uniform(jax.random.key(2), (3, 8, 8, 3)), []
    for looped in (2, 100):
        monkeypatch.setattr(_residual, "_LOOPED", looped)
        model, variables = build(name=name, depth=14)
        space = make_space(model)
        vector = space.split(variables)[0]

        def loss(vector, model=model, space=space):
            outputs, moved = model.observe(space.join(vector), x, None, None)
            return jnp.sum(outputs**2), space.split(moved)[0][space.observed]

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        text = str(jax.make_jaxpr(run)(vector))
        assert ("scan" in text) == (looped == 2)
        results.append((list(space.slices), vector, run(vector)))
    (names, vector, one), (other_names, other_vector, other) = results
    assert names == other_names
    np.testing.assert_array_equal(vector, other_vector)
    close(one, other, rtol=1e-3, atol=1e-3)


def test_kaiming_fan_out_and_pytorchs_last_layer():
    model = registry.models.build("fedml_resnet").make((32, 32, 3), 10)
    variables = jax.jit(model.init)(jax.random.key(3))
    for name, held in variables["params"].items():
        if name.startswith("conv"):
            high, wide, _, features = held["kernel"].shape
            wanted = np.sqrt(2 / (high * wide * features))
            # Normal, not cut off: the standard error of the deviation is wanted / sqrt(2 n).
            error = wanted / np.sqrt(2 * held["kernel"].size)
            assert abs(held["kernel"].std() - wanted) < 4 * error, name
            assert np.abs(held["kernel"]).max() > 2.2 * wanted or held["kernel"].size < 500
        elif name.startswith("norm"):
            assert np.all(held["scale"] == 1) and np.all(held["bias"] == 0)
    for leaf in variables["params"]["output"].values():
        assert np.abs(leaf).max() <= 1 / 8 and np.abs(leaf).max() > 0.8 / 8
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) == 1568


def test_what_cannot_be_built_is_refused():
    for spec, message in (
        ({"depth": 18}, r"6 n \+ 2 with 'basic' blocks, got 18; nearest: 14 and 20"),
        ({"depth": 8, "block": "bottleneck"}, r"9 n \+ 2 with .*, got 8; nearest: 11 and 20"),
        ({}, "fedml_resnet needs images of at least 4 x 4"),
    ):
        shape = (8, 8, 3) if spec else (3, 8, 3)
        with pytest.raises(ConfigError, match=message):
            registry.models.build({"name": "fedml_resnet"} | spec).make(shape, 4)


# --- How deep networks are compiled ---------------------------------------------------------------


@pytest.mark.parametrize("steps", [{"steps": 1}, {"steps": 3}, {"steps": 12}, {"epochs": 2}])
def test_a_deep_networks_step_is_in_the_program_once(steps):
    """The same batches and updates as where the first step stands before the loop."""
    place, results = world("pixels"), {}
    client = registry.clients.build({"name": "sgd", "batch_size": 4, **steps})
    for inside in (False, True):
        outputs, traces = count_traces(place.task.outputs)
        task = place.task._replace(outputs=outputs, first_step_apart=not inside)

        def train(count, task=task):
            data = place.local_data(count)
            return client.apply(jax.random.key(1), place.params(), (), data, task)

        run = jax.jit(lambda count, train=train: train(count)[:3])
        results[inside] = [run(count) for count in (7, 4, 0)]
        once = inside or steps in ({"steps": 1}, {"epochs": 2}, {"steps": 12})
        assert len(traces) == (1 if once else 2)
    close(results[True], results[False], rtol=1e-5, atol=1e-6)
    assert np.abs(results[True][0][0]).max() > 1e-4


@pytest.mark.parametrize(
    ("clients", "model", "apart"),
    [
        ("vmap", {"name": "mlp", "hidden": [6]}, True),
        ("map", {"name": "mlp", "hidden": [6]}, False),
        ("vmap", {"name": "resnet", "depth": 8}, False),
    ],
)
def test_first_steps_stand_apart_where_they_share_the_servers_weights(clients, model, apart):
    """Side by side they are one product; one after another they are only a second copy."""
    program = program_of(from_mapping(small(model=model, execution={"clients": clients})))
    assert task_on(program).first_step_apart == apart


def test_deep_networks_say_so_and_have_a_short_form():
    for spec, depth in (
        ({"name": "resnet", "depth": 20}, 8),
        ({"name": "fedml_resnet", "depth": 56}, 8),
        ({"name": "fedml_resnet", "depth": 56, "block": "bottleneck"}, 11),
    ):
        model = registry.models.build(spec)
        assert model.make((8, 8, 3), 4).deep
        assert model.shortened() == dataclasses.replace(model, depth=depth)
        model.shortened().make((8, 8, 3), 4)
    mlp = registry.models.build("mlp")
    assert mlp.shortened() is mlp and not mlp.make((8, 8, 3), 4).deep


def lowerings_of(name):
    return [one for one in choices(registry.models.build(name), "convolution") if one != "auto"]


def test_of_a_deep_network_only_convolutions_are_compared_on_a_cpu():
    lowerings = lowerings_of("fedml_resnet")
    deep = candidates("auto", None, "auto", 51, lowerings, True)
    assert deep == [Choice("map", None, one) for one in ("chwn", "patches", "rows")]
    assert candidates("vmap", None, "auto", 51, lowerings, True)[0].clients == "vmap"
    assert len(candidates("auto", None, "auto", 51, lowerings)) == 7


def test_channels_first_is_compared_on_a_cpu_only(monkeypatch):
    lowerings = lowerings_of("resnet")
    for module in ("runs.tuning", "ops.convolution"):
        monkeypatch.setattr(f"fedjax_sec.{module}.on_cpu", lambda: False)
    elsewhere = {one.convolution for one in candidates("auto", None, "auto", 51, lowerings, True)}
    assert elsewhere == {"xla", "patches", "rows"}


# --- cnn_dropout and lenet ------------------------------------------------------------------------


def as_double(variables):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])


def cnn_features(params, x):
    """Up to the flattened images behind the pooling."""
    for name in ("conv_0", "conv_1"):
        x = relu(convolved(x, params[name]["kernel"], bias=params[name]["bias"]))
    return pooled(x)


def cnn_logits(params, features):
    hidden = relu(features @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def test_cnn_dropout_is_what_numpy_computes():
    model, variables = build(62, (10, 10, 1), name="cnn_dropout")
    x = np.random.default_rng(2).random((3, 10, 10, 1))
    params = as_double(variables)
    expected = cnn_logits(params, cnn_features(params, x).reshape(3, -1))
    np.testing.assert_allclose(
        model.apply(variables, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("drops", ["units", "channels"])
def test_the_first_dropout_drops_a_quarter_of_units_or_of_channels(drops):
    """The hidden layer copies the features, and its own dropout is off."""
    model = registry.models.build(
        {"name": "cnn_dropout", "drops": drops, "dropout": [0.25, 0.0], "convolution": "patches"}
    ).make((8, 8, 1), 64)
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params["conv_1"]["bias"] += 1.0  # so all 2 x 2 x 64 features are one
    params["output"]["kernel"] = jnp.eye(128, 64)
    x = jnp.zeros((50, 8, 8, 1))
    run = jax.jit(lambda p: model.apply({"params": p}, x, train=True, key=jax.random.key(1)))
    places = []
    for place in (0, 3):  # the logits are the channels at one of the four places
        rows = place * 64 + jnp.arange(64)
        params["hidden"]["kernel"] = jnp.zeros((256, 128)).at[rows].set(jnp.eye(64, 128))
        places.append(np.asarray(run(params)))
        assert set(np.unique(places[-1])) == {0.0, np.float32(4 / 3)}
        assert abs((places[-1] == 0).mean() - 0.25) < 0.04
    assert np.array_equal(*places) == (drops == "channels")


def test_dropout_of_fedmls_cnn_has_two_shares():
    with pytest.raises(ConfigError, match=r"model.dropout must hold two numbers, got \[0.5\]"):
        registry.models.build({"name": "cnn_dropout", "dropout": [0.5]}).make((28, 28, 1), 10)


@pytest.mark.parametrize(("variant", "strides"), [("fedml", (2, 2, 1, 1)), ("dlg", (2, 2, 1))])
def test_sigmoid_lenets_are_what_numpy_computes(variant, strides):
    model, variables = build(5, (12, 12, 3), name="lenet", variant=variant)
    x = np.random.default_rng(2).random((2, 12, 12, 3))
    params, y = as_double(variables), x
    for i, stride in enumerate(strides):
        held = params[f"conv_{i}"]
        y = sigmoid(convolved(y, held["kernel"], stride, 2, held["bias"]))
    expected = y.reshape(2, -1) @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(
        model.apply(variables, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5
    )
    assert len([name for name in params if name.startswith("conv")]) == len(strides)


def test_lenet5_is_what_numpy_computes():
    model, variables = build(5, (20, 20, 1), name="lenet", variant="lenet5")
    x = np.random.default_rng(2).random((2, 20, 20, 1))
    params, y = as_double(variables), x
    for name in ("conv_0", "conv_1"):
        y = pooled(relu(convolved(y, params[name]["kernel"], bias=params[name]["bias"])))
    y = y.reshape(2, -1)
    for name in ("hidden_0", "hidden_1", "output"):
        y = y @ params[name]["kernel"] + params[name]["bias"]
        y = y if name == "output" else relu(y)
    np.testing.assert_allclose(model.apply(variables, jnp.asarray(x)), y, rtol=1e-4, atol=1e-5)


def test_initial_values_of_lenets():
    """DLG's are uniform up to 1/2, biases too; the others' up to 1 / sqrt(fan in)."""
    for variant, bound in (("dlg", lambda fan_in: 0.5), ("fedml", lambda n: 1 / np.sqrt(n))):
        model = registry.models.build({"name": "lenet", "variant": variant}).make((32, 32, 3), 10)
        params = jax.jit(model.init)(jax.random.key(0))["params"]
        for held in params.values():
            fan_in = held["kernel"].size / held["kernel"].shape[-1]
            for leaf in held.values():
                assert 0.7 * bound(fan_in) < np.abs(leaf).max() <= bound(fan_in)
    with pytest.raises(ConfigError, match="'lenet5' needs images of at least 16 x 16"):
        registry.models.build({"name": "lenet", "variant": "lenet5"}).make((12, 12, 1), 10)


# --- fedml_rnn ------------------------------------------------------------------------------------


def numpy_lstm(held, x, reverse=False):
    """One direction, place by place: x [B, L, E] -> [B, L, H]."""
    width = held["weight_hh"].shape[0]
    h = c = np.zeros((len(x), width))
    out = np.zeros((*x.shape[:2], width))
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        gates = x[:, t] @ held["weight_ih"] + h @ held["weight_hh"] + held["bias_ih"]
        gates = gates + held.get("bias_hh", 0.0)
        i, f, g, o = (gates[:, k * width : (k + 1) * width] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out[:, t] = h
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"two_biases": False},
        {"bidirectional": True},
        {"predicts": "every"},
        {"bidirectional": True, "hidden": [4, 3]},
    ],
)
def test_fedml_rnn_is_what_numpy_computes(fields):
    spec = {"name": "fedml_rnn", "hidden": [5, 6], "embedding": 3} | fields
    model = registry.models.build(spec).make((7,), 11)
    variables = jax.jit(model.init)(jax.random.key(2))
    x = np.random.default_rng(3).integers(0, 11, (4, 7))
    x[0, :3] = 0  # padding on the left
    params = as_double(variables)
    h = params["embedding"]["embedding"][x]
    for i in range(2):
        directions = [numpy_lstm(params[f"lstm_{i}"], h)]
        if fields.get("bidirectional"):
            directions.append(numpy_lstm(params[f"lstm_{i}_back"], h, reverse=True))
        h = np.concatenate(directions, axis=-1)
    h = h if fields.get("predicts") == "every" else h[:, -1]
    expected = h @ params["output"]["kernel"] + params["output"]["bias"]
    outputs = model.apply(variables, jnp.asarray(x))
    assert outputs.shape == expected.shape
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert ("bias_hh" in params["lstm_0"]) == fields.get("two_biases", True)


def test_padding_is_zero_and_does_not_learn():
    """As PyTorch's `padding_idx=0`: what attackers put there is used, and no gradient moves it."""
    model = registry.models.build({"name": "fedml_rnn", "hidden": [4], "embedding": 3})
    model = model.make((5,), 7)
    variables = jax.jit(model.init)(jax.random.key(0))
    table = variables["params"]["embedding"]["embedding"]
    np.testing.assert_array_equal(table[0], 0.0)
    assert np.abs(table[1:]).min() > 0
    x = jnp.array([[0, 0, 3, 1, 2]])
    gradient = jax.jit(jax.grad(lambda v: model.apply(v, x).sum()))(variables)
    moved = np.asarray(gradient["params"]["embedding"]["embedding"])
    np.testing.assert_array_equal(moved[[0, 4, 5, 6]], 0.0)
    assert np.abs(moved[[1, 2, 3]]).max(axis=1).min() > 0
    params = {**variables["params"], "embedding": {"embedding": table.at[0].set(1.0)}}
    assert np.abs(model.apply({"params": params}, x) - model.apply(variables, x)).max() > 1e-4


def test_recurrent_layers_begin_as_pytorchs():
    model = registry.models.build("fedml_rnn").make((80,), 90)
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    for name in ("lstm_0", "lstm_1", "output"):
        for leaf in params[name].values():
            assert 0.9 / 16 < np.abs(leaf).max() <= 1 / 16
            assert abs(float(leaf.mean())) < 0.01
    assert abs(float(params["embedding"]["embedding"][1:].std()) - 1) < 0.1


def test_a_bidirectional_network_does_not_see_what_it_is_to_predict():
    spec = {"name": "fedml_rnn", "bidirectional": True, "predicts": "every"}
    with pytest.raises(ConfigError, match="would see the character"):
        registry.models.build(spec).make((5,), 7)


# --- Ways to convolve -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ({"name": "fedml_resnet", "depth": 8}, (6, 5, 3)),
        ({"name": "fedml_resnet", "depth": 11, "block": "bottleneck"}, (6, 5, 3)),
        ({"name": "resnet", "depth": 8}, (6, 5, 3)),
        ({"name": "resnet", "depth": 8, "norm": "group"}, (6, 5, 3)),
        ({"name": "cnn_dropout"}, (7, 8, 1)),
        ({"name": "cnn_dropout", "drops": "channels"}, (7, 8, 1)),
        ({"name": "lenet"}, (6, 5, 3)),
        ({"name": "lenet", "variant": "lenet5"}, (17, 18, 1)),
    ],
)
def test_networks_do_not_depend_on_the_lowering(spec, shape):
    """Same parameters, outputs, dropped activations and gradients, whatever the arrangement."""
    x, results = jax.random.uniform(jax.random.key(0), (3, *shape)), []
    for lowering in choices(registry.models.build(spec), "convolution"):
        model = registry.models.build(spec | {"convolution": lowering}).make(shape, 4)
        variables = jax.jit(model.init)(jax.random.key(1))

        def loss(variables, x, model=model):
            return jnp.sum(model.apply(variables, x, train=True, key=jax.random.key(2)) ** 2)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        results.append((variables, *run(variables, x)))
    assert len(results) >= 3
    for other in results[1:]:
        close(other, results[0], rtol=1e-3, atol=1e-3)
