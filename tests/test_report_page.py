"""The page of a folder of runs, and of two: what is read, counted, tested and written."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import sweeps_made
from helpers import small
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import sweeps
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError
from fedjax_sec.report import page
from fedjax_sec.report.page import axes, charts, comparison, facts, pictures, rows
from fedjax_sec.report.page.folder import read
from fedjax_sec.runs import results
from fedjax_sec.sweeps import catalog

ATTACKS = {"no attack": None, "sign flip": "sign_flip", "ALIE, z = 1.5": {"name": "alie", "z": 1.5}}
DEFENSES = {"mean": "mean", "median": "median"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return sweeps_made.sweep(tmp_path_factory.mktemp("made") / "first", ATTACKS, DEFENSES)


@pytest.fixture
def unfinished(finished, tmp_path):
    out = tmp_path / "unfinished"
    shutil.copytree(finished, out)
    sweeps_made.unfinish(out, "sign-flip_mean/seed1", rows=4)
    for seed in range(3):
        sweeps_made.unfinish(out, f"sign-flip_median/seed{seed}")
    (out / "cells" / "no-attack_mean" / "seed0" / results.METRICS).write_text("rubbish\n")
    return out


def run_with(cell, **metrics):
    """A run of a cell with some of its metrics replaced."""
    run = cell.runs[0]
    return run._replace(metrics=run.metrics | {k: np.asarray(v, float) for k, v in metrics.items()})


# --- The folder -----------------------------------------------------------------------------------


def test_a_sweeps_labels_are_read_in_its_order(finished):
    folder = read(finished)
    assert folder.kind == "sweep" and len(folder.runs) == 18
    assert [cell.title for cell in folder.cells[:3]] == [
        "no attack / mean",
        "no attack / median",
        "sign flip / mean",
    ]
    assert [run.seed for run in folder.cells[0].runs] == [0, 1, 2]
    made = axes.axes_of(folder.cells)
    assert [(axis.name, axis.labels) for axis in made] == [
        ("attack", tuple(ATTACKS)),
        ("defense", tuple(DEFENSES)),
    ]
    assert axes.default_pair(made) == ("attack", "defense")


def test_without_labels_the_configurations_tell_the_axes(finished, tmp_path):
    out = tmp_path / "older"
    shutil.copytree(finished, out)
    (out / catalog.FILE).unlink()
    made = {axis.name: axis for axis in axes.axes_of(read(out).cells)}
    assert made["attack"].labels == ("no attack", "alie", "sign_flip")
    assert made["defense"].labels == ("mean", "median")


def test_a_field_that_varies_is_an_axis_and_numbers_are_in_order(tmp_path):
    attacks = {f"z is {z}": {"name": "alie", "z": z} for z in (1.5, 0.5, 10.0)}
    made = {axis.name: axis for axis in axes.axes_of(read(sweep_of(tmp_path, attacks)).cells)}
    assert set(made) == {"attack"}  # attack.z would say the same again
    (tmp_path / "made" / catalog.FILE).unlink()
    cells = read(tmp_path / "made").cells
    assert axes.axes_of(cells)[0].labels == ("alie z=0.5", "alie z=1.5", "alie z=10.0")
    (field,) = [a for a in axes._fields([_leaves(cell) for cell in cells]) if a.name == "attack.z"]
    assert field.labels == ("0.5", "1.5", "10.0") and field.numeric


def _leaves(cell):
    from fedjax_sec.report.page.folder import comparable

    return comparable(cell.config)


def sweep_of(tmp_path, attacks):
    return sweeps_made.sweep(tmp_path / "made", attacks, {"mean": "mean"}, seeds=(0,))


def test_runs_side_by_side_are_cells_that_differ_in_more_than_the_seed(finished, tmp_path):
    cells = finished / "cells"
    for name, source in (("a", "sign-flip_mean/seed0"), ("b", "sign-flip_mean/seed1")):
        shutil.copytree(cells / source, tmp_path / name)
    shutil.copytree(cells / "sign-flip_median" / "seed0", tmp_path / "c")
    folder = read(tmp_path)
    assert folder.kind == "runs" and [cell.name for cell in folder.cells] == ["a", "c"]
    assert [run.seed for run in folder.cells[0].runs] == [0, 1]
    assert [axis.name for axis in axes.axes_of(folder.cells)] == ["defense"]
    alone = read(tmp_path / "a")
    assert alone.kind == "run" and not axes.axes_of(alone.cells)
    assert rows.content(alone)["down"] == rows.content(alone)["across"] == ""


def test_a_papers_folder_is_that_of_its_runs(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "paper" / "runs")
    results.write_mark(tmp_path / "paper", "paper alie")
    assert sweeps.survey(tmp_path / "paper").counts["finished"] == 18
    assert len(read(tmp_path / "paper").cells) == 6
    results.write_mark(tmp_path, "paper alie")
    with pytest.raises(ConfigError, match="holds neither a run nor a sweep"):
        sweeps.survey(tmp_path)


def test_what_is_not_finished_or_damaged_is_said(unfinished):
    folder = read(unfinished)
    known = facts.of(folder)
    assert [(row["name"], row["state"], row["round"]) for row in known["missing"]] == [
        ("sign-flip_mean/seed1", "interrupted", "3 of 10"),
        *((f"sign-flip_median/seed{seed}", "waiting", "0 of 10") for seed in range(3)),
    ]
    assert known["unfinished"].endswith("of 18 runs 14 finished, 3 waiting, 1 interrupted.")
    (problem,) = known["problems"]
    assert problem.startswith("no-attack_mean/seed0: ") and "line 1 is no JSON" in problem
    made = rows.content(folder)
    states = [run["state"] for run in made["runs"]]
    assert states[0] == "damaged" and states.count("waiting") == 3
    assert made["runs"][0]["final"] == [None] * len(made["metrics"])
    lines = made["curves"]["metrics"]["accuracy"]
    assert lines[0] is None and len(lines[7]) == 4 and len(lines[8]) == 11


@pytest.mark.parametrize("content", [None, "x"])
def test_a_folder_without_runs_is_refused(content, tmp_path):
    if content:
        (tmp_path / "file").write_text(content)
    with pytest.raises(ConfigError, match=r"nothing was run in it|neither a run nor a sweep"):
        read(tmp_path)


def test_the_labels_of_several_sweeps_in_one_folder_are_kept(tmp_path):
    base = small(rounds=1)
    for values in ([0.0, 0.1], [0.1, 0.2]):
        sweeps.plan(sweeps.make_cells(base, {"client.l2": values}), tmp_path)
    known = catalog.read(tmp_path)
    assert known == {f"{value}/seed0": {"client.l2": value} for value in ("0.0", "0.1", "0.2")}


# --- The rows -------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_runs(finished):
    folder, made = read(finished), rows.content(read(finished))
    names = [one["name"] for one in made["metrics"]]
    assert names[:4] == ["accuracy", "best_accuracy", "attack_success_rate", "loss"]
    assert names[-1] == "seconds" and "round" not in names and "kept" not in names
    run = folder.cells[2].runs[1]
    row = made["runs"][7]
    assert (row["cell"], row["seed"], row["attacked"]) == (2, 1, True)
    assert row["final"][0] == pytest.approx(run.metrics["accuracy"][-1], rel=1e-3)
    assert row["final"][-1] == 1.0  # three replicas share three seconds
    clean = made["runs"][0]
    assert clean["final"][2] is None and clean["attacked"] is False
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    (seeds,) = [axis for axis in made["axes"] if axis["name"] == "seed"]
    assert seeds["labels"] == ["0", "1", "2"] and seeds["at"][:4] == [0, 1, 2, 0]


def test_directions_of_metrics():
    assert rows.metric("accuracy", True) == {
        "name": "accuracy",
        "share": True,
        "worst": "lowest",
        "drawn": True,
    }
    assert [rows.metric(name, True)["worst"] for name in ("loss", "kept_malicious")] == [
        "highest"
    ] * 2
    assert not rows.metric("loss", True)["share"]


def test_curves_are_thinned_but_keep_both_ends(finished):
    (cell, *_) = read(finished).cells
    rounds = np.arange(0, 1001, 2.0)
    long = run_with(cell, round=rounds, accuracy=rounds / 1000)
    drawn = rows.curves([long], ["accuracy"])
    assert len(drawn["rounds"][0]) == rows.POINTS
    assert (drawn["rounds"][0][0], drawn["rounds"][0][-1]) == (0, 1000)
    assert drawn["metrics"]["accuracy"][0][-1] == 1.0
    gaps = np.diff(drawn["rounds"][0])
    assert gaps.max() - gaps.min() <= 2


def test_many_metrics_do_not_make_the_page_large(finished, monkeypatch):
    monkeypatch.setattr(rows, "CURVES", 20_000)
    (cell, *_) = read(finished).cells
    rounds = np.arange(0, 1001, 2.0)
    many = {f"metric{i}": rounds / 3 for i in range(40)}
    drawn = rows.curves([run_with(cell, round=rounds, **many)] * 3, list(many))
    assert 4 <= len(drawn["metrics"]) < 40
    assert len(json.dumps(drawn, separators=(",", ":"))) < 1.3 * rows.CURVES
    drawn = rows.curves([run_with(cell, round=rounds, **many)] * 12, list(many))
    assert len(drawn["metrics"]) == 4 and drawn["points"] < rows.POINTS


def test_what_was_kept_is_told_apart(finished):
    (_, _, cell, *_) = read(finished).cells
    shares = [[math.nan] * 4, [1, 0, 0.5, 1], [0, 1, 1, 0]]
    config = cell.config | {"data": {"num_clients": 4}}
    run = run_with(cell, round=[0, 1, 2], kept=shares)._replace(config=config)
    made = rows._kept(run, 10)
    assert made["rounds"] == [1, 2] and made["known"]
    assert made["malicious"] == {"clients": [0, 1], "of": 2, "shares": ["90", "09"]}
    assert made["honest"] == {"clients": [2, 3], "of": 2, "shares": ["49", "90"]}
    unknown = rows._kept(run._replace(summary={}), 10)
    assert not unknown["known"] and unknown["honest"]["of"] == 4
    honest = rows._kept(run._replace(config=config | {"attack": None}), 10)
    assert honest["malicious"]["of"] == 0  # without an attack nobody is


def test_who_is_malicious_may_change_with_the_round(finished):
    (_, _, cell, *_) = read(finished).cells
    run = run_with(
        cell,
        round=[1, 2],
        kept=[[1, 0], [1, 1]],
        clients=[[0, 3], [3, 1]],
        malicious=[[1, 0], [1, 0]],
    )._replace(config=cell.config | {"data": {"num_clients": 4}})
    made = rows._kept(run, 10)
    assert made["malicious"] == {"clients": [0, 3], "of": 2, "shares": ["9-", "-9"]}
    assert made["honest"] == {"clients": [1, 3], "of": 2, "shares": ["-9", "0-"]}


def test_what_was_kept_stays_small(finished, monkeypatch):
    monkeypatch.setattr(rows, "KEPT", 2000)
    made = rows.kept(read(finished).cells)
    assert not made["all"] and sum(one is not None for one in made["runs"]) == 6
    assert made["runs"][0] is not None and made["runs"][1] is None


def test_configurations_are_those_keys_that_differ(finished):
    made = rows.configurations(read(finished).cells)
    assert made["common"]["rounds"] == "10" and "seed" not in made["common"]
    assert made["cells"][0] == {
        "attack": "none",
        "defense.name": "mean",
        "defense.weighted": "true",
    }
    assert made["cells"][3]["defense.name"] == "median"


def test_warnings_versions_and_cost(finished):
    cells = read(finished).cells
    assert facts.warnings(cells) == []
    run = cells[0].runs[1]
    run = run._replace(summary=run.summary | {"warnings": ["odd"], "git_revision": "other"})
    run = run._replace(status=run.status.__class__(run.name, "finished", 10, 10, diverged=True))
    cells = [cells[0]._replace(runs=[cells[0].runs[0], run]), *cells[1:]]
    assert facts.warnings(cells) == [
        ("1 of 17 runs (no attack / mean, seed 1)", "odd"),
        (
            "1 of 17 runs (no attack / mean, seed 1)",
            "diverged: the final loss or parameters are not finite",
        ),
    ]
    counted = facts.versions([run for cell in cells for run in cell.runs])
    assert counted["git revision"] == {"abc": 16, "other": 1} and counted["jax"] == {"0.10.2": 17}
    cost = facts.cost(cells)
    assert cost["said"].startswith("17.0 s for 17 finished runs, and 5.7 s of compilation.")
    assert cost["rows"][0] == ["no attack / mean", "2", "1.0", "0.3", "10.0"]


# --- Charts and pictures --------------------------------------------------------------------------


def strings(part):
    if isinstance(part, dict):
        return {one for value in part.values() for one in strings(value)}
    if isinstance(part, list):
        return {one for value in part for one in strings(value)}
    return {part} if isinstance(part, str) else set()


@pytest.mark.parametrize("specs", [charts.of_one, charts.of_two])
def test_charts_hold_no_address_and_cut_no_label(specs):
    for name, spec in specs().items():
        assert not [text for text in strings(spec) if "http" in text], name
        assert spec["config"]["axis"]["labelLimit"] == 0, name
        assert spec["config"]["legend"]["labelLimit"] == 0, name
        assert any(text.startswith("@") for text in strings(spec)) or name == "clients"


def test_colours_say_nothing_that_a_dash_or_a_shape_does_not():
    for name in ("curves", "axis"):
        layers = charts.of_one()[name]["layer"]
        used = {channel for layer in layers for channel in layer["encoding"]}
        assert {"color", "strokeDash", "shape"} <= used
    looks = {(c, d) for c, d in zip(charts.COLOURS * 6, charts.DASHES * 7, strict=True)}
    assert len(looks) == len(charts.COLOURS) * len(charts.DASHES)  # a period of 42 lines


@pytest.mark.slow
def test_backdoors_are_drawn_once(tmp_path):
    attacks = {"no attack": None, "plus": {"name": "pattern"}, "flip": "sign_flip"}
    attacks["boosted"] = [{"name": "pattern"}, {"name": "boost"}]
    out = sweeps_made.sweep(tmp_path / "made", attacks, DEFENSES, seeds=(0,))
    (drawn,) = pictures.pictures(read(out).cells)
    assert drawn["title"] == "pattern, digits"
    assert drawn["said"].count("plus / ") == 2 and drawn["said"].count("boosted / ") == 2
    assert [row["name"] for row in drawn["rows"]][:3] == [
        "clean",
        "stamped",
        "difference (grey: none)",
    ]
    assert all(len(row["images"]) == 4 for row in drawn["rows"])
    assert drawn["rows"][0]["images"] != drawn["rows"][1]["images"]
    assert all(re.fullmatch(r"\d read as 0", text) for text in drawn["under"])


def test_pictures_without_their_data_say_why(tmp_path, monkeypatch):
    out = sweeps_made.sweep(tmp_path / "made", {"plus": {"name": "pattern"}}, DEFENSES, seeds=(0,))

    def absent(experiment, count):
        raise ConfigError("the data set is not here")

    monkeypatch.setattr(pictures, "backdoor_pictures", absent)
    (drawn, *_) = pictures.pictures(read(out).cells)
    assert (
        drawn["rows"] == [] and "There are no pictures: the data set is not here" in drawn["said"]
    )


# --- Two folders ----------------------------------------------------------------------------------


def test_the_paired_test_is_that_of_scipy_on_the_differences():
    from scipy import stats

    draw = np.random.default_rng(0)
    a, b = draw.normal(size=8), draw.normal(size=8) + 0.5
    test = comparison.paired(a, b)
    assert test.t_test == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert test.wilcoxon == pytest.approx(stats.wilcoxon(b, a).pvalue)
    assert test.spread == pytest.approx(np.std(b - a, ddof=1)) and test.pairs == 8
    assert comparison.paired(a[:5], b[:5]).wilcoxon is None


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([0.5, 0.6], [0.7, 0.9], "no test is possible with fewer than 3 pairs"),
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], "equal to the bit"),
        ([0.5, 0.25, 0.75], [1.0, 0.75, 1.25], "the same difference in every pair"),
    ],
)
def test_where_no_test_is_possible_it_says_so(a, b, said):
    test = comparison.paired(a, b)
    assert test.t_test is None and test.said.startswith(said)


@pytest.fixture
def two(finished, tmp_path):
    """A sweep and one whose median is better by far, for four seeds; one attack is missing."""
    draw = np.random.default_rng(1)
    seeds = range(4)
    first = {
        (a, d, s): 0.5 + 0.01 * draw.random() for a in ATTACKS for d in DEFENSES for s in seeds
    }
    second = {
        key: value + (0.2 if key[1] == "median" else 0.0) + 0.01 * draw.normal()
        for key, value in first.items()
    }
    a = sweeps_made.sweep(tmp_path / "a", ATTACKS, DEFENSES, seeds=seeds, values=first)
    attacks = {name: ATTACKS[name] for name in ("no attack", "sign flip")}
    b = sweeps_made.sweep(
        tmp_path / "b", attacks, DEFENSES, seeds=seeds, values=second, client={"batch_size": 8}
    )
    return a, b


def test_differences_are_found_where_they_are(two):
    a, b = map(read, two)
    made = comparison.content(a, b)
    assert made["cells"] == [f"{x} / {y}" for x in ("no attack", "sign flip") for y in DEFENSES]
    by_cell = dict(zip(made["cells"], made["tests"][0], strict=True))
    assert [one["larger"] for one in by_cell.values()] == [False, True, False, True]
    far = by_cell["sign flip / median"]
    assert far["pairs"] == 4 and far["difference"] == pytest.approx(0.2, abs=0.03)
    assert far["adjusted"] >= far["t_test"] and far["wilcoxon"] is None
    assert far["b"] - far["a"] == pytest.approx(far["difference"], abs=2e-4)
    known = comparison.facts(a, b)
    assert known["configurations"] == [("client.batch_size", "32", "8", 4)]
    assert known["only"] == [
        (str(a.path), ["ALIE, z = 1.5 / mean", "ALIE, z = 1.5 / median"]),
        (str(b.path), []),
    ]
    assert known["versions"] == [] and known["seeds"] == "4"
    assert comparison.said(made).startswith("accuracy: 2 of 4 cells differ by more than the spread")


def test_pairs_are_of_one_seed(two):
    a, b = map(read, two)
    b = b._replace(cells=[cell._replace(runs=cell.runs[1:]) for cell in b.cells])
    test = comparison.tests(comparison.matched(a, b), ["accuracy"])[0][1]
    pairs = list(zip(a.cells[1].runs[1:], b.cells[1].runs, strict=True))
    assert all(x.seed == y.seed for x, y in pairs) and test["pairs"] == 3
    change = [y.metrics["accuracy"][-1] - x.metrics["accuracy"][-1] for x, y in pairs]
    assert test["difference"] == pytest.approx(np.mean(change), rel=1e-3)


def test_versions_that_differ_are_named(two):
    a, b = map(read, two)
    runs = [run._replace(summary=run.summary | {"git_revision": "new"}) for run in b.runs]
    assert comparison._versions(a.runs, runs) == [("git revision", "abc", "new")]


def test_folders_without_a_common_cell_are_refused(two, tmp_path):
    other = sweeps_made.sweep(tmp_path / "c", {"zero": "zero"}, DEFENSES, seeds=(0,))
    with pytest.raises(ConfigError, match="have no cell in common"):
        comparison.matched(read(two[0]), read(other))
    ones = [read(path / "cells" / "sign-flip_mean" / "seed0") for path in two]
    assert len(comparison.matched(*ones)) == 1


# --- The page -------------------------------------------------------------------------------------


def checked(path):
    """The page's text, in which nothing is loaded from elsewhere."""
    text = path.read_text()
    body = re.sub(r"(?s)<script.*?</script>", "", text)
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)[a-z./]", body)
    assert "default-src 'none'" in text and "connect-src" not in text
    assert text.count("<script") == text.count("</script>") == 3
    return text


