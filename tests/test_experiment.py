"""`run`: its result, its folder, reproducibility, resuming after a kill, replicas, honesty."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import NumpyMlp, close, same_bits, small
from jax.flatten_util import ravel_pytree
from programs import program_of, replicas_of, train

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.report import plotting
from fedjax_sec.runs import config, results
from fedjax_sec.runs import source as source_lib
from fedjax_sec.runs.prepare import make_population, prepare
from fedjax_sec.runs.source import load_source

LONG = small(rounds=160, checkpoint={"every": 10}, evaluation={"every": 1})


def flat(params):
    return np.asarray(ravel_pytree(params)[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run in a folder, which the tests only read."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return fedjax_sec.run(small(), out=folder), folder


def test_result(finished):
    result, _ = finished
    metrics = result.metrics
    assert metrics["round"].tolist() == [0, 1, 2, 3]
    for name in ("accuracy", "loss"):
        assert metrics[name].shape == (4,) and np.isfinite(metrics[name]).all()
    assert metrics["per_class_accuracy"].shape == (4, 10)
    assert metrics["kept"].shape == metrics["update_norm"].shape == (4, 5)
    for name in ("kept", "train_loss"):  # nothing is trained before round 1
        assert np.isnan(metrics[name][0]).all() and np.isfinite(metrics[name][1:]).all()
    assert result.experiment == config.from_mapping(small())
    tree = result.params["params"]
    assert tree["hidden_0"]["kernel"].shape == (64, 6) and tree["output"]["bias"].shape == (10,)


def test_folder(finished):
    result, folder = finished
    assert config.load(folder / "config.yaml") == result.experiment
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert [row["accuracy"] for row in rows] == pytest.approx(result.metrics["accuracy"].tolist())
    assert len(rows[1]["kept"]) == 5 and "kept" not in rows[0]
    assert (folder / "figures" / "accuracy.png").stat().st_size > 1000
    assert (folder / "figures" / "accuracy.pdf").exists()


def test_summary(finished):
    result, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final"]["accuracy"] == pytest.approx(result.metrics["accuracy"][-1])
    best = int(np.argmax(result.metrics["accuracy"]))
    assert summary["best"]["accuracy"] == pytest.approx(result.metrics["accuracy"][best])
    assert summary["best"]["round"] == best
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[best])
    assert summary["best"].get("train_loss") == row.get("train_loss")
    assert summary["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
    assert summary["wall_seconds"] > summary["compile_seconds"] > 0
    parts = summary["compiled"]
    assert set(parts) == {"init", "evaluate", "advance 1"}
    longest = max(part["seconds"] for part in parts.values())  # they compile side by side
    assert 0 < longest <= summary["compile_seconds"]
    assert parts["advance 1"]["argument_bytes"] > 43 * 64  # the images at least
    assert summary["rounds_per_second"] > 0
    assert summary["versions"]["jax"] == jax.__version__
    assert jax.devices()[0].platform in summary["device"]
    assert {"git_revision", "host", "python"} <= summary.keys()
    data = summary["data"]
    assert (data["train"], data["test"], data["official_train"]) == (43, 360, 1437)
    assert data["subset"] and data["clients"] == 5 and data["unused_train"] == 0
    assert "subset: 43 of 1437" in data["label"] and any("43" in w for w in summary["warnings"])


@pytest.mark.parametrize("placement", ["random", "first"])
def test_the_summary_says_who_is_malicious(placement):
    changes = {"seed": 3, "threat.num_malicious": 2, "threat.placement": placement}
    one = config.from_mapping(small(), changes | {"attack": "sign_flip"})
    other = dataclasses.replace(one, seed=4)
    for result in train([one, other]):
        source = load_source(one)
        population, _ = make_population(result.experiment, source)
        summary = result.summary
        assert summary["malicious_clients"] == np.flatnonzero(population.malicious).tolist()
        assert (summary["placement"], summary["seed"]) == (placement, result.experiment.seed)
        assert summary["diverged"] is False
        if placement == "first":
            assert summary["malicious_clients"] == [0, 1]
    assert fedjax_sec.run(small()).summary["malicious_clients"] == []


def test_per_client_numbers_say_whose_they_are():
    everybody = fedjax_sec.run(small()).metrics
    assert "clients" not in everybody  # client i is entry i
    spec = small(
        server={"clients_per_round": 2},
        threat={"num_malicious": 2},
        attack="zero",
        evaluation={"every": 1},
    )
    result = fedjax_sec.run(spec)
    clients, norms = (result.metrics[name][1:] for name in ("clients", "update_norm"))
    assert clients.shape == norms.shape == (3, 2)
    malicious = np.isin(clients, result.summary["malicious_clients"])
    assert malicious.any() and not malicious.all()
    np.testing.assert_array_equal(norms == 0, malicious)  # they send zeros


def test_a_diverged_run_says_so_and_its_best_evaluation_is_a_finite_one(tmp_path):
    rate = {"client.optimizer.learning_rate": 1e30}
    result = fedjax_sec.run(small(), out=tmp_path / "run", **rate)
    assert result.summary["diverged"] is True and not np.isfinite(result.metrics["loss"][-1])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["diverged"] is True
    best = result.summary["best"]
    assert np.isfinite(best["loss"]) and best["round"] == 0


def test_the_figure_of_a_run_can_be_read_alone(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: drawn.append(figure))
    fedjax_sec.run(
        small(seed=3, attack="sign_flip", threat={"num_malicious": 1, "start": 2}),
        out=tmp_path / "run",
    )
    (axes,) = drawn[0].axes
    assert axes.get_title() == "digits (subset: 43 of 1437 train, 360 of 360 test), seed 3"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("round", "test examples (%)")
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["accuracy", "the attack begins (round 2)"]


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fedjax_sec.run(small())
    assert list(tmp_path.iterdir()) == []


def test_seeds_reproduce_to_the_bit(finished):
    again = fedjax_sec.run(small())
    same_bits(again.metrics, finished[0].metrics)
    same_bits(again.params, finished[0].params)
    other = fedjax_sec.run(small(), seed=1)
    assert not np.array_equal(flat(other.params), flat(again.params))


def test_on_evaluation_and_overrides():
    seen = []
    result = fedjax_sec.run(
        small(), rounds=2, on_evaluation=lambda done, rows: seen.append((done, rows[0]["round"]))
    )
    assert seen == [(0, 0), (1, 1), (2, 2)] and result.experiment.rounds == 2


# --- Folders ------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_run(finished, tmp_path):
    result, folder = finished
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*--overwrite"):
        fedjax_sec.run(small(), out=folder)
    with pytest.raises(ConfigError, match=r"another configuration; it differs in rounds, seed\."):
        fedjax_sec.run(small(), out=folder, resume=True, rounds=4, seed=1)
    again = fedjax_sec.run(small(), out=folder, resume=True)  # finished: read back
    written = json.loads((folder / "summary.json").read_text())
    digest = written.pop("sha256")  # of the rest
    assert again.params is None and again.summary == written and len(digest) == 64
    same_bits(again.metrics["accuracy"], result.metrics["accuracy"])
    assert (folder / "metrics.jsonl").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="in use by something else"):
            fedjax_sec.run(small(), out=tmp_path, **options)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_keys_added_by_a_later_version_are_no_difference(tmp_path):
    fedjax_sec.run(small(), out=tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    assert "execution:\n  clients: auto\n  chunk: null\n" in text
    older = text.replace("execution:\n  clients: auto\n  chunk: null\n", "")
    (tmp_path / "config.yaml").write_text(older)
    assert fedjax_sec.run(small(), out=tmp_path, resume=True).params is None  # read back
    with pytest.raises(ConfigError, match=r"it differs in execution\.clients"):
        (tmp_path / "config.yaml").write_text(older)
        fedjax_sec.run(small(execution={"clients": "map"}), out=tmp_path, resume=True)


def test_overwrite_replaces_a_run(tmp_path):
    fedjax_sec.run(small(), out=tmp_path / "out")
    fedjax_sec.run(small(), out=tmp_path / "out", overwrite=True, seed=3)
    assert config.load(tmp_path / "out" / "config.yaml").seed == 3
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_line_cut_short_is_repaired(tmp_path):
    folder = results.RunFolder(tmp_path)
    digests = [folder.append({"round": number, "loss": float("nan")}) for number in range(3)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "lo')
    assert [row["round"] for row in folder.rows()] == [0, 1, 2]
    assert folder.take_up(digests[:2], [0, 1]) == [
        {"round": 0, "loss": None},
        {"round": 1, "loss": None},
    ]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"round": 0, "loss": null}\n{"round": 1, "loss": null}\n'


# --- Resuming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    return fedjax_sec.run(LONG, out=folder), folder


def kill_after(lines, folder, file, env):
    """Starts the run as its own process and kills it when it has written that many lines."""
    command = "from fedjax_sec.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "run", str(file), "--out", str(folder)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end, "the run writes nothing"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 15, 47])
def test_a_killed_run_goes_on_to_the_same_bits(lines, tmp_path, uninterrupted, subprocess_env):
    whole, whole_folder = uninterrupted
    file, folder = tmp_path / "experiment.yaml", tmp_path / "out"
    file.write_text(config.dump_yaml(LONG))
    kill_after(lines, folder, file, subprocess_env)
    assert not (folder / "summary.json").exists()
    if lines == 15:
        with open(folder / "metrics.jsonl", "a") as metrics:
            metrics.write('{"round": 99, "accur')
    resumed = fedjax_sec.run(file, out=folder, resume=True)
    rows, expected = (
        (f / "metrics.jsonl").read_text().splitlines() for f in (folder, whole_folder)
    )
    assert rows == expected and len(rows) == LONG["rounds"] + 1
    same_bits(resumed.params, whole.params)
    same_bits(resumed.metrics, whole.metrics)
    if lines == 47:  # it went on from a checkpoint instead of starting again
        assert resumed.summary["rounds_per_second"] is not None
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {"150.json", "150-0", "160.json", "160-0"}


@pytest.mark.slow
def test_resuming_by_the_command_line(tmp_path, uninterrupted, subprocess_env):
    file, folder = tmp_path / "experiment.yaml", tmp_path / "out"
    file.write_text(config.dump_yaml(LONG))
    kill_after(25, folder, file, subprocess_env)
    command = "from fedjax_sec.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "run", str(file), "--out", str(folder), "--resume"],
        env=subprocess_env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "metrics.jsonl").read_text() == (
        uninterrupted[1] / "metrics.jsonl"
    ).read_text()


# --- Replicas of one program --------------------------------------------------------------------


def replicas():
    """Three runs of one structure: other seeds, learning rates and malicious clients."""
    outcome = []
    for seed, rate, malicious in ((0, 0.2, 1), (1, 0.1, 2), (2, 0.05, 1)):
        changes = {
            "seed": seed,
            "client.optimizer.learning_rate": rate,
            "threat.num_malicious": malicious,
            "attack": {"name": "sign_flip", "scale": 1.0 + seed},
            "rounds": 2,
            "evaluation.every": 2,
        }
        outcome.append(config.from_mapping(small(), changes))
    return outcome


@pytest.mark.slow
def test_one_program_serves_all_replicas_however_they_are_batched():
    cells = replicas()
    alone = [train([cell])[0] for cell in cells]
    assert len({result.summary["final"]["loss"] for result in alone}) == 3
    for at_once in (None, 1, 2, 3):
        together = train(cells, at_once=at_once)
        for one, other in zip(alone, together, strict=True):
            for name, values in one.metrics.items():
                np.testing.assert_allclose(
                    values, other.metrics[name], rtol=1e-4, atol=1e-5, err_msg=name
                )
            np.testing.assert_allclose(flat(one.params), flat(other.params), rtol=1e-3, atol=1e-5)


CNN = {"name": "small_cnn", "channels": [4], "hidden": 8}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", CNN], ids=["mlp", "cnn"])
def test_the_order_of_training_changes_only_rounding(model):
    changes = {"model": model, "client": {"name": "sgd", "steps": 2, "batch_size": 4}}
    layouts = [
        {"clients": "vmap"},
        {"clients": "map"},
        {"clients": "chunked", "chunk": 2},  # of 5 clients: a remainder is left
        {"clients": "chunked", "chunk": 99},
        {"clients": "auto"},
    ]
    first, *others = [fedjax_sec.run(small(**changes, execution=layout)) for layout in layouts]
    assert len(set(first.metrics["loss"].tolist())) == 4  # so there is something to compare
    for other in others:
        close(other.params, first.params, rtol=1e-4, atol=1e-5)
    outcome = [result.summary["layout"]["at_once"] for result in (first, *others)]
    assert outcome == [5, 1, 2, 5, 1 if model is CNN and jax.default_backend() == "cpu" else 5]


@pytest.mark.slow
def test_lowerings_of_convolutions_change_only_rounding():
    results = [
        fedjax_sec.run(small(model=CNN | {"convolution": lowering}))
        for lowering in ("xla", "patches", "rows")
    ]
    for other in results[1:]:
        close(other.params, results[0].params, rtol=1e-4, atol=1e-5)


def test_one_compilation_for_each_structure():
    cells = replicas()
    program = program_of(cells[0])
    train(cells[:1], program=program)
    traces = program.traces
    assert 1 <= traces <= 2
    for cell in cells[1:]:
        train([cell], program=program)
    assert program.traces == traces
    with pytest.raises(ConfigError, match="differ in structure"):
        train([cells[0], config.from_mapping(small(), {"defense": "median"})])


def test_the_state_is_donated():
    cells = replicas()
    program = program_of(cells[0])
    stacked = replicas_of(cells[:1])
    state = program.init(stacked)
    new, _ = program.advance(state, stacked, 0, 2)
    assert state.server.params.is_deleted() and not new.server.params.is_deleted()


# --- What is measured ---------------------------------------------------------------------------


def hand_accuracy(result, source, labels):
    inputs = int(np.prod(source.x_test.shape[1:]))
    mlp = NumpyMlp(inputs, 6, source.num_classes, source.mean[0], source.std[0])
    return mlp.accuracy(flat(result.params), source.x_test / source.scale, labels)


def test_nothing_moves_between_host_and_device_inside_a_stretch():
    experiment = config.from_mapping(small())
    program = program_of(experiment).compile([prepare(experiment)])
    replicas = replicas_of([experiment])
    state = program.init(replicas)
    with jax.transfer_guard("disallow"):  # explicit transfers, such as the round's number, pass
        state, _ = program.advance(state, replicas, 0, 1)
        program.evaluate(state, replicas)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            state.server.params + np.ones((1, 1))  # the guard is on


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_profile_holds_one_stretch_of_rounds(rounds, tmp_path):
    fedjax_sec.run(small(rounds=rounds), out=tmp_path / "run", profile=tmp_path / "profile")
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    with pytest.raises(ConfigError, match="profile: the run in .* is finished"):
        fedjax_sec.run(small(rounds=rounds), out=tmp_path / "run", resume=True, profile=tmp_path)


def test_metrics_are_those_of_the_test_set(finished):
    result, _ = finished
    source = load_source(result.experiment)
    expected = hand_accuracy(result, source, source.y_test)
    assert result.metrics["accuracy"][-1] == pytest.approx(expected, abs=1e-6)
    share = np.bincount(source.y_test) / len(source.y_test)
    assert result.metrics["per_class_accuracy"][-1] @ share == pytest.approx(expected, abs=1e-5)


def test_training_labels_never_enter_a_test_metric(monkeypatch):
    """Trained on wrong labels, the model is judged by the right ones."""
    rounds = {"rounds": 60, "evaluation.every": 60, "data.max_train": None, "client.batch_size": 64}
    source = load_source(config.from_mapping(small(), rounds))
    wrong = source._replace(y_train=(source.y_train + 1) % 10)
    monkeypatch.setattr(source_lib, "_load", lambda *args: wrong)
    result = train([config.from_mapping(small(), rounds)])[0]
    expected = hand_accuracy(result, source, source.y_test)
    shifted = hand_accuracy(result, source, (source.y_test + 1) % 10)
    assert result.metrics["accuracy"][-1] == pytest.approx(expected, abs=1e-6)
    assert expected < 0.2 and shifted > 0.5  # it has learned the wrong labels


def test_attack_success_is_measured_on_stamped_test_images():
    attack = {"name": "pattern", "size": 3, "target": 4}
    base = small(attack=attack, threat={"num_malicious": 1}, rounds=1)
    for exclude in (True, False):
        result = fedjax_sec.run(base, **{"evaluation.exclude_target": exclude})
        source = load_source(result.experiment)
        stamped = source.x_test / source.scale
        stamped[:, :3, :3] = 1.0
        mlp = NumpyMlp(64, 6, 10, source.mean[0], source.std[0])
        hit = mlp.forward(flat(result.params), stamped)[2].argmax(1) == 4
        counted = source.y_test != 4 if exclude else np.ones(len(hit), bool)
        got = result.metrics["attack_success_rate"][-1]
        assert got == pytest.approx(hit[counted].mean(), abs=1e-5)


def test_an_attack_without_effect_is_reported():
    result = fedjax_sec.run(
        small(rounds=1, threat={"num_malicious": 1, "knowledge": "omniscient"}),
        attack={"name": "sign_flip", "scale": 1.0},
    )
    assert not any("changed no update" in w for w in result.summary["warnings"])
    idle = small(
        rounds=1,
        threat={"num_malicious": 1},
        attack="zero",
        client={
            "name": "sgd",
            "steps": 1,
            "batch_size": 9,
            "optimizer": {"name": "sgd", "learning_rate": 0.0},
        },
    )
    warnings = fedjax_sec.run(idle).summary["warnings"]
    assert "the attack changed no update in any of the 1 rounds" in warnings


def test_normalisation_is_the_data_sets_own_unless_given():
    mine = fedjax_sec.run(small(rounds=1))
    source = load_source(mine.experiment)
    spelled = {"data.mean": list(source.mean), "data.std": list(source.std)}
    same = fedjax_sec.run(small(rounds=1), **spelled)
    same_bits(mine.params, same.params)
    other = program_of(
        config.from_mapping(small(), {"data.mean": [0.0], "data.std": [2.0]})
    ).problem
    assert (other.inputs.mean, other.inputs.std) == ((0.0,), (2.0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.mean": [0.1]}, "give both of mean and std or neither"),
        ({"data.mean": [0.1, 0.2], "data.std": [1.0, 1.0]}, "data.mean must hold 1 numbers"),
        ({"data.mean": [0.1], "data.std": [0.0]}, r"data.std\[0\] must be > 0"),
    ],
)
def test_bad_normalisation(changes, message):
    with pytest.raises(ConfigError, match=message):
        fedjax_sec.run(small(rounds=1), **changes)
