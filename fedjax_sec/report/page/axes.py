"""The axes of a folder's cells: those that a sweep names, and keys in which configurations differ.

A sweep writes its labels down. Of runs that nobody labelled, and of keys beside the labels (a
paper's rows differ in attack and defence), the axes are read from the configurations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedjax_sec.report.page.folder import Cell, comparable
from fedjax_sec.sweeps.arena import NO_ATTACK
from fedjax_sec.sweeps.grid import label_of

#: Whole pipelines are one axis each; their fields are further ones.
PIPELINES = ("attack", "defense")
#: The axis whose labels are the runs' names: of a paper's rows, and of folders side by side.
RUN = "run"
#: Axes that are offered at most, and labels of one that is read from configurations.
_MOST, _LABELS = 24, 60
#: Sections that a sweep fills in by itself, or that change no result.
_NO_AXES = ("evaluation.backdoor", "checkpoint", "execution")


class Axis(NamedTuple):
    """`of` are the cells' labels, in their order; None where a cell has no such key."""

    name: str
    labels: tuple[str, ...]
    of: tuple[str | None, ...]

    @property
    def numeric(self) -> bool:
        """Whether all labels are numbers, so that something can be drawn over them."""
        return all(_number(label) is not None for label in self.labels)


def axes_of(cells: Sequence[Cell]) -> list[Axis]:
    """The axes with more than one label: attack and defence first, then the sweep's others.

    >>> from types import SimpleNamespace
    >>> run = SimpleNamespace(config={"rounds": 5})
    >>> cells = [Cell(z, {"attack.z": z, "n": "1"}, [run]) for z in ("0.5", "0.25")]
    >>> [(axis.name, axis.labels) for axis in axes_of(cells)]
    [('attack.z', ('0.25', '0.5'))]
    """
    names = list(dict.fromkeys(axis for cell in cells for axis in cell.labels))
    labelled = [_axis(name, [cell.labels.get(name) for cell in cells]) for name in names]
    axes = [axis for axis in labelled if axis.name != RUN]
    derived = [*_pipelines(cells), *_fields([comparable(cell.config) for cell in cells])]
    partitions = {_partition(axis) for axis in axes}
    for axis in (*derived, *(axis for axis in labelled if axis.name == RUN)):
        # What says the same as an axis that is there already is not offered again.
        if axis.name not in [one.name for one in axes] and _partition(axis) not in partitions:
            axes.append(axis)
            partitions.add(_partition(axis))
    wide = [axis for axis in axes if len(axis.labels) > 1]
    return sorted(wide, key=lambda axis: axis.name not in PIPELINES)[:_MOST]


def default_pair(axes: Sequence[Axis]) -> tuple[str, str]:
    """The axes down and across at the beginning; empty where there are fewer.

    Attack by defence where both are there.

    >>> default_pair([Axis("defense", ("a", "b"), ()), Axis("seed", ("0", "1"), ())])
    ('seed', 'defense')
    """
    names = [axis.name for axis in axes]
    across = "defense" if "defense" in names else next(iter(names), "")
    if "attack" in names and across == "attack" and len(names) > 1:
        across = next(name for name in names if name != "attack")
    down = [name for name in ("attack", *names) if name in names and name != across]
    return (down[0] if down else ""), across


def _axis(name: str, of: Sequence[str | None]) -> Axis:
    """Labels in the order of the cells; numbers by their size."""
    labels = [label for label in dict.fromkeys(of) if label is not None]
    values = [_number(label) for label in labels]
    if all(value is not None for value in values):
        labels = [label for _, label in sorted(zip(values, labels, strict=True))]
    return Axis(name, tuple(labels), tuple(of))


def _partition(axis: Axis) -> tuple:
    """Which cells have the same label, whatever it is."""
    places: dict = {}
    return tuple(places.setdefault(label, len(places)) for label in axis.of)


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _pipelines(cells: Sequence[Cell]) -> list[Axis]:
    """Attack and defence, named by their components and by those fields that vary."""
    axes = []
    for key in PIPELINES:
        stages = [_stages(cell.config.get(key)) for cell in cells]
        varying = _varying(stages)
        nothing = NO_ATTACK if key == "attack" else "none"
        axis = _axis(key, [_short(one, varying) or nothing for one in stages])
        labels = sorted(axis.labels, key=lambda label: label != nothing)  # the others stay as is
        axes.append(axis._replace(labels=tuple(labels)))
    return axes


def _stages(spec: Any) -> list[dict]:
    given = spec if isinstance(spec, list) else [spec]
    return [one if isinstance(one, dict) else {"name": str(one)} for one in given if one]


def _varying(pipelines: Sequence[list[dict]]) -> set[tuple[str, str]]:
    """(component, field) of the fields that have several values."""
    values: dict = {}
    for stages in pipelines:
        for stage in stages:
            for field, value in stage.items():
                values.setdefault((str(stage.get("name")), field), set()).add(text(value))
    return {key for key, several in values.items() if len(several) > 1}


def _short(stages: Sequence[dict], varying: set) -> str:
    """A pipeline's label with the fields that tell it from others.

    >>> _short([{"name": "alie", "z": 1.5, "m": 2}], {("alie", "z")})
    'alie z=1.5'
    """
    return " + ".join(
        label_of(
            {
                key: value
                for key, value in stage.items()
                if key == "name" or (stage.get("name"), key) in varying
            }
        )
        for stage in stages
    )


def _fields(configs: Sequence[dict]) -> list[Axis]:
    """The leaves that have several values; a component's name has the component's key."""
    axes = []
    for key in dict.fromkeys(key for config in configs for key in config):
        if key.startswith(_NO_AXES):
            continue
        of = [text(config[key]) if key in config else None for config in configs]
        labels = {label for label in of if label is not None}
        if 1 < len(labels) <= _LABELS:
            axes.append(_axis(key.removesuffix(".name"), of))
    return axes


def text(value: Any) -> str:
    """A leaf of a configuration as it is shown.

    >>> text(None), text(True), text([1, 2]), text("krum")
    ('none', 'true', '[1, 2]', 'krum')
    """
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
