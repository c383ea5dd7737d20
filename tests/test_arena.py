"""Every attack against every defence: combinations, refusals, tables, heat maps, resuming."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import small
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import sweeps
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError
from fedjax_sec.report import arena as report_lib
from fedjax_sec.report import plotting
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.experiment import Result
from fedjax_sec.sweeps.arena import NO_ATTACK, choices

BASE = small(threat={"num_malicious": 2})


def plan(attacks="sign_flip", defenses="median", seeds=1, base=BASE, **overrides):
    return sweeps.plan_arena(base, attacks, defenses, seeds, overrides)


def pairs(arena):
    return [(c.labels["attack"], c.labels["defense"], c.experiment.seed) for c in arena.cells]


# --- Combinations ---------------------------------------------------------------------------------


def test_no_attack_and_plain_mean_are_always_there():
    arena = plan("sign_flip,zero", "median", seeds=2)
    assert arena.attacks == (NO_ATTACK, "sign_flip", "zero")
    assert arena.defenses == ("mean", "median") and arena.reference == "mean"
    wanted = [
        (attack, rule, seed)
        for attack in arena.attacks
        for rule in arena.defenses
        for seed in (0, 1)
    ]
    assert pairs(arena) == wanted and not arena.refused
    for cell in arena.cells:
        names = [stage.registered_name for stage in cell.experiment.attack.stages]
        assert names == ([] if cell.labels["attack"] == NO_ATTACK else [cell.labels["attack"]])
        rules = [stage.registered_name for stage in cell.experiment.defense.stages]
        assert rules == [cell.labels["defense"]]
        assert cell.experiment.rounds == 3


def test_the_reference_is_the_plain_mean_whatever_its_label():
    arena = plan(defenses={"FedAvg": "mean", "median": "median"})
    assert arena.defenses == ("FedAvg", "median") and arena.reference == "FedAvg"
    arena = plan(defenses=[{"name": "mean", "weighted": False}])
    assert arena.defenses == ("mean", "mean weighted=False") and arena.reference == "mean"
    with pytest.raises(ConfigError, match="'mean' is the column of the plain mean"):
        plan(defenses={"mean": "median"})


def test_refused_combinations_stop_no_other():
    arena = plan("sign_flip", "krum,bulyan,median")  # bulyan needs 11 clients, there are 5
    assert {(one.attack, one.defense) for one in arena.refused} == {
        (attack, rule)
        for attack in (NO_ATTACK, "sign_flip")
        for rule in ("bulyan", "krum")  # 2 f + 2 = 6 clients
    }
    assert "bulyan needs 4 f + 3 <= K" in next(
        one.reason for one in arena.refused if one.defense == "bulyan"
    )
    assert {rule for _, rule, _ in pairs(arena)} == {"mean", "median"}
    nobody = plan(base=small(), attacks="sign_flip,zero")
    assert [one.attack for one in nobody.refused] == ["sign_flip"] * 2 + ["zero"] * 2
    assert "num_malicious is 0" in nobody.refused[0].reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attacks": "sign_flp"}, "attacks: sign_flp.*unknown attack.*Did you mean 'sign_flip'"),
        ({"defenses": "medain"}, "defenses: medain.*unknown defense.*Did you mean 'median'"),
        ({"attacks": [{"name": "sign_flip", "scal": 2}]}, "unknown key 'scal'"),
        ({"attacks": "zero,zero"}, "'zero' is there twice"),
        ({"attacks": {NO_ATTACK: "zero"}}, "is the row without any"),
        ({"defenses": []}, "defenses is empty"),
        ({"defenses": "median+mean"}, "exactly one aggregator"),
        ({"seeds": 0}, "seeds must be a number of seeds >= 1"),
        ({"seeds": [1, 1]}, "a list of different ones"),
        ({"base": BASE | {"seed": 5}, "seeds": [0, 1]}, "experiment.seed = 5 would be ignored"),
        ({"base": {"grid": {}}}, "this is a sweep: it has the key 'grid'"),
        ({"base": BASE | {"rounds": 0}}, "rounds must be >= 1"),
        ({"attack": "zero"}, "attack would do nothing: an arena replaces attack"),
        ({"defense.num_byzantine": 1}, "an arena replaces defense in every combination"),
        ({"seed": 3}, "seed would be ignored; give seeds"),
        ({"attacks": {"a b": "zero", "a-b": "sign_flip"}}, "two combinations have the same name"),
    ],
)
def test_mistakes_are_errors(change, said):
    with pytest.raises(ConfigError, match=said):
        plan(**change)


def test_choices_in_every_form(tmp_path):
    strong = {"name": "sign_flip", "scale": 9}
    assert choices("zero", "attack") == {"zero": "zero"}
    assert choices([strong, "zero"], "attack") == {"sign_flip scale=9": strong, "zero": "zero"}
    assert choices(strong, "attack") == {"sign_flip scale=9": strong}
    assert choices({"strong": strong}, "attack") == {"strong": strong}
    assert choices("[zero, {name: sign_flip, scale: 9}]", "attack") == choices(
        ["zero", strong], "attack"
    )
    assert choices([None, "none", "zero"], "attack") == {"zero": "zero"}
    assert choices([["clip_norm", "median"]], "defense") == choices("clip_norm+median", "defense")
    path = tmp_path / "lists.yaml"
    path.write_text("attacks: {strong: {name: sign_flip, scale: 9}}\ndefenses: [median, krum]\n")
    assert choices(path, "attack") == {"strong": strong}
    assert choices(str(path), "defense") == {"median": "median", "krum": "krum"}
    path.write_text("[median]\n")
    assert choices(path, "defense") == {"median": "median"}
    path.write_text("defenses: [median]\n")
    with pytest.raises(ConfigError, match="holds defenses, and no attacks"):
        choices(path, "attack")
    with pytest.raises(ConfigError, match="No configuration file"):
        choices("none.yaml", "attack")
    built = config_lib.from_mapping(BASE | {"attack": strong}).attack.stages[0]
    assert list(choices([built], "attack").values()) == [{"name": "sign_flip", "scale": 9.0}]


def test_seeds_begin_at_the_bases():
    arena = plan(base=BASE | {"seed": 7}, seeds=3)
    assert {seed for _, _, seed in pairs(arena)} == {7, 8, 9}
    assert {seed for _, _, seed in pairs(plan(seeds=[4, 2]))} == {4, 2}


def test_overrides_are_of_every_experiment():
    arena = plan(**{"client.l2": 0.5, "rounds": 2})
    assert {(c.experiment.client.l2, c.experiment.rounds) for c in arena.cells} == {(0.5, 2)}


def test_a_common_backdoor_is_measured_without_an_attack():
    def backdoors(attacks):
        cells = plan(attacks, "median").cells
        return [one.experiment.backdoor for one in cells if one.labels["attack"] == NO_ATTACK]

    one = {"name": "trojan", "target": 3}
    assert all(b.target == 3 for b in backdoors({"a": one, "b": [one, "boost"], "c": "zero"}))
    assert backdoors({"a": one, "b": {"name": "trojan", "target": 4}}) == [None, None]
    assert backdoors("sign_flip") == [None, None]


def test_what_its_data_refuses_is_refused_too(tmp_path):
    """Of five digits no client holds class 9: known once the data is dealt out."""
    base = small(threat={"num_malicious": 2}, data={"max_train": 5}) | {
        "client": BASE["client"] | {"batch_size": 1}
    }
    planned = plan({"flip": {"name": "label_flip", "base": 9, "target": 0}}, base=base, seeds=2)
    assert not planned.refused
    arena, prepared = sweeps.admit(planned, tmp_path)
    assert [(one.attack, one.defense) for one in arena.refused] == [
        ("flip", "mean"),
        ("flip", "median"),
    ]
    assert "no malicious client holds an example of base class 9" in arena.refused[0].reason
    assert "(seed 0)" in arena.refused[0].reason
    assert {attack for attack, _, _ in pairs(arena)} == {NO_ATTACK}
    assert set(prepared) == {cell.name for cell in arena.cells}
    with pytest.raises(ConfigError, match="batch_size"):  # nothing at all can be run
        sweeps.admit(plan(base=base | {"client": BASE["client"] | {"batch_size": 99}}), tmp_path)


def test_what_is_prepared_is_not_prepared_again(tmp_path, monkeypatch):
    arena, prepared = sweeps.admit(plan(), tmp_path)
    launched = []

    class Idle:
        def launch(self, out, groups, **options):
            launched.extend(one for group in groups for one in group.prepared)

    monkeypatch.setattr(sweeps.groups, "prepare", None)  # which would be an error to call
    with pytest.raises(ConfigError, match="4 of 4 runs .* are not finished"):
        sweeps.run_cells(arena.cells, tmp_path, launcher=Idle(), prepared=prepared)
    assert {id(one) for one in launched} == {id(one) for one in prepared.values()}


# --- Tables ---------------------------------------------------------------------------------------


def result_of(cell, accuracy, success=math.nan, honest=1.0, malicious=1.0, diverged=False):
    """A finished run with two evaluations; what was kept differs between the two."""
    metrics = {
        "round": np.array([0.0, 1.0, 3.0]),
        "accuracy": np.array([0.1, 0.2, accuracy]),
        "kept_honest": np.array([np.nan, honest - 0.1, honest + 0.1]),
        "kept_malicious": np.array([np.nan, malicious, malicious]),
    }
    if not math.isnan(success):
        metrics["attack_success_rate"] = np.array([0.0, 0.0, success])
    summary = {
        "final": {name: values[-1] for name, values in metrics.items()},
        "best": {"accuracy": accuracy, "round": 3.0},
        "data": {"label": "digits"},
        "diverged": diverged,
        "malicious_clients": [0, 1],
    }
    return Result(cell.experiment, metrics, summary, None)


#: (attack, defence) -> accuracies of two seeds, and their backdoor success.
NUMBERS = {
    (NO_ATTACK, "mean"): ((0.90, 0.94), (0.01, 0.03)),
    (NO_ATTACK, "median"): ((0.85, 0.91), (0.02, 0.02)),
    ("sign_flip", "mean"): ((0.10, 0.30), ()),
    ("sign_flip", "median"): ((0.80, 0.82), ()),
    ("trojan", "mean"): ((0.88, 0.90), (0.9, 1.0)),
    ("trojan", "median"): ((0.70, 0.72), (0.2, 0.4)),
}


@pytest.fixture
def finished():
    arena = plan("sign_flip,trojan", "median,bulyan", seeds=2)
    results = []
    for cell in arena.cells:
        attack, rule = cell.labels["attack"], cell.labels["defense"]
        accuracies, successes = NUMBERS[attack, rule]
        seed = cell.experiment.seed
        results.append(
            result_of(
                cell,
                accuracies[seed],
                successes[seed] if successes else math.nan,
                honest=0.6 if rule == "median" else 1.0,
                malicious=0.25 if (attack, rule) == ("trojan", "median") else 1.0,
                diverged=(attack, rule, seed) == ("sign_flip", "mean", 0),
            )
        )
    return arena, results


def test_the_frame_has_a_row_a_combination_and_one_for_the_worst(finished):
    frame = report_lib.to_frame(report_lib.score(*finished)).set_index(["attack", "defense"])
    assert len(frame) == 4 * 3  # no attack, two attacks, the worst; mean, median, bulyan
    for (attack, rule), (accuracies, successes) in NUMBERS.items():
        row = frame.loc[(attack, rule)]
        assert row["seeds"] == 2 and row["accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
        if successes:
            assert row["attack_success_rate"] == pytest.approx(np.mean(successes))
        else:
            assert math.isnan(row["attack_success_rate"])
        assert row["kept_honest"] == pytest.approx(0.6 if rule == "median" else 1.0)
    for rule in ("mean", "median"):
        clean = np.subtract(NUMBERS[NO_ATTACK, "mean"][0], NUMBERS[NO_ATTACK, rule][0])
        costs = frame.xs(rule, level="defense")["cost_without_attack"]
        assert costs.tolist() == pytest.approx([np.mean(clean)] * 4)
    assert frame.loc[("trojan", "median"), "kept_malicious"] == 0.25
    assert frame.loc[("sign_flip", "mean"), "diverged"] == 1
    assert frame.loc[("worst attack", "mean"), "worst_attack"] == "sign_flip"
    assert frame.loc[("worst attack", "median"), "worst_attack"] == "trojan"
    assert frame.loc[("worst attack", "median"), "accuracy"] == pytest.approx(0.71)
    assert frame.loc[("worst attack", "median"), "kept_malicious"] == 0.25
    refused = frame.xs("bulyan", level="defense")
    assert refused["seeds"].tolist() == [0] * 4 and refused["accuracy"].isna().all()
    assert ["bulyan needs 4 f" in str(one) for one in refused["refused"]] == [True] * 3 + [False]


def test_the_matrix_says_what_is_refused_diverged_and_worst(finished):
    scored = report_lib.score(*finished)
    table = report_lib.matrix(scored, "headline", "lowest")
    assert table.loc[NO_ATTACK].tolist() == ["92.0 ± 2.8", "88.0 ± 4.2", "refused"]
    assert table.loc["sign_flip", "mean"] == "20.0 ± 14.1 (1 of 2 diverged)"
    assert table.loc["worst attack"].tolist() == ["20.0 ± 14.1", "71.0 ± 1.4", ""]
    table = report_lib.matrix(scored, "success", "highest")
    assert table.loc["sign_flip"].tolist() == ["", "", "refused"]
    assert table.loc["worst attack"].tolist() == ["95.0 ± 7.1", "30.0 ± 14.1", ""]
    known = scored.scores["sign_flip", "median"]._replace(success=np.array([0.5, 0.7]))
    scored.scores["sign_flip", "median"] = known
    table = report_lib.matrix(scored, "success", "highest")
    assert table.loc["worst attack", "median"] == "60.0 ± 14.1"
    success = dict(report_lib._figures(scored))["attack_success_rate"][0]
    assert success.values[-1, 1] == pytest.approx(60) and success.notes[-1, 1] == "sign_flip"


def test_the_table_of_defences(finished):
    table = report_lib.by_defense(report_lib.score(*finished))
    assert table.loc["median"].to_dict() == {
        "no attack": "88.0 ± 4.2",
        "cost without an attack": "4.0 ± 1.4",
        "worst attack": "trojan",
        "accuracy under it": "71.0 ± 1.4",
        "honest kept": "60.0 ± 0.0",
        "malicious kept": "25.0 ± 0.0",
        "highest backdoor success": "30.0 ± 14.1",
    }
    assert table.loc["mean", "cost without an attack"] == "0.0 ± 0.0"
    assert table.loc["bulyan", "no attack"] == "refused"
    assert table.loc["bulyan", "cost without an attack"] == ""


def test_the_page_and_its_files(finished, tmp_path):
    figures = report_lib.write(report_lib.score(*finished), finished[1], tmp_path, "A title")
    assert [path.name for path in figures] == [
        "accuracy.png",
        "attack_success_rate.png",
        "kept.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in figures)
    text = (tmp_path / "arena.md").read_text()
    for heading in ("Defences", "Accuracy", "Backdoor success", "Honest clients kept", "Refused"):
        assert f"## {heading}\n" in text
    assert "- no attack x bulyan: " in text and "bulyan needs 4 f + 3 <= K" in text
    assert "two seeds" not in text and "mean ± standard deviation over 2 seeds" in text
    frame = pd.read_csv(tmp_path / "arena.csv")
    assert frame["accuracy"].tolist()[:2] == pytest.approx([0.92, 0.88])
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 12


def test_one_seed_has_no_spread(finished):
    arena, results = finished
    one = [i for i, cell in enumerate(arena.cells) if cell.experiment.seed == 0]
    arena = arena._replace(cells=tuple(arena.cells[i] for i in one))
    scored = report_lib.score(arena, [results[i] for i in one])
    assert report_lib.matrix(scored, "headline").loc[NO_ATTACK, "mean"] == "90.0"
    assert report_lib.matrix(scored, "headline").loc["sign_flip", "mean"] == "10.0 (diverged)"
    assert "one seed" in report_lib.page(scored)


def test_panels_hold_the_numbers(finished):
    (name, (headline, cost)), (success, (panel,)), (kept, _) = report_lib._figures(
        report_lib.score(*finished)
    )
    assert (name, success, kept) == ("accuracy", "attack_success_rate", "kept")
    np.testing.assert_allclose(headline.values[:, 0], [92, 20, 89, 20])
    np.testing.assert_allclose(headline.values[:, 1], [88, 81, 71, 71])
    assert np.isnan(headline.values[:, 2]).all()
    assert headline.notes[:3, 2].tolist() == ["refused"] * 3
    assert headline.notes[:, 0].tolist() == ["± 2.8", "diverged", "± 1.4", "sign_flip"]
    assert headline.rows[-1] == "worst attack" and headline.breaks == (1, 3)
    np.testing.assert_allclose(cost.values, [[0, 4, np.nan]])
    np.testing.assert_allclose(panel.values[:, 1], [2, np.nan, 30, 30])
    assert panel.notes[1].tolist() == ["not measured", "not measured", "refused"]


def test_heat_maps_name_the_columns_once(tmp_path):
    values = np.array([[0.0, 50.0], [100.0, np.nan]])
    notes = np.array([["", "± 1"], ["", "refused"]], object)
    panel = plotting.Panel("one", ["a", "b"], ["x", "y"], values, notes, (0, 100), "viridis", (1,))
    drawn = []

    def saved(figure, path):
        drawn.append(figure)
        return [path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "save", saved)
        plotting.heat_maps([panel, panel._replace(title="two")], ["title"], tmp_path / "x")
    upper, lower = [axis for axis in drawn[0].axes if axis.get_title()]
    assert [label.get_text() for label in upper.get_xticklabels()] == ["", ""]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["x", "y"]
    texts = [text.get_text() for text in lower.texts]
    assert texts == ["0.0", "50.0", "± 1", "100.0", "refused"]
    inks = {text.get_text(): text.get_color() for text in lower.texts}
    assert inks["0.0"] == "white" and inks["100.0"] == "black"


# --- Running --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One attack against two rules and one that is refused; two rounds, one seed."""
    out = tmp_path_factory.mktemp("arena")
    groups = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = fedjax_sec.arena(
            BASE,
            attacks=["sign_flip"],
            defenses=["median", "bulyan"],
            out=out,
            on_group=lambda number, total, cells: groups.append(cells),
            rounds=2,
        )
    return done, out, [str(one.message) for one in caught], groups


