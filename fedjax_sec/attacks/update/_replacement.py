"""Updates multiplied so that they outweigh the honest ones in the mean."""

import dataclasses

import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, ConfigError, UpdateAttack, numeric, static


def replacement_factor(view, weights=None):
    """[]: what the malicious clients' mean update is multiplied by, to be what the model moves by.

    With w the clients' `weights` (None: as the adversary knows them), M the malicious ones and eta
    the server's rate it is sum_i w_i / (eta sum_M w_i); for m of K equal ones K / (eta m).

    >>> import types
    >>> view = types.SimpleNamespace(
    ...     malicious=jnp.array([True, False, False]),
    ...     weights=jnp.array([2.0, 3.0, 5.0]),
    ...     server_rate=0.5,
    ... )
    >>> replacement_factor(view).item()
    10.0
    """
    if weights is None:
        weights = jnp.ones(view.malicious.shape) if view.weights is None else view.weights
    rate = 1.0 if view.server_rate is None else view.server_rate
    divisor = rate * jnp.sum(jnp.where(view.malicious, weights, 0.0))
    return weights.sum() / jnp.where(divisor > 0, divisor, 1.0)


@dataclasses.dataclass(frozen=True)
class Replacement(UpdateAttack):
    """An attack that multiplies updates by a factor, given or computed."""

    factor: float | None = numeric(
        None,
        "lambda, what updates are multiplied by (null: K, the clients of the round).",
        above=0,
        unbounded=ANY_SCALE,
    )
    accounts_for: str = static(
        "clients",
        "factor null: K, the `clients` of the round, or what their `weights_and_rate` make it.",
        choices=("clients", "weights_and_rate"),
    )

    @property
    def needs(self):
        return frozenset({"rate"} if self.accounts_for == "weights_and_rate" else ())

    @property
    def separable(self):
        return self.accounts_for == "clients"

    def check_factor(self, path: str) -> None:
        """Raises `ConfigError` when both a factor and a way to compute it are given."""
        if self.factor is not None and self.accounts_for != "clients":
            raise ConfigError(
                f"{path}.accounts_for {self.accounts_for!r} computes the factor, but factor = "
                f"{self.factor} is given; set factor to null, or accounts_for to clients."
            )

    def apply(self, key, updates, state, view):
        if self.accounts_for == "clients":
            factor = updates.shape[0] if self.factor is None else self.factor
            return factor * updates, state, {}
        return replacement_factor(view).astype(updates.dtype) * updates, state, {}
