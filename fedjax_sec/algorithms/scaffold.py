"""SCAFFOLD: Karimireddy et al., ICML 2020."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_sec.algorithms._averaging import Averaging, Server
from fedjax_sec.core import NO_HOOKS, Hooks, Message, State, registry, static


class ScaffoldServer(NamedTuple):
    """The averaging server, the mean control variate c [T], and 1 / N."""

    server: Server
    variate: Any
    share: Any


class ScaffoldClient(NamedTuple):
    """One client's control variate c_i [T], and what its training keeps."""

    variate: Any
    client: State


@registry.algorithms.register("scaffold")
class Scaffold(Averaging):
    r"""FedAvg with control variates, which correct the drift of clients with unequal data.

    Each local step of client i descends :math:`g - c_i + c`. With :math:`\bar g_i` the mean of its
    uncorrected gradients in the round,

    .. math:: c_i^+ = \bar g_i, \qquad c \leftarrow c + \frac{1}{N} \sum_{i \in S} (c_i^+ - c_i)

    over the clients S of the round that the defence does not leave out before it aggregates. For
    plain SGD :math:`\bar g_i` equals option II, :math:`c_i - c + (w_t - w_i) / (steps \cdot
    rate)`, and it needs neither the rate nor the optimizer's kind.

    The differences of variates travel as the message's extra, outside the defence: malicious
    clients that tamper with them move c under any rule. `joint` puts them into the vector instead,
    [D + T], so that the defence aggregates them with the updates; c then moves by |S| / N times
    the aggregate's part.

    Source: Karimireddy et al. 2020, Algorithm 1 (option II in this form) and Equation 5. The paper
    averages updates with equal weights; here the defence decides.

    Example:
        >>> import fedjax_sec
        >>> result = fedjax_sec.run({"algorithm": "scaffold", "rounds": 2})
        >>> sorted(name for name in result.metrics if name.startswith("scaffold"))
        ['scaffold/variate_norm']
    """

    joint: bool = static(False, "Send the variates in the vector, through the defence.")

    def init(self, key, params, setting, task):
        return ScaffoldServer(self.start(params), _zeros(task), 1.0 / setting.registered)

    def init_client(self, params, setting, task):
        return ScaffoldClient(_zeros(task), self.own_state(task.dim))

    def message(self, setting, task):
        return None

    def download(self, server, client):
        return server.server.params, server.variate

    def received(self, download):
        return download[0]

    def train(self, key, download, state, data, task, hooks=NO_HOOKS):
        params, variate = download
        corrected = Hooks(
            correct=lambda gradient, delta: gradient - state.variate + variate, mean_gradient=True
        )
        done = self.local(key, params, state.client, data, task, corrected.then(hooks))
        # A client without examples took no step, so it keeps its variate.
        new = jnp.where(done.steps > 0, done.gradient, state.variate)
        change = new - state.variate
        if self.joint:
            message = Message(jnp.concatenate([done.delta, change]), data.reported)
        else:
            message = Message(done.delta, data.reported, change)
        return message, ScaffoldClient(new, done.state), done.metrics

    def step(self, key, server, aggregate, messages, view, task):
        included = view.included()
        if self.joint:
            aggregate, mean = aggregate[: task.dim], aggregate[task.dim :]
            change = mean * included.sum() * server.share
        else:
            sent = jnp.where(included[:, None], messages.extra, 0.0)
            change = sent.sum(axis=0) * server.share
        variate = server.variate + change
        new = ScaffoldServer(self.moved(server.server, aggregate), variate, server.share)
        return new, {"variate_norm": jnp.linalg.norm(variate)}

    def params(self, server):
        return server.server.params


def _zeros(task):
    return jnp.zeros(task.space.trained.stop - task.space.trained.start)
