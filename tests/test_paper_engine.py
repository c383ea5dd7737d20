"""The engine behind the papers: the order of settings, twins, --only, folders, the command."""

import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fedjax_sec import cli, papers, sweeps
from fedjax_sec.core import ConfigError, shipped
from fedjax_sec.report import paper as engine
from fedjax_sec.runs import config, results
from fedjax_sec.runs.experiment import Result

ROOT = Path(__file__).parents[1]

#: A whole paper: two tables of one data set, whose rows overlap, and a table that needs all rows.
MODULE = '''
"""A paper."""

from fedjax_sec.report import paper_writers as writers
from fedjax_sec.report.paper import Item, Option, Paper, Part, Row


def parts(plan):
    return [Part("digits", ("digits",))] if plan["kind"] != "none" else []


def rows(case):
    bound = case.base["threat"]["num_malicious"]
    return [
        Row("mean", {"defense": "mean"}),
        Row("Krum", {"defense": {"name": "krum", "num_byzantine": bound}, "rounds": 3}),
    ]


def more(case):
    return [*rows(case), Row("median", lambda seed: {"defense": "median", "rounds": seed + 1})]


table = writers.Table(
    ("defense",),
    lambda report, entry: {"accuracy": writers.percent(entry.results, "accuracy")},
    lambda report: f"Percent, {report.over}.",
)
PAPER = Paper(
    __name__,
    "Tiny",
    {
        "table1": Item("Table 1", rows, table, parts),
        "table2": Item("Table 2", more, table, parts, published="table1"),
        "table3": Item("Table 3", more, table, parts, whole=True),
    },
    options=(Option("kind", ("some", "none"), "Kind.", "some"),),
    seeds=2,
)
'''
SCALES = """
smoke:
  digits: {rounds: 4, client.batch_size: 16}
  Krum: {client.batch_size: 8}
"""
NUMBERS = """item,dataset,row,column,metric,value,place
table1,digits,Krum,,accuracy,93.5,Table 1
"""
FILES = {
    "digits": {
        "data": {"name": "digits", "num_clients": 6},
        "threat": {"num_malicious": 1},
        "client": {"name": "sgd", "steps": 1, "batch_size": 32},
        "rounds": 5,
    }
}


