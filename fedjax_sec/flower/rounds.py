"""The rounds of an experiment whose clients are elsewhere."""

import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import ConfigError
from fedjax_sec.core.types import Message
from fedjax_sec.flower.clients import ALONE
from fedjax_sec.flower.exchange import Answers, Ask, Download, Network, Reply, RoundFailed
from fedjax_sec.flower.limits import check_deployable
from fedjax_sec.round import make_task
from fedjax_sec.round.apart import clients_of, server_round
from fedjax_sec.round.state import message_shapes
from fedjax_sec.runs.prepare import Prepared
from fedjax_sec.runs.program import Program, over_rounds
from fedjax_sec.runs.tuning import Tuning


class Deployed(Program):
    """An experiment's compiled functions, but its rounds are computed over a network.

    The server's half of a round is compiled; initial state, evaluation, results and resuming are
    those of a simulation. `quorum` is the smallest number of clients with which a round is
    finished; None: the smallest that the defence's bound allows.

    Raises: `ConfigError` for an experiment that only a simulation can run.
    """

    def __init__(self, prepared: Prepared, network: Network, quorum: int | None = None):
        check_deployable(prepared.experiment)
        super().__init__(prepared, tuning=Tuning(ALONE, {}))
        self.network, self.quorum = network, quorum
        per_round = self.experiment.clients_per_round
        if quorum is not None and not 1 <= quorum <= per_round:
            raise ConfigError(
                f"quorum must be in 1 .. {per_round}, the clients of a round, got {quorum}."
            )
        self._participants = jax.jit(lambda replica, at: clients_of(self.problem, replica, at))

    def init(self, replicas, starts=None):
        state = super().init(replicas, starts)
        if jax.tree.leaves(state.attack.data):
            raise ConfigError(
                f"attack: {self.experiment.attack.backdoor.registered_name!r} keeps a memory that "
                f"its clients and the evaluation share, and over a network nobody shares it. "
                f"Simulate it (fedjax_sec.run)."
            )
        return state

    def advance(self, state, replicas, start: int, rounds: int):
        state, replica = jax.tree.map(lambda leaf: leaf[0], (state, replicas))
        rows = []
        for index in range(start, start + rounds):
            state, metrics = self._round(state, replica, index)
            rows.append(metrics)
        names = [name for name in rows[-1] if all(name in row for row in rows)]
        history = {name: jnp.stack([row[name] for row in rows]) for name in names}
        return jax.tree.map(lambda leaf: leaf[None], (state, over_rounds(history)))

    def _round(self, state, replica, index: int):
        ask, places, form = self._ask(state, replica, index)
        answers = self.network.exchange(ask)
        self._check_enough(ask, answers)
        begin = time.time()
        arrived = _stacked(form, places, answers.replies, self.experiment.clients_per_round)
        args = state, replica, self.pool, *arrived, np.int32(index)
        new, metrics, kept = self._compile("serve", self._serve, *args)(*args)
        jax.block_until_ready(new)
        shares = None
        if kept is not None:
            each = np.asarray(kept).tolist()
            shares = {client: each[place] for client, place in places.items()}
        self.network.aggregated(index, begin, time.time(), shares)
        return new, metrics

    def _serve(self, state, replica, pool, sent, arrived, metrics, index):
        task = make_task(self.problem, pool, replica.components.task)
        return server_round(self.problem, task, pool, replica, state, sent, arrived, metrics, index)

    def _ask(self, state, replica, index: int) -> tuple[Ask, dict[int, int], Message]:
        """(the question, each asked client's place among the round's K, the form of a message)."""
        components = core.resolve(replica.components, index)
        algorithm, task = components.algorithm, make_task(self.problem, self.pool, components.task)
        who = jax.device_get(self._participants(replica, np.int32(index)))
        places = {int(c): i for i, c in enumerate(who.ids) if who.present[i]}
        numbers = jnp.asarray(list(places), jnp.int32)

        def downloads(axis):
            one = lambda client: algorithm.download(state.server, client)  # noqa: E731
            return jax.vmap(one, out_axes=axis)(numbers)

        try:
            download, shared = downloads(None), True
        except ValueError:  # each client gets its own
            download, shared = downloads(0), False
        one = download if shared else jax.tree.map(lambda leaf: leaf[0], download)
        local = jax.tree.map(lambda leaf: leaf[0], state.client)
        form = message_shapes(self.problem, task, components, one, local)
        arrays = tuple(np.asarray(leaf) for leaf in jax.tree.leaves(download))
        wanted = tuple(jax.tree.leaves(form))
        return Ask(index, tuple(places), Download(arrays, shared), wanted), places, form

    def _check_enough(self, ask: Ask, answers: Answers) -> None:
        """Raises `RoundFailed` where too few clients answered."""
        number, defense = len(answers.replies), self.experiment.defense
        reason = None
        if self.quorum is not None and number < self.quorum:
            reason = f"the quorum is {self.quorum}"
        elif number == 0:
            reason = "nobody answered"
        elif answers.missing and self.quorum is None:
            setting = self.prepared.setting._replace(num_clients=number)
            try:
                core.check_components(defense.server_stages, "defense", setting)
            except ConfigError as error:
                reason = str(error)
        if reason is not None:
            raise RoundFailed(
                f"Round {ask.index + 1}: {number} of {len(ask.clients)} clients answered, and "
                f"{reason} {_reasons(answers.missing)}"
            )


def _reasons(missing: Mapping[int, str]) -> str:
    """Why clients are missing, those of one reason together."""
    clients: dict[str, list[int]] = {}
    for client, reason in missing.items():
        clients.setdefault(reason, []).append(client)
    return "; ".join(f"clients {numbers}: {reason}" for reason, numbers in clients.items())


def _stacked(form: Message, places: Mapping[int, int], replies: Sequence[Reply], rows: int):
    """(messages [K, ...], which arrived [K], metrics [K]); rows that did not arrive are zero."""
    leaves, structure = jax.tree.flatten(form)
    stacks = [np.zeros((rows, *leaf.shape), leaf.dtype) for leaf in leaves]
    arrived = np.zeros(rows, bool)
    names = dict.fromkeys(name for reply in replies for name in reply.metrics)
    metrics = {name: np.zeros(rows, np.float32) for name in names}
    for reply in replies:
        place = places[reply.client]
        arrived[place] = True
        for stack, leaf in zip(stacks, reply.message, strict=True):
            stack[place] = leaf
        for name, value in reply.metrics.items():
            metrics[name][place] = value
    return jax.tree.unflatten(structure, stacks), arrived, metrics
