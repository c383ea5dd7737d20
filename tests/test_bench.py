"""The benchmark command: what it times, what it writes, what it refuses."""

import json
import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from jax.experimental.compilation_cache import compilation_cache
from programs import classification, problem_of
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import bench, cli
from fedjax_sec.bench import (
    aggregators,
    busy,
    fixed,
    inversion,
    memory,
    order,
    peers,
    rounds,
    scaling,
    timing,
)
from fedjax_sec.core import registry
from fedjax_sec.core.types import LocalData
from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.ops.client_axis import Layout
from fedjax_sec.round import Pool, make_task
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import execution
from fedjax_sec.runs.prepare import prepare
from fedjax_sec.runs.tuning import Tuning


def test_cases_take_turns_and_slow_ones_fewer(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds[calls.count(name) - 1]

        return timing.Case(name, call)

    quick = work("quick", [9.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    slow = work("slow", [30.0] * 9)
    result = timing.take_turns([quick, slow], repeats=5, at_most=60.0)
    assert calls[:6] == ["quick", "slow", "quick", "slow", "quick", "slow"]
    assert result["quick"] == timing.Timing(3.0, 1.0, 5.0, 5)  # the first call is not timed
    assert result["slow"].repeats == 3


def test_the_machine_is_measured():
    rates = timing.measure_machine(size=64, copied=1000, repeats=3)
    assert rates.flops > 1e6 and rates.bytes > 1e5


def test_compiling_anew_reads_no_compiled_program(tmp_path):
    """Also where JAX has used its cache before in this process, and it is used again after."""
    read = []

    def note(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            read.append(event)

    def compile_again():
        jax.clear_caches()
        read.clear()
        jax.jit(lambda x: jnp.sin(x) * 3 + 1).lower(jnp.ones(7)).compile()
        return len(read)

    names = (
        "compilation_cache_dir",
        "persistent_cache_min_compile_time_secs",
        "enable_compilation_cache",
    )
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.monitoring.register_event_listener(note)
    try:
        for name, value in zip(before, (str(tmp_path), 0.0, True), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        compile_again()
        assert compile_again()
        with timing.compiling_anew():
            assert not compile_again()
        assert compile_again()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.monitoring.unregister_event_listener(note)


def test_every_rule_is_what_its_name_says():
    updates = jnp.asarray(np.random.default_rng(0).normal(size=(12, 40)), jnp.float32)
    result = {
        n: fedjax_sec.aggregate(updates, r.defense) for n, r in aggregators.rules(12, 40).items()
    }
    np.testing.assert_allclose(result["mean"], updates.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result["median"], jnp.median(updates, axis=0), rtol=1e-5)
    clipped = result.pop("centered_clipping")  # a radius that clips none of these
    np.testing.assert_allclose(clipped, result["mean"], rtol=1e-4, atol=1e-6)
    assert len({tuple(np.asarray(a).round(5)) for a in result.values()}) == len(result)


def test_bench_writes_machine_command_and_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "measure_machine", lambda: timing.Rates(1e9, 1e9))
    out = tmp_path / "results" / "b.json"
    arguments = ["bench", "--out", str(out), "--only", "krum", "--only", "mean", "--size", "8,300"]
    monkeypatch.setattr("sys.argv", ["fedjax-sec", *arguments])
    done = CliRunner().invoke(cli.app, [*arguments, "--repeats", "3", "--no-peers"])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [row["rule"] for row in report["rows"]] == ["mean", "krum"]
    assert report["rows"][1]["limit ms"] == pytest.approx(1e3 * max(8 * 8 * 300, 4 * 9 * 300) / 1e9)
    assert report["rows"][0]["ours ms"] > 0 and "| krum" in done.output
    assert report["command"].startswith("fedjax-sec bench --out")
    assert report["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kurm"], "unknown 'kurm'. Did you mean 'krum'?"),
        (["--size", "51"], "--size must be K,D such as 51,80000 with K >= 4, got '51'"),
        (["--size", "3,10"], "got '3,10'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path / "b.json"), *arguments])
    assert done.exit_code == 2 and message in done.output.replace("\n", " ")


@pytest.mark.skipif("byzfl" in peers.missing(), reason="ByzFL is not installed")
def test_byzfl_agrees_where_the_rules_are_the_same():
    updates = np.random.default_rng(0).normal(size=(12, 40)).astype(np.float32)
    theirs = peers.byzfl_aggregators(3, aggregators.ITERATIONS, aggregators.RADIUS)
    ours = aggregators.rules(12, 40)
    for name in ("mean", "median", "trimmed_mean", "near_median", "centered_clipping"):
        for case in peers.byzfl_cases(theirs[name], updates):
            result = fedjax_sec.aggregate(updates, ours[name].defense)
            np.testing.assert_allclose(result, np.asarray(case.call()), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_layers():
    one = rounds.Workload({"model": "mlp"}, 1, images=1)
    # forward, weight gradients, and the gradient of the hidden layer's activations
    assert rounds.flops("", one) == 2 * (79_400 + 79_400 + 1_000)
    attacked = rounds.Workload({"model": "mlp"}, 1, images=0, attacked=3)
    assert rounds.flops("", attacked) == 3 * 2 * (79_400 + 79_400)
    for name, workload in rounds.workloads().items():
        shape = (32, 32, 3) if "cifar" in workload.experiment["data"]["name"] else (28, 28, 1)
        model = config_lib.from_mapping(workload.experiment).model.make(shape, 10)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        cost = jax.jit(model.apply).lower(shapes, image).cost_analysis()
        every = rounds.products(workload)[1]
        assert 2 * every == pytest.approx(cost["flops"], rel=0.05), name


@pytest.mark.parametrize("name", ["mlp", "fltrust_cnn"])
@pytest.mark.parametrize("kind", ["one step", "epochs", "pgd"])
@pytest.mark.parametrize("peer", ["Simulator", "Vectorised"])
def test_the_pytorch_rounds_compute_our_updates(peer, name, kind):
    """The peer does the same work: same weights and data, same updates."""
    pytest.importorskip("torch", reason="PyTorch is not installed (extra `bench`)")
    from fedjax_sec.bench import torch_loop

    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (24, 28, 28, 1), np.uint8)
    y = rng.integers(0, 10, 24).astype(np.int32)
    pgd = {"eps": 0.1, "step_size": 0.03, "pgd_steps": 5, "fraction": 1.0, "random_start": False}
    steps = {"epochs": 2} if kind == "epochs" else {"steps": 1}
    model = registry.models.build(name).make((28, 28, 1), 10)
    problem = problem_of(
        model=model,
        input_shape=(28, 28, 1),
        num_classes=10,
        pixel_scale=255.0,
        mean=(0.2,),
        std=(0.3,),
        num_clients=3,
        clients_per_round=3,
        omniscient=False,
        layout=Layout(3),
    )
    task = make_task(problem, Pool(jnp.asarray(x), jnp.asarray(y)), classification())
    optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}
    spec = {"name": "sgd", "batch_size": 8, "optimizer": optimizer, **steps}
    client = registry.clients.build(
        spec | ({"name": "adversarial", **pgd} if kind == "pgd" else {})
    )
    variables = jax.jit(model.init)(jax.random.key(1))
    params = jax.flatten_util.ravel_pytree(variables)[0]

    def train(number):
        def fetch(position):
            row = 8 * number + position
            return task.inputs.decode(jnp.asarray(x)[row]), jnp.asarray(y)[row]

        local = LocalData(jnp.asarray(8), 8, jnp.asarray(0), fetch)
        return client.apply(jax.random.key(number), params, client.init(task.dim), local, task)[0]

    ours = [task.unravel(train(number)) for number in range(3)]

    network = torch_loop.network(name)
    torch_loop.load_parameters(network, variables)
    loop = getattr(torch_loop, peer)(
        network,
        x,
        y,
        [range(8 * i, 8 * i + 8) for i in range(3)],
        batch_size=8,
        **steps,
        momentum=0.9,
        aggregate=lambda stack: stack.mean(0),
        mean=0.2,
        std=0.3,
        pgd=pgd if kind == "pgd" else None,
    )
    before = [weight.detach().clone() for weight in loop.weights]
    loop.round()
    for row, update in zip(loop.stack, ours, strict=True):
        expected = torch_loop.network(name)
        torch_loop.load_parameters(expected, update)
        parts = row.split([weight.numel() for weight in before])
        for result, weight in zip(parts, expected.parameters(), strict=True):
            np.testing.assert_allclose(
                result.numpy(), weight.detach().flatten().numpy(), rtol=2e-3, atol=2e-6
            )
    moved = loop.weights[0].detach() - before[0]
    mean = loop.stack.mean(0)[: moved.numel()].view_as(moved)
    np.testing.assert_allclose(moved.numpy(), mean.numpy(), atol=1e-6)


def test_the_pytorch_attack_is_alie():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `bench`)")
    from fedjax_sec.bench import torch_loop

    updates = np.random.default_rng(0).normal(size=(9, 30)).astype(np.float32)
    stack = torch.from_numpy(updates.copy())
    torch_loop.alie(4, 1.5)(stack)
    ours = fedjax_sec.attack(updates, "alie", malicious=np.arange(9) < 4, z=1.5)
    np.testing.assert_allclose(stack.numpy(), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["round"], "Unknown benchmark 'round'. Did you mean 'rounds'?"),
        (
            ["rounds", "--size", "8,300"],
            "--size belongs to the benchmarks aggregators, memory, order, not to 'rounds'",
        ),
        (["scaling", "--only", "seed_s"], "--only: unknown 'seed_s'. Did you mean 'seeds'?"),
    ],
)
def test_bench_refuses_what_it_does_not_know(arguments, message, tmp_path):
    out = tmp_path / "b.json"
    done = CliRunner().invoke(cli.app, ["bench", *arguments, "--out", str(out)])
    assert done.exit_code == 2 and not out.exists()
    assert message in " ".join(done.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["K", "seeds"])
