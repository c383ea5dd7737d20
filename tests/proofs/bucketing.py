"""Buckets of clients before a rule: a stage that merges rows."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, registry, static


@registry.defenses.register("buckets")
class Buckets:
    """Means of `size` rows drawn at random."""

    stage = "before"
    size: int = static(2, "Clients in a bucket.", low=1, high=COUNT)

    def after(self, setting):
        return setting._replace(num_clients=-(-setting.num_clients // self.size), merged=True)

    def apply(self, key, updates, state, view):
        clients = updates.shape[0]
        rows = -(-clients // self.size)
        bucket = jax.random.permutation(key, clients) // self.size
        takes = jax.nn.one_hot(bucket, rows, dtype=updates.dtype).T * view.valid[None]
        count = takes.sum(axis=1)
        mean = takes @ jnp.where(view.valid[:, None], updates, 0.0) / jnp.maximum(count, 1)[:, None]
        members = takes @ view.members
        view = view._replace(valid=count > 0, weights=takes @ view.weights, members=members)
        return mean, view, state, {}
