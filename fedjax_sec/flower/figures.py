"""Pictures of a deployed run: the times of its clients, and its accuracy beside a simulation's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedjax_sec.core import files
from fedjax_sec.flower.trace import KINDS, SERVER, chrome_trace, read_journal, spans
from fedjax_sec.report import plotting

#: Colours that the colour-blind tell apart (Okabe and Ito).
_COLOURS = {
    "communication": "#56B4E9",
    "preparing": "#F0E442",
    "waiting": "#D9D9D9",
    "training": "#D55E00",
    "aggregation": "#000000",
}


def write_trace(folder: str | Path, rounds: int = 2) -> list[Path]:
    """Writes a deployed run's `trace.json`, for Perfetto, and a picture of its last rounds.

    Raises: `ConfigError` where the folder holds no deployed run.
    """
    folder = Path(folder).absolute()
    rows = read_journal(folder)
    trace = folder / "trace.json"
    files.write_atomically(trace, json.dumps(chrome_trace(rows)))
    return [trace, *draw_rounds(rows[-rounds:], folder / "figures" / "rounds")]


def draw_rounds(rows: Sequence[Mapping], path: Path) -> list[Path]:
    """A line for each client and the server, divided by what each does when, as Figure 16."""
    parts = list(spans(rows))
    start = min(one.begin for one in parts)
    clients = sorted({one.client for one in parts if one.client != SERVER})
    place = {client: i for i, client in enumerate([*clients, SERVER])}
    figure, axes = plotting.subplots(
        figsize=(9, min(2.5 + 0.14 * len(place), 14)), layout="constrained"
    )
    for kind in KINDS:
        mine = [one for one in parts if one.kind == kind]
        bars = [(one.begin - start, one.end - one.begin) for one in mine]
        for bar, one in zip(bars, mine, strict=True):
            axes.broken_barh([bar], (place[one.client] - 0.4, 0.8), facecolor=_COLOURS[kind])
        axes.plot([], [], color=_COLOURS[kind], linewidth=7, label=kind)
    step = max(1, len(clients) // 12)
    ticks = [place[client] for client in clients[::step]] + [place[SERVER]]
    labels = [f"client {client}" for client in clients[::step]] + ["server"]
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    numbers = [row["round"] for row in rows]
    shown = f"Round {numbers[0]}" if len(numbers) == 1 else f"Rounds {numbers[0]} to {numbers[-1]}"
    axes.set_title(shown, fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(KINDS), fontsize=9, frameon=False)
    return plotting.save(figure, path)
