"""Bucketing of updates before an aggregator (Karimireddy et al., ICLR 2022)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, Stage, registry, static


@registry.defenses.register("bucketing")
class Bucketing(Stage):
    r"""Means of `size` updates drawn at random stand for them: a stage before aggregation.

    With a permutation :math:`\pi` of the K clients, drawn anew in every round, row i is

    .. math:: y_i = \frac{1}{|B_i|} \sum_{k \in B_i} u_{\pi(k)}, \qquad
              B_i = \{ s (i - 1) + 1, \dots, \min(s i, K) \}

    `updates [K, D] -> [ceil(K / s), D]`. Clients whose update is not finite are left out of their
    bucket's mean; a bucket without any other is left out whole. A row's weight is the sum of its
    clients'. Later stages work on buckets: their bound is checked against the buckets' number, and
    each client's share of the kept updates is its bucket's. At most f buckets hold one of f
    malicious clients, so f itself need not be changed.

    Raises: `ConfigError` for buckets of more than K clients; later stages, for a number of buckets
    that they cannot work with, and where they add up each client's history.

    Source: Karimireddy, He, Jaggi 2022 (Byzantine-robust learning on heterogeneous datasets via
    bucketing), Algorithm 1. The paper's experiments use s = 2, the default.

    Example:
        >>> import fedjax_sec
        >>> rule = [{"name": "bucketing", "size": 3}, {"name": "mean", "weighted": False}]
        >>> print(fedjax_sec.aggregate([[0.0], [3.0], [6.0]], rule))
        [3.]
    """

    stage = "before"
    size: int = static(2, "s, clients in a bucket.", low=1, high=COUNT)

    def check(self, path, setting):
        if self.size > setting.num_clients:
            raise ConfigError(
                f"{path}.size must be <= {setting.num_clients}, the clients of a round, got "
                f"{self.size}."
            )

    def after(self, setting):
        return setting._replace(num_clients=-(-setting.num_clients // self.size), merged=True)

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        clients = updates.shape[0]
        rows = -(-clients // self.size)
        order = jax.random.permutation(key, clients)
        bucket = jnp.zeros(clients, jnp.int32).at[order].set(jnp.arange(clients) // self.size)
        used = jax.nn.one_hot(bucket, rows, dtype=updates.dtype).T * view.valid[None]
        count = used.sum(axis=1)
        # Divided first: in float16 a sum of huge updates would be infinite.
        share = used / jnp.maximum(count, 1)[:, None]
        merged = jnp.matmul(
            share,
            jnp.where(view.valid[:, None], updates, 0.0),
            precision=jax.lax.Precision.HIGHEST,
        )
        view = view._replace(
            valid=count > 0, weights=used @ view.weights, members=used @ view.members
        )
        return merged, view, state, {}
