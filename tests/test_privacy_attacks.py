"""Attacks on privacy against hand-made cases, NumPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import fedjax_sec
from fedjax_sec.attacks.privacy import _labels, _matching, _search, imprint
from fedjax_sec.core import ConfigError, Known, LocalData, Message, registry
from fedjax_sec.core.types import InputSpec
from fedjax_sec.ops import interception, lbfgs
from fedjax_sec.ops import reconstruction as scores
from fedjax_sec.runs.reconstruct import task_of

PIXELS = InputSpec("pixels", (4, 4, 1), 1.0, (0.3,), (0.5,))


def world(model="mlp", inputs=PIXELS, classes=5, seed=0, **fields):
    """(task, parameters) of a small network."""
    network = registry.models.build({"name": model} | fields).make(inputs.shape, classes)
    task = task_of(network, inputs, classes)
    return task, task.space.split(network.init(jax.random.key(seed)))[0]


def batch(count, task, labels=None, seed=0):
    """(x in [0, 1], y) of examples that never repeat."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.05, 0.95, (count, *task.inputs.shape)).astype(np.float32)
    y = rng.integers(0, task.num_classes, count) if labels is None else np.asarray(labels)
    return jnp.asarray(x), jnp.asarray(y)


def trained(task, params, x, y, steps=1, size=None, rate=0.1, l2=0.0):
    """The update [D] of the client `sgd` on these examples."""
    client = registry.clients.build(
        {
            "name": "sgd",
            "steps": steps,
            "batch_size": size or len(y),
            "optimizer": {"name": "sgd", "learning_rate": rate},
            "l2": l2,
        }
    )
    data = LocalData(jnp.int32(len(y)), len(y), jnp.int32(0), lambda at: (x[at], y[at]))
    key = jax.random.key(3)
    return client.apply(key, params, client.init(task.dim), data, task).delta


def known_of(task, count, steps=1, size=None, rate=0.1, l2=0.0, **more):
    return Known(rate, steps, size or count, task.num_classes, count, None, l2, **more)


def shares(task, y):
    return jax.nn.one_hot(y, task.num_classes)


# --- Matching -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "l2"), [(1, 0.0), (1, 0.2), (4, 0.0), (4, 0.2)])
def test_a_simulated_client_sends_what_the_real_one_does(steps, l2):
    task, params = world(hidden=[6])
    x, y = batch(3, task)
    known = known_of(task, 3, steps, l2=l2)
    update = trained(task, params, x, y, steps, l2=l2)
    slope = _matching.slope_of(Message(update, jnp.float32(3)), params, task, known)
    made = _matching.simulate(params, x, shares(task, y), task, known)
    close(made, slope, rtol=1e-4, atol=1e-5)


def test_the_mean_of_two_clients_is_simulated_as_such():
    task, params = world(hidden=[6])
    x, y = batch(6, task)
    updates = [trained(task, params, x[i : i + 3], y[i : i + 3], 3) for i in (0, 3)]
    known = known_of(task, 6, 3, size=3, clients=2)
    slope = -(updates[0] + updates[1]) / 2 / 0.1
    close(_matching.simulate(params, x, shares(task, y), task, known), slope, 1e-4, 1e-5)
    together = _matching.simulate(params, x, shares(task, y), task, known._replace(clients=1))
    assert np.abs(together - slope).max() > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_through_local_steps_are_finite_differences(steps):
    """The derivative of the matching loss by a pixel, on a smooth network in float64."""
    with jax.enable_x64(True):
        task, params = world(hidden=[6])
        first, second = 16 * 6, 6 * 5
        params = jnp.asarray(np.random.default_rng(1).normal(size=task.dim))

        def outputs(params, x, **options):
            hidden = jnp.tanh(x.reshape(x.shape[0], 16) @ params[:first].reshape(16, 6))
            return hidden @ params[first : first + second].reshape(6, 5)

        task = task._replace(outputs=outputs)
        x, y = batch(4, task)
        x, known = x.astype(jnp.float64), known_of(task, 4, steps, size=2, rate=0.3)
        target = _matching.simulate(params, x[::-1], shares(task, y), task, known)

        def loss(x):
            made = _matching.simulate(params, x, shares(task, y), task, known)
            return _matching.cosine_distance(made, target)

        slope = jax.grad(loss)(x)
        assert slope.dtype == jnp.float64 and loss(x) > 0.01
        for place in [(0, 1, 2, 0), (3, 0, 0, 0), (2, 3, 3, 0)]:
            step = jnp.zeros_like(x).at[place].set(1e-5)
            numeric = (loss(x + step) - loss(x - step)) / 2e-5
            np.testing.assert_allclose(slope[place], numeric, rtol=1e-5)


