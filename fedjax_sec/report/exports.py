"""Folders of runs, written for other programs: what a logger would have written, or a table."""

from pathlib import Path

from fedjax_sec.core import ConfigError, files
from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.optional import require
from fedjax_sec.report.frames import load
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import results
from fedjax_sec.runs.loggers import PACKAGES, Run
from fedjax_sec.runs.loggers.writing import LOGGERS, check_installed
from fedjax_sec.sweeps import catalog

#: The formats, and the files of those that are tables.
TABLES = {"csv": "metrics.csv", "parquet": "metrics.parquet"}
FORMATS = (*PACKAGES, *TABLES)


def export(out: str | Path, to: str, folder: str | Path) -> list[str]:
    """Writes all measurements of a run's or a sweep's folder into another folder.

    Args:
      out: the folder, as `load` takes it.
      to: `tensorboard` or `wandb`, a run of theirs for each run as if it had been logged; `csv` or
        `parquet`, the table of `load` as `metrics.csv` or `metrics.parquet`.
      folder: where to; a second export replaces event files and tables, and makes new runs of W&B.

    Returns: the names of the runs that were written. Raises: `ConfigError` for another format, a
    package that is missing, a folder that holds results, and what `load` raises.
    """
    if to not in FORMATS:
        raise ConfigError(
            f"to must be one of {', '.join(FORMATS)}, got {shown(to)}.{suggestion(to, FORMATS)}"
        )
    folder = Path(folder).absolute()
    if (kind := results.read_mark(folder).kind) not in ("free", "other"):
        raise ConfigError(
            f"Output folder {str(folder)!r} holds results ({kind}). Choose another folder."
        )
    if to in PACKAGES:
        check_installed([to])
        return _to_logger(out, to, folder)
    if to == "parquet":
        require("pyarrow", "A Parquet file")
    frame = load(out)
    files.check_writable(folder)
    path = folder / TABLES[to]
    if to == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return frame["run"].unique().tolist()


def _to_logger(out: str | Path, to: str, folder: Path) -> list[str]:
    """Runs without a row are left out. One logger is open at a time."""
    group = catalog.located(out)[0].name
    measured = [(place, place.folder.rows()) for place in catalog.places(out)]
    measured = [(place, rows) for place, rows in measured if rows]
    if not measured:
        raise ConfigError(f"No run in {str(out)!r} has measured anything yet.")
    files.check_writable(folder)
    for place, rows in measured:
        config = config_lib.read_yaml(place.folder.path / results.CONFIG)
        named = place.path, place.name, group if place.path else None
        logger = LOGGERS[to](Run(*named, place.labels, place.seed, config), folder, False)
        for row in rows:
            logger.log(row)
        logger.close(place.folder.finished)
    return [place.name for place, _ in measured]