def test_scaling_has_a_row_for_each_size(axis, monkeypatch):
    monkeypatch.setattr(scaling, "CLIENTS", (8, 9))
    monkeypatch.setattr(scaling, "SEEDS", (1, 2))
    monkeypatch.setattr(scaling, "RULES", ("mean", "krum"))
    monkeypatch.setattr(scaling, "MLP", small(rounds=2))
    rows = list(scaling.run(timing.Rates(1e9, 1e9), [axis], repeats=1))
    if axis == "K":
        assert [(row["K"], row["rule"]) for row in rows] == [
            (8, "mean"),
            (8, "krum"),
            (9, "mean"),
            (9, "krum"),
        ]
        assert all(row["ours ms"] > 0 for row in rows)
    else:
        assert [row["seeds"] for row in rows] == [1, 2]
        assert all(row["faster"] > 0 for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
def test_peak_memory_counts_what_a_rule_allocates(monkeypatch):
    """A whole second stack is seen, and none where the rule works in blocks."""
    shape = (16, 2_000_000)
    (row,) = memory.run(["median"], shape)
    assert row["stack MiB"] == pytest.approx(122.07, abs=0.01)
    assert 1.0 <= row["peak / stack"] < 1.5
    copying = memory.CHILD.replace("_aggregate.lower", "jax.jit(lambda d, s, *rest: s + 1).lower")
    monkeypatch.setattr(memory, "CHILD", copying)
    (row,) = memory.run(["median"], shape)
    assert 1.9 < row["peak / stack"] < 2.3


def test_the_trivial_round_is_timed():
    row = fixed._trivial_round(repeats=3, rounds=3)
    assert 0 < row["ms"] < 1e4


def test_a_stopped_benchmark_keeps_the_rows_that_it_has(tmp_path, monkeypatch):
    def interrupted(*_):
        yield {"what": "first", "ms": 1.0}
        raise ValueError("stopped")

    monkeypatch.setattr(timing, "measure_machine", lambda: timing.Rates(1e9, 1e9))
    monkeypatch.setitem(bench.SUITES, "fixed", bench.Suite(tuple, interrupted))
    out = tmp_path / "b.json"
    done = CliRunner().invoke(cli.app, ["bench", "fixed", "--out", str(out)])
    assert done.exit_code == 2
    assert json.loads(out.read_text())["rows"] == [{"what": "first", "ms": 1.0}]


def test_reconstructions_are_timed(monkeypatch):
    monkeypatch.setattr(inversion, "MESSAGES", (2,))
    monkeypatch.setattr(inversion, "ATTACK", inversion.ATTACK | {"iterations": 8})
    (row,) = inversion.run(timing.Rates(1e9, 1e9), ["mlp"], with_peers=False)
    assert row["messages"] == 2 and row["ours a minute"] == pytest.approx(120 / row["ours s"])


def test_every_way_finds_the_same_median():
    rows = list(order.run(timing.Rates(1e9, 1e9), repeats=3, clients=(9,), dim=50))
    assert {row["way"] for row in rows} == {"jnp.sort", "counting", "network"}
    assert all(row["times the limit"] == pytest.approx(row["ms"] / row["limit ms"]) for row in rows)


def test_the_share_of_busy_time_is_that_of_the_union():
    assert busy.union([(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (4.0, 5.0)]) == 4.0
    assert busy.busy_share(lambda: jnp.ones(2).block_until_ready()) == {}  # no device of its own


def test_queued_calls_are_counted_as_so_many(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "on_cpu", lambda: False)
    case = timing.queued("one", lambda: calls.append(0), lambda _: calls.append("wait"))
    case.call()
    assert case.times == timing.QUEUED == len(calls) - 1 and calls[-1] == "wait"
    slept = timing.Case("slow", lambda: time.sleep(0.02), times=10)
    assert timing.take_turns([slept], 3)["slow"].median < 0.01


def test_the_page_shows_what_was_measured():
    """Every table of docs/performance.md is the one that the committed results give."""
    root = Path(__file__).parents[1]
    page = runpy.run_path(str(root / "benchmarks" / "page.py"))
    text = (root / "docs" / "performance.md").read_text()
    assert all(f"<!-- table {name} -->" in text for name in page["TABLES"])
    assert page["fill"](text) == text
    assert page["fill"](text.replace("| krum", "| kurm")) == text


def test_rounds_are_timed_as_in_a_long_run(monkeypatch):
    """A run of a few rounds is compiled lightly, and a benchmark's has no more."""
    monkeypatch.delenv("FEDJAX_SEC_TUNING", raising=False)
    prepared, asked = prepare(config_lib.from_mapping(small())), []
    measure = lambda options, *_: asked.append(options) or Tuning(options[1], {"a": 1.0})  # noqa: E731
    monkeypatch.setattr(execution, "tune", measure)
    assert execution.choose_layout(prepared).optimization == 2 or not on_cpu()
    asked.clear()
    program = rounds.lasting_program([prepared])
    assert program.tuning.optimization is None and len(asked) == 1
    assert program.tuning.milliseconds == {"a": 1.0}
