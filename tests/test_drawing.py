"""Pictures of a sweep: heat maps, metrics over a numeric axis, and the two public functions."""

import io
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from helpers import small
from PIL import Image

import fedjax_sec
from fedjax_sec import sweeps
from fedjax_sec.core import ConfigError
from fedjax_sec.report import plotting, sweep_figures
from fedjax_sec.report import sweeps as sweeps_report
from fedjax_sec.runs.experiment import Result

BASE = small(threat={"num_malicious": 2})
ATTACKS = {"no attack": None, "flip": "sign_flip", "plus": {"name": "pattern"}}


def result_of(cell, accuracy, success=math.nan):
    metrics = {
        "round": np.array([0.0, 3.0]),
        "accuracy": np.array([0.1, accuracy]),
        "loss": np.array([2.0, 1.0]),
        "kept": np.zeros((2, 5)),
    }
    if not math.isnan(success):
        metrics["attack_success_rate"] = np.array([0.0, success])
    final = {name: values[-1] for name, values in metrics.items() if values.ndim == 1}
    summary = {"final": final, "best": final, "data": {"label": "digits"}, "diverged": False}
    return Result(cell.experiment, metrics, summary, None)


def swept(grid, seeds=(0, 1), success=False, base=BASE):
    """A sweep whose accuracies are 0.5, 0.51, ... in the order of its cells."""
    cells = sweeps.make_cells(base, grid, seeds)
    results = [
        result_of(
            cell, 0.5 + 0.01 * i, 0.5 if success and cell.labels["attack"] == "plus" else math.nan
        )
        for i, cell in enumerate(cells)
    ]
    return fedjax_sec.SweepResult(cells, results)


@pytest.fixture
def kept(monkeypatch):
    """The figures that are saved, by their names."""
    figures = {}

    def save(figure, path):
        figures[path.name] = figure
        return [path.with_suffix(".png")]

    monkeypatch.setattr(plotting, "save", save)
    return figures


# --- Files of a sweep -----------------------------------------------------------------------------


def test_a_sweep_has_heat_maps_and_its_backdoor_beside_the_accuracy(kept, tmp_path):
    done = swept({"attack": ATTACKS, "defense": ["mean", "median"]}, success=True)
    sweeps_report.write(done.cells, done.results, tmp_path, "Mine")
    assert set(kept) == {
        "accuracy",
        "accuracy_heat_map",
        "attack_success_rate",
        "attack_success_rate_heat_map",
    }
    heat = kept["accuracy_heat_map"].axes[0]
    assert [label.get_text() for label in heat.get_yticklabels()] == [*ATTACKS, "worst attack"]
    texts = [text.get_text() for text in heat.texts]
    assert texts[:4] == ["50.5", "± 0.7", "52.5", "± 0.7"]
    assert texts[-4:] == ["54.5", "flip", "56.5", "flip"]  # the clean row is no attack
    beside = kept["attack_success_rate"].axes
    assert [(axes.get_title(), axes.get_ylabel()) for axes in beside] == [
        ("plus", "test accuracy (%)"),
        ("plus", "attack success rate (%)"),
    ]
    assert "Mine\ndigits; after the last round" in kept["accuracy_heat_map"].get_suptitle()


def test_panels_name_their_axis_and_rounds_are_whole(kept, tmp_path):
    grid = {"attack.z": [0.5, 1.5], "defense": ["mean", "median"]}
    done = swept(grid, base=BASE | {"attack": {"name": "alie"}})
    sweeps_report.write(done.cells, done.results, tmp_path)
    panels = kept["accuracy"].axes
    assert [panel.get_title() for panel in panels] == ["attack.z = 0.5", "attack.z = 1.5"]
    for panel in panels:
        ticks = panel.xaxis.get_major_locator().tick_values(0, 3)
        assert all(float(tick).is_integer() for tick in ticks)


