"""A result as a notebook shows it: its curve and its final numbers."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_sec.core.registry import headlines

#: The size of the curve in pixels, and the metrics that it draws in percent, with their colours.
_WIDTH, _HEIGHT = 360, 120
_COLOURS = {name: "#1f77b4" for name in headlines()} | {"attack_success_rate": "#d62728"}


def sentence(summary: Mapping[str, Any], seed: int) -> str:
    """A run in one line.

    >>> final = {"round": 20.0, "accuracy": 0.912, "attack_success_rate": 0.03}
    >>> sentence({"data": {"label": "digits"}, "final": final}, 0)
    'digits, seed 0: accuracy 91.2%, attack success rate 3.0% after 20 rounds'
    """
    final = summary.get("final", {})
    shares = [
        f"{name.replace('_', ' ')} {final[name]:.1%}"
        for name in _COLOURS
        if final.get(name) is not None
    ]
    text = f"{summary.get('data', {}).get('label', 'a run')}, seed {seed}"
    text += f": {', '.join(shares)}" if shares else ""
    text += f" after {final['round']:.0f} rounds" if final.get("round") is not None else ""
    return text + (", diverged" if summary.get("diverged") else "")


def page(metrics: Mapping[str, np.ndarray], summary: Mapping[str, Any], seed: int) -> str:
    """A run as HTML: one line, its curve, and a table of its final and its best evaluation."""
    parts = [(name, summary.get(name, {})) for name in ("final", "best")]
    rows = [
        (metric, *(_number(part.get(metric)) for _, part in parts))
        for metric in parts[0][1]
        if metric != "round"
    ]
    head = ("metric", *(f"{name} (round {part.get('round', 0):.0f})" for name, part in parts))
    warnings = [f"<p>Warning: {html.escape(text)}</p>" for text in summary.get("warnings", ())]
    title = f"<p><b>{html.escape(sentence(summary, seed))}</b></p>"
    return "".join([title, curve(metrics), table(head, rows), *warnings])


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts.

    >>> table(["a"], [["<"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;</td></tr></table>'
    """

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(t)}</{tag}>" for t in texts) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def curve(metrics: Mapping[str, np.ndarray]) -> str:
    """The task's metric and the attack's success over rounds, from 0 to 100 %, as an SVG."""
    rounds = np.asarray(metrics.get("round", ()), float)
    names = [name for name in _COLOURS if name in metrics]
    if len(rounds) < 2 or not names:
        return ""
    drawn = [
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *(_label(metrics, rounds, name, place) for place, name in enumerate(names)),
    ]
    text = f'<text x="{_WIDTH - 4}" y="{_HEIGHT - 4}" text-anchor="end" font-size="10">'
    drawn.append(f"{text}0 to 100 %, {rounds[-1]:.0f} rounds</text>")
    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(drawn)}</svg>'


def _label(metrics: Mapping, rounds: np.ndarray, name: str, place: int) -> str:
    """One line and its name; it is broken where a value is not finite."""
    values = np.asarray(metrics[name], float)
    x = _WIDTH * rounds / rounds[-1]
    y = _HEIGHT * (1 - 0.98 * values) - 1
    parts, pen = [], "M"
    for across, down in zip(x, y, strict=True):
        if np.isfinite(down):
            parts.append(f"{pen}{across:.1f} {down:.1f}")
        pen = "L" if np.isfinite(down) else "M"
    line = f'<path d="{" ".join(parts)}" fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>'
    text = f'<text x="4" y="{_HEIGHT - 4 - 12 * place}" font-size="10" fill="{_COLOURS[name]}">'
    return f"{line}{text}{name.replace('_', ' ')}</text>"