def load(name, folder, text, monkeypatch):
    """The paper in a module of this text, with its data files beside it."""
    folder.mkdir()
    for suffix, content in ((".py", text), (".yaml", SCALES), (".csv", NUMBERS)):
        (folder / f"{name}{suffix}").write_text(content)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.PAPER


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The paper of a module outside the package."""
    engine._scales.cache_clear()
    yield load("tiny", tmp_path / "module", MODULE, monkeypatch)
    engine._scales.cache_clear()


def cells(paper, items=("table1",), **plan):
    """(item, row's label) -> its cells."""
    sheets = engine.make_cells(paper, paper.plan(**plan), list(items), FILES)
    return {(name, row.label): made for name, _, rows in sheets for row, made in rows}


# --- The order of settings ----------------------------------------------------------------------


def test_later_settings_win(tiny):
    """File < scale < row < --set, for one key at a time."""

    def of(row, **plan):
        one = cells(tiny, **plan)["table1", row][0].experiment
        return one.rounds, one.client.batch_size

    assert of("mean") == (5, 32)  # the file
    assert of("mean", scale="smoke") == (4, 16)  # the scale
    assert of("Krum", scale="smoke") == (3, 8)  # the row, and the scale of the row
    assert of("Krum", scale="smoke", overrides=("rounds=2",)) == (2, 8)
    assert of("Krum", overrides=("client.batch_size=4", "rounds=2")) == (2, 4)


def test_rows_are_computed_from_what_was_set(tiny):
    made = cells(tiny, overrides=("threat.num_malicious=2", "data.num_clients=9"))
    assert made["table1", "Krum"][0].experiment.defense.stages[0].num_byzantine == 2


def test_a_row_may_depend_on_the_seed(tiny):
    made = cells(tiny, ["table2"], seeds=3)
    assert [cell.experiment.rounds for cell in made["table2", "median"]] == [1, 2, 3]


# --- From Python --------------------------------------------------------------------------------


def test_python_makes_the_files_of_the_command(tiny, tmp_path, monkeypatch):
    """The plan, the runs and the folder are those of the command; `changes` is its `--set`."""
    asked = {}

    def regenerate(paper, plan, items, out, run):
        asked.update(paper=paper, plan=plan, items=items, out=out, run=run)
        return [out / "table1.md"]

    monkeypatch.setattr(papers, "find", lambda name: tiny)
    monkeypatch.setattr(engine, "regenerate", regenerate)
    monkeypatch.chdir(tmp_path)
    changes = {"rounds": 2, "data.max_train": None, "defense": {"name": "krum"}}
    written = papers.regenerate(
        "tiny", "all", "made", scale="smoke", only="Krum", changes=changes, kind="some"
    )
    texts = ("rounds=2", "data.max_train=null", 'defense={"name": "krum"}')
    assert asked["plan"] == tiny.plan("smoke", None, texts, ["Krum"], kind="some")
    assert asked["items"] == list(tiny.items) and written == [tmp_path / "made" / "table1.md"]
    assert [config.parse_override(text)[1] for text in texts] == list(changes.values())


def test_python_gets_the_experiments_of_a_table(tiny, monkeypatch):
    monkeypatch.setattr(papers, "find", lambda name: tiny)
    monkeypatch.setattr(engine, "Files", lambda paper: FILES)
    made = papers.experiments("tiny", "table1", scale="smoke", changes={"client.batch_size": 4})
    assert list(made) == ["mean", "Krum"] and made["Krum"].rounds == 3
    assert [one.client.batch_size for one in made.values()] == [4, 4]
    with pytest.raises(ConfigError, match=r"item of tiny: .* Did you mean 'table1'"):
        papers.experiments("tiny", "tabel1")


# --- Twins --------------------------------------------------------------------------------------


def test_twins_are_one_cell(tiny):
    made = cells(tiny, ["table1", "table2"])
    for row in ("mean", "Krum"):
        assert [one.name for one in made["table1", row]] == [
            f"table1-{row}/seed{i}" for i in (0, 1)
        ]
        assert all(
            one is other
            for one, other in zip(made["table1", row], made["table2", row], strict=True)
        )
    alike = cells(tiny, ["table2"], seeds=1, overrides=("defense=median", "rounds=1"))
    assert len({id(made[0]) for made in alike.values()}) == 1


def test_the_fingerprint_is_of_all_that_changes_a_run():
    one = config.from_mapping(FILES["digits"])
    elsewhere = config.from_mapping(FILES["digits"], {"data.data_dir": "x", "data.download": False})
    assert one.fingerprint() == elsewhere.fingerprint()
    for change in ("seed=1", "rounds=6", "client.l2=0.1", "data.max_test=9", "defense=median"):
        assert config.from_mapping(FILES["digits"], [change]).fingerprint() != one.fingerprint()


def test_different_runs_of_one_name_are_an_error():
    twins = engine.Twins()
    twins.cell({"run": "a b"}, config.from_mapping({}))
    with pytest.raises(ConfigError, match="'a-b/seed0'"):
        twins.cell({"run": "a-b"}, config.from_mapping({"rounds": 3}))


# --- Parts of items -----------------------------------------------------------------------------


def test_only_picks_rows_of_all_items(tiny):
    made = cells(tiny, ["table1", "table2"], only=("K*", "median"))
    assert list(made) == [("table1", "Krum"), ("table2", "Krum"), ("table2", "median")]
    made = cells(tiny, ["table1", "table2"], only=("median",))
    assert list(made) == [("table2", "median")]
    with pytest.raises(ConfigError, match=r"only: 'krun' is no row of table1.*mean, Krum"):
        cells(tiny, only=("krun",))


def test_only_keeps_items_that_need_all_rows_whole(tiny):
    with pytest.raises(ConfigError, match="table3 needs all of its rows"):
        cells(tiny, ["table3"], only=("Krum",))
    assert len(cells(tiny, ["table3"], only=("*",))) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": "tiny"}, "scale: expected one of smoke, small, paper, got 'tiny'"),
        ({"kind": "sone"}, "kind: expected one of some, none, got 'sone'.*Did you mean 'some'"),
        ({"kinds": "some"}, "option of tiny: expected one of kind, got 'kinds'"),
        ({"kind": "none"}, "table1: not in the paper for --kind none"),
    ],
)
def test_plans_that_cannot_be_say_why(tiny, given, message):
    with pytest.raises(ConfigError, match=message):
        cells(tiny, **given)


