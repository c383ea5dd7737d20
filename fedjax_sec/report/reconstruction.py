"""Reconstructs clients' examples from a run's rounds, and draws them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_sec.core import ConfigError, files, registry, value_of
from fedjax_sec.core.types import InputSpec
from fedjax_sec.ops import reconstruction as scores_of
from fedjax_sec.report import plotting
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import results
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.reconstruct import Reconstruction, Sight, attack_sights, watch
from fedjax_sec.runs.source import load_source

#: The files beside the pictures.
FILES = ("reconstruction.json", "reconstruction.npz")
#: Examples of one sight in a picture, and sights in one.
_COLUMNS, _ROWS = 8, 6
#: A reconstruction succeeds from this PSNR on (a choice), in decibels.
SUCCESS = 20.0
#: Sights that the table lists one by one.
_LISTED = 12


class Report(NamedTuple):
    """Reconstructions of what an observer saw: one sight, one reconstruction and one entry each.

    An entry is what `reconstruction.json` holds.
    """

    attack: Any
    inputs: InputSpec
    sights: list[Sight]
    made: list[Reconstruction]
    entries: list[dict]


def reconstruct(
    where: str | Path | Mapping | Experiment,
    attack: Any,
    *,
    rounds: Sequence[int] | None = None,
    clients: Sequence[int] = (0,),
    observer: str = "server",
    secure_aggregation: bool = False,
    merged: int | None = None,
    seed: int = 0,
    success: float = SUCCESS,
    overrides: Mapping | Sequence[str] = (),
) -> Report:
    """Reconstructs the examples of some clients of an experiment, round by round.

    Args:
      where: the folder of a finished run, whose checkpoints are used; or a configuration.
      attack: the privacy attack, a name or a mapping with `name` and fields.
      rounds: numbered from 1 (None: the one behind a finished run's last, and the first of a
        configuration).
      clients: numbers of clients: those that are looked at, or with the observer `client` those
        that look.
      observer: `server`, `client`, `uplink` or `downlink`, see `fedjax_sec.ops.observers`.
      secure_aggregation: the server sees the clients' weighted mean alone.
      merged: the number of clients whose mean the attack takes the message for (None: all whom the
        observer cannot tell apart).
      seed: of the attack's own draws.
      success: PSNR in decibels from which on an entry's mean is called a success.
      overrides: changes of a configuration.

    Raises: `ConfigError` for what `watch` refuses, and for overrides of a finished run.
    """
    attack = registry.privacy_attacks.build(attack, "attack")
    experiment, folder = _experiment(where, overrides)
    if rounds is None:
        rounds = (1,) if folder is None else (experiment.rounds + 1,)
    task, sights = watch(
        experiment,
        attack,
        folder=folder,
        rounds=rounds,
        clients=clients,
        observer=observer,
        secure_aggregation=secure_aggregation,
        merged=merged,
    )
    pairs = attack_sights(attack, task, sights, seed)
    sights, made = [sight for sight, _ in pairs], [one for _, one in pairs]
    guessed = any(one.guess.x is not None for one in made) and task.inputs.kind != "tokens"
    source = load_source(experiment) if guessed else None
    # Among all training inputs an observer looks for the right one.
    pool = None if source is None else np.asarray(source.inputs.decode(source.x_train))
    about = {"observer": observer, "secure_aggregation": secure_aggregation}
    entries = [
        _entry(attack, about, sight, one, task.inputs, pool, success)
        for sight, one in zip(sights, made, strict=True)
    ]
    return Report(attack, task.inputs, sights, made, entries)


def _experiment(where, overrides) -> tuple[Experiment, Path | None]:
    """(the experiment, the folder of its run or None)."""
    if isinstance(where, Experiment):
        return where, None
    if isinstance(where, Mapping):
        return config_lib.from_mapping(where, overrides), None
    path = Path(where)
    if not path.is_dir():
        return config_lib.load(path, overrides), None
    run = results.RunFolder(path)
    if not run.finished:
        raise ConfigError(
            f"Folder {str(path)!r} holds no finished run; finish it, or give its configuration."
        )
    if overrides:
        given = overrides if isinstance(overrides, Mapping) else {}
        if set(given) - {"data.data_dir"} or not given:
            raise ConfigError(
                f"experiment: the run in {str(path)!r} is as it is; give a configuration instead "
                f"of its folder to change {', '.join(map(str, given or overrides))}."
            )
        return config_lib.from_mapping(run.experiment().to_dict(), overrides), path
    return run.experiment(), path


def _entry(attack, about, sight: Sight, made: Reconstruction, inputs, pool, success) -> dict:
    guess, scores = made.guess, made.scores
    entry = {
        "round": sight.round,
        "client": sight.clients[0] if len(sight.clients) == 1 else list(sight.clients),
        **about,
        "viewer": sight.viewer,
        "attack": attack.registered_name,
        "steps": sight.known.steps,
        "batch_size": sight.known.batch,
        "examples": len(sight.y),
        "labels_true": np.asarray(sight.y).tolist(),
        "labels_recovered": np.asarray(guess.y).tolist(),
        "label_rate": float(scores.labels),
        "loss": _number(guess.loss),
    }
    if guess.x is None:
        return entry | {"psnr": None, "ssim": None, "success": bool(scores.labels == 1.0)}
    if inputs.kind == "tokens":
        right = 1.0 - np.asarray(scores.mse)
        return entry | {
            "psnr": None,
            "ssim": None,
            "token_rate": float(right.mean()),
            "success": bool(right.mean() >= 0.5),
        }
    named = scores_of.identified(guess.x, scores.match, sight.ids, pool)
    psnr = float(np.mean(scores.psnr))
    return entry | {
        "psnr": _number(psnr),
        "psnr_of_examples": [_number(one) for one in scores.psnr],
        "ssim": _number(np.mean(scores.ssim)),
        "mse": _number(np.mean(scores.mse)),
        "identified": float(np.mean(named)),
        "success": bool(psnr >= success),
    }


def _number(value) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None


# --- Files ----------------------------------------------------------------------------------------


def write(report: Report, folder: Path) -> list[Path]:
    """Writes `reconstruction.json`, the arrays, and the pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in FILES]
    files.write_atomically(written[0], json.dumps(report.entries, indent=2) + "\n")
    arrays = {}
    for sight, one in zip(report.sights, report.made, strict=True):
        name = label(sight).replace(", ", "_").replace(" ", "")
        arrays |= {f"{name}_true_x": sight.x, f"{name}_true_y": sight.y, f"{name}_y": one.guess.y}
        if one.guess.x is not None:
            arrays |= {f"{name}_x": one.guess.x, f"{name}_match": one.scores.match}
        if one.guess.trail is not None:
            arrays[f"{name}_trail"] = one.guess.trail
    with files.replacing(written[1]) as file:
        np.savez(file, **arrays)
    return written + draw(report, folder)