def data_of(text):
    (held,) = re.findall(r'(?s)<script type="application/json" id="rows">(.*?)</script>', text)
    return json.loads(held)


def test_the_page_holds_everything(unfinished, tmp_path):
    (unfinished / "arena.csv").write_text(
        "attack,defense,refused\nsign flip,bulyan,needs <more> clients\nsign flip,mean,\n"
    )
    text = checked(page.write_one(unfinished, tmp_path / "page.html"))
    assert "Not everything is finished: of 18 runs 14 finished" in text
    assert "sign flip / bulyan: needs &lt;more&gt; clients" in text
    held = data_of(text)
    assert held["refused"][0]["refused"] == "needs <more> clients"
    assert set(held["charts"]) == set(charts.of_one()) and len(held["runs"]) == 18
    for part in ("heat", "curves", "kept", "clients", "scatter", "differences", "versions", "cost"):
        assert f'id="{part}"' in text
    assert "<td>0.10.2</td>" in text


def test_a_label_cannot_end_the_data(tmp_path):
    attacks = {"</script><b>bad": "sign_flip"}
    out = sweeps_made.sweep(tmp_path / "made", attacks, DEFENSES, seeds=(0,))
    text = checked(page.write_one(out, tmp_path / "page.html", with_pictures=False))
    assert data_of(text)["cells"][0] == "</script><b>bad / mean"