def test_a_client_whose_steps_are_no_gradients_is_refused():
    task, params = world(hidden=[6])
    with pytest.raises(ConfigError, match="give it the optimizer sgd without momentum"):
        _matching.slope_of(Message(params, 1.0), params, task, Known(None, 1, 2, 5))


def test_total_variation_is_that_of_numpy():
    x = np.random.default_rng(0).normal(size=(3, 5, 6, 2)).astype(np.float32)
    down, across = np.abs(x[:, 1:] - x[:, :-1]).mean(), np.abs(x[:, :, 1:] - x[:, :, :-1]).mean()
    close(_matching.total_variation(jnp.asarray(x)), down + across)


def test_descent_keeps_points_on_the_way_and_inside_its_bounds():
    import optax

    x, trail = _search.descend(
        lambda step, x: jnp.ones_like(x), jnp.zeros(2), optax.sgd(1.0), 7, 3, (-4.0, 1.0)
    )
    assert trail[:, 0].tolist() == [0, -2, -4] and x.tolist() == [-4, -4]


def test_lbfgs_takes_pytorchs_steps():
    """Two steps on a quadratic, by hand: the first along the gradient, the second by its memory."""
    scales = jnp.array([1.0, 4.0])
    start = jnp.array([1.0, 1.0])

    def value(x):
        return 0.5 * jnp.sum(scales * x**2)

    gradient = scales * start
    first = start - gradient * min(1.0, 1.0 / float(jnp.abs(gradient).sum()))
    close(lbfgs.minimize(value, start, 1, 1, 5, 1.0)[0], first)
    s, change = first - start, scales * first - gradient
    rho, g = 1.0 / jnp.dot(change, s), scales * first
    alpha = rho * jnp.dot(s, g)
    q = (g - alpha * change) * jnp.dot(change, s) / jnp.dot(change, change)
    second = first - (q + s * (alpha - rho * jnp.dot(change, q)))
    close(lbfgs.minimize(value, start, 2, 1, 5, 1.0)[0], second)


# --- Scores ---------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    one = rng.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    other = np.clip(one + 0.2 * rng.normal(size=one.shape), 0, 1).astype(np.float32)
    for i in range(2):
        mse = np.mean((one[i] - other[i]) ** 2)
        expected = metrics.peak_signal_noise_ratio(one[i], other[i], data_range=1.0)
        np.testing.assert_allclose(scores.psnr(jnp.asarray(mse)), expected, rtol=1e-5)
        expected = metrics.structural_similarity(
            one[i],
            other[i],
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        np.testing.assert_allclose(scores.ssim(one, other)[i], expected, rtol=2e-3)


def test_guesses_are_scored_in_any_order():
    task, _ = world()
    x, y = batch(4, task)
    order = jnp.array([2, 0, 3, 1])
    guess = scores.Guess(x[order] + 0.01, y[order])
    made = scores.score(guess, x, y, task.inputs, task.num_classes)
    close(made.mse, np.full(4, 1e-4), rtol=1e-3)
    close(made.psnr, np.full(4, 40.0), rtol=1e-4)
    assert made.labels == 1 and (order[made.match] == jnp.arange(4)).all()


def test_identification_names_the_nearest_training_example():
    pool = np.random.default_rng(0).uniform(size=(20, 4, 4, 1)).astype(np.float32)
    guess = pool[[7, 3]] + np.array([0.01, 0.0]).reshape(2, 1, 1, 1)
    match = jnp.array([1, 0])  # the true examples are 3 and 7, in this order
    assert scores.identified(guess, match, jnp.array([3, 7]), pool).tolist() == [1, 1]
    assert scores.identified(guess, match, jnp.array([3, 8]), pool).tolist() == [1, 0]


# --- Labels ---------------------------------------------------------------------------------------


def head(logits, y, features):
    """The gradients of the last kernel [F, C] and bias [C] of a batch's mean loss."""
    wrong = np.asarray(jax.nn.softmax(logits)) - np.eye(logits.shape[1])[y]
    return jnp.asarray(features.T @ wrong / len(y)), jnp.asarray(wrong.mean(axis=0))


def drawn_head(y, classes=10, width=24, seed=0, positive=True):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(y), width))
    features = np.abs(features) if positive else features
    return head(0.1 * rng.normal(size=(len(y), classes)), np.asarray(y), features)


def counted(labels):
    return sorted(np.asarray(labels).tolist())


