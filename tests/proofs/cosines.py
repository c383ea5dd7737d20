"""A monitor that records every client's cosine with the mean of the honest updates."""

import jax.numpy as jnp

from fedjax_sec.core import Monitor, registry


@registry.monitors.register("cosines")
class Cosines(Monitor):
    """`cosines/client` [K], in every round."""

    def observe(self, key, state, trace, task):
        vectors, honest = trace.sent.vector, trace.present & ~trace.malicious
        mean = honest.astype(vectors.dtype) @ vectors / jnp.maximum(honest.sum(), 1)
        lengths = jnp.linalg.norm(vectors, axis=1) * jnp.linalg.norm(mean)
        return state, {"client": vectors @ mean / jnp.maximum(lengths, 1e-12)}