def test_the_command(finished, two, tmp_path):
    run = CliRunner().invoke
    done = run(app, ["report", str(finished), "--no-pictures", "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0 and checked(tmp_path / "r.html")
    done = run(app, ["report", *map(str, two)])
    assert done.exit_code == 0, done.output
    assert "accuracy: 2 of 4 cells differ by more than the spread" in " ".join(done.output.split())
    text = checked(two[0] / "comparison.html")
    assert "paired t-test" in text and "Only in" in text
    for given, said in (
        ([str(tmp_path / "none")], "nothing was run in it"),
        ([str(finished)] * 3, "one folder, or two to compare, got 3"),
        ([str(finished), "--out", str(tmp_path)], "is a folder; name a file, such as report.html"),
    ):
        done = run(app, ["report", *given])
        assert done.exit_code == 2 and said in " ".join(done.output.split())


@pytest.mark.slow
def test_two_hundred_cells_stay_under_five_megabytes(tmp_path):
    attacks = {f"attack {i}": {"name": "sign_flip", "scale": 1.0 + i} for i in range(20)}
    rules = {f"rule {i}": {"name": "centered_clipping", "radius": 1.0 + i} for i in range(10)}
    out = sweeps_made.sweep(tmp_path / "s", attacks, rules, rounds=500, every=4, clients=51)
    path = page.write_one(out, tmp_path / "page.html")
    assert len(data_of(checked(path))["cells"]) == 200
    assert 2_000_000 < path.stat().st_size < 5_000_000


@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    """Real runs with a backdoor, two of four and then all: the metrics' names are the program's."""
    base = small(rounds=2, evaluation={"every": 1}, threat={"num_malicious": 1})
    attacks = {"none at all": None, "plus": {"name": "pattern"}}
    grid = {"attack": attacks, "defense": ["mean", "median"]}
    spec = {"experiment": base, "grid": grid}
    fedjax_sec.sweep(spec, out=tmp_path / "s")
    held = data_of(checked(page.write_one(tmp_path / "s", tmp_path / "page.html")))
    assert held["axes"][0]["labels"] == ["none at all", "plus"]
    names = [one["name"] for one in held["metrics"]]
    assert {"accuracy", "attack_success_rate", "kept_honest", "kept_malicious"} <= set(names)
    assert all(one is not None for one in held["kept"]["runs"])
    assert "data:image/png" in (tmp_path / "page.html").read_text()
