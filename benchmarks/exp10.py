"""FedSecurity's Experiment 10: real clients by Flower on this machine, beside the simulation.

    python benchmarks/exp10.py --nodes 2 --seeds 3 --data-dir DATA --out results/exp10

70 clients on SuperNodes, 7 of them malicious (random mode), logistic regression on MNIST: without
an attack, with it, and with m-Krum. Draws the accuracies as Figure 15 (deployed runs of one seed
over the simulated ones of all seeds), writes m-Krum's rounds as Figure 16 and as a trace for
Perfetto, and what a round costs: its seconds, their parts, and the largest memory of each kind of
process (PSS, sampled every 5 seconds; Linux). Needs the environment of `constraints-flower.txt`.
Runs that are finished in the folder are read.
"""

import json
import os
import re
import shutil
import statistics
import threading
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import psutil
import typer

import fedjax_sec
from fedjax_sec.flower import deploy
from fedjax_sec.flower.figures import write_trace
from fedjax_sec.flower.trace import read_journal, spans
from fedjax_sec.report import plotting
from fedjax_sec.runs.experiment import read_result
from fedjax_sec.runs.results import RunFolder, environment

CONFIG = Path(__file__).parents[1] / "configs" / "fedsecurity" / "mnist.yaml"
ROWS = {
    "benign": {"attack": None, "threat": {}, "defense": "mean"},
    "no defense": {"defense": "mean"},
    "m-Krum": {},
}
KINDS = ("superlink", "supernode", "clientapp", "serverapp")


class Memory(threading.Thread):
    """The largest proportional set size [MB] of each kind of Flower's processes below this one."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.over = dict.fromkeys(KINDS, 0.0), threading.Event()

    def run(self):
        while not self.over.wait(5.0):
            for process in psutil.Process().children(recursive=True):
                try:
                    command = " ".join(process.cmdline())
                    pss = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                except (psutil.Error, OSError):
                    continue
                kind = next((k for k in KINDS if re.search(rf"fl(wr|ower)-{k}", command)), None)
                if kind and (size := re.search(r"Pss:\s+(\d+) kB", pss)):
                    self.largest[kind] = max(self.largest[kind], int(size[1]) / 1000)


def finished(folder: Path):
    """A run read back, or None."""
    run = RunFolder(folder)
    return read_result(run.experiment(), run) if run.finished else None


def deployed(name: str, spec: dict, out: Path, nodes: int) -> tuple:
    """(the result, the memory of its processes)."""
    record = out / "memory.json"
    if (result := finished(out / "run")) is not None and record.exists():
        return result, json.loads(record.read_text())
    memory = Memory()
    memory.start()
    result = deploy(CONFIG, out=out, overrides=spec, nodes=nodes, resume=(out / "run").exists())
    memory.over.set()
    record.write_text(json.dumps(memory.largest))
    return result, memory.largest


def cost(out: Path) -> dict:
    """Medians over rounds and clients: a round's seconds, and those of a client's parts."""
    rows, parts = read_journal(out), defaultdict(list)
    starts = [min(node["sent"] for node in row["nodes"]) for row in rows]
    seconds = [row["aggregation"][1] - start for row, start in zip(rows, starts, strict=True)]
    each = defaultdict(float)
    for span in spans(rows):
        each[span.round, span.client, span.kind] += span.end - span.begin
    for (_, _, kind), value in each.items():
        parts[kind].append(value)
    return {
        "rounds": len(rows),
        "seconds a round": statistics.median(seconds),
        "seconds of the first round": seconds[0],
        **{f"seconds of {kind}": statistics.median(values) for kind, values in parts.items()},
    }


def draw(curves: dict, path: Path) -> list[Path]:
    """Accuracy over rounds: deployed runs as lines, simulated ones as bands over seeds."""
    figure, axes = plotting.subplots(figsize=(6.5, 4.4), layout="constrained")
    for (name, (real, simulated)), style, colour in zip(
        curves.items(), ("-", "--", "-."), ("#0072B2", "#D55E00", "#009E73"), strict=True
    ):
        rounds, values = real.metrics["round"], 100 * real.metrics["accuracy"]
        axes.plot(rounds, values, style, color=colour, label=f"{name}, deployed")
        stack = 100 * np.stack([one.metrics["accuracy"] for one in simulated])
        axes.fill_between(
            rounds, stack.min(0), stack.max(0), color=colour, alpha=0.2, label=f"{name}, simulated"
        )
    axes.set(xlabel="round", ylabel="test accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("FedSecurity, Exp 10: 70 clients, 7 malicious, MNIST", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return plotting.save(figure, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    nodes: Annotated[int, typer.Option(min=1, help="SuperNodes.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the simulation.")] = 3,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds (the configuration's).")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Prepared data.")] = None,
) -> None:
    out, common, curves, lines = out.absolute(), {}, {}, []
    out.mkdir(parents=True, exist_ok=True)
    if rounds is not None:
        common["rounds"] = rounds
    if data_dir is not None:
        common["data.data_dir"] = str(data_dir.absolute())
    costs = {"machine": environment() | {"cores": os.cpu_count()}, "nodes": nodes}
    for name, change in ROWS.items():
        folder, spec = out / name.replace(" ", "_"), common | change
        simulated = [
            finished(folder / f"seed{seed}")
            or fedjax_sec.run(CONFIG, out=folder / f"seed{seed}", **spec | {"seed": seed})
            for seed in range(seeds)
        ]
        result, memory = deployed(name, spec, folder / "deployed", nodes)
        curves[name] = result, simulated
        costs[name] = cost(folder / "deployed") | {
            f"MB of a {kind}": memory[kind] for kind in KINDS
        }
        finals = 100 * np.array([one.metrics["accuracy"][-1] for one in simulated])
        same = np.abs(result.metrics["accuracy"] - simulated[0].metrics["accuracy"])
        lines.append(
            {
                "run": name,
                "deployed": 100 * result.metrics["accuracy"][-1],
                "simulated, the same seed": finals[0],
                "simulated, mean": finals.mean(),
                "spread": finals.std(ddof=1) if seeds > 1 else float("nan"),
                "largest difference in any round": 100 * same.max(),
            }
        )
    draw(curves, out / "figure15")
    krum = out / "m-Krum" / "deployed"
    write_trace(krum, rounds=2)
    shutil.copyfile(krum / "trace.json", out / "figure16_trace.json")
    shutil.copyfile(krum / "figures" / "rounds.png", out / "figure16.png")
    frame = pd.DataFrame(lines).round(2)
    (out / "accuracy.md").write_text(frame.to_markdown(index=False) + "\n")
    frame.to_csv(out / "accuracy.csv", index=False)
    (out / "cost.json").write_text(json.dumps(costs, indent=1) + "\n")
    print(frame.to_markdown(index=False))
    print(json.dumps(costs, indent=1))


if __name__ == "__main__":
    typer.run(main)
