"""Metrics of the global model on every client's own test data."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fedjax_sec.core.types import Metrics


def by_client(right: Mapping[str, Bool[Array, " L"]], positions: Int[Array, "N T"]) -> Metrics:
    r"""Shares of each client's examples, and the mean over clients weighted by their numbers.

    `right[name] [N T]`, flattened, says for each of `positions` (-1: none) whether the model is
    right. `per_client_NAME [N]` is NaN for a client without examples; `local_NAME` is

    .. math:: \frac{\sum_i n_i\, share_i}{\sum_i n_i}

    >>> local = by_client({"accuracy": jnp.array([1, 0, 1, 1], bool)}, jnp.array([[3, 4], [7, -1]]))
    >>> local["per_client_accuracy"].tolist(), round(local["local_accuracy"].item(), 3)
    ([0.5, 1.0], 0.667)
    """
    there = positions >= 0
    counts = there.sum(axis=1).astype(jnp.float32)
    metrics = {}
    for name, held in right.items():
        hits = jnp.where(there, held.reshape(positions.shape), False).sum(axis=1)
        metrics[f"per_client_{name}"] = jnp.where(counts > 0, hits / counts, jnp.nan)
        metrics[f"local_{name}"] = hits.sum() / counts.sum()
    return metrics