def test_an_arena_is_a_sweep_whose_cells_are_runs(run):
    done, out, said, groups = run
    assert [text for text in said if text.startswith("refused and not run: no attack x bulyan")]
    assert len(done.results) == 4 and {(one.attack) for one in done.refused} == {
        NO_ATTACK,
        "sign_flip",
    }
    assert sum(map(len, groups)) == 4
    assert sweeps.survey(out).counts["finished"] == 4
    cell = done.arena.cells[-1]
    alone = fedjax_sec.run(cell.experiment.to_dict())
    assert alone.metrics["accuracy"][-1] == done.results[-1].metrics["accuracy"][-1]
    frame = done.frame.set_index(["attack", "defense"])
    assert frame.loc[("sign_flip", "median"), "accuracy"] == alone.metrics["accuracy"][-1]
    kept = alone.metrics["kept_honest"][1:].mean()
    assert frame.loc[("sign_flip", "median"), "kept_honest"] == pytest.approx(kept)
    summary = json.loads((out / "cells" / cell.name / "summary.json").read_text())
    assert summary["final"]["round"] == 2
    assert (out / "accuracy.png").exists() and (out / "arena.md").exists()


def test_finished_combinations_are_not_run_again(run, tmp_path):
    done, out, _, _ = run
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/metrics.jsonl")}
    groups = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = fedjax_sec.arena(
            BASE,
            attacks=["sign_flip"],
            defenses=["median", "bulyan"],
            out=out,
            on_group=lambda number, total, cells: groups.append(cells),
            rounds=2,
        )
    assert not groups and len(before) == 4
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert again.frame.equals(done.frame)
    with pytest.raises(ConfigError, match="rounds"):
        fedjax_sec.arena(BASE, attacks=["sign_flip"], defenses=["median"], out=out, rounds=3)
    with pytest.raises(ConfigError, match="out must be the path of a folder"):
        fedjax_sec.arena(BASE, attacks="zero", defenses="median", out=3)


