"""LoRA: pairs beside the layers of a frozen network, in components and in runs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, same_bits, small

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.space import make_space
from fedjax_sec.runs import config
from fedjax_sec.runs.experiment import train
from fedjax_sec.runs.loading import final_params, logits_of
from fedjax_sec.runs.prepare import make_replicas, prepare
from fedjax_sec.runs.program import Program

BASE = {"name": "mlp", "hidden": [6]}
LORA = {"name": "lora", "base": BASE, "rank": 2, "alpha": 6.0}
FOUR_STEPS = {
    "name": "sgd",
    "steps": 4,
    "batch_size": 8,
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
}


def spec(**changes):
    return small(**{"model": LORA, "client": FOUR_STEPS} | changes)


def test_a_layer_adds_its_pair():
    """x W + b + alpha / r (x A) B, by hand and in float64."""
    model = registry.models.build(LORA).make((8, 8, 1), 10)
    variables = model.init(jax.random.key(0))
    drawn = np.random.default_rng(0)
    variables["lora"] = jax.tree.map(
        lambda leaf: drawn.normal(size=leaf.shape).astype(np.float32), variables["lora"]
    )
    x = drawn.uniform(size=(3, 8, 8, 1)).astype(np.float32)
    h = x.reshape(3, -1).astype(np.float64)
    for name in ("hidden_0", "output"):
        layer, pair = variables["params"][name], variables["lora"][name]
        kernel, bias, a, b = (
            np.float64(v) for v in (layer["kernel"], layer["bias"], *pair.values())
        )
        h = h @ kernel + bias + 6.0 / 2 * h @ a @ b
        h = np.maximum(h, 0) if name == "hidden_0" else h
    close(model.apply(variables, x), h.astype(np.float32), rtol=1e-4, atol=1e-4)


def test_training_begins_at_the_base():
    base, model = (registry.models.build(one).make((8, 8, 1), 10) for one in (BASE, LORA))
    x, key = jnp.ones((2, 8, 8, 1)), jax.random.key(3)
    same_bits(model.apply(model.init(key), x), base.apply(base.init(key), x))


def test_only_pairs_are_in_the_vector_and_only_they_move():
    result = fedjax_sec.run(spec())
    space = make_space(result.experiment.model.make((8, 8, 1), 10))
    assert space.dim == 2 * (64 + 6) + 2 * (6 + 10)
    assert all(name.startswith("lora/") for name in space.slices)
    base = registry.models.build(BASE).make((8, 8, 1), 10).init(jax.random.key(0))
    same_bits(result.params["params"], base["params"])
    assert np.abs(result.params["lora"]["output"]["b"]).max() > 1e-3
    assert result.metrics["loss"][-1] < result.metrics["loss"][0]


def program_of(clients, hidden, model="lora", layout="vmap"):
    """(the program, the arguments of one round) for so many clients and hidden units."""
    base = {"name": "mlp", "hidden": [hidden]}
    made = config.from_mapping(
        small(
            data={"num_clients": clients, "max_train": 8 * clients},
            model=LORA | {"base": base} if model == "lora" else base,
            client=FOUR_STEPS | {"batch_size": 1},  # so that activations are small
            execution={"clients": layout},
            evaluation={"diagnostics": False},
        )
    )
    prepared = prepare(made)
    program, replicas = Program(prepared), make_replicas([prepared])
    state = program.state_shapes(replicas)
    return program, (state, replicas, program.pool, jnp.int32(0), program.test)


def lowered(program, args):
    program.at_once = 1
    return jax.jit(program._advance(1)).lower(*args)


def test_the_program_does_not_hold_the_base():
    """As text a base of 38,000 numbers would be longer than all the rest."""
    short, long = (len(lowered(*program_of(4, hidden)).as_text()) for hidden in (8, 512))
    assert long < 1.02 * short, (short, long)


@pytest.mark.parametrize("layout", ["vmap", "map"])
def test_the_base_is_held_once_and_not_for_each_client(layout):
    def needs(clients, model):
        program, args = program_of(clients, 512, model, layout)
        memory = lowered(program, args).compile().memory_analysis()
        return memory.temp_size_in_bytes, program.pool.frozen

    base = 4 * (64 * 512 + 512 + 512 * 10 + 10)
    (few, frozen), (many, _) = needs(4, "lora"), needs(16, "lora")
    assert sum(leaf.nbytes for leaf in frozen) == base
    grown = (many - few) / 12 / base
    full = (needs(16, "mlp")[0] - needs(4, "mlp")[0]) / 12 / base
    assert grown < 0.5 < 0.9 < full, (grown, full)  # in bases for each further client


def test_seeds_share_the_base():
    prepared = [prepare(config.from_mapping(spec(seed=seed))) for seed in (0, 1)]
    one, other = train(prepared)
    same_bits(one.params["params"], other.params["params"])
    assert not np.array_equal(
        one.params["lora"]["output"]["b"], other.params["lora"]["output"]["b"]
    )


def test_a_run_resumes_and_its_folder_gives_the_whole_model(tmp_path):
    once = fedjax_sec.run(spec(rounds=4))
    fedjax_sec.run(spec(rounds=2), out=tmp_path / "run")
    resumed = fedjax_sec.run(spec(rounds=4), out=tmp_path / "run", resume=True)
    same_bits(resumed.params, once.params)
    params = final_params(tmp_path / "run")
    same_bits(params, once.params)
    source = prepare(once.experiment).source
    logits = logits_of(once.experiment)(params, source.inputs.decode(jnp.asarray(source.x_test)))
    accuracy = np.mean(np.argmax(logits, axis=1) == source.y_test)
    close(accuracy, once.metrics["accuracy"][-1], rtol=1e-5)


def test_a_base_is_read_from_a_finished_run(tmp_path):
    trained = small(model=BASE, client=FOUR_STEPS, rounds=10, checkpoint={"keep_params": True})
    before = fedjax_sec.run(trained, out=tmp_path / "base")
    file = str(tmp_path / "base" / "params.npy")
    result = fedjax_sec.run(spec(model=LORA | {"base_params": file}, rounds=2))
    close(result.metrics["accuracy"][0], before.metrics["accuracy"][-1], rtol=1e-6)
    same_bits(result.params["params"], before.params["params"])
    wrong = LORA | {"base_params": file, "base": {"name": "mlp", "hidden": [7]}}
    with pytest.raises(ConfigError, match="must hold the base's 535 parameters"):
        fedjax_sec.run(spec(model=wrong))
    with pytest.raises(ConfigError, match="base_params: .*none.npy' cannot be read"):
        fedjax_sec.run(spec(model=LORA | {"base_params": str(tmp_path / "none.npy")}))


class Normed(nn.Module):
    """A layer, batch norm, and a layer."""

    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(5, name="first")(x.reshape(x.shape[0], -1))
        h = nn.BatchNorm(use_running_average=not train, momentum=0.5)(h)
        return nn.Dense(10, name="output")(nn.relu(h))


def test_statistics_of_the_base_are_observed():
    model = {"name": "lora", "base": {"name": "module", "module": Normed()}, "rank": 2}
    result = fedjax_sec.run(spec(model=model))
    start = prepare(result.experiment).network.model.init(jax.random.key(0))
    same_bits(result.params["params"], start["params"])
    moved = result.params["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.abs(moved).max() > 1e-2
    assert result.metrics["loss"][-1] < result.metrics["loss"][0]


class Cell(nn.Module):
    """flax's cell joins its kernels and calls no layer."""

    @nn.compact
    def __call__(self, x):
        h = nn.RNN(nn.OptimizedLSTMCell(3))(x.reshape(x.shape[0], 8, 8))
        return nn.Dense(10)(h[:, -1])


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(10, (8, 8), padding="VALID")(x)[:, 0, 0]


def test_what_it_cannot_adapt_is_refused():
    for net, words in ((Cell(), "never calls 'OptimizedLSTMCell_0/"), (Images(), "has no layer")):
        model = {"name": "lora", "base": {"name": "module", "module": net}}
        with pytest.raises(ConfigError, match=words):
            fedjax_sec.run(spec(model=model))
