"""The clients that one node holds: each trains, and misbehaves, as in a simulation."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import ConfigError
from fedjax_sec.flower.exchange import Leaves, Reply
from fedjax_sec.flower.limits import check_deployable
from fedjax_sec.round import make_task
from fedjax_sec.round.apart import client_round, init_client
from fedjax_sec.runs.prepare import Prepared, make_problem, make_replicas
from fedjax_sec.runs.tuning import Choice

#: One client is trained at a time, so that nothing is to be measured.
ALONE = Choice("map")


class Clients:
    """The clients of a node, trained one after another, which all hold the experiment's data.

    `train` is compiled once and serves every client.
    """

    def __init__(self, prepared: Prepared):
        check_deployable(prepared.experiment)
        self.experiment = prepared.experiment
        self.problem = make_problem(prepared, ALONE, self.experiment.clients_per_round)
        self.replica = jax.tree.map(lambda leaf: leaf[0], make_replicas([prepared]))
        self.pool = jax.device_put(prepared.pool)
        self._compiled: Any = None
        self._init = jax.jit(self._init_client)
        self.form = self._form()

    def _task(self, pool, replica):
        return make_task(self.problem, pool, replica.components.task)

    def _client_round(self, pool, replica, *args):
        return client_round(self.problem, self._task(pool, replica), pool, replica, *args)

    def _init_client(self, pool, replica, download):
        return init_client(self.problem, self._task(pool, replica), replica, download)

    def _form(self):
        """The form of a download, with shapes for arrays."""

        def download(params):
            algorithm = core.resolve(self.replica.components, 0).algorithm
            task = self._task(self.pool, self.replica)
            server = algorithm.init(jax.random.key(0), params, self.problem.setting, task)
            return algorithm.download(server, jnp.int32(0))

        return jax.eval_shape(download, jnp.zeros(self.problem.space.dim))

    def train(
        self, client: int, index: int, download: Leaves, state: Leaves | None
    ) -> tuple[Reply, Leaves]:
        """The client's answer in round `index`, and its memory.

        `download` holds the leaves of the algorithm's download, `state` the memory that its last
        round returned; None: the client begins.

        Raises: `ConfigError` for a client that the experiment does not have.
        """
        clients = self.experiment.data.num_clients
        if not 0 <= client < clients:
            raise ConfigError(f"client must be in 0 .. {clients - 1}, got {client}.")
        download = jax.tree.unflatten(jax.tree.structure(self.form), download)
        memory = self._init(self.pool, self.replica, download)
        if state is not None:
            memory = jax.tree.unflatten(jax.tree.structure(memory), state)
        args = self.pool, self.replica, np.int32(client), download, memory, np.int32(index)
        if self._compiled is None:  # no part of a client's time
            self._compiled = jax.jit(self._client_round).lower(*args).compile()
        begin = time.time()
        message, memory, metrics = jax.device_get(self._compiled(*args))
        end = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        reply = Reply(client, tuple(jax.tree.leaves(message)), values, begin, end)
        return reply, tuple(jax.tree.leaves(memory))
