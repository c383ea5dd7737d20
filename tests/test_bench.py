"""The benchmark command: what it times, what it writes, what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import cli
from fedjax_sec.bench import aggregators, peers, timing


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
    found = timing.take_turns([quick, slow], repeats=5, at_most=60.0)
    assert calls[:6] == ["quick", "slow", "quick", "slow", "quick", "slow"]
    assert found["quick"] == timing.Timing(3.0, 1.0, 5.0, 5)  # the first call is not timed
    assert found["slow"].repeats == 3


def test_the_machine_is_measured():
    rates = timing.measure_machine(size=64, copied=1000, repeats=3)
    assert rates.flops > 1e6 and rates.bytes > 1e5


def test_every_rule_is_what_its_name_says():
    updates = jnp.asarray(np.random.default_rng(0).normal(size=(12, 40)), jnp.float32)
    found = {
        n: fedjax_sec.aggregate(updates, r.defense) for n, r in aggregators.rules(12, 40).items()
    }
    np.testing.assert_allclose(found["mean"], updates.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["median"], jnp.median(updates, axis=0), rtol=1e-5)
    clipped = found.pop("centered_clipping")  # a radius that clips none of these
    np.testing.assert_allclose(clipped, found["mean"], rtol=1e-4, atol=1e-6)
    assert len({tuple(np.asarray(a).round(5)) for a in found.values()}) == len(found)


def test_bench_writes_machine_command_and_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "measure_machine", lambda: timing.Rates(1e9, 1e9))
    out = tmp_path / "results" / "b.json"
    arguments = ["bench", "--out", str(out), "--rule", "krum", "--rule", "mean", "--size", "8,300"]
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
        (["--rule", "kurm"], "unknown rule 'kurm'. Did you mean 'krum'?"),
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
            found = fedjax_sec.aggregate(updates, ours[name].defense)
            np.testing.assert_allclose(found, np.asarray(case.call()), rtol=1e-4, atol=1e-5)
