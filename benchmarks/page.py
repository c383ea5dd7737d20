"""Writes the tables of docs/performance.md, between its markers, from benchmarks/results/.

python benchmarks/page.py

Every number of the page that a measurement gives stands between `<!-- table NAME -->` and
`<!-- end -->`, so nobody has to copy one by hand.
"""

import json
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"


def load(name: str) -> dict:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(frame: pd.DataFrame) -> str:
    """A table with three significant digits and empty fields where nothing was measured."""
    shown = frame.astype(object).map(lambda v: f"{v:.3g}" if isinstance(v, float) else v)
    return shown.where(frame.notna(), "").to_markdown(index=False, disable_numparse=True)


def measured(name: str, columns: list[str]) -> str:
    """A result file's rows, with its command, date and the machine's rates in that run."""
    report = load(name)
    frame = pd.DataFrame(report["rows"])
    if "K" in frame and "rule" in frame:
        frame["stack"] = [f"[{k}, {d:,}]" for k, d in zip(frame["K"], frame["D"], strict=True)]
    machine, tunables = report["machine"], report.get("GLIBC_TUNABLES")
    setting = f"GLIBC_TUNABLES={tunables} " if tunables else ""
    note = (
        f"`{setting}{report['command']}`, {report['date']}, revision {report['git_revision']}: "
        f"product {machine['product GFLOP/s']:.0f} GFLOP/s, copy {machine['copy GB/s']:.1f} GB/s."
    )
    return f"{note}\n\n{markdown(frame[[c for c in columns if c in frame]])}"


def rows_of(*names: str) -> dict[str, dict]:
    """Rows of several round benchmarks by their round."""
    return {row["round"]: row for name in names for row in load(name)["rows"]}


def targets() -> str:
    """What was aimed at beside what was reached."""
    rules = {(row["rule"], row["K"]): row for row in load("aggregators_cpu")["rows"]}
    peers = ("ByzFL on PyTorch", "ByzFL on NumPy")

    def ratio(rule, rows):
        row = rules[rule, rows]
        return min(row[f"{peer} ms"] for peer in peers) / row["ours ms"]

    lines = []

    def line(work, target, reached, met):
        lines.append({"work": work, "target": target, "reached": reached, "met": met})

    for rule, times in (("median", 10), ("near_median", 10), ("trimmed_mean", 2)):
        for rows, dim in ((51, "80,000"), (100, "1,000,000")):
            faster = ratio(rule, rows)
            line(
                f"{rule}, [{rows}, {dim}]",
                f"{times} times the faster ByzFL",
                f"{rules[rule, rows]['ours ms']:.3g} ms, {faster:.3g} times",
                "yes" if faster >= times else "no",
            )
    bulyan = rules["bulyan", 51]["ours ms"]
    line(
        "Bulyan, [51, 80,000]",
        "100 times ALIE's author code (2,807 ms, not run here)",
        f"{bulyan:.3g} ms, {2807 / bulyan:.3g} times",
        "yes" if 2807 / bulyan >= 100 else "no",
    )
    for rule in ("mean", "krum", "multi_krum", "geometric_median", "centered_clipping"):
        for rows, dim in ((51, "80,000"), (100, "1,000,000")):
            faster = ratio(rule, rows)
            line(
                f"{rule}, [{rows}, {dim}]",
                "at most 1.2 times the time of the faster ByzFL",
                f"{rules[rule, rows]['ours ms']:.3g} ms, {1 / faster:.2g} times its time",
                "yes" if 1 / faster <= 1.2 else "no",
            )
    rounds = rows_of("rounds_cpu", "rounds_large_cpu", "rounds_rlr_cpu")
    attacked = [r for name, r in rounds.items() if name.startswith("ALIE MNIST, ALIE")]
    slowest = min(attacked, key=lambda r: r["ours rounds/s"])
    fastest = max(attacked, key=lambda r: r["ours rounds/s"])
    line(
        "ALIE MNIST round, attack on, every defence",
        "40 rounds/s",
        f"{slowest['ours rounds/s']:.3g} to {fastest['ours rounds/s']:.3g} rounds/s",
        "yes" if slowest["ours rounds/s"] >= 40 else "no",
    )
    for name, target in (("mean", 2), ("median", 2), ("Krum", 2)):
        row = rounds[f"FLTrust CNN, {name}"]
        line(
            f"FLTrust's CNN, 100 clients, {name}",
            f"{target} rounds/s",
            f"{row['ours rounds/s']:.3g} rounds/s, {row['faster than PyTorch loop']:.2g} times the "
            f"PyTorch loop",
            "yes" if row["ours rounds/s"] >= target else "no",
        )
    for name, target in (("PGD-40 CNN, mean", 2.0), ("RLR Fashion-MNIST, mean", 1.5)):
        row = rounds[name]
        line(
            name,
            f"{target:g} times the PyTorch loop",
            f"{row['ours ms'] / 1e3:.3g} s, {row['faster than PyTorch loop']:.2g} times",
            "yes" if row["faster than PyTorch loop"] >= target else "no",
        )
    fixed = {row["what"]: row["ms"] for row in load("fixed_cpu")["rows"]}
    for what, target in (
        ("a round of a trivial model, 100 clients", 1.0),
        ("process start to the first finished round, second start", 4000.0),
    ):
        line(
            what,
            f"{target:g} ms",
            f"{fixed[what]:.3g} ms",
            "yes" if fixed[what] <= target else "no",
        )
    seeds = {row["seeds"]: row for row in load("seeds_cpu")["rows"]}[16]
    line(
        "16 seeds of a perceptron in one sweep, compilation included",
        "3 times faster than one after another",
        f"{seeds['faster']:.3g} times; {seeds['cached, faster']:.2g} where the single runs "
        f"share a cache of programs",
        "yes" if seeds["faster"] >= 3 else "no",
    )
    peak = max(load("memory_cpu")["rows"], key=lambda row: row["peak / stack"])
    line(
        "peak memory of an aggregation",
        "2.5 times the stack",
        f"{peak['peak / stack']:.2g} times at most ({peak['rule']})",
        "yes" if peak["peak / stack"] < 2.5 else "no",
    )
    return pd.DataFrame(lines).to_markdown(index=False)


