"""A rule that reads the server's own loss: the updates that lower it most are averaged."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, numeric, registry, static


@registry.defenses.register("zeno_proof")
class ZenoProof:
    """The mean of all but the `removed` updates of the lowest score.

    The score is `f(w) - f(w + u) - rho |u|^2` with the loss f on the server's examples.
    """

    stage = "aggregate"
    needs = frozenset({"root"})
    removed: int = static(1, "Updates that are left out.", low=0, high=COUNT)
    rho: float = numeric(5e-4, "Weight of an update's squared length.", low=0, high=1e6)

    def check(self, path, setting):
        if self.removed >= setting.num_clients:
            raise ConfigError(
                f"{path}.removed must be < {setting.num_clients}, got {self.removed}."
            )

    def apply(self, key, updates, state, view):
        safe = jnp.where(view.valid[:, None], updates, 0.0)
        before = view.root.loss(view.params)
        fall = jax.vmap(lambda update: before - view.root.loss(view.params + update))(safe)
        score = jnp.where(view.valid, fall - self.rho * jnp.sum(safe**2, axis=1), -jnp.inf)
        place = jnp.argsort(jnp.argsort(-score))
        kept = ((place < updates.shape[0] - self.removed) & view.valid).astype(updates.dtype)
        return kept @ safe / jnp.maximum(kept.sum(), 1), state, {"kept": kept}
