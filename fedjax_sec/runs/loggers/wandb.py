"""Runs of Weights & Biases (extra `[wandb]`)."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedjax_sec.core import files
from fedjax_sec.core.optional import require
from fedjax_sec.runs.loggers import Run, points

#: The project of runs where `WANDB_PROJECT` names none.
PROJECT = "fedjax_sec"


class Wandb:
    """A run of W&B with the axes, the seed and the whole configuration; a sweep is its group.

    The mode, project and entity are W&B's own settings (`WANDB_MODE=offline`, `WANDB_PROJECT`,
    `WANDB_ENTITY`). Whoever goes on, goes on in the run of before, whose identity is kept in the
    folder: W&B takes no step twice. Offline the run is written anew, whole, and the transaction
    file of before is removed, so that one file alone is there to be synchronised.

    Source: wandb 0.31 (`init(reinit="create_new")`: runs beside one another).
    """

    below: ClassVar[str] = ""

    def __init__(self, run: Run, folder: Path, goes_on: bool):
        wandb = require("wandb", "The logger 'wandb'")
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "wandb" / f"{run.path.replace('/', '_') or 'run'}.id"
        known = kept.read_text().strip() if goes_on and kept.exists() else ""
        identity = known or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            dir=str(folder),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run.group,
            name=run.name,
            id=identity,
            config={**run.settings, "experiment": dict(run.config)},
            resume="allow" if known else None,
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True
            ),
        )
        if not known:
            kept.parent.mkdir(exist_ok=True)
            files.write_atomically(kept, f"{identity}\n")
        elif self._run.offline:
            here = Path(self._run.dir).parent
            others = (folder / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
            files.remove_files([path for path in others if path.parent.name != here.name])

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes a row of `metrics.jsonl`."""
        self._run.log(points(row), step=row["round"], commit=True)

    def close(self, finished: bool) -> None:
        """Ends; `finished` says whether the run has reached its last round."""
        self._run.finish(exit_code=0 if finished else 1)
