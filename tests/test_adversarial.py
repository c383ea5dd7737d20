"""PGD on inputs, and local training on the examples it finds."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small, tiny_pool, tiny_task
from hypothesis import strategies as st
from jax.extend import core as jax_core
from programs import program_of, replicas_of, task_on

from fedjax_sec import core
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.types import LocalData
from fedjax_sec.ops.client_axis import Layout, map_clients
from fedjax_sec.ops.pgd import linf_pgd
from fedjax_sec.runs.config import from_mapping

LINEAR = jnp.array([[1.0, -2.0, 0.0, 0.5]])


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("eps, step_size, num_steps", [(0.3, 0.01, 40), (0.1, 0.25, 3)])
def test_pgd_reaches_the_optimum_of_a_linear_loss(random_start, eps, step_size, num_steps):
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 4)).astype(np.float32))
    result = linf_pgd(
        lambda moved: jnp.broadcast_to(LINEAR, moved.shape),
        x,
        jax.random.key(1),
        eps=eps,
        step_size=step_size,
        num_steps=100,
        random_start=random_start,
    )
    best = jnp.clip(x + eps * jnp.sign(LINEAR), 0, 1)
    still = np.asarray(LINEAR[0] == 0)
    np.testing.assert_allclose(result[:, ~still], best[:, ~still], atol=1e-6)
    if random_start:
        assert not np.allclose(result[:, still], x[:, still])
    else:
        np.testing.assert_array_equal(result[:, still], x[:, still])
    few = linf_pgd(
        lambda moved: jnp.broadcast_to(LINEAR, moved.shape),
        x,
        jax.random.key(1),
        eps=eps,
        step_size=step_size,
        num_steps=num_steps,
        random_start=random_start,
    )
    assert np.all(np.abs(few - x) <= eps + 1e-6) and few.min() >= 0 and few.max() <= 1
    if not random_start:
        moved = np.minimum(num_steps * step_size, eps) * np.sign(np.asarray(LINEAR))
        np.testing.assert_allclose(few, np.clip(x + moved, 0, 1), atol=1e-5)


def client(**changes):
    spec = {"name": "adversarial", "steps": 1, "batch_size": 8, "eps": 0.2, "step_size": 0.05}
    return registry.clients.build(spec | {"pgd_steps": 7} | changes)


NORMALISATIONS = {
    "mean": st.floats(-2, 2, width=32),
    "std": st.floats(2**-7, 4, width=32),
    "eps": st.floats(0, 1, width=32),
    "step_size": st.floats(0, 2, width=32),
    "seed": st.integers(0, 2**31 - 1),
}
SEARCHES = {
    "adversarial": client(most=1.0),
    "adversarial, no random start": client(most=1.0, random_start=False),
    "fgsm": registry.evasions.build("fgsm"),
    "pgd": registry.evasions.build({"name": "pgd", "steps": 7, "momentum": 0.5}),
    "apgd": registry.evasions.build({"name": "apgd", "steps": 7}),
}


@functools.partial(jax.jit, static_argnames="name")
def searched(name, mean, std, eps, step_size, seed):
    """Inputs, and what the attack makes of them where the network sees (x - mean) / std."""
    plain, pool, key = tiny_task(), tiny_pool(), jax.random.key(seed)

    def outputs(params, x, **options):
        return plain.outputs(params, (x - mean) / std, **options)

    task = plain._replace(outputs=outputs)
    fields = {"eps": eps, "step_size": step_size}
    attack = SEARCHES[name]
    attack = dataclasses.replace(attack, **{n: v for n, v in fields.items() if hasattr(attack, n)})
    x, y = pool.x[:8] / 255.0, pool.y[:8]
    params = 0.3 * jax.random.normal(jax.random.key(2), (task.dim,))
    if hasattr(attack, "examples"):
        return x, attack.examples(key, params, x, y, jnp.ones(8, bool), task)[0]
    return x, attack.apply(key, functools.partial(outputs, params), x, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
@hypothesis.given(**NORMALISATIONS)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_inputs_stay_in_the_ball_and_in_the_range(name, mean, std, eps, step_size, seed):
    """Both are in pixels, whatever the network makes of them."""
    x, moved = searched(name, mean, std, eps, step_size, seed)
    assert np.isfinite(moved).all()
    assert np.abs(moved - x).max() <= eps + 1e-6
    assert moved.min() >= 0 and moved.max() <= 1


@pytest.mark.parametrize("name", SEARCHES)
def test_the_ball_is_used(name):
    x, moved = searched(name, 0.3, 0.05, 0.1, 0.05, 0)
    assert np.abs(moved - x).max() == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    "fraction, present, expected",
    [(0.5, 8, 4), (0.25, 8, 2), (1.0, 8, 8), (0.5, 6, 3), (0.8, 5, 4), (0.5, 0, 0)],
)
def test_the_share_of_the_examples_that_are_there_is_replaced(fraction, present, expected):
    pool, task = tiny_pool(), tiny_task()
    x, y = pool.x[:8] / 255.0, pool.y[:8]
    params = 0.3 * jax.random.normal(jax.random.key(2), (task.dim,))
    mask = jnp.arange(8) < present
    moved, labels = client(fraction=fraction).examples(jax.random.key(0), params, x, y, mask, task)
    changed = np.any(np.asarray(moved != x).reshape(8, -1), axis=1)
    assert changed.tolist() == [i < expected for i in range(8)]
    np.testing.assert_array_equal(labels, y)
    if expected:
        assert np.abs(moved - x).max() <= 0.2 + 1e-6
        alone = jnp.arange(8) < expected
        assert task.loss(params, moved, y, alone) > task.loss(params, x, y, alone) + 0.05


def test_the_share_can_follow_a_schedule():
    jump = {"schedule": "steps", "values": {0: 0.125, 3: 0.75}}
    spec = {"name": "adversarial", "steps": 1, "batch_size": 8, "fraction": jump}
    part = from_mapping(small(client=spec)).client
    assert part.most == 0.75  # PGD is computed for no more than six of eight
    pool, task = tiny_pool(), tiny_task()
    x, y, mask = pool.x[:8] / 255.0, pool.y[:8], jnp.ones(8, bool)
    params = 0.3 * jax.random.normal(jax.random.key(2), (task.dim,))

    @jax.jit
    def replaced(index):
        now = core.resolve(part, index)
        moved, _ = now.examples(jax.random.key(0), params, x, y, mask, task)
        return jnp.any((moved != x).reshape(8, -1), axis=1).sum()

    assert [int(replaced(index)) for index in (0, 2, 3, 9)] == [1, 1, 6, 6]


def test_shares_up_to_the_same_most_run_in_one_program():
    def structure(fraction, most=0.8):
        spec = {"name": "adversarial", "steps": 1, "batch_size": 8, "fraction": fraction}
        return from_mapping(small(client=spec | {"most": most})).structure()

    assert structure(0.1) == structure(0.8)
    assert structure(0.1, None) != structure(0.8, None)
    with pytest.raises(ConfigError, match=r"client.fraction must be <= client.most = 0.8, got 0.9"):
        structure(0.9)


def one_round(params, how, **changes):
    pool, task = tiny_pool(), tiny_task()
    part = client(**changes)

    def train(number):
        def fetch(position):
            row = (position + 10 * number) % 40
            return pool.x[row] / 255.0, pool.y[row]

        local = LocalData(jnp.asarray(10), 10, jnp.asarray(0), fetch)
        key = jax.random.fold_in(jax.random.key(3), number)
        return part.apply(key, params, (), local, task)[0]

    return map_clients(train, how, jnp.arange(4))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_all_layouts_train_alike(steps):
    params = 0.3 * jax.random.normal(jax.random.key(2), (tiny_task().dim,))
    rounds = [
        jax.jit(functools.partial(one_round, how=Layout(at_once), steps=steps))(params)
        for at_once in (4, 1, 2)
    ]
    for other in rounds[1:]:
        np.testing.assert_allclose(other, rounds[0], rtol=2e-4, atol=1e-6)
    plain = jax.jit(functools.partial(one_round, how=Layout(4), steps=steps, eps=0.0))(params)
    assert np.abs(plain - rounds[0]).max() > 1e-3


def products(jaxpr, inside=False):
    """(inside a loop, has batch dimensions) of every matrix product in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield inside, bool(eqn.params["dimension_numbers"][1][0])
        loop = inside or eqn.primitive.name in ("while", "scan")
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, jax_core.ClosedJaxpr):
                    yield from products(inner.jaxpr, loop)
                elif isinstance(inner, jax_core.Jaxpr):
                    yield from products(inner, loop)


