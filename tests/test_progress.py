"""Progress while something runs: its numbers, and how terminals, logs and notebooks show them."""

import io
import re
import sys
import types

import pytest
from helpers import small
from rich.console import Console
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import progress, sweeps
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError
from fedjax_sec.progress import State
from fedjax_sec.runs import config
from fedjax_sec.sweeps import groups as groups_lib

BASE = small(rounds=3)


class Recorded:
    """A display that keeps what it is shown."""

    def __init__(self):
        self.states = []

    def show(self, state):
        self.states.append(state)


def clock_of(*times):
    given = iter(times)
    return lambda: next(given)


# --- Numbers ------------------------------------------------------------------------------------


def test_the_rate_leaves_compiling_out_and_follows_the_newest():
    rate = progress.Rate(clock_of(0.0, 60.0, 61.0, 62.0))
    assert [rate.at(done) for done in (0, 10, 20, 30)] == [None, 10 / 60, 10.0, 10.0]
    slow = progress.Rate(clock_of(*range(30), 129))  # one round a second, then one in 100 seconds
    rates = [slow.at(done) for done in range(31)]
    assert rates[29] == 1.0 and rates[30] == pytest.approx(19 / 118)
    still = progress.Rate(clock_of(1.0, 1.0))
    assert [still.at(5), still.at(5)] == [None, None]


def test_a_runs_states():
    display = Recorded()
    watch = progress.OfRun(display, 40, clock=clock_of(0.0, 9.0, 10.0, 12.0))
    row = {"round": 0, "accuracy": 0.5, "loss": 1.0, "attack_success_rate": 0.25}
    for done in (0, 20, 30, 40):
        watch(done, [row])
    watch.end()
    assert [(s.done, s.rate, s.left) for s in display.states] == [
        (0, None, None),
        (0, None, None),
        (20, 20 / 9, 9.0),
        (30, 10.0, 1.0),
        (40, 20 / 3, 0.0),
    ]
    assert display.states[0].note == "compiling"
    assert display.states[-1].note == "accuracy 50.0%, attack success rate 25.0%, loss 1"


def test_a_sweeps_states(tmp_path):
    cells = sweeps.make_cells(BASE, {"client.l2": [0.0, 0.1]}, seeds=(0, 1))
    sweeps.plan(cells[1:], tmp_path, group_size=2)  # one and two seeds
    display = Recorded()
    # 5 to prepare, 2 to compile, 1 for each round of two
    times = clock_of(0.0, 5.0, 5.0, 9.0, 9.0, 11.0, 11.0)
    watch = progress.OfSweep(display, cells, cells[1:], tmp_path, times)
    assert watch.done == 3  # of the run that was finished before
    look = watch.on_group(0, 2, cells[2:])
    look(0, [{"round": 0, "accuracy": 0.0}] * 2)
    look(1, [{"round": 1, "accuracy": 0.5}, {"round": 1, "accuracy": 1.0}])
    look(3, [{"round": 3, "accuracy": 1.0}] * 2)
    first, begun, second, third = display.states
    assert first.title == "group 1/2 (2 runs): l2 = 0.1" and first.note == "compiling"
    assert (second.done, second.total, second.note) == (5, 12, "accuracy 75.0%")
    assert begun.left is None
    assert second.left == pytest.approx(7 * 4.0 / 2 + 5.0)  # compiling is taken for a round yet
    assert third.left == pytest.approx(3 * 2.0 / 4 + 5.0 + 4.0 - 1 * 2.0 / 2)


def test_a_sweep_counts_what_other_processes_do(tmp_path):
    cells = sweeps.make_cells(BASE, {"client.l2": [0.0, 0.1, 0.2, 0.3]})
    groups = sweeps.plan(cells, tmp_path, group_size=1)
    display = Recorded()
    # 40 to prepare and compile, half a second for the first round, 19.5 for the second one
    times = clock_of(0.0, 40.0, 40.0, 40.5, 40.5, 60.0, 60.0, 80.0)
    watch = progress.OfSweep(display, cells, cells, tmp_path, times)
    look = watch.on_group(0, 4, cells[:1])
    look(0, [{}])
    sweeps.work(tmp_path, groups[1])
    with groups_lib.take(tmp_path, groups[2].name):  # as a process that works on it
        look(1, [{}])  # too early to look again
        look(2, [{}])
    _, _, alone, shared = display.states
    assert (alone.done, alone.left) == (1, pytest.approx(11 * 0.5 + 3 * 40.0))
    assert (shared.done, shared.left) == (2 + 3, pytest.approx((7 * 19.5 + 1 * 21.0) / 2))
    sweeps.work(tmp_path, groups[2])
    watch.on_wait(cells[3:])
    assert display.states[-1].done == 2 + 3 + 3


