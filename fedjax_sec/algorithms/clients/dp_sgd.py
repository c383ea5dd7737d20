"""Differentially private local training (Abadi, Chu, Goodfellow and others, CCS 2016)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.algorithms.clients._local_sgd import LocalSgd
from fedjax_sec.core import ANY_SCALE, COUNT, ConfigError, every_value, numeric, registry, static
from fedjax_sec.ops.accounting import gaussian_epsilon, require_accountant


@registry.clients.register("dp_sgd")
class DpSgd(LocalSgd):
    r"""`sgd` that clips each example's gradient and adds noise to their sum.

    A step on the batch B of at most L = `batch_size` examples takes, in place of the gradient,

    .. math:: \frac{1}{L} \left( \sum_{e \in B} g_e \min\left(1, \frac{C}{\|g_e\|_2}\right)
              + \sigma C \, \mathcal{N}(0, I) \right)

    and everything else is as in `sgd`: momentum, the L2 term and `clip_gradient` act on it and cost
    no privacy. `at_once` examples are side by side; their gradients [at_once, D] lie in memory.

    The run's summary holds `privacy`: epsilon for `delta`, the largest of all clients', against
    whoever sees every message. Neighbouring data sets differ in one example, which is there or
    counts as nothing. An epoch uses an example once, so a client's run is one Gaussian mechanism of
    noise :math:`\sigma` for each pass over its data; no amplification by sampling is claimed, since
    batches are shuffled and not drawn independently. A client that is not in every round has less.

    Raises: `ConfigError` for `sampling: uniform`, which may use an example more than once in a
    pass, for a network that normalises over its batch, which has no gradient of one example, and
    where the package dp_accounting is not installed.

    Source: Abadi et al. 2016 (Deep learning with differential privacy), Algorithm 1; the accountant
    is dp_accounting's Renyi one (Mironov 2017). Its moments accountant assumes independent draws of
    each example; passes are counted here instead (a choice). C = 1 and sigma = 1 are choices.

    Example:
        >>> from fedjax_sec.core import registry
        >>> client = registry.clients.build({"name": "dp_sgd", "steps": 1, "batch_size": 8})
        >>> client.clip, client.noise
        (1.0, 1.0)
    """

    clip: float = numeric(
        1.0, "C, largest L2 norm of one example's gradient.", above=0, unbounded=ANY_SCALE
    )
    noise: float = numeric(1.0, "sigma, deviation of the noise in units of C.", low=0, high=1e6)
    delta: float = static(1e-5, "delta, for which epsilon is reported.", above=0, below=1)
    at_once: int | None = static(
        None, "Examples whose gradients are computed side by side (null: all).", low=1, high=COUNT
    )

    def check(self, path, setting):
        super().check(path, setting)
        require_accountant()
        if self.sampling != "epoch":
            raise ConfigError(
                f"{path}.sampling must be epoch for 'dp_sgd', whose epsilon counts passes over the "
                f"data, got {self.sampling!r}."
            )

    def gradient(self, key, params, x, y, mask, task, dropout_key):
        if task.space.observed.stop > task.space.observed.start:
            raise ConfigError(
                "client: 'dp_sgd' clips each example's gradient, and this network normalises over "
                "its batch; choose group normalisation (norm: group), or another network."
            )

        def of_one(args):
            example, target, counts, number = args
            one_key = jax.random.fold_in(dropout_key, number)
            loss, slope = jax.value_and_grad(task.loss)(
                params, example[None], target[None], jnp.ones(1, bool), train=True, key=one_key
            )
            short = self.clip / jnp.maximum(jnp.linalg.norm(slope), self.clip)
            return jnp.where(counts, loss, 0.0), slope, jnp.where(counts, short, 0.0)

        size = self.at_once or mask.shape[0]
        rows = (x, y, mask, jnp.arange(mask.shape[0]))
        if size >= mask.shape[0]:
            losses, slopes, factors = jax.vmap(of_one)(rows)
            loss, total = losses.sum(), factors @ slopes  # clipped and summed in one product
        else:
            loss, total = _summed(of_one, rows, size, params.shape[0])
        drawn = jax.random.normal(key, total.shape, total.dtype)
        total = total + self.noise * self.clip * drawn
        # An empty step must not move: it is dropped by its mask.
        return loss / jnp.maximum(mask.sum(), 1), total / self.batch_size, None

    def privacy(self, counts, rounds):
        counts = np.asarray(counts)[np.asarray(counts) > 0]
        if self.epochs is not None:
            passes = rounds * self.epochs
        else:
            whole = counts // self.batch_size
            batches = whole if self.drop_last else -(-counts // self.batch_size)
            passes = int(np.ceil(rounds * self.steps / np.maximum(batches, 1)).max())
        noise = min(float(one.noise) for one in every_value(self))
        epsilon = gaussian_epsilon(noise, passes, self.delta)
        return {
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "delta": self.delta,
            "noise": noise,
            "passes": passes,
            "neighbours": "one example is there or counts as nothing",
            "accountant": "dp_accounting, Renyi differential privacy",
        }


def _summed(of_one, rows, size: int, dim: int):
    """(the sum of losses, that of gradients [D]), `size` examples at a time."""
    count = rows[2].shape[0]
    short = -count % size

    def padded(leaf):
        wide = jnp.pad(leaf, [(0, short)] + [(0, 0)] * (leaf.ndim - 1))
        return wide.reshape(-1, size, *leaf.shape[1:])

    def some(carry, part):
        losses, slopes, factors = jax.vmap(of_one)(part)
        return (carry[0] + losses.sum(), carry[1] + factors @ slopes), None

    start = jnp.zeros(()), jnp.zeros(dim)
    return jax.lax.scan(some, start, tuple(padded(leaf) for leaf in rows))[0]
