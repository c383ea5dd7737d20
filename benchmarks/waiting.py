"""How long one waits for a sweep, the demo and a first number: one tree beside another.

    git worktree add ../before REVISION
    python benchmarks/waiting.py before=../before after=. --data-dir DATA --out OUT.json

The commands of the trees take turns, each in a fresh process with nothing compiled or measured
before; data sets are decoded already. `sweep`: 24 small runs of MNIST (4 attacks x 3 defences x 2
seeds). `demo`: `fedjax-sec demo`. `first`: a configuration of one's own, to the end of its first
ten rounds. `read`: the sweep's command again, when all is finished. Processor seconds count all
threads and say what the machine computed, however busy it was; seconds are the clock's.
"""

import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml

from fedjax_sec.bench import report, timing
from fedjax_sec.core.caching import cache_folder
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.prepare import prepare

BASE = {
    "data": {"name": "mnist", "num_clients": 10},
    "model": "fltrust_cnn",
    "client": {"name": "sgd", "steps": 2, "batch_size": 16},
    "threat": {"num_malicious": 2},
    "evaluation": {"every": 10},
    "rounds": 20,
}
SWEEP = {
    "experiment": "base.yaml",
    "seeds": [0, 1],
    "grid": {
        "attack": {
            "none": None,
            "sign flip": {"name": "sign_flip", "scale": 4.0},
            "ALIE": {"name": "alie", "z": 1.5},
            "label flip": {"name": "label_flip", "pairs": [[3, 9]]},
        },
        "defense": {"mean": "mean", "median": "median", "Krum": "krum"},
    },
}
FIRST = {
    "data": {"name": "digits", "num_clients": 20},
    "model": {"name": "small_cnn", "channels": [8, 16], "hidden": 32},
    "client": {"name": "sgd", "steps": 2, "batch_size": 16},
    "threat": {"num_malicious": 4},
    "attack": {"name": "alie", "z": 1.5},
    "defense": {"name": "trimmed_mean", "num_byzantine": 4},
    "evaluation": {"every": 10},
    "rounds": 10,
}
START = "import sys; from fedjax_sec.cli import main; sys.argv[0] = 'fedjax-sec'; main()"
PARTS = ("sweep", "read", "demo", "first")


def command(part: str, out: Path, data_dir: Path | None) -> list[str]:
    """What a user types for a part; configurations lie in the folder where it runs."""
    place = ["--out", str(out / ("sweep" if part == "read" else part))]
    if part == "demo":
        return ["demo", *place]
    if part == "first":
        return ["run", "first.yaml", *place]
    return ["sweep", "sweep.yaml", *place, *(["--data-dir", str(data_dir)] if data_dir else [])]


def measure(tree: Path, parts, data_dir: Path | None) -> dict[str, tuple[float, float]]:
    """part -> seconds and processor seconds of its command in this tree."""
    with tempfile.TemporaryDirectory() as folder:
        here, cache = Path(folder), Path(folder) / "cache"
        cache.mkdir()
        for decoded in cache_folder().glob("*.npz"):
            shutil.copy(decoded, cache)
        for name, content in (("base", BASE), ("sweep", SWEEP), ("first", FIRST)):
            (here / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("FEDJAX_SEC_", "XLA_"))}
        env |= {"PYTHONPATH": str(tree.resolve()), "JAX_PLATFORMS": "cpu"}
        taken = {}
        for part in parts:
            env["FEDJAX_SEC_CACHE"] = str(cache)
            if part != "read":  # the same folder of compiled programs as its sweep
                for kept in [*cache.glob("compiled*"), cache / "tuning"]:
                    shutil.rmtree(kept, ignore_errors=True)
            before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            arguments = [sys.executable, "-c", START, *command(part, here / "out", data_dir)]
            subprocess.run(arguments, cwd=here, env=env, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken[part] = time.perf_counter() - begin, used
        return taken


def main(
    trees: Annotated[list[str], typer.Argument(help="LABEL=FOLDER of a checkout.")],
    out: Annotated[Path, typer.Option(help="The JSON file.")],
    data_dir: Annotated[Path | None, typer.Option(help="Folder of prepared data.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each tree.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}.")] = None,
) -> None:
    """Measures and writes the file."""
    parts = [part for part in PARTS if part in (only or PARTS)]
    data_dir = data_dir and data_dir.resolve()  # the commands run elsewhere
    folders = dict(tree.split("=", 1) for tree in trees)
    prepare(from_mapping(BASE, {"data.data_dir": data_dir and str(data_dir)}))  # decodes the images
    taken: dict = {}
    for _ in range(repeats):
        for label, folder in folders.items():
            for part, seconds in measure(Path(folder), parts, data_dir).items():
                taken.setdefault((part, label), []).append(seconds)
                print(label, part, json.dumps(seconds), flush=True)
    rows = [
        {
            "part": part,
            "code": label,
            "s": statistics.median(wall for wall, _ in values),
            "processor s": statistics.median(used for _, used in values),
            "fastest s": min(wall for wall, _ in values),
            "slowest s": max(wall for wall, _ in values),
            "repeats": len(values),
        }
        for (part, label), values in taken.items()
    ]
    report.write(out, shlex.join(["python", *sys.argv]), timing.measure_machine(), rows)
    print(report.table(rows))


if __name__ == "__main__":
    typer.run(main)