@pytest.mark.parametrize("how", ["sign", "minimum", "bias"])
def test_one_label_is_read_by_every_strategy(how):
    for label in (0, 4, 9):
        kernel, bias = drawn_head([label])
        assert _labels.STRATEGIES[how](kernel, bias, 1).tolist() == [label]


def test_different_labels_are_read_by_every_strategy():
    kernel, bias = drawn_head([7, 2, 5])
    for strategy in _labels.STRATEGIES.values():
        assert counted(strategy(kernel, bias, 3)) == [2, 5, 7]


def test_the_bias_names_labels_as_often_as_they_are_there():
    kernel, bias = drawn_head([3, 3, 3, 8, 8, 1])
    assert counted(_labels.by_bias(kernel, bias, 6)) == [1, 3, 3, 3, 8, 8]
    assert len(set(_labels.by_sign(kernel, bias, 6).tolist())) == 6  # it cannot repeat


def test_the_bias_strategy_by_hand():
    """Impact (-.4 - .2 - .1) / 4: class 2, 0 and 1 once, then the lowest of what is left."""
    bias = jnp.array([-0.2, -0.1, -0.4, 0.7])
    # Left after the three: -.025, .075, -.225, .7.
    assert _labels.by_bias(None, bias, 4).tolist() == [2, 0, 1, 2]


def test_label_bag_reads_a_batch_of_two_thirds_of_the_features():
    bag = registry.privacy_attacks.build({"name": "label_bag", "positive_features": False})
    y = [1, 4, 6, 9]
    kernel, _ = drawn_head(y, positive=False)
    assert counted(bag._solve(np.asarray(kernel, np.float64), 4)) == y


def test_label_bag_needs_no_sign_of_the_features():
    """Where features have both signs, sums of columns do not name the labels, and it does."""
    bag = registry.privacy_attacks.build({"name": "label_bag", "positive_features": False})
    right, summed = 0, 0
    for seed in range(8):
        y = np.random.default_rng(seed).permutation(10)[:5]
        kernel, bias = drawn_head(y, positive=False, seed=seed)
        right += counted(bag._solve(np.asarray(kernel, np.float64), 5)) == sorted(y.tolist())
        summed += counted(_labels.by_sign(kernel, bias, 5)) == sorted(y.tolist())
    assert right == 8 and summed < 4


def test_label_bag_refuses_batches_that_fill_its_space():
    task, params = world("logistic_regression")
    known = known_of(task, 5)
    bag = registry.privacy_attacks.build("label_bag")
    with pytest.raises(ConfigError, match="fewer examples than features and classes"):
        bag.reconstruct(jax.random.key(0), Message(params, 1.0), params, task, known)


# --- Closed forms ---------------------------------------------------------------------------------


def attacked(attack, model, x, y, task, params, **fields):
    """The attack on one step of gradient descent at these parameters, scored."""
    update = trained(task, params, x, y)
    network, fields = (model, {}) if isinstance(model, dict) else (model, fields)
    return fedjax_sec.reconstruct(
        update,
        attack,
        model=network,
        params=params,
        shape=task.inputs.shape,
        num_classes=task.num_classes,
        examples=len(y),
        rate=0.1,
        mean=task.inputs.mean,
        std=task.inputs.std,
        truth=(x, y),
        **fields,
    )


def test_one_example_is_read_from_a_perceptrons_first_layer():
    model = {"name": "mlp", "hidden": [6]}
    task, params = world(hidden=[6])
    x, y = batch(1, task)
    made = attacked("analytic", model, x, y, task, params)
    close(made.x, x, rtol=1e-3, atol=1e-3)
    assert made.y.tolist() == y.tolist() and made.scores.psnr[0] > 50


def test_linear_inversion_guesses_as_many_examples_as_all_merged_clients_have():
    """Two clients with three examples each, of five classes: six guesses, not three."""
    model = {"name": "logistic_regression"}
    network = registry.models.build(model).make(PIXELS.shape, 5)
    task = task_of(network, PIXELS, 5)
    params = task.space.split(network.init(jax.random.key(0)))[0]
    x, y = batch(6, task)
    update = (trained(task, params, x[:3], y[:3]) + trained(task, params, x[3:], y[3:])) / 2
    made = fedjax_sec.reconstruct(
        update,
        "linear_inversion",
        model=model,
        params=params,
        shape=PIXELS.shape,
        num_classes=5,
        examples=6,
        batch_size=3,
        clients=2,
        rate=0.1,
        mean=0.3,
        std=0.5,
        truth=(x, y),
    )
    assert made.x.shape == (6, *PIXELS.shape) and made.scores.psnr.shape == (6,)


