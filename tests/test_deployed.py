"""Rounds whose clients are apart, without a network: the two halves together are a simulation."""

import jax
import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.flower.clients import Clients
from fedjax_sec.flower.exchange import Answers, RoundFailed
from fedjax_sec.flower.limits import check_deployable
from fedjax_sec.flower.rounds import Deployed
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.experiment import execute

BASE = {
    "data": {"name": "digits", "num_clients": 8},
    "threat": {"num_malicious": 2},
    "attack": "sign_flip",
    "defense": {"name": "multi_krum", "num_byzantine": 2, "num_selected": 3},
    "evaluation": {"every": 1, "diagnostics": False},
    "rounds": 3,
}


class Direct:
    """Clients in this process, who remember; some of them may be `lost` in a round."""

    def __init__(self, prepared, lost=(), weights=None):
        self.clients, self.states, self.lost, self.kept = Clients(prepared), {}, dict(lost), []
        self.weights = weights or {}

    def exchange(self, ask):
        replies, missing = [], {}
        for place, client in enumerate(ask.clients):
            if client in self.lost.get(ask.index, ()):
                missing[client] = "it was killed"
                continue
            reply, self.states[client] = self.clients.train(
                client, ask.index, ask.download.row(place), self.states.get(client)
            )
            if client in self.weights:
                vector = reply.message[0]
                reply = reply._replace(message=(vector, np.float32(self.weights[client])))
            replies.append(reply)
        return Answers(replies, missing)

    def aggregated(self, index, begin, end, kept):
        assert begin <= end
        self.kept.append(kept)


def deployed(changes=(), **options):
    networks = []

    def make(prepared):
        networks.append(Direct(prepared, options.pop("lost", ()), options.pop("weights", None)))
        return Deployed(prepared, networks[0], **options)

    out = options.pop("out")
    result = execute(BASE, out=out, make_program=make, **dict(changes))
    return result, networks[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attack": {"name": "byzantine", "mode": "random"}, "threat.redraw": True},
        {"algorithm": "scaffold", "attack": None, "defense": "mean"},
        {"attack": "label_flip", "server.clients_per_round": 4, "defense": "median"},
    ],
    ids=["sign_flip", "random", "scaffold", "label_flip"],
)
def test_two_halves_are_the_simulated_round(changes, tmp_path):
    apart, _ = deployed(changes, out=tmp_path / "run")
    together = fedjax_sec.run(BASE, **changes)
    names = set(together.metrics)
    assert names == set(apart.metrics) and {"accuracy", "train_loss", "excluded"} <= names
    for name in names:
        np.testing.assert_allclose(
            apart.metrics[name], together.metrics[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        apart.params,
        together.params,
    )


def test_a_round_goes_on_without_those_that_are_lost(tmp_path):
    result, network = deployed({"defense": "median"}, out=tmp_path / "run", lost={1: {0, 3}})
    assert result.metrics["absent"][1:].tolist() == [0, 2, 0]
    assert result.metrics["accuracy"][-1] > result.metrics["accuracy"][0]
    assert [set(shares) for shares in network.kept] == [set(range(8))] * 3
    assert network.kept[1][0] == network.kept[1][3] == 0 < network.kept[0][0]


def test_reported_weights_are_not_trusted(tmp_path):
    weights, changes = {0: np.nan, 3: -5.0}, {"defense": "mean", "attack": None, "rounds": 1}
    result, network = deployed(changes, out=tmp_path / "run", weights=weights)
    kept = network.kept[0]
    assert kept[0] == kept[3] == 0 and min(kept[client] for client in (1, 2, 4)) > 0
    assert result.metrics["accuracy"][-1] > result.metrics["accuracy"][0]


def test_shares_are_those_of_the_clients_that_were_asked(tmp_path):
    changes = {"server.clients_per_round": 7, "rounds": 1, "defense.num_byzantine": 1}
    _, network = deployed(changes, out=tmp_path / "run", lost={0: {5}})
    (kept,) = network.kept
    assert len(kept) == 7 and sum(kept.values()) == 3 and kept.get(5, 0) == 0


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, r"Round 2: 4 of 8 clients answered.*multi_krum needs 2 f \+ 2 < K"),
        ({"defense": "median"}, {"quorum": 5}, "Round 2: 4 of 8 .* the quorum is 5 .*killed"),
    ],
    ids=["bound", "quorum"],
)
def test_too_few_answers_end_the_run_with_the_reason(changes, options, message, tmp_path):
    lost = {1: {0, 1, 2, 3}}
    with pytest.raises(RoundFailed, match=message):
        deployed(changes, out=tmp_path / "run", lost=lost, **options)
    result, _ = deployed({"resume": True, **changes}, out=tmp_path / "run")  # what is done is kept
    assert result.metrics["round"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": "alie"}, "'alie' computes a malicious client's row from other clients' rows"),
        ({"threat.knowledge": "omniscient"}, "omniscient adversary sees the messages of all"),
        ({"attack": {"name": "boost", "accounts_for": "weights_and_rate"}}, "'boost' computes"),
        ({"attack": {"name": "lazy_worker", "convention": "fedsecurity"}}, "'lazy_worker'"),
        ({"evaluation.diagnostics": True}, "evaluation.diagnostics=false"),
        ({"server.dropout": 0.1}, "server.dropout: over a network clients are lost by themselves"),
    ],
)
def test_what_only_a_simulation_can_run_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_deployable(from_mapping(BASE, changes))


def test_objects_of_python_cannot_travel():
    defense = {"name": "function", "function": lambda updates: updates.mean(axis=0)}
    with pytest.raises(ConfigError, match="objects that were given from Python"):
        check_deployable(from_mapping(BASE, {"defense": defense}))