def test_an_unknown_item_says_which_there_are(tiny):
    with pytest.raises(ConfigError, match="item of tiny: .*table1.*Did you mean 'table1'"):
        cells(tiny, ["tabel1"])


# --- Tables and folders -------------------------------------------------------------------------


def regenerate(paper, out, items=("table1", "table2"), run=None, **plan):
    return engine.regenerate(paper, paper.plan(**plan), list(items), out, run=run, files=FILES)


def test_a_paper_is_run_once_and_written(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = {"scale": "smoke", "overrides": ("model=logistic_regression",)}
    written = regenerate(tiny, out, **given)
    assert [path.name for path in written] == ["table1.md", "table1.csv", "table2.md", "table2.csv"]
    folders = sorted(path.name for path in (out / "runs" / "cells").iterdir())
    assert folders == ["table1-Krum", "table1-mean", "table2-median"]
    table = pd.read_csv(out / "table2.csv").set_index("defense")
    assert list(table) == ["accuracy: paper", "accuracy: ours", "accuracy: spread"]
    assert table.loc["Krum", "accuracy: paper"] == 93.5 and np.isnan(table.iloc[0, 0])
    assert (table["accuracy: ours"] > 0).all()
    text = (out / "table1.md").read_text()
    assert text.startswith("# Tiny, Table 1\n\nPercent, mean and standard deviation over 2 seeds.")
    assert "`--set model=logistic_regression` replaces the file's and the scale's." in text
    before = {path: path.read_bytes() for path in written}
    monkeypatch.setattr(sweeps.groups, "train", lambda *args, **kwargs: pytest.fail("run again"))
    regenerate(tiny, out, **given)
    assert before == {path: path.read_bytes() for path in written}


def no_run(cells, folder):
    """Stands in for `sweeps.run_cells`: results, without a run."""
    metrics = {"round": np.zeros(1), "accuracy": np.ones(1), "loss": np.ones(1)}
    summary = {"data": {"label": "digits"}}
    return [Result(cell.experiment, metrics, summary, None) for cell in cells]


def test_a_papers_folder_has_a_mark(tiny, tmp_path):
    out = tmp_path / "out"
    regenerate(tiny, out, run=no_run)
    assert results.read_mark(out).kind == "paper tiny"
    regenerate(tiny, out, run=no_run)
    with pytest.raises(ConfigError, match="holds the results of another paper, tiny"):
        plan = papers.find("alie").plan()
        engine.regenerate(papers.find("alie"), plan, ["table1"], out, run=no_run)
    # Nor is it a run's or a sweep's, whatever is asked for.
    for kwargs in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="holds a paper's results, not a run"):
            results.RunFolder(out).check({}, **kwargs)
    with pytest.raises(ConfigError, match="holds a paper's results, not a sweep"):
        sweeps.run_cells([], out)
    assert (out / "table1.md").exists()


