"""The base of algorithms whose server steps along the aggregate of the clients' updates."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sec.core import NO_HOOKS, Algorithm, Hooks, Message, State, Trained, given


class Server(NamedTuple):
    """The global parameters [D] and the state of the server's optimizer."""

    params: Any
    optimizer: State


@dataclasses.dataclass(frozen=True)
class Averaging(Algorithm):
    """Clients train from the global parameters and send their update; the server steps along it.

    The fields are the experiment's `client` and `server.optimizer`. An algorithm of this kind says
    in `hooks` what it adds to a local step, and where it sends or keeps more than that, composes
    `local`, `start` and `moved`, the parts of `train`, `init` and `step`.
    """

    client: Any = given("How a client trains, `client` of the experiment.")
    optimizer: Any = given("The server's optimizer, `server.optimizer` of the experiment.")

    @property
    def rate(self):
        """The learning rate of a server that takes plain gradient steps, else None."""
        return self.optimizer.rate

    def hooks(self, params) -> Hooks:
        """The algorithm's additions to a local step."""
        return NO_HOOKS

    def start(self, params) -> Server:
        """The server before round 0."""
        return Server(params, self.optimizer.transformation().init(params))

    def local(self, key, params, state, data, task, hooks: Hooks = NO_HOOKS) -> Trained:
        """The client's training from the parameters [D] that it got."""
        return self.client.apply(key, params, state, data, task, hooks)

    def own_state(self, dim: int) -> State:
        """The state that the client component keeps from round to round."""
        return self.client.init(dim) if self.client.keeps_state else ()

    def moved(self, server: Server, aggregate) -> Server:
        """The server after a step of its optimizer, whose gradient is minus the aggregate [D]."""
        change, optimizer = self.optimizer.transformation().update(
            -aggregate, server.optimizer, server.params
        )
        return Server(server.params + change, optimizer)

    def init(self, key, params, setting, task):
        return self.start(params)

    def init_client(self, params, setting, task):
        return self.own_state(task.dim)

    def message(self, setting, task):
        shape = jax.ShapeDtypeStruct
        return Message(shape((task.dim,), jnp.float32), shape((), jnp.float32))

    def download(self, server, client):
        return server.params

    def received(self, download):
        return download

    def train(self, key, download, state, data, task, hooks=NO_HOOKS):
        hooks = self.hooks(download).then(hooks)
        done = self.local(key, download, state, data, task, hooks)
        return Message(done.delta, data.reported), done.state, done.metrics

    def step(self, key, server, aggregate, messages, view, task):
        return self.moved(server, aggregate), {}

    def params(self, server):
        return server.params
