"""Everything against everything: a list of attacks times a list of defences, and seeds.

An arena is a sweep whose refused combinations stop nobody else. Cells, groups, folders and
launchers are those of any sweep.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sec import core
from fedjax_sec.core import ConfigError, plugins, shown
from fedjax_sec.core.values import own_name
from fedjax_sec.core.yaml import parse, read_text
from fedjax_sec.round.pipeline import Attack, Defense
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.prepare import Prepared, prepare
from fedjax_sec.sweeps import groups
from fedjax_sec.sweeps.grid import Cell, common_backdoor, label_of, seeds_of

#: The row that is always there, and the rule that the cost of a defence is measured against.
NO_ATTACK, MEAN = "no attack", "mean"
#: The two axes: keys of an experiment, and those of a file that holds lists for both.
AXES = {"attack": "attacks", "defense": "defenses"}
#: Specifications of no attack.
_NOTHING = (None, "none", [])
_BUILD = {"attack": Attack.build, "defense": Defense.build}


class Refusal(NamedTuple):
    """A combination that our checks refuse, and their reason."""

    attack: str
    defense: str
    reason: str

    def __str__(self):
        return f"{self.attack} x {self.defense}: {self.reason}"


class Arena(NamedTuple):
    """The combinations: labels of rows and columns, cells of what can run, and what cannot.

    `attacks` begins with no attack; `reference` is the label of the plain mean.
    """

    attacks: tuple[str, ...]
    defenses: tuple[str, ...]
    reference: str
    cells: tuple[Cell, ...]
    refused: tuple[Refusal, ...]


def plan_arena(
    base: str | Path | Mapping | Experiment,
    attacks: Any,
    defenses: Any,
    seeds: int | Sequence[int] = 1,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    imports: Sequence[str] = (),
) -> Arena:
    """The arena of an experiment: no attack and each attack, times plain mean and each defence.

    Args:
      base: the experiment, whose own attack and defence are replaced.
      attacks: see `choices`.
      defenses: see `choices`.
      seeds: the seeds of every combination, or how many there are, from the base's on.
      overrides: keys of every experiment, `{"client.l2": 1e-4}` or `["client.l2=1e-4"]`.
      imports: modules and files with components of your own.

    Raises: `ConfigError` for a base that cannot be run, names and fields that do not exist, and
    labels that are alike. Combinations that the checks refuse are in `refused`.

    >>> base = {"threat": {"num_malicious": 2}, "data": {"num_clients": 8}}
    >>> arena = plan_arena(base, "sign_flip", "krum,bulyan")
    >>> arena.attacks, arena.defenses, len(arena.cells)
    (('no attack', 'sign_flip'), ('mean', 'krum', 'bulyan'), 4)
    >>> print(arena.refused[0].defense, arena.refused[0].reason[:48])
    bulyan defense.num_byzantine: bulyan needs 4 f + 3 <= K
    """
    spec = _spec(base, imports)
    changes = _changes(overrides)
    attacked = {NO_ATTACK: None} | choices(attacks, "attack")
    defended, reference = _with_mean(choices(defenses, "defense"))
    numbers = _seeds(spec, seeds)
    for axis, labelled in (("attack", attacked), ("defense", defended)):
        for label, one in labelled.items():
            _BUILD[axis](one, f"{AXES[axis]}: {label}")
    cells, refused = [], []
    for attack, one in attacked.items():
        for defense, rule in defended.items():
            set_here = changes | {"attack": one, "defense": rule}
            labels = {"attack": attack, "defense": defense}
            try:
                made = [
                    Cell(labels, config_lib.from_mapping(spec, set_here | {"seed": seed}))
                    for seed in numbers
                ]
            except ConfigError as error:
                if (attack, defense) == (NO_ATTACK, reference):
                    raise  # nothing can be run
                refused.append(Refusal(attack, defense, str(error)))
            else:
                cells += made
    _check_names(cells)
    rows, columns = tuple(attacked), tuple(defended)
    return Arena(rows, columns, reference, _with_base_rate(cells, spec), tuple(refused))


def admit(arena: Arena, out: str | Path) -> tuple[Arena, dict[str, Prepared]]:
    """The arena without combinations that cannot be run on their data, and what is prepared.

    A combination is refused whole where one of its seeds is. Raises: `ConfigError` where plain mean
    without an attack cannot be run, or the folder is not this sweep's.
    """
    out = Path(out).absolute()
    groups.check_folders(arena.cells, out)
    prepared, reasons = {}, {}
    for cell in groups.unfinished(arena.cells, out):
        pair = _pair(cell)
        if pair in reasons:
            continue
        try:
            prepared[cell.name] = prepare(cell.experiment)
        except ConfigError as error:
            if pair == (NO_ATTACK, arena.reference):
                raise
            reasons[pair] = f"{error} (seed {cell.experiment.seed})"
    if not reasons:
        return arena, prepared
    cells = tuple(cell for cell in arena.cells if _pair(cell) not in reasons)
    refused = (*arena.refused, *(Refusal(*pair, reason) for pair, reason in reasons.items()))
    names = {cell.name for cell in cells}
    left = {name: one for name, one in prepared.items() if name in names}
    return arena._replace(cells=cells, refused=refused), left


def choices(given: Any, axis: str) -> dict[str, Any]:
    """label -> specification of the attacks or defences that are given.

    A list of names, mappings with `name`, objects of Python's own and lists (pipelines); a mapping
    of labels to these; or text: the path of a YAML file with such a list or mapping, which may
    stand below `attacks` or `defenses`, such a list or mapping inline, or names separated by
    commas, those of a pipeline by plus signs.

    >>> choices("median, clip_norm+mean", "defense")
    {'median': 'median', 'clip_norm + mean': ['clip_norm', 'mean']}
    >>> choices("{strong: {name: sign_flip, scale: 9}}", "attack")
    {'strong': {'name': 'sign_flip', 'scale': 9}}
    """
    key = AXES[axis]
    if isinstance(given, (str, os.PathLike)):
        given = _read(str(given), axis)
    if isinstance(given, Mapping) and "name" not in given:
        labelled = {str(label): one for label, one in given.items()}
    else:
        listed = given if isinstance(given, (list, tuple)) else [given]
        listed = [core.dump(one, True) if own_name(type(one)) else one for one in listed]
        if axis == "attack":  # that row is always there
            listed = [one for one in listed if one not in _NOTHING]
        labels = [label_of(one) for one in listed]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ConfigError(f"{key}: {twice[0]!r} is there twice; give labels, {{label: value}}.")
        labelled = dict(zip(labels, listed, strict=True))
    if axis == "attack":
        labelled = {label: one for label, one in labelled.items() if one not in _NOTHING}
    elif not labelled:
        raise ConfigError("defenses is empty; name one or more.")
    if NO_ATTACK in labelled and axis == "attack":
        raise ConfigError(f"attacks: {NO_ATTACK!r} is the row without any; give another label.")
    return labelled


def _read(text: str, axis: str) -> Any:
    key = AXES[axis]
    if text.lstrip()[:1] in ("{", "["):
        return parse(text, key, with_references=False)
    if text.endswith((".yaml", ".yml")):
        content = parse(read_text(text), text)
        if isinstance(content, Mapping) and content.keys() <= set(AXES.values()):
            if key not in content:
                raise ConfigError(f"{text} holds {', '.join(content)}, and no {key}.")
            content = content[key]
        if not isinstance(content, (Mapping, list)):
            raise ConfigError(f"{text} must hold a list or {{label: value}}, got {shown(content)}.")
        return content
    names = [part.strip() for part in text.split(",") if part.strip()]
    return [[one.strip() for one in name.split("+")] if "+" in name else name for name in names]


def _spec(base, imports: Sequence[str]) -> dict:
    if isinstance(base, Experiment):
        spec = base.to_dict(objects=True)
    elif isinstance(base, Mapping):
        spec = config_lib.apply_overrides(base, ())
    else:
        spec = config_lib.read_yaml(base)
    if lost := {"grid", "experiment"} & spec.keys():
        raise ConfigError(
            f"An arena takes an experiment, and this is a sweep: it has the key "
            f"{sorted(lost)[0]!r}."
        )
    if imports or "imports" in spec:
        given = plugins.joined(spec.get("imports"), imports)
        spec["imports"] = plugins.import_all(given, "imports")
    return spec


def _changes(overrides) -> dict:
    if not isinstance(overrides, Mapping):
        overrides = dict(config_lib.parse_override(text) for text in overrides)
    for key in overrides:
        first = str(key).partition(".")[0]
        if first in AXES:
            raise ConfigError(
                f"{key} would do nothing: an arena replaces {first} in every combination; put it "
                f"into {AXES[first]}."
            )
        if key == "seed":
            raise ConfigError("seed would be ignored; give seeds.")
    return dict(overrides)


def _seeds(spec: Mapping, seeds) -> list[int]:
    first, seeds = seeds_of(spec)[0], core.plain(seeds)
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
        return list(range(first, first + seeds))
    numbers = list(seeds) if isinstance(seeds, (list, tuple)) else []
    if not numbers or len(set(map(repr, numbers))) < len(numbers):
        raise ConfigError(
            f"seeds must be a number of seeds >= 1 or a list of different ones, got {shown(seeds)}."
        )
    if "seed" in spec and first not in numbers:
        raise ConfigError(
            f"experiment.seed = {shown(first)} would be ignored, since seeds are {shown(numbers)}; "
            f"leave one of the two out."
        )
    return numbers


def _with_mean(defended: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The defences with plain mean among them, and its label."""
    plain = core.dump(_BUILD["defense"](MEAN))
    for label, spec in defended.items():
        try:
            built = _BUILD["defense"](spec, f"defenses: {label}")
        except ConfigError:
            continue  # it is raised where all are built
        if core.dump(built) == plain:
            return dict(defended), label
    if MEAN in defended:
        raise ConfigError(
            f"defenses: {MEAN!r} is the column of the plain mean; give another label."
        )
    return {MEAN: MEAN, **defended}, MEAN


def _with_base_rate(cells: Sequence[Cell], spec: Mapping) -> tuple[Cell, ...]:
    """Cells without an attack measure the attacks' backdoor, where it is one and the same."""
    given = spec.get("evaluation")
    named = isinstance(given, Mapping) and given.get("backdoor") is not None
    if named or (backdoor := common_backdoor(cells)) is None:
        return tuple(cells)
    changes = {"evaluation.backdoor": backdoor}

    def measured(cell: Cell) -> Cell:
        if cell.experiment.attack.stages or cell.experiment.backdoor is not None:
            return cell
        spec = cell.experiment.to_dict(objects=True)
        return cell._replace(experiment=config_lib.from_mapping(spec, changes))

    return tuple(map(measured, cells))


def _check_names(cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"two combinations have the same name {sorted(twice)[0]!r}; give labels, "
            f"{{label: value}}, that differ in letters or digits."
        )


def _pair(cell: Cell) -> tuple[str, str]:
    return cell.labels["attack"], cell.labels["defense"]