def test_a_foreign_folder_is_refused(tiny, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.md").write_text("mine")
    with pytest.raises(ConfigError, match="in use by something else"):
        regenerate(tiny, foreign, run=no_run)
    assert [path.name for path in foreign.iterdir()] == ["thesis.md"]
    for kind, what in (("run", "a run"), ("sweep", "a sweep")):
        folder = tmp_path / kind
        folder.mkdir()
        results.write_mark(folder, kind)
        with pytest.raises(ConfigError, match=f"holds {what}, not a paper's results"):
            regenerate(tiny, folder, run=no_run)


def test_a_folder_from_before_the_mark_is_taken_up(tiny, tmp_path):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    results.write_mark(out / "runs", "sweep")
    (out / "table1.csv").write_text("old")
    regenerate(tiny, out, run=no_run)
    assert results.read_mark(out).kind == "paper tiny"
    other = tmp_path / "other"
    (other / "runs").mkdir(parents=True)
    results.write_mark(other / "runs", "sweep")
    (other / "setup.py").write_text("a project with a sweep in it")
    with pytest.raises(ConfigError, match="in use by something else"):
        regenerate(tiny, other, run=no_run)


def test_what_cannot_run_leaves_no_folder(tiny, tmp_path):
    def fail(cells, folder):
        raise ConfigError("no data")

    with pytest.raises(ConfigError, match="no data"):
        regenerate(tiny, tmp_path / "a" / "b", run=fail)
    assert not (tmp_path / "a").exists()


def test_the_paper_in_contributing_is_a_whole_one(tmp_path, monkeypatch):
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (text,) = [block for block in blocks if "PAPER = Paper(" in block]
    paper = load("example", tmp_path / "module", text, monkeypatch)
    regenerate(paper, tmp_path / "out", ["table1"], run=no_run, seeds=1)
    table = pd.read_csv(tmp_path / "out" / "table1.csv")
    assert list(table["defence"]) == ["Mean", "Krum"]
    assert list(table["accuracy: ours"]) == [100, 100]
    assert table["accuracy: paper"][1] == 93.5


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,row,metric,value\n", "tiny.csv: the columns must be item,dataset,row,column"),
        (NUMBERS + NUMBERS.splitlines()[1] + "\n", "tiny.csv, line 3: table1, digits, Krum, "),
    ],
)
def test_bad_files_of_published_numbers_say_why(tiny, text, message):
    Path(sys.modules["tiny"].__file__).with_suffix(".csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        tiny.published("table1", "digits")


def test_configurations_are_those_of_the_checkout_else_of_the_package(tmp_path, monkeypatch):
    assert engine.config_path("alie", "mnist") == ROOT / "configs" / "alie" / "mnist.yaml"
    with pytest.raises(ConfigError, match="no configuration alie/mnits. Did you mean 'alie/mnist'"):
        engine.config_path("alie", "mnits")
    package = tmp_path / "site" / "fedjax_sec"
    installed = package / "_configs" / "alie" / "mnist.yaml"
    installed.parent.mkdir(parents=True)
    installed.write_text("rounds: 1\n")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert engine.config_path("alie", "mnist") == installed
    # A folder of that name beside an installed package is somebody else's.
    (tmp_path / "site" / "configs" / "alie").mkdir(parents=True)
    assert engine.config_path("alie", "mnist") == installed


def test_every_file_that_a_paper_asks_for_is_there():
    for name in papers.names():
        paper = papers.find(name)
        options = [
            {option.name: (value,) if option.many else value}
            for option in paper.options
            for value in option.values
        ]
        required = {
            option.name: option.values[0] for option in paper.options if option.default is None
        }
        for given in options:
            plan = paper.plan(**(required | given))
            for item in paper.items.values():
                for part in item.parts(plan):
                    assert engine.config_path(name, part.file).is_file()


# --- The command and the scripts ----------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Records the engine's requests in place of running them."""
    calls = []

    def regenerate(paper, plan, items, out, *, run, files):
        calls.append((paper.name, plan, items, out, files._changes))
        return []

    monkeypatch.setattr(engine, "regenerate", regenerate)
    return calls


def by_script(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return status.value.code


COMMON = ["--scale", "smoke", "--seeds", "2", "--set", "rounds=3", "--set", "defense=median"]
COMMON += ["--only", "K*", "--data-dir", "data", "--out", "out"]
COMMANDS = {
    "alie": ["table1", "figure2", "--dataset", "mnist", "--convention", "author"],
    "fat": ["all", "--dataset", "mnist", "--dataset", "cifar10", "--users", "femnist"],
    "fedsecurity": ["exp1", "exp7", "--dataset", "cifar10", "--statement", "config"],
    "fltrust": ["table3", "--dataset", "har_windows"],
    "reconstruction": ["tradeoff", "labels"],
    "rlr": ["table1-iid", "--non-iid", "femnist_digits"],
}


@pytest.mark.parametrize("name", papers.names())
def test_the_script_is_the_command(name, asked, monkeypatch):
    arguments = [*COMMANDS[name], *COMMON]
    done = CliRunner().invoke(cli.app, ["paper", name, *arguments])
    assert done.exit_code == 0, done.output
    assert by_script(name, arguments, monkeypatch) == 0
    one, other = asked
    assert one == other
    _, plan, items, out, changes = one
    assert (plan.scale, plan.seeds, plan.only) == ("smoke", 2, ("K*",))
    assert plan.overrides == ("rounds=3", "defense=median")
    assert out == Path("out") and changes == {"data.data_dir": "data"}
    assert items == (list(papers.find(name).items) if name == "fat" else items)
    if name == "fat":
        assert plan.options == {"dataset": ("mnist", "cifar10"), "users": "femnist"}
    if name == "rlr":
        assert plan.options == {"non_iid": "femnist_digits"}


def test_defaults_are_the_papers(asked):
    arguments = {"fltrust": ["--dataset", "har"]}
    for name in papers.names():
        some = next(iter(papers.find(name).items))
        given = ["paper", name, some, "--out", "x", *arguments.get(name, [])]
        assert CliRunner().invoke(cli.app, given).exit_code == 0
    assert {name: (plan.scale, plan.seeds) for name, plan, *_ in asked} == {
        "alie": ("paper", 3),
        "fat": ("paper", 1),
        "fedsecurity": ("paper", 3),
        "fltrust": ("paper", 3),
        "reconstruction": ("paper", 1),
        "rlr": ("paper", 1),
    }
    assert {name: plan.options for name, plan, *_ in asked} == {
        "alie": {"dataset": "mnist", "convention": "paper"},
        "fat": {"dataset": ("mnist", "fashion_mnist"), "users": "mnist_by_writer"},
        "fedsecurity": {"dataset": "all", "statement": "text"},
        "fltrust": {"dataset": "har"},
        "reconstruction": {},
        "rlr": {"non_iid": "mnist_by_writer"},
    }


def test_an_unknown_paper_says_which_there_are():
    done = CliRunner().invoke(cli.app, ["paper", "alei", "table1"])
    assert done.exit_code == 2 and "Did you mean 'alie'" in done.output


def documented():
    """Every command of a paper in the documents, the configurations and the scripts."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages += [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "scripts").glob("*.py")]
    pattern = re.compile(r"(?:python scripts/(\w+)\.py|fedjax-sec paper (\w+)) ([^`#]+?)(?:`|$)")
    made = {}
    for page in pages:
        for line in page.read_text().splitlines():
            for script, command, rest in pattern.findall(line):
                if script or command in papers.names():
                    made[script or command, rest.strip()] = page.name
    return sorted(made)


@pytest.mark.parametrize(("name", "arguments"), documented())
def test_documented_commands_are_understood(name, arguments, asked, tmp_path):
    words = shlex.split(arguments)
    if "--out" not in words:  # cut off by the page's line
        words += ["--out", "OUT"]
    done = CliRunner().invoke(cli.app, ["paper", name, *words])
    assert done.exit_code == 0, done.output
    ((_, plan, items, *_),) = asked
    assert engine.make_cells(papers.find(name), plan, items)
