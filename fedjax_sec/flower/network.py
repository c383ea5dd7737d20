"""The way to the clients over Flower's grid: who holds them, waiting, faults, and the times."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedjax_sec.flower import wire
from fedjax_sec.flower.exchange import Answers, Ask, Reply
from fedjax_sec.flower.trace import Journal

_log = logging.getLogger(__name__)

#: Seconds between two looks at what arrived.
POLL = 0.25


class GridNetwork:
    """Clients on Flower's SuperNodes; several of them may lie on one.

    A client belongs to the first node that says it holds it, until that node is no longer online.
    A round waits `timeout` seconds for answers, and the first one as long for nodes. Each round is
    written to the `journal`.
    """

    def __init__(
        self, grid: Grid, fingerprint: str, num_clients: int, timeout: float, journal: Journal
    ):
        self.grid, self.fingerprint, self.num_clients = grid, fingerprint, num_clients
        self.timeout, self.journal = timeout, journal
        self.holder: dict[int, int] = {}
        self.known: set[int] = set()

    # --- Nodes ----------------------------------------------------------------------------------

    def _enrol(self) -> None:
        """Learns which clients are where; the first time it waits until somebody holds each."""
        waits, deadline = not self.known, time.time() + self.timeout
        while True:
            online = set(self.grid.get_node_ids())
            for client in [c for c, node in self.holder.items() if node not in online]:
                del self.holder[client]
            self.known &= online
            if new := sorted(online - self.known):
                self._question(new, min(deadline, time.time() + self.timeout))
            if not waits or len(self.holder) == self.num_clients or time.time() > deadline:
                return
            time.sleep(POLL)

    def _question(self, nodes: Sequence[int], deadline: float) -> None:
        """Asks nodes which clients they hold."""
        config = RecordDict({"experiment": ConfigRecord({"fingerprint": self.fingerprint})})
        messages = [Message(config, node, MessageType.QUERY) for node in nodes]
        for node, message, _ in self._replies(messages, deadline):
            if message.has_error():
                _log.warning("Node %d: %s", node, one_line(message.error.reason))
                continue
            self.known.add(node)
            clients = message.content["clients"].get("clients")
            if not isinstance(clients, list) or not all(self._is_client(one) for one in clients):
                _log.warning("Node %d says it holds clients that there are not.", node)
                continue
            for client in clients:
                if self.holder.setdefault(client, node) != node:
                    _log.warning("Client %d is on node %d already.", client, self.holder[client])

    def _is_client(self, value) -> bool:
        return isinstance(value, int) and 0 <= value < self.num_clients

    def _replies(
        self, messages: Sequence[Message], deadline: float
    ) -> Iterable[tuple[int, Message, float]]:
        """(the node that was asked, its answer, the time), until all came or the time is over.

        Errors that the SuperLink reports for a node name themselves as their source.
        """
        nodes = [message.metadata.dst_node_id for message in messages]
        waiting = dict(zip(self.grid.push_messages(messages), nodes, strict=True))
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, reply, time.time()
            if time.time() > deadline:
                return
            if waiting:
                time.sleep(POLL)

    # --- Rounds ---------------------------------------------------------------------------------

    def exchange(self, ask: Ask) -> Answers:
        """Asks the clients and waits for them."""
        self._enrol()
        missing = {c: "no node holds it" for c in ask.clients if c not in self.holder}
        clients_of: dict[int, list[int]] = {}
        for client in ask.clients:
            if client in self.holder:
                clients_of.setdefault(self.holder[client], []).append(client)
        self.journal.begin(ask.index, ask.clients)
        messages = [
            Message(wire.to_question(ask, clients, self.fingerprint), node, MessageType.TRAIN)
            for node, clients in clients_of.items()
        ]
        sent, replies = time.time(), []
        waiting = dict(clients_of)
        for node, message, arrived in self._replies(messages, sent + self.timeout):
            clients = waiting.pop(node)
            answered, reason = self._read(message, clients, ask, node, sent, arrived)
            replies += answered
            if reason is not None:
                missing |= dict.fromkeys(clients, reason)
        for node, clients in waiting.items():
            reason = f"node {node} did not answer within {self.timeout:g} s"
            missing |= dict.fromkeys(clients, reason)
        self.journal.missing(missing)
        for client, reason in missing.items():
            _log.warning("Round %d, client %d: %s", ask.index + 1, client, reason)
        return Answers(replies, missing)

    def _read(
        self, message: Message, clients, ask: Ask, node: int, sent: float, arrived: float
    ) -> tuple[list[Reply], str | None]:
        """The replies in a node's answer, or why there are none."""
        if message.has_error():
            return [], f"node {node} failed: {one_line(message.error.reason)}"
        try:
            replies, worked = wire.from_answer(message.content, clients, ask.wanted)
        except wire.Refused as error:
            return [], f"the answer of node {node} is refused: {error}"
        self.journal.answered(node, replies, sent, worked, arrived)
        return replies, None

    def aggregated(
        self, index: int, begin: float, end: float, kept: Mapping[int, float] | None
    ) -> None:
        """Writes the round to the journal."""
        self.journal.end(begin, end, kept)


def one_line(reason: str | None) -> str:
    """The last line of an error's text."""
    lines = (reason or "").strip().splitlines()
    return lines[-1].strip() if lines else "it gave no reason"
