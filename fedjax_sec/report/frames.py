"""Everything that was measured in a folder, as one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedjax_sec.core import ConfigError
from fedjax_sec.core.optional import require
from fedjax_sec.sweeps import catalog

if TYPE_CHECKING:
    import pandas as pd

#: Columns beside the axes and the metrics.
FACTS = ("seed", "run", "finished", "round")


def load(out: str | Path, *, lists: bool = False) -> "pd.DataFrame":
    """All evaluations of all runs in a folder, of a run, a sweep, an arena or a paper.

    Args:
      out: the folder; runs that are not finished are there with what they have measured.
      lists: whether metrics with an entry a class or a client are columns, too, of lists.

    Returns: a pandas frame with one row a run and evaluation. Its columns are the axes of the grid
    (numbers, where all labels are some), `seed`, the `run`'s name, whether it is `finished`, the
    `round`, and the metrics under the names and in the units of `metrics.jsonl`, NaN where one was
    not measured. An axis with such a name is `grid.NAME`.

    Raises: `ConfigError` for a folder without a run that has measured anything, or with damage.

    >>> import tempfile
    >>> import fedjax_sec
    >>> grid = {"defense": ["mean", "median"]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = fedjax_sec.sweep({"experiment": {"rounds": 2}, "grid": grid}, out=folder)
    ...     frame = load(folder)
    >>> frame[["defense", "seed", "round"]].values.tolist()
    [['mean', 0, 0], ['mean', 0, 2], ['median', 0, 0], ['median', 0, 2]]
    >>> wide = frame.pivot(index="round", columns="defense", values="accuracy")  # wide.plot()
    """
    pandas = require("pandas", "A table of measurements")
    places = catalog.places(out)
    measured = [place.folder.rows() for place in places]
    metrics = list(dict.fromkeys(key for rows in measured for row in rows for key in row))
    axes = dict.fromkeys(axis for place in places for axis in place.labels)
    taken = {*FACTS, *metrics}
    columns = {axis: f"grid.{axis}" if axis in taken else axis for axis in axes}
    content: list[dict[str, Any]] = []
    for place, rows in zip(places, measured, strict=True):
        about = {columns[axis]: label for axis, label in place.labels.items()}
        about |= {"seed": place.seed, "run": place.name, "finished": place.folder.finished}
        content += [about | {"round": row["round"]} | _metrics(row, lists) for row in rows]
    if not content:
        raise ConfigError(f"No run in {str(out)!r} has measured anything yet.")
    named = list(dict.fromkeys(key for row in content for key in row))
    names = [*columns.values(), *FACTS]
    frame = pandas.DataFrame(content)[names + [key for key in named if key not in names]]
    for column in columns.values():
        frame[column] = _values(frame[column].tolist())
    for column in frame.columns.difference(names):
        if not any(isinstance(value, list) for value in frame[column]):
            frame[column] = frame[column].astype(float)
    return frame


def _metrics(row: Mapping[str, Any], lists: bool) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name != "round"}
    return {name: one for name, one in rest.items() if lists or not isinstance(one, list)}


def _values(labels: Sequence) -> Sequence:
    """Labels as numbers or as truth values where all are such, as a reader of CSV takes them.

    >>> _values(["1", "2.5"]), _values(["1", "krum"]), _values(["True"])
    ([1.0, 2.5], ['1', 'krum'], [True])
    """
    if all(label in ("True", "False") for label in labels):
        return [label == "True" for label in labels]
    for kind in (int, float):
        try:
            return [kind(label) for label in labels]
        except (TypeError, ValueError):
            continue
    return labels