def test_a_model_without_a_first_dense_layer_is_refused():
    inputs = InputSpec("pixels", (8, 8, 1))
    task, params = world("small_cnn", inputs)
    x, y = batch(1, task)
    with pytest.raises(ConfigError, match="'mlp' and 'logistic_regression'"):
        attacked("analytic", "small_cnn", x, y, task, params)


def planted(attack, model, inputs=PIXELS, classes=5):
    """(the network that a malicious server sends, its task, its parameters)."""
    network = attack.insert(registry.models.build(model))
    task = task_of(network.make(inputs.shape, classes), inputs, classes)
    drawn = task.space.split(network.make(inputs.shape, classes).init(jax.random.key(1)))[0]
    return network, task, attack.plant(jax.random.key(2), drawn, task)


@pytest.mark.parametrize("model", ["logistic_regression", {"name": "mlp", "hidden": [6]}])
def test_an_imprint_gives_every_example_that_is_alone_between_two_edges(model):
    attack = registry.privacy_attacks.build(
        {"name": "imprint", "bins": 400, "measure": "random", "deviation": 0.6}
    )
    network, task, params = planted(attack, model)
    x, y = batch(4, task, labels=[0, 1, 2, 3])
    # Each bin that holds one of them holds one alone.
    kernel, bias = task.space.shapes["params/inserted/kernel"], "params/inserted/bias"
    h = params[task.space.slices["params/inserted/kernel"]].reshape(kernel)[:, 0]
    measured = (task.inputs.normalize(x).reshape(4, -1)) @ h
    edges = -params[task.space.slices[bias]]
    assert len(set(np.searchsorted(edges, measured).tolist())) == 4
    made = attacked(attack, network, x, y, task, params)
    assert (made.scores.psnr > 35).all(), made.scores.psnr


def test_the_edges_of_an_imprint_are_quantiles():
    from scipy import stats

    attack = imprint.Imprint(bins=8, location=1.0, deviation=2.0)
    shares = np.arange(1, 8) / 8
    expected = 1.0 + 2.0 * stats.laplace(scale=1 / np.sqrt(2)).ppf(shares)
    close(attack.edges(8)[1:], expected.astype(np.float32), rtol=1e-4, atol=1e-5)
    normal = imprint.Imprint(bins=8, measure="mean")
    close(normal.edges(8)[1:], stats.norm.ppf(shares).astype(np.float32), rtol=1e-4, atol=1e-5)


def test_trap_weights_are_halves_and_read_single_examples():
    attack = registry.privacy_attacks.build("curious_abandon_honesty")
    inputs = InputSpec("pixels", (8, 8, 1))
    network, task, params = planted(attack, {"name": "mlp", "hidden": [400]}, inputs)
    place = next(n for n, s in task.space.shapes.items() if s == (64, 400))
    kernel = np.asarray(params[task.space.slices[place]].reshape(64, 400))
    assert ((kernel < 0).sum(axis=0) == 32).all()
    for column in (0, 17):
        low = np.sort(-kernel[:, column][kernel[:, column] < 0])
        high = np.sort(kernel[:, column][kernel[:, column] > 0])
        close(high, (0.95 * low).astype(np.float32), rtol=1e-5)
    x, y = batch(4, task)
    made = attacked(attack, network, x, y, task, params)
    assert (made.scores.psnr > 30).sum() >= 2, made.scores.psnr


# --- Searches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        {"name": "dlg", "restarts": 2},
        {"name": "idlg"},
        {"name": "inverting_gradients", "iterations": 400},
        {"name": "grad_inversion", "iterations": 800, "matching": 1.0},
    ],
)
def test_a_search_meets_one_example(attack):
    model = {"name": "mlp", "hidden": [12]}
    task, params = world(hidden=[12])
    x, y = batch(1, task)
    made = attacked(attack, model, x, y, task, params)
    assert made.y.tolist() == y.tolist()
    assert made.scores.psnr[0] > 25, made.scores.psnr


def test_restarts_give_the_lowest_loss():
    model = {"name": "mlp", "hidden": [12]}
    task, params = world(hidden=[12])
    x, y = batch(2, task)
    short = {"name": "inverting_gradients", "iterations": 40}
    alone = attacked(short, model, x, y, task, params)
    several = attacked(short | {"restarts": 6}, model, x, y, task, params)
    assert several.loss < alone.loss


