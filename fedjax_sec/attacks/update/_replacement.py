"""By what updates are multiplied so that they outweigh the honest ones in the mean."""

import jax.numpy as jnp

from fedjax_sec.core import ConfigError


def check_factor(path, attack) -> None:
    """Raises `ConfigError` when both a factor and a way to compute it are given."""
    if attack.factor is not None and attack.accounts_for != "clients":
        raise ConfigError(
            f"{path}.accounts_for {attack.accounts_for!r} computes the factor, but factor = "
            f"{attack.factor} is given; set factor to null, or accounts_for to clients."
        )


def boosted(attack, updates, view):
    """The updates [K, D] times the attack's factor."""
    if attack.accounts_for == "clients":
        factor = updates.shape[0] if attack.factor is None else attack.factor
        return factor * updates
    weights = jnp.ones(updates.shape[0]) if view.weights is None else view.weights
    rate = 1.0 if view.server_rate is None else view.server_rate
    divisor = rate * jnp.sum(jnp.where(view.malicious, weights, 0.0))
    factor = weights.sum() / jnp.where(divisor > 0, divisor, 1.0)
    return factor.astype(updates.dtype) * updates
