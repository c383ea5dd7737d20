"""The times of a deployed run: a journal, a trace that Perfetto opens, and spans to draw.

A round's time is divided for each client into communication (until its node begins, and from the
node's end until the server has the answer), preparing (the node's start: data and compilation),
waiting for the node's other clients, and training; the server's is aggregation.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedjax_sec.core import ConfigError, files
from fedjax_sec.flower.exchange import Reply

JOURNAL = "rounds.jsonl"
#: What a span can be, in the order in which they are drawn.
KINDS = ("communication", "preparing", "waiting", "training", "aggregation")
#: The server's row; clients' are their numbers.
SERVER = -1


class Span(NamedTuple):
    """A part of a round, in seconds since the epoch by the server's clock."""

    round: int
    client: int
    kind: str
    begin: float
    end: float


class Journal:
    """Writes a line for each round that is finished: who was asked, who answered and when.

    `anew` removes an earlier run's.
    """

    def __init__(self, folder: Path, anew: bool = False):
        self.path = folder / JOURNAL
        self.row: dict = {}
        if anew:
            files.remove_files([self.path])

    def begin(self, index: int, clients: Sequence[int]) -> None:
        """A round begins."""
        self.row = {"round": index + 1, "asked": list(clients), "nodes": [], "missing": {}}

    def answered(
        self,
        node: int,
        replies: Sequence[Reply],
        sent: float,
        worked: tuple[float, float],
        arrived: float,
    ) -> None:
        """A node's answer: `sent` and `arrived` by our clock, `worked` by the node's."""
        clients = [[reply.client, reply.begin, reply.end] for reply in replies]
        times = {"sent": sent, "begin": worked[0], "end": worked[1], "arrived": arrived}
        self.row["nodes"].append({"node": str(node), **times, "clients": clients})

    def missing(self, reasons: Mapping[int, str]) -> None:
        """The clients without an answer."""
        self.row["missing"] = {str(client): reason for client, reason in reasons.items()}

    def end(self, begin: float, end: float, kept: Mapping[int, float] | None) -> None:
        """The round is aggregated."""
        self.row["aggregation"] = [begin, end]
        if kept is not None:
            self.row["kept"] = {str(client): share for client, share in kept.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.row) + "\n")


def read_journal(folder: Path) -> list[dict]:
    """The rounds of a journal; of one that was computed twice, after a resume, the later.

    Raises: `ConfigError` where there is none.
    """
    path = folder / JOURNAL
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r} holds no deployed run: it has no {JOURNAL} ({error.strerror})."
        ) from error
    rows = [json.loads(line) for line in lines]
    return list({row["round"]: row for row in rows}.values())


def spans(rows: Sequence[Mapping]) -> Iterator[Span]:
    """The parts of all rounds, a node's times moved to the server's clock.

    A node's clock is taken to be right unless by it the node worked before it was asked or after
    its answer came; then its middle is laid on the server's.

    >>> node = {"sent": 0, "begin": 11, "end": 13, "arrived": 4, "clients": [[7, 11.5, 12]]}
    >>> rows = [{"round": 1, "nodes": [node], "aggregation": [4, 5]}]
    >>> [(one.kind, one.begin, one.end) for one in spans(rows) if one.end > one.begin][1:4]
    [('preparing', 1.0, 1.5), ('training', 1.5, 2.0), ('waiting', 2.0, 3.0)]
    """
    for row in rows:
        for node in row["nodes"]:
            early, late = node["begin"] < node["sent"], node["end"] > node["arrived"]
            middle = (node["sent"] + node["arrived"] - node["begin"] - node["end"]) / 2
            shift = middle if early or late else 0.0
            ready = min(begin for _, begin, _ in node["clients"])
            for client, begin, end in node["clients"]:
                there = [node["begin"], ready, begin, end, node["end"]]
                edges = [node["sent"], *(time + shift for time in there), node["arrived"]]
                kinds = ("communication", "preparing", "waiting", "training", "waiting", KINDS[0])
                for kind, left, right in zip(kinds, edges, edges[1:], strict=False):
                    yield Span(row["round"], client, kind, left, right)
        yield Span(row["round"], SERVER, "aggregation", *row["aggregation"])


def chrome_trace(rows: Sequence[Mapping]) -> dict:
    """The rounds as Chrome's trace events, which https://ui.perfetto.dev opens.

    Times are microseconds since the first question; a row is a client.
    """
    parts = list(spans(rows))
    start = min((one.begin for one in parts), default=0.0)
    clients = sorted({one.client for one in parts})
    names = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": 0,
            "tid": client + 1,
            "args": {"name": "server" if client == SERVER else f"client {client}"},
        }
        for client in clients
    ]
    events = [
        {
            "ph": "X",
            "name": one.kind,
            "cat": f"round {one.round}",
            "pid": 0,
            "tid": one.client + 1,
            "ts": round(1e6 * (one.begin - start), 1),
            "dur": round(1e6 * (one.end - one.begin), 1),
            "args": {"round": one.round},
        }
        for one in parts
    ]
    return {"displayTimeUnit": "ms", "traceEvents": names + events}