def tuning() -> str:
    """Milliseconds of every way to train some clients, the chosen one last."""
    ways = {}
    for entry in load("tuning_cpu"):
        chosen = ", ".join(filter(None, (entry["clients"], entry["convolution"])))
        ways[entry["name"]] = entry["milliseconds"] | {"chosen": chosen}
    frame = pd.DataFrame(ways)
    order = [way for way in frame.index if way != "chosen"] + ["chosen"]
    return markdown(frame.loc[order].reset_index(names="way"))


def gpu_changes() -> str:
    """Rules whose passes were changed after the first run on a GPU, before and after."""
    before, after = (load(name)["rows"] for name in ("aggregators_gpu", "aggregators_later_gpu"))
    later = {(row["rule"], row["K"]): row for row in after}
    lines = []
    for row in before:
        new = later.get((row["rule"], row["K"]))
        if new and row["rule"] in CHANGED:
            names = {"ours ms": "after ms", "ByzFL on PyTorch ms": "ByzFL on PyTorch ms"}
            line = {"rule": row["rule"], "stack": f"[{row['K']}, {row['D']:,}]"}
            line["before ms"] = row["ours ms"]
            line |= {shown: new[name] for name, shown in names.items()}
            lines.append(line | {"limit ms": new["limit ms"]})
    return markdown(pd.DataFrame(lines))


#: Their code today is what `aggregators_later_gpu.json` timed, unlike that of rules on order
#: statistics.
CHANGED = ("mean", "krum", "multi_krum", "geometric_median", "centered_clipping")
RULE = [
    "rule",
    "stack",
    "ours ms",
    "ByzFL on PyTorch ms",
    "ByzFL on NumPy ms",
    "faster than ByzFL on PyTorch",
    "faster than ByzFL on NumPy",
    "limit ms",
    "times the limit",
    "compile s",
    "temporary / stack",
]
ROUND = [
    "round",
    "ours rounds/s",
    "ours ms",
    "PyTorch loop ms",
    "faster than PyTorch loop",
    "limit ms",
    "times the limit",
    "compile s",
    "temporary MiB",
    "arguments MiB",
    "computed as",
]
BATCH = ["model", "B", "ours ms", "limit ms", "computed as"]
SEEDS = [
    "seeds",
    "one sweep s",
    "one after another s",
    "faster",
    "cached, one sweep s",
    "cached, one after another s",
    "cached, faster",
]
CELLS = ["cells", "ms a round of all", "times one cell", "compile s", "busy"]
ORDER = ["K", "D", "way", "ms", "limit ms", "times the limit", "compile s"]
GPU_ROUND = [
    "round",
    "ours ms",
    "PyTorch loop ms",
    "faster than PyTorch loop",
    "PyTorch vmap ms",
    "faster than PyTorch vmap",
    "limit ms",
    "compile s",
    "computed as",
    "busy",
]
INVERSION = [
    "network",
    "messages",
    "ours a minute",
    "PyTorch a minute",
    "faster than PyTorch",
    "compile s",
]
PROCESSES = ["code", "convolutions", "C library", "slowest", "median", "fastest"]
TABLES = {
    "targets": targets,
    "aggregators": lambda: measured("aggregators_cpu", RULE),
    "memory": lambda: measured("memory_cpu", ["rule", "stack", "stack MiB", "peak / stack"]),
    "rounds": lambda: measured("rounds_cpu", ROUND),
    "large rounds": lambda: measured("rounds_large_cpu", ROUND),
    "rlr round": lambda: measured("rounds_rlr_cpu", ROUND),
    "fedsecurity round": lambda: measured("rounds_fedsecurity_cpu", ROUND),
    "batch": lambda: measured("batch_cpu", BATCH),
    "seeds": lambda: measured("seeds_cpu", SEEDS),
    "small pages": lambda: measured("rounds_small_pages_cpu", ROUND),
    "tuning": tuning,
    "processes": lambda: measured("processes_cpu", PROCESSES),
    "fixed": lambda: measured("fixed_cpu", ["what", "ms"]),
    "waiting": lambda: measured("waiting_cpu", ["part", "code", "s", "processor s", "repeats"]),
    "inversion": lambda: measured("inversion_cpu", INVERSION),
    "gpu aggregators": lambda: measured("aggregators_gpu", RULE),
    "gpu changes": gpu_changes,
    "gpu order": lambda: measured("order_gpu", ORDER),
    "gpu rounds": lambda: measured("rounds_gpu", GPU_ROUND),
    "gpu graphs": lambda: measured("rounds_graphs_gpu", GPU_ROUND),
    "gpu cells": lambda: measured("cells_gpu", CELLS),
}


def fill(text: str) -> str:
    """The page with every table between its markers."""

    def table(match):
        return f"{match[1]}\n\n{TABLES[match[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- table (.+?) -->).*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