def test_the_command(run, tmp_path):
    """On the finished folder: it only reads, and writes the tables again."""
    _, out, _, _ = run
    base = tmp_path / "base.yaml"
    base.write_text(config_lib.dump_yaml(BASE))
    call = ["arena", str(base), "rounds=2", "--attacks", "sign_flip", "--out", str(out)]
    call += ["--log", "tensorboard"]
    (out / "arena.md").unlink()
    done = CliRunner().invoke(app, [*call, "--defenses", "median,bulyan"])
    assert done.exit_code == 0, done.output
    assert "Refused: no attack x bulyan" in done.output
    assert done.output.index("Refused") < done.output.index("Tables:")
    assert (out / "arena.md").exists() and Path(out / "accuracy.png").name in done.output
    unknown = CliRunner().invoke(app, [*call, "--defenses", "median", "--log", "tensorbord"])
    assert unknown.exit_code == 2 and "--log: unknown logger 'tensorbord'" in unknown.output
    wrong = CliRunner().invoke(app, [*call, "--defenses", "medain"])
    assert wrong.exit_code == 2 and "Did you mean 'median'" in wrong.output
    twice = CliRunner().invoke(
        app, [*call, "data.data_dir=x", "--defenses", "median", "--data-dir", "y"]
    )
    assert twice.exit_code == 2 and "both say where the data" in twice.output
