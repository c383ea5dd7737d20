"""An algorithm like SCAFFOLD, by option II of the paper: from the client's steps and its rate."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_sec.algorithms import Averaging, Server
from fedjax_sec.core import ConfigError, Hooks, registry
from fedjax_sec.core.types import Message


class WithVariate(NamedTuple):
    """The averaging server and the mean variate c [D], or a client's variate c_i [D]."""

    variate: Any
    server: Server | None = None


@registry.algorithms.register("option_two")
class OptionTwo(Averaging):
    """FedAvg whose local gradients become g - c_i + c.

    With `c_i+ = c_i - c - u_i / (steps * rate)`, where `u_i` is the client's update.
    """

    def check(self, path, setting):
        if setting.sampled:
            raise ConfigError(f"{path}: 'option_two' needs every client in every round.")

    def init(self, key, params, setting, task):
        return WithVariate(jnp.zeros(task.dim), self.start(params))

    def init_client(self, params, setting, task):
        return WithVariate(jnp.zeros(task.dim))

    def message(self, setting, task):
        return None

    def download(self, server, client):
        return server.server.params, server.variate

    def received(self, download):
        return download[0]

    def train(self, key, download, state, data, task):
        params, variate = download
        hooks = Hooks(correct=lambda gradient, delta: gradient - state.variate + variate)
        done = self.local(key, params, (), data, task, hooks)
        rate = self.client.optimizer.rate
        new = state.variate - variate - done.delta / (done.steps * rate)
        change = new - state.variate
        return Message(done.delta, data.reported, change), WithVariate(new), done.metrics

    def step(self, key, server, aggregate, messages, view, task):
        variate = server.variate + messages.extra.mean(axis=0)
        return WithVariate(variate, self.moved(server.server, aggregate)), {}

    def params(self, server):
        return server.server.params
