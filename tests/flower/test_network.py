"""Waiting for nodes and their faults, on a grid that is scripted."""

import jax
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedjax_sec.flower import network as network_lib
from fedjax_sec.flower import wire
from fedjax_sec.flower.exchange import Ask, Download, Reply
from fedjax_sec.flower.network import GridNetwork
from fedjax_sec.flower.trace import Journal, chrome_trace, read_journal

WANTED = (jax.ShapeDtypeStruct((2,), np.dtype("float32")),)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds pass where the network sleeps, and nowhere else."""

    class Clock:
        now = 1000.0

        def time(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(network_lib, "time", clock)
    return clock


class Scripted:
    """Nodes that each hold the client of their number, and answer as they are told."""

    def __init__(self, nodes):
        self.online, self.behaviour = set(nodes), {}
        self.claims = {node: [node] for node in nodes}
        self.asked, self._waiting = [], {}

    def get_node_ids(self):
        return list(self.online)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"{len(self.asked)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, ids):
        replies = []
        for one in list(ids):
            message = self._waiting[one]
            content = self._answer(message)
            if content is not None:
                replies.append(Message(content, reply_to=message))
            if isinstance(content, Error):  # the SuperLink's, in the node's place
                replies[-1].metadata.__dict__["_src_node_id"] = 1
        return replies

    def _answer(self, message):
        node = message.metadata.dst_node_id
        if node not in self.online:
            return None
        if message.metadata.message_type == "query":
            return RecordDict({"clients": ConfigRecord({"clients": self.claims[node]})})
        return self.behaviour.get(node, good)(message)


def good(message, value=1.0):
    clients = message.content["round"]["clients"]
    replies = [
        Reply(client, (np.full(2, value, np.float32),), {"train_loss": 1.0}, 0.0, 0.0)
        for client in clients
    ]
    return wire.to_answer(replies, 0.0, 0.0)


def wrong_shape(message):
    content = good(message)
    content["messages"] = ArrayRecord({"0": Array(np.ones((1, 3), np.float32))})
    return content


def far_too_many_bytes(message):
    content = good(message)
    content["messages"] = ArrayRecord({"0": Array(np.ones((1, 10**6), np.float32))})
    return content


FAULTS = {
    0: (lambda message: Error(1, "killed"), "failed: killed"),
    1: (lambda message: None, "did not answer within 30 s"),
    2: (wrong_shape, r"refused: array 0 is float32 (1, 3)"),
    3: (far_too_many_bytes, "takes 4000128 bytes"),
}


def network_of(grid, tmp_path, clients=5):
    return GridNetwork(grid, "print", clients, 30.0, Journal(tmp_path))


def ask(index=0, clients=range(5)):
    return Ask(index, tuple(clients), Download((np.zeros(2, np.float32),), True), WANTED)


def test_a_round_goes_on_without_those_that_fail(tmp_path, clock):
    grid = Scripted(range(5))
    network = network_of(grid, tmp_path)
    grid.behaviour = {node: fault for node, (fault, _) in FAULTS.items()}
    begin = clock.now
    answers = network.exchange(ask())
    assert [reply.client for reply in answers.replies] == [4]
    assert set(answers.missing) == set(FAULTS)
    for client, (_, reason) in FAULTS.items():
        assert reason in answers.missing[client]
    assert clock.now - begin == pytest.approx(30.0, abs=1.0)
    network.aggregated(0, clock.now, clock.now + 1, {4: 1.0})
    (row,) = read_journal(tmp_path)
    assert set(row["missing"]) == {"0", "1", "2", "3"} and row["kept"] == {"4": 1.0}
    names = {event["name"] for event in chrome_trace([row])["traceEvents"]}
    assert {"training", "communication", "aggregation"} <= names


def test_nan_is_the_defences_affair(tmp_path):
    grid = Scripted(range(2))
    grid.behaviour[1] = lambda message: good(message, np.nan)
    answers = network_of(grid, tmp_path, 2).exchange(ask(clients=range(2)))
    vectors = {reply.client: reply.message[0] for reply in answers.replies}
    assert not answers.missing and np.isnan(vectors[1]).all() and np.isfinite(vectors[0]).all()


def test_a_node_is_lost_and_back(tmp_path):
    grid = Scripted(range(3))
    network = network_of(grid, tmp_path, 3)
    assert len(network.exchange(ask(0, range(3))).replies) == 3
    grid.online.discard(1)
    answers = network.exchange(ask(1, range(3)))
    assert answers.missing == {1: "no node holds it"} and len(answers.replies) == 2
    grid.online.add(7)  # it comes back as another node
    grid.claims[7] = [1]
    answers = network.exchange(ask(2, range(3)))
    assert not answers.missing and network.holder[1] == 7
    assert grid.asked.count((7, "query")) == 1 and grid.asked.count((0, "query")) == 1


def test_nobody_takes_over_a_client_or_claims_one_that_there_is_not(tmp_path):
    grid = Scripted([0, 1, 2])
    network = network_of(grid, tmp_path, 3)
    network.exchange(ask(0, range(3)))
    grid.online |= {8, 9}
    grid.claims |= {8: [0, 1], 9: [99]}
    answers = network.exchange(ask(1, range(3)))
    assert not answers.missing
    assert network.holder == {0: 0, 1: 1, 2: 2}


def test_the_first_round_waits_for_the_nodes(tmp_path, clock):
    grid = Scripted([0])
    network, sleep = network_of(grid, tmp_path, 2), clock.sleep
    grid.claims[1] = [1]

    def later(seconds):
        sleep(seconds)
        if clock.now > 1010:
            grid.online.add(1)

    clock.sleep = later
    answers = network.exchange(ask(0, range(2)))
    assert not answers.missing and len(answers.replies) == 2
    assert 1010 < clock.now < 1012
