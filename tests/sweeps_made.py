"""Folders of sweeps without a run: what a page of results reads, written in a moment."""

import json
import re
import zlib
from pathlib import Path

import numpy as np

from fedjax_sec.core import files
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import results
from fedjax_sec.sweeps import catalog

ENVIRONMENT = {"device": "cpu", "host": "test", "python": "3", "git_revision": "abc"}


def sweep(
    out: Path,
    attacks,
    defenses,
    seeds=(0, 1, 2),
    *,
    rounds=10,
    every=1,
    clients=10,
    shift=0.0,
    values=None,
    **changes,
) -> Path:
    """A finished sweep of attacks (label -> spec) against defences; all numbers are made up.

    `shift` is added to each accuracy; `values` maps (attack, defence, seed) to the last one.
    """
    base = {"rounds": rounds, "evaluation": {"every": every}, "threat": {"num_malicious": 2}}
    base |= {"data": {"name": "digits", "num_clients": clients}, **changes}
    labels = {}
    results.write_mark(_made(out), "sweep")
    for attack, attack_spec in attacks.items():
        for defense, rule in defenses.items():
            spec = base | {"attack": attack_spec, "defense": rule}
            text = config_lib.dump_yaml(config_lib.from_mapping(spec).to_dict())
            for seed in seeds:
                name = f"{_slug(attack)}_{_slug(defense)}/seed{seed}"
                labels[name] = {"attack": attack, "defense": defense}
                last = (values or {}).get((attack, defense, seed))
                rows = _rows(name, rounds, every, clients, shift, last, attack_spec is not None)
                _run(out / catalog.CELLS / name, text, seed, rows)
    files.write_json(out / catalog.FILE, {"cells": labels})
    return out


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "-", label).strip("-")


def _rows(name, rounds, every, clients, shift, last, attacked) -> list[dict]:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    top, speed = 0.4 + 0.5 * draw.random(), 1 + draw.random()
    rows = []
    for done in [*range(0, rounds, every), rounds]:
        share = 1 - np.exp(-speed * 3 * done / rounds)
        row = {"round": done, "accuracy": 0.1 + (top - 0.1) * share + shift, "loss": 2.3 - share}
        if attacked:
            row["attack_success_rate"] = float(draw.random() * share)
        if done:
            kept = (draw.random(clients) > 0.3).astype(float)
            row |= {"kept": kept.tolist(), "kept_honest": float(kept[2:].mean())}
            row |= {"kept_malicious": float(kept[:2].mean()), "train_loss": 2.0 - share}
        rows.append(row)
    if last is not None:
        rows[-1]["accuracy"] = last
    return rows


def _run(folder: Path, text: str, seed: int, rows: list[dict]) -> None:
    results.write_mark(_made(folder), "cell")
    (folder / results.CONFIG).write_text(text.replace("\nseed: 0\n", f"\nseed: {seed}\n"))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / results.METRICS).write_text(lines)
    final = {key: value for key, value in rows[-1].items() if not isinstance(value, list)}
    summary = {"data": {"label": "digits"}, "final": final, "best": final, "seed": seed}
    summary |= {"wall_seconds": 3.0, "compile_seconds": 1.0, "replicas": 3, "diverged": False}
    summary |= {"rounds_per_second": 10.0, "malicious_clients": [0, 1], **ENVIRONMENT}
    summary |= {"versions": {"fedjax_sec": "0.1.0", "jax": "0.10.2"}, "headline": "accuracy"}
    summary["files"] = {results.METRICS: files.file_digest(folder / results.METRICS)}
    files.write_json(folder / results.SUMMARY, summary)


def unfinish(out: Path, name: str, rows: int | None = None) -> None:
    """Makes one of the runs an interrupted one with so many rows, or one that waits."""
    folder = out / catalog.CELLS / name
    (folder / results.SUMMARY).unlink()
    lines = (folder / results.METRICS).read_text().splitlines(keepends=True)
    if rows:
        (folder / results.METRICS).write_text("".join(lines[:rows]))
    else:
        (folder / results.METRICS).unlink()
