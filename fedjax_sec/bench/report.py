"""Benchmark results as a JSON file that says where, when and how, and as a table."""

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fedjax_sec.bench import peers
from fedjax_sec.bench.timing import Rates
from fedjax_sec.core import files
from fedjax_sec.core.optional import require
from fedjax_sec.runs import results


def write(path: Path, command: str, rates: Rates, rows: Sequence[dict]) -> None:
    """Writes rows with the command, the date, the machine, its rates and all versions."""
    report = {
        "command": command,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),  # huge pages, see benchmarks/README.md
        "date": datetime.date.today().isoformat(),
        "machine": {"product GFLOP/s": rates.flops / 1e9, "copy GB/s": rates.bytes / 1e9},
        "peers": peers.versions(),
        "rows": list(rows),
        **results.environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, json.dumps(results.to_json(report), indent=2) + "\n")


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    return (
        require("pandas", "The table of a benchmark")
        .DataFrame(rows)
        .to_markdown(index=False, floatfmt=".3g", missingval="")
    )