def test_pgd_of_the_first_local_step_runs_on_one_batch_at_the_servers_weights():
    """Nothing but the gradient of the weights is per client."""
    params = jnp.zeros(tiny_task().dim)
    result = list(products(jax.make_jaxpr(functools.partial(one_round, how=Layout(4)))(params)))
    assert [batched for inside, batched in result if inside] == [False] * 4
    layers = 2
    assert sum(batched for _, batched in result) == layers
    later = list(
        products(jax.make_jaxpr(functools.partial(one_round, how=Layout(4), steps=2))(params))
    )
    assert sum(batched for inside, batched in later if inside) > layers


def test_an_adversarial_experiment_resists_what_an_ordinary_one_does_not():
    losses = {}
    pgd = {"eps": 0.1, "step_size": 0.03}
    for name, fields in {"sgd": {}, "adversarial": pgd | {"pgd_steps": 5, "fraction": 1.0}}.items():
        spec = {"name": name, "steps": 4, "batch_size": 8, **fields}
        experiment = from_mapping(small(client=spec, rounds=30))
        program = program_of(experiment)
        replicas = replicas_of([experiment])
        state, _ = program.advance(program.init(replicas), replicas, 0, 30)
        task = task_on(program)
        x, y = program.test.x[:200] / program.source.scale, program.test.y[:200]
        loss = functools.partial(
            task.loss, state.server.params[0], y=y, mask=jnp.ones(len(y), bool)
        )
        moved = linf_pgd(jax.grad(loss), x, jax.random.key(5), num_steps=10, **pgd)
        losses[name] = float(loss(moved))
    assert losses["adversarial"] < 0.8 * losses["sgd"]
