"""Rounds whose clients are apart, without a network: the two halves together are a simulation."""

import jax
import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.flower.clients import Clients
from fedjax_sec.flower.rounds import Answers, Deployed
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

    def __init__(self, prepared, lost=()):
        self.clients, self.states, self.lost, self.kept = Clients(prepared), {}, dict(lost), []

    def exchange(self, ask):
        replies, missing = [], {}
        for place, client in enumerate(ask.clients):
            if client in self.lost.get(ask.index, ()):
                missing[client] = "it was killed"
                continue
            reply, self.states[client] = self.clients.train(
                client, ask.index, ask.download.row(place), self.states.get(client)
            )
            replies.append(reply)
        return Answers(replies, missing)

    def aggregated(self, index, begin, end, kept):
        assert begin <= end
        self.kept.append(kept)


def deployed(changes=(), **options):
    networks = []

    def make(prepared):
        networks.append(Direct(prepared, options.pop("lost", ())))
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