# --- Displays -----------------------------------------------------------------------------------


def test_plain_lines_now_and_then():
    lines, times = [], iter([0, 1, 2, 13, 13, 14, 14, 15, 16])
    with progress.Lines(lines.append, every=10, clock=lambda: next(times)) as display:
        for done in (0, 1, 2, 3):
            display.show(State("one", done, 9, note="x"))
        display.show(State("two", 4, 9))
        display.show(State("two", 5, 9))
    assert lines == [
        "one: round 0/9, x",
        "one: round 3/9, x",  # 13 seconds later
        "two: round 4/9",
        "two: round 5/9",  # the last one
    ]


def test_a_log_says_nothing_of_what_has_not_begun():
    lines = []
    with pytest.raises(KeyError), progress.Lines(lines.append) as display:
        display.show(State("", 0, 9, note="compiling"))
        raise KeyError
    assert lines == []


def test_a_terminal_has_one_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with progress.choose(console) as display:
        assert isinstance(display, progress.Terminal)
        display.show(State("group 1/2: krum", 3, 12, 4.5, 75.0, "accuracy 91.2%"))
        display.show(State("group 2/2: mean", 12, 12, 4.5, 0.0, "accuracy 95.0%"))
    text = console.file.getvalue()
    assert "group 2/2: mean" in text and "12/12" in text and "accuracy 95.0%" in text
    assert "4.5 rounds/s" in text and text.count("\n") <= 3


@pytest.fixture
def notebook(monkeypatch):
    """IPython in the kernel of a notebook; the list grows by what is displayed."""
    shown = []

    class Handle:
        def update(self, page):
            shown.append(("update", page))

    def display(page, display_id):
        assert display_id is True
        shown.append(("display", page))
        return Handle()

    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_notebook_shows_one_line_of_html(notebook, capfd):
    assert progress.in_notebook()
    fedjax_sec.run(BASE)
    kinds = [kind for kind, _ in notebook]
    assert kinds == ["display"] + ["update"] * 4
    assert notebook[0][1] == '<progress value="0" max="3"></progress> round 0/3, compiling'
    assert re.match(
        r'<progress value="3" max="3"></progress> round 3/3, .*accuracy', notebook[-1][1]
    )
    assert capfd.readouterr().err == ""
    notebook.clear()
    fedjax_sec.run(BASE, progress=False)
    assert notebook == []


def test_titles_are_escaped():
    assert "&lt;b&gt;" in progress.displays.as_html(State("<b>", 1, 2))


def test_outside_a_notebook_python_says_nothing_unless_asked(capfd, tmp_path):
    seen = []
    fedjax_sec.run(BASE, on_evaluation=lambda done, rows: seen.append(done))
    assert capfd.readouterr() == ("", "") and seen == [0, 1, 2, 3]
    fedjax_sec.run(BASE, progress=True, on_evaluation=lambda done, rows: seen.append(done))
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("round 0/3, accuracy ") and said[-1].startswith("round 3/3, ")
    assert "accuracy" in said[-1] and seen == [0, 1, 2, 3] * 2
    groups = []
    spec = {"experiment": BASE, "grid": {"client.l2": [0.0, 0.1]}}
    fedjax_sec.sweep(
        spec, out=tmp_path, progress=True, on_group=lambda *group: groups.append(group[:2])
    )
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "group 1/1 (2 runs): l2 = 0.0, l2 = 0.1: round 0/6, compiling"
    assert "round 6/6, " in said[-1] and groups == [(0, 1)]
    with pytest.raises(ConfigError, match="progress must be true, false or null, got 3"):
        fedjax_sec.run(BASE, progress=3)


def test_the_command_prints_plain_lines_into_a_log(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(config.dump_yaml(BASE))
    command = ["run", str(file), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    lines = [line for line in done.output.splitlines() if line.startswith("round ")]
    assert lines[0].startswith("round 0/3, accuracy ") and lines[-1].startswith("round 3/3, ")
    assert done.exit_code == 0 and "accuracy" in lines[-1]
    again = CliRunner().invoke(app, [*command, "--resume"])
    assert "round 0/3, nothing was computed" in again.output
