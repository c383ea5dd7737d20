"""Federated adversarial training: local SGD on batches partly replaced by PGD examples."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_sec import core
from fedjax_sec.algorithms.clients._local_sgd import LocalSgd
from fedjax_sec.core import ConfigError, numeric, registry, static
from fedjax_sec.ops.pgd import linf_pgd


@registry.clients.register("adversarial")
class Adversarial(LocalSgd):
    r"""`sgd` with a share of every batch replaced by PGD examples of the weights it trains.

    Each step descends, for a batch of n examples and k = round(fraction n),

    .. math:: \frac{1}{n} \Big( \sum_{i \le k} CE(w; x_i + \delta_i, y_i)
              + \sum_{i > k} CE(w; x_i, y_i) \Big)

    where :math:`\delta_i` comes from L-infinity PGD at the weights w of this very step. The
    batch's order is random, so its first k examples are a random choice. In the first local step
    the weights are the server's, and with all clients side by side PGD is one batch of K k inputs.

    `fraction` can follow a schedule over rounds, such as the paper's `{schedule: steps, values:
    {0: 0.1, 200: 0.8}}`. PGD is computed for as many inputs as its largest value asks for, in
    every round.

    Raises: as `sgd`, and `ConfigError` for a `fraction` beyond `most`.

    Source: Zizzo et al. 2020 (FAT), Equation 1; defaults are its Table 1 for MNIST. The random
    start is Madry et al.'s, whose settings the paper takes over. Dropout is off while PGD searches:
    a choice, both are silent.

    Example:
        >>> from fedjax_sec.core import registry
        >>> from fedjax_sec import core
        >>> spec = {"name": "adversarial", "steps": 1, "batch_size": 64, "fraction": 0.5}
        >>> client = registry.clients.build(spec)
        >>> client.eps, client.pgd_steps
        (0.3, 40)
    """

    inputs = frozenset({"pixels"})
    fraction: float = numeric(0.5, "Share of a batch that is replaced, K/N.", low=0, high=1)
    most: float | None = static(
        None,
        "Share of a batch that PGD is computed for (null: the largest `fraction`).",
        above=0,
        high=1,
    )
    eps: float = numeric(
        0.3, "Radius of the L-infinity ball, pixels in [0, 1].", low=0, high=1, pixels=True
    )
    step_size: float = numeric(0.01, "PGD's step, pixels in [0, 1].", low=0, high=1, pixels=True)
    pgd_steps: int = static(40, "PGD's gradients.", low=1, high=10**6)
    random_start: bool = static(True, "Start PGD anywhere in the ball.")

    def resolve_auto(self):
        """With `most` no longer open; an experiment asks for it before anything compiles."""
        if self.most is not None:
            return self
        largest = max(one.fraction for one in core.every_value(self))
        return dataclasses.replace(self, most=largest or 1.0)

    def check(self, path, setting):
        super().check(path, setting)
        if self.most is not None and self.fraction > self.most:
            raise ConfigError(
                f"{path}.fraction must be <= {path}.most = {self.most}, got {self.fraction}."
            )

    def shortened(self, steps):
        """Also at most ten of PGD, which then still take most of the time."""
        return dataclasses.replace(super().shortened(steps), pgd_steps=min(self.pgd_steps, 10))

    def gradients(self, capacity):
        share, steps = 1.0 if self.most is None else self.most, super().gradients(capacity)
        return None if steps is None else round(steps * (1 + share * self.pgd_steps))

    def examples(self, key, params, x, y, mask, task):
        # The last batch of an epoch may be shorter: its share is counted over what is there.
        most = 1.0 if self.most is None else self.most
        k = max(round(most * self.batch_size), 1)
        chosen = jnp.arange(k) < jnp.round(self.fraction * mask.sum())

        def gradient(inputs):
            return jax.grad(lambda moved: task.loss(params, moved, y[:k], mask[:k]))(inputs)

        moved = linf_pgd(
            gradient,
            x[:k],
            key,
            eps=self.eps,
            step_size=self.step_size,
            num_steps=self.pgd_steps,
            random_start=self.random_start,
        )
        chosen = chosen.reshape(-1, *(1,) * (x.ndim - 1))
        return x.at[:k].set(jnp.where(chosen, moved, x[:k])), y
