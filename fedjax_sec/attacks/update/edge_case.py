"""Edge-case attack: black box, PGD, and PGD with model replacement (Wang et al., NeurIPS 2020)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._replacement import replacement_factor
from fedjax_sec.attacks.update._training import gradient, sgd_step
from fedjax_sec.core import (
    ANY_RATE,
    ANY_SCALE,
    ConfigError,
    UpdateAttack,
    component,
    numeric,
    refuse_unread,
    registry,
    static,
)


@registry.attacks.register("edge_case")
class EdgeCase(UpdateAttack):
    r"""Malicious clients train on edge-case and clean examples, staying close to the global model.

    The adversary's set holds the examples of `backdoor`, drawn once, and `num_clean` examples of
    the data of its clients in the round, by a key that is drawn once: they are the same wherever
    the same clients attack. From the global parameters w a malicious client takes `epochs` passes
    over the set by SGD and sends what it has learned, :math:`\Delta = X - w`. `updates [K, D] ->
    [K, D]`. By `mode`:

    - `black_box`: nothing else; such an attacker needs no more than to change its data.
    - `pgd`: in every epoch after the batches 0, f, 2f, ... (f is `project_frequency`) and after the
      last one X is projected to the ball around w,

      .. math:: \Delta \leftarrow \Delta \min(1, eps / \|\Delta\|_2)

      over the trained parameters; the momentum stays as it is.
    - `pgd_replacement`: as `pgd`, and then :math:`\Delta` is multiplied by
      :math:`\sum_i w_i / (\eta \sum_{i \in M} w_i)`, with w the numbers of examples that are
      reported, :math:`\eta` the server's rate and M the malicious clients of the round.

    With `reports: set` a malicious client reports the number of examples in the set, by which a
    weighted mean weighs it; inside another attack it reports its own. Attackers at a fixed
    frequency are `threat: {num_malicious: 1, per_round: 1, every: 10}` with
    `server.clients_per_round` below N; a fixed pool of attackers who come as chance has it is
    `threat: {num_malicious: ...}` alone. In rounds without a malicious client nothing is trained.

    Raises: `ConfigError` when `backdoor` is no attack on data; for fields that the mode does
    not read; with `pgd_replacement` and a server whose step is not a rate times the aggregate;
    outside an experiment, since it needs a model and data.

    Source: Wang et al. 2020 (Attack of the Tails), Section 3 (black box, PGD, PGD with replacement)
    and Section 4; where the text is silent, the author code: `fl_trainer.py` for the projection
    (`train`), the factor and the weights, `utils.py` for the set (100 and 400 images on CIFAR-10;
    66 and 100 on EMNIST), `run_simulated_averaging.sh` for rate 0.02, 2 epochs, eps 2 and a
    projection every 10 batches on CIFAR-10; batch 32, momentum 0.9, weight decay 1e-4. On EMNIST
    rate 0.1, 5 epochs, eps 1. Under Krum it multiplies eps by 0.998 in each round: a schedule. Its
    factor is not divided among several malicious clients of a round, and its clean images are any
    of the training set, of which ours has those of the malicious clients, drawn with replacement:
    choices, as are one common update (`alike`) and training images that are not cropped or flipped.

    Example:
        >>> from fedjax_sec.core import refuse_unread, registry
        >>> attack = {"name": "edge_case", "mode": "pgd", "eps": 1.0}
        >>> registry.attacks.build(attack).num_clean
        400
    """

    rewrites = "message"
    mode: str = static(
        "black_box",
        "Whether updates are projected, and then scaled.",
        choices=("black_box", "pgd", "pgd_replacement"),
    )
    backdoor: Any = component(
        "attack", "edge_images", "What to teach, an attack on data.", poisons=False
    )
    num_clean: int = static(400, "Clean examples in the set.", low=0, high=10**6)
    epochs: int = static(2, "Passes over the set.", low=1, high=10**6)
    batch_size: int = static(32, "Examples in a batch.", low=1, high=10**6)
    learning_rate: float = numeric(
        0.02, "Learning rate of the adversary's training.", low=0, unbounded=ANY_RATE
    )
    momentum: float = numeric(0.9, "Its momentum.", low=0, high=1)
    weight_decay: float = numeric(1e-4, "Its weight decay, as PyTorch's.", low=0, high=1e6)
    eps: float = numeric(
        2.0, "Radius of the ball, for the modes of PGD.", above=0, unbounded=ANY_SCALE
    )
    project_frequency: int = static(10, "Batches from projection to projection.", low=1, high=10**6)
    reports: str = static(
        "set",
        "Number of examples that a malicious client reports: of the `set`, or its `own`.",
        choices=("set", "own"),
    )
    alike: bool = static(
        True, "All malicious clients of a round send one update; false: each trains for itself."
    )

    @property
    def needs(self):
        return frozenset({"task", "rate"} if self.mode == "pgd_replacement" else {"task"})

    def check(self, path, setting):
        if self.backdoor.stage != "data":
            raise ConfigError(
                f"{path}.backdoor must be an attack on data such as 'edge_images', got "
                f"{self.backdoor.registered_name!r}."
            )
        if self.mode == "black_box":
            refuse_unread(self, path, ("eps", "project_frequency"), "by mode 'black_box'")

    def init(self, num_clients, dim):
        """The key by which the set is drawn, once there is one."""
        return {"key": jax.random.key_data(jax.random.key(0)), "drawn": jnp.array(False)}

    def apply(self, key, updates, state, view):
        """Updates as sent inside another attack, which leaves the weights as they are."""
        vectors, _, state = self._craft(key, updates, state, view, "own")
        return vectors, state, {}

    def tamper(self, key, message, state, view):
        vectors, size, state = self._craft(key, message.vector, state, view, self.reports)
        message = message._replace(vector=vectors)
        if self.reports == "set":
            weight = jnp.where(view.malicious, jnp.float32(size), message.weight)
            message = message._replace(weight=weight)
        return message, state, {}

    def _craft(self, key, updates, state, view, reports):
        """(updates [K, D], examples in the set, state)."""
        drawn = jnp.where(state["drawn"], state["key"], jax.random.key_data(key))
        state = {"key": drawn, "drawn": jnp.array(True)}
        x, y = self._set(jax.random.wrap_key_data(drawn), view)
        size, scale = y.shape[0], 1.0
        if self.mode == "pgd_replacement":
            weights = jnp.ones(updates.shape[0]) if view.weights is None else view.weights
            if reports == "set":
                weights = jnp.where(view.malicious, float(size), weights)
            scale = replacement_factor(view, weights)

        def craft(own_key):
            return (scale * self._train(own_key, x, y, view)).astype(updates.dtype)

        nothing = lambda: jnp.zeros(updates.shape[1:], updates.dtype)  # noqa: E731
        if self.alike:
            one = jax.lax.cond(jnp.any(view.malicious), lambda: craft(key), nothing)
            return jnp.broadcast_to(one, updates.shape), size, state
        # One client after another, and no work for honest ones.
        crafted = jax.lax.map(
            lambda row: jax.lax.cond(
                view.malicious[row], lambda: craft(jax.random.fold_in(key, row)), nothing
            ),
            jnp.arange(updates.shape[0]),
        )
        return crafted, size, state

    def _set(self, key, view):
        """The adversary's examples and their labels."""
        edge_key, clean_key = jax.random.split(key)
        x, y = self.backdoor.examples(edge_key, view.memory(self.backdoor), view)
        if self.num_clean == 0:
            return x, y
        clean, labels = view.sample(clean_key, self.num_clean)
        return jnp.concatenate([x, clean]), jnp.concatenate([y, labels.astype(y.dtype)])

    def _train(self, key, x, y, view):
        """X - w [D]."""
        task, start, count = view.task, view.params, y.shape[0]
        size = min(self.batch_size, count)
        batches, part = -(-count // size), task.space.trained

        def project(params):
            moved = params - start
            length = jnp.linalg.norm(moved[part])
            within = jnp.where(length > self.eps, self.eps / jnp.maximum(length, self.eps), 1.0)
            return params.at[part].set(start[part] + within * moved[part])

        def one_batch(epoch_key, carry, batch):
            params, velocity = carry
            number, rows = batch
            dropout = jax.random.fold_in(epoch_key, number + 1)
            real = rows < count  # the last batch is padded
            rows = jnp.minimum(rows, count - 1)
            slope, seen = gradient(
                task, params, x[rows], y[rows], real, dropout, lambda loss, params: loss
            )
            params, velocity = sgd_step(
                task,
                params,
                velocity,
                slope,
                seen,
                self.learning_rate,
                self.momentum,
                self.weight_decay,
            )
            if self.mode != "black_box":
                due = (number % self.project_frequency == 0) | (number == batches - 1)
                params = jnp.where(due, project(params), params)
            return (params, velocity), None

        def one_epoch(carry, epoch):
            epoch_key = jax.random.fold_in(key, epoch)
            order = jax.random.permutation(jax.random.fold_in(epoch_key, 0), count)
            rows = jnp.pad(order, (0, batches * size - count), constant_values=count)
            each = jnp.arange(batches), rows.reshape(batches, size)
            return jax.lax.scan(functools.partial(one_batch, epoch_key), carry, each)

        carry = start, jnp.zeros_like(start)
        (params, _), _ = jax.lax.scan(one_epoch, carry, jnp.arange(self.epochs))
        return params - start
