"""The folder of a run: configuration, metrics, summary; written so that a kill loses nothing."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np

from fedjax_sec import config as config_lib
from fedjax_sec.schema import ConfigError

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
PARAMS = "params.npy"
_WHEREABOUTS = ("data.data_dir", "data.download")  # where the data lies changes no result
_PACKAGES = ("fedjax_sec", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets")


class RunFolder:
    """`DIR/config.yaml`, `DIR/metrics.jsonl`, `DIR/summary.json` of one run.

    A folder belongs to one configuration. Opening it again needs `resume` (and the same
    configuration) or `overwrite`; anything else is a `ConfigError`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def open(self, config: dict, *, resume: bool = False, overwrite: bool = False) -> None:
        """Claims the folder for a configuration."""
        if overwrite and (self.path / CONFIG).exists():
            shutil.rmtree(self.path)
        if self.path.exists() and any(self.path.iterdir()):
            if not (self.path / CONFIG).exists():
                raise ConfigError(
                    f"Output folder {str(self.path)!r} is in use by something else: it holds files "
                    f"but no {CONFIG}. Choose another folder."
                )
            if not resume:
                raise ConfigError(
                    f"Output folder {str(self.path)!r} already holds a run. Choose another folder, "
                    f"or pass --resume to continue it or --overwrite to replace it."
                )
            self.check_config(config)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / CONFIG, config_lib.dump_yaml(config))

    def check_config(self, config: dict) -> None:
        """Raises `ConfigError` that lists the keys in which the folder's configuration differs."""
        known = config_lib.read_yaml(self.path / CONFIG)
        with contextlib.suppress(ConfigError):  # a later version may have added keys
            known = config_lib.from_mapping(known).to_dict()
        different = sorted(
            set(_differences(*(json.loads(json.dumps(c)) for c in (known, config))))
            - set(_WHEREABOUTS)
        )
        if different:
            raise ConfigError(
                f"Output folder {str(self.path)!r} holds a run of another configuration; "
                f"it differs in {', '.join(different)}. Choose another folder."
            )

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last round."""
        return (self.path / SUMMARY).exists()

    def truncate(self, after_round: int) -> None:
        """Drops metrics of later rounds, and a line that a kill cut short."""
        kept = [row for row in self.rows() if row["round"] <= after_round]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path / METRICS, text)

    def append(self, row: dict) -> None:
        """Adds one line to the metrics and makes sure that it is on the disk."""
        with open(self.path / METRICS, "a") as file:
            file.write(json.dumps(to_json(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict]:
        """The metrics, one mapping an evaluation; an incomplete last line is left out."""
        path = self.path / METRICS
        if not path.exists():
            return []
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def write_params(self, flat) -> None:
        """Keeps the final parameters [D]."""
        temporary = self.path / f".{os.getpid()}.tmp.npy"
        np.save(temporary, np.asarray(flat))
        os.replace(temporary, self.path / PARAMS)

    def params(self) -> np.ndarray | None:
        """The final parameters [D], if they were kept."""
        path = self.path / PARAMS
        return np.load(path) if path.exists() else None

    def write_summary(self, summary: dict) -> None:
        """Marks the run as finished."""
        write_atomically(self.path / SUMMARY, json.dumps(to_json(summary), indent=2) + "\n")

    def summary(self) -> dict:
        """The summary of a finished run."""
        return json.loads((self.path / SUMMARY).read_text())


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(value):
    """Arrays as lists and non-finite numbers as null, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if hasattr(value, "dtype"):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _differences(a, b, path=""):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            at = f"{path}.{key}" if path else key
            if key not in a or key not in b:
                yield at
            else:
                yield from _differences(a[key], b[key], at)
    elif a != b:
        yield path


def environment() -> dict:
    """Device, platform, versions and git revision, as every summary states them."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the source tree, with `-dirty` when it has uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