def test_batch_norm_statistics_are_matched_by_the_true_batch():
    """The prior is zero at the client's own batch, and its gradient reaches the images."""
    inputs = InputSpec("pixels", (8, 8, 3))
    task, params = world("resnet", inputs, depth=8)
    x, y = batch(2, task)
    attack = registry.privacy_attacks.build({"name": "grad_inversion", "statistics": "sent"})
    update = trained(task, params, x, y)
    known = known_of(task, 2, batch_statistics=True)
    prior = attack.statistics_prior(Message(update, 1.0), params, task, known)
    other = batch(2, task, seed=1)[0]
    assert prior(x) < 1e-3 < 0.1 < prior(other)
    assert jnp.abs(jax.grad(prior)(other)).max() > 0
    running = registry.privacy_attacks.build("grad_inversion")
    assert running.statistics_prior(Message(update, 1.0), params, task, known)(x) > 0.1


def text_world(**fields):
    """Twelve tokens, six places: a small recurrent network that predicts the next token."""
    inputs = InputSpec("tokens", (6,))
    fields = {"hidden": [12], "embedding": 8} | fields
    return world("fedml_rnn", inputs, 12, **fields), {"name": "fedml_rnn"} | fields


def test_tag_finds_the_tokens_of_a_text():
    (task, params), model = text_world()
    x, y = jnp.array([[3, 7, 1, 9, 4, 2]]), jnp.array([5])
    update = trained(task, params, x, y)
    made = fedjax_sec.reconstruct(
        update,
        {"name": "tag", "restarts": 4},
        model=model,
        params=params,
        shape=(6,),
        num_classes=12,
        rate=0.1,
        kind="tokens",
        truth=(x, y),
    )
    assert set(made.x[0].tolist()) <= set(x[0].tolist())  # by the gradient of the table
    assert made.y.tolist() == [5]
    assert made.scores.mse[0] <= 0.5, made.x


def test_embeddings_stand_in_for_tokens():
    (task, params), _ = text_world()
    x = jnp.array([[3, 7, 1, 9, 4, 2], [1, 1, 2, 2, 11, 10]])
    name = interception.table_of(task)
    table = params[task.space.slices[name]].reshape(task.space.shapes[name])
    given = interception.outputs_for(params, table[x], task)
    close(given, task.outputs(params, x), rtol=1e-5)


def test_tag_refuses_a_model_without_an_embedding():
    task, _ = world()
    with pytest.raises(ConfigError, match="'fedml_rnn' or 'char_lstm'"):
        interception.table_of(task)


# --- The Python interface -------------------------------------------------------------------------


def test_several_updates_are_attacked_in_one_program():
    model = {"name": "mlp", "hidden": [6]}
    task, params = world(hidden=[6])
    pairs = [batch(1, task, seed=seed) for seed in range(3)]
    updates = jnp.stack([trained(task, params, x, y) for x, y in pairs])
    made = fedjax_sec.reconstruct(
        updates,
        "analytic",
        model=model,
        params=task.unravel(params),
        shape=(4, 4, 1),
        num_classes=5,
        rate=0.1,
        mean=0.3,
        std=0.5,
        truth=(np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])),
    )
    assert made.x.shape == (3, 1, 4, 4, 1) and (made.scores.psnr > 45).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"update": np.zeros(7)}, "update must hold the model's 85 parameters, got 7"),
        ({"params": np.zeros((3, 85))}, "params must be one for all, or 1, got 3"),
        ({"kind": "pixel"}, "kind must be one of features, pixels, tokens.*'pixels'"),
        ({"examples": 0}, "examples must be an integer >= 1, got 0"),
        ({"rate": 0}, "rate must be > 0"),
        ({"examples": 3, "clients": 2}, "examples must be a multiple of clients"),
        ({"attack": "tag"}, "'tag' works on tokens, and the inputs are pixels"),
        ({"attack": "dgl"}, "'dlg'"),
        ({"labels": [1]}, "labels are not read by 'analytic'"),
        ({"batch_size": 3}, "batch_size must be between 1 and 1"),
        (
            {"labels": [1, 2], "attack": {"name": "analytic", "labels": "known"}},
            r"labels must be \[1\] for each update",
        ),
        ({"truth": (np.zeros((1, 2, 2, 1)), [0])}, r"truth\[0\] must be \[1, 4, 4, 1\]"),
        ({"mean": [0.1, 0.2]}, "mean must be a number, or 1"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    given = {
        "update": np.zeros(85),
        "attack": "analytic",
        "model": "logistic_regression",
        "params": np.zeros(85),
        "shape": (4, 4, 1),
        "num_classes": 5,
    }
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.reconstruct(**(given | changes))