def test_lines_differ_in_more_than_their_colour(kept, tmp_path):
    done = swept({"attack": ATTACKS, "client.l2": [0.0, 0.1, 0.2, 0.3]}, seeds=(0,))
    sweeps_report.write(done.cells, done.results, tmp_path)
    panel = kept["accuracy"].axes[0]
    looks = {(line.get_linestyle(), line.get_marker()) for line in panel.lines}
    assert len(looks) == len({line.get_color() for line in panel.lines}) == 4
    assert (
        len({tuple(plotting.look(i, 9)[k] for k in ("linestyle", "marker")) for i in range(28)})
        == 28
    )
    assert panel.get_legend() is None and kept["accuracy"].legends


def test_a_metric_over_a_numeric_axis(kept, tmp_path):
    grid = {"attack.z": [1.5, 0.25, 0.5], "defense": ["mean", "median"]}
    done = swept(grid, base=BASE | {"attack": {"name": "alie"}})
    sweeps_report.write(done.cells, done.results, tmp_path)
    (panel,) = kept["accuracy_over_attack_z"].axes
    assert panel.get_xlabel() == "attack.z" and panel.get_xscale() == "linear"
    lines = {line.get_label(): line for line in panel.lines}
    assert set(lines) == {"mean", "median"}
    assert lines["mean"].get_xdata().tolist() == [0.25, 0.5, 1.5]  # in their order
    assert lines["mean"].get_ydata().tolist() == pytest.approx([54.5, 58.5, 50.5])
    assert len(panel.collections) == 2  # a band a line


def test_a_wide_axis_is_logarithmic_and_two_numbers_are_no_curve(kept, tmp_path):
    done = swept({"client.l2": [0.001, 0.1, 10.0], "defense": ["mean", "median"]})
    sweeps_report.write(done.cells, done.results, tmp_path)
    assert kept["accuracy_over_client_l2"].axes[0].get_xscale() == "log"
    kept.clear()
    done = swept({"client.l2": [0.001, 0.1], "defense": ["mean", "median"]})
    sweeps_report.write(done.cells, done.results, tmp_path)
    assert set(kept) == {"accuracy", "accuracy_heat_map"}
    heat = kept["accuracy_heat_map"].axes[0]
    assert [one.get_text() for one in heat.get_xticklabels()] == [
        "client.l2 = 0.001",
        "client.l2 = 0.1",
    ]


def test_further_axes_are_panels(kept, tmp_path):
    grid = {"attack": ATTACKS, "defense": ["mean", "median"], "client.l2": [0.0, 0.1, 0.5]}
    done = swept(grid, seeds=(0,))
    sweeps_report.write(done.cells, done.results, tmp_path)
    titles = [axes.get_title() for axes in kept["accuracy_heat_map"].axes if axes.get_title()]
    assert titles == [f"client.l2 = {l2}: test accuracy (%)" for l2 in (0.0, 0.1, 0.5)]
    assert [axes.get_title() for axes in kept["accuracy_over_client_l2"].axes] == list(ATTACKS)


def test_a_run_has_its_legend_outside(kept, tmp_path):
    (cell,) = sweeps.make_cells(BASE, {})
    plotting.headline_curve(result_of(cell, 0.5, 0.3), tmp_path)
    (axes,) = kept["accuracy"].axes
    first, second = axes.lines
    assert axes.get_legend() is None and kept["accuracy"].legends
    assert first.get_color() != second.get_color()
    assert first.get_linestyle() != second.get_linestyle()


# --- The public functions -------------------------------------------------------------------------


def test_curves_of_everything_that_holds_results():
    done = swept({"defense": ["mean", "median"]})
    one, other = done.results[:2], done.results[2:]
    alone = fedjax_sec.plot_curves(one[0])
    assert len(alone.lines) == 1 and alone.get_legend() is None
    seeds = fedjax_sec.plot_curves(one, "accuracy")
    assert len(seeds.lines) == len(seeds.collections) == 1
    assert seeds.lines[0].get_ydata()[-1] == pytest.approx(50.5)
    both = fedjax_sec.plot_curves({"a": one, "b": other[0]})
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["a", "b"]
    cells = fedjax_sec.plot_curves(done)
    assert [line.get_label() for line in cells.lines] == ["mean", "median"]
    _, ax = plotting.subplots(figsize=(3, 3))
    assert fedjax_sec.plot_curves(done, ax=ax) is ax