def label(sight: Sight) -> str:
    """`round 3, client 7`, or how many clients it holds."""
    many = len(sight.clients) > 1
    who = f"{len(sight.clients)} clients" if many else f"client {sight.clients[0]}"
    who += "" if sight.viewer is None else f" by {sight.viewer}"
    return f"round {sight.round}, {who}"


def draw(report: Report, folder: Path) -> list[Path]:
    """Originals above reconstructions, and the first ones over the search's steps."""
    if not scores_of.is_image(report.inputs) or report.made[0].guess.x is None:
        return []
    rows = _side_by_side(report)
    shown = [] if rows else list(zip(report.sights, report.made, strict=True))[:_ROWS]
    for sight, one in shown:
        order = np.asarray(one.scores.match)[:_COLUMNS]
        notes = [f"{value:.1f} dB" for value in one.scores.psnr[:_COLUMNS]]
        rows += [
            plotting.Strip(label(sight), sight.x[:_COLUMNS], ()),
            plotting.Strip(report.attack.registered_name, np.asarray(one.guess.x)[order], notes),
        ]
    title = f"{report.attack.registered_name}: originals above reconstructions, PSNR below"
    written = plotting.strips(rows, title, folder / "reconstruction")
    first, sight = report.made[0], report.sights[0]
    if first.guess.trail is None:
        return written
    steps, rows = np.asarray(first.guess.trail), []
    shown = np.unique(np.linspace(0, len(steps) - 1, _COLUMNS - 2).astype(int))
    total = value_of(report.attack, "iterations") or 0
    for example in range(min(len(sight.y), _ROWS)):
        place = int(first.scores.match[example])
        images = [sight.x[example], *steps[shown, place], np.asarray(first.guess.x)[place]]
        errors = [np.mean((image - sight.x[example]) ** 2) for image in images[1:]]
        at = [*(f"{round(total * i / len(steps))}" for i in shown), f"{total}"]
        notes = [
            "original",
            *(f"{a}: {-10 * np.log10(e):.1f} dB" for a, e in zip(at, errors, strict=True)),
        ]
        rows.append(plotting.Strip(f"example {example}", np.stack(images), notes))
    title = f"{report.attack.registered_name}, {label(sight)}: steps of the search, PSNR"
    return written + plotting.strips(rows, title, folder / "reconstruction_steps")


def _side_by_side(report: Report) -> list:
    """The rows of several sights of one example each: a column a sight."""
    if len(report.sights) == 1 or any(len(sight.y) > 1 for sight in report.sights):
        return []
    rows = []
    for begin in range(0, min(len(report.sights), _COLUMNS * _ROWS), _COLUMNS):
        sights, made = (part[begin : begin + _COLUMNS] for part in (report.sights, report.made))
        notes = [
            f"{label(sight)}\n{one.scores.psnr[0]:.1f} dB"
            for sight, one in zip(sights, made, strict=True)
        ]
        originals = np.concatenate([sight.x for sight in sights])
        guesses = np.concatenate([np.asarray(one.guess.x) for one in made])
        rows += [
            plotting.Strip("original", originals, ()),
            plotting.Strip(report.attack.registered_name, guesses, notes),
        ]
    return rows


def table(report: Report):
    """A row for each sight: its mean scores, as text."""
    import pandas as pd

    names = {
        "psnr": ("PSNR (dB)", "{:.1f}"),
        "ssim": ("SSIM", "{:.2f}"),
        "identified": ("identified (%)", "{:.0%}"),
        "token_rate": ("tokens (%)", "{:.0%}"),
        "label_rate": ("labels (%)", "{:.0%}"),
        "success": ("success", "{}"),
    }
    names = {k: v for k, v in names.items() if any(k in one for one in report.entries)}

    def cells(entry):
        return {
            title: "" if entry.get(name) is None else how.format(entry[name])
            for name, (title, how) in names.items()
        }

    pairs = list(zip(report.sights, report.entries, strict=True))
    rows = {label(sight): cells(entry) for sight, entry in pairs[:_LISTED]}
    if len(pairs) > 1:
        mean = {}
        for name in names:
            values = [one[name] for one in report.entries if one.get(name) is not None]
            mean[name] = float(np.mean(values)) if values else None
        rows[f"mean of {len(pairs)}"] = cells(mean) | {"success": f"{mean['success']:.0%}"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what is seen")