def test_a_notebook_shows_a_figure_as_a_picture():
    """Without pyplot nothing tells IPython how: it asks the object."""
    figure = fedjax_sec.plot_curves(result_of(sweeps.make_cells(BASE, {}, [0])[0], 0.5)).figure
    picture = np.asarray(Image.open(io.BytesIO(figure._repr_png_())))
    assert picture.shape[0] > 300 and picture.shape[1] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10


def test_a_legend_covers_no_data():
    done = swept({"defense": ["mean", "median"], "client.l2": [i / 10 for i in range(24)]})
    ax = fedjax_sec.plot_curves(done)
    ax.figure.draw_without_rendering()
    legend, inside = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.x0 >= inside.x1 and legend.x1 <= ax.figure.bbox.x1 + 1
    assert inside.width > 150 and inside.height > 200


def test_a_heat_map_of_any_two_axes():
    grid = {"attack": ATTACKS, "defense": ["mean", "median"], "client.l2": [0.0, 0.1]}
    done = swept(grid, seeds=(0,))
    ax = fedjax_sec.plot_heatmap(done)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("attack", "defense")
    assert ax.get_title() == "test accuracy (%), mean over client.l2"
    assert ax.texts[0].get_text() == "50.5"
    ax = fedjax_sec.plot_heatmap(done, "loss", rows="client.l2", columns="attack")
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("client.l2", "attack")
    assert ax.get_title() == "loss, mean over defense"
    assert {text.get_text() for text in ax.texts} == {"1.0", "± 0.0"}
    ax = fedjax_sec.plot_heatmap(done, columns="attack")
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("defense", "attack")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": "atack"}, "rows: there is no axis 'atack'.*Did you mean 'attack'"),
        ({"rows": "attack", "columns": "attack"}, "rows and columns must differ"),
        ({"metric": "acuracy"}, "'acuracy' is not measured in the sweep.*Did you mean 'accuracy'"),
        ({"metric": "kept"}, "'kept' is not measured"),
    ],
)
def test_a_heat_map_of_what_is_not_there(change, said):
    done = swept({"attack": ATTACKS, "defense": ["mean", "median"]}, seeds=(0,))
    with pytest.raises(ConfigError, match=said):
        fedjax_sec.plot_heatmap(done, **change)


def test_other_mistakes_are_errors():
    done = swept({"defense": ["mean", "median"]})
    with pytest.raises(ConfigError, match=r"needs two axes .* this sweep has defense"):
        fedjax_sec.plot_heatmap(done)
    with pytest.raises(ConfigError, match="must be what sweep or arena returns"):
        fedjax_sec.plot_heatmap(done.results)
    with pytest.raises(ConfigError, match="is no share"):
        fedjax_sec.plot_curves(done, "loss")
    with pytest.raises(ConfigError, match="'accuracies' is not measured in mean. Did you"):
        fedjax_sec.plot_curves(done, "accuracies")
    for nothing in ([], {}, {"a": []}, "accuracy", 3):
        with pytest.raises(ConfigError, match="results must be of run, sweep or arena"):
            fedjax_sec.plot_curves(nothing)
    longer = done.results[0].metrics | {"round": np.array([0.0, 9.0])}
    with pytest.raises(ConfigError, match="measured at different rounds"):
        fedjax_sec.plot_curves([done.results[0], done.results[1]._replace(metrics=longer)])


def test_importing_draws_on_no_library(subprocess_env):
    program = "import sys, fedjax_sec; fedjax_sec.plot_curves\n"
    program += "print([n for n in ('matplotlib', 'pandas', 'altair') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=subprocess_env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_labels_that_are_no_numbers_have_no_curve():
    cells = swept({"defense": ["mean", "median"], "client.l2": [0, 1, 2]}).cells
    axes = sweep_figures.axes_of(cells)
    assert list(itertools.chain(*axes.values())) == ["mean", "median", "0", "1", "2"]
    assert sweep_figures.over_axes(cells[:4], [], "accuracy", [], None) == []
