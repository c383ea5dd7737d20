"""Shared parts of gradient attacks on inputs: losses, restarts, targets, and the worst kept."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, Evasion, numeric, static
from fedjax_sec.ops.evasion import LOSSES, margin, objective


def worst_of(count: int, find, logits, x, y):
    """Of x and `find(0)`, ..., `find(count - 1)`, each example with the smallest margin."""

    def attempt(number, carry):
        kept, lowest = carry
        result = find(number)
        margins = margin(logits(result), y)
        better = (margins < lowest).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(better, result, kept), jnp.minimum(margins, lowest)

    return jax.lax.fori_loop(0, count, attempt, (x, margin(logits(x), y)))[0]


@dataclasses.dataclass(frozen=True)
class Attempts(Evasion):
    """Several searches from one input; the found input with the smallest margin is kept.

    The input itself is the first candidate, so no attack helps the model.
    `search(key, value, x)`, in the components, gives inputs in the ball around `x` for which
    `value(inputs) -> [B]` is large.
    """

    inputs = frozenset({"pixels"})
    eps: float = numeric(
        0.3, "Radius of the L-infinity ball, pixels in [0, 1].", low=0, high=1, pixels=True
    )
    loss: str = static("cross_entropy", "What is ascended.", choices=LOSSES)
    logit_scale: float = numeric(
        1.0,
        "What logits are multiplied by before the loss (1/T for a model distilled at T).",
        above=0,
        high=1e6,
    )
    targets: int = static(
        0,
        "Wrong classes aimed at one after another, the likeliest first (0: untargeted).",
        low=0,
        high=COUNT,
    )
    restarts: int = static(1, "Searches from an input, for each target.", low=1, high=10**6)

    def check(self, path: str, setting) -> None:
        classes = setting.num_classes
        if classes is None:
            return
        if self.targets >= classes:
            raise ConfigError(
                f"{path}.targets must be <= {classes - 1}, the number of wrong classes, "
                f"got {self.targets}."
            )
        needed = 4 if self.targets else 3
        if self.loss == "dlr" and classes < needed:
            raise ConfigError(
                f"{path}.loss: 'dlr' needs {needed} classes, the data has {classes}; choose "
                f"another of {', '.join(LOSSES)}."
            )

    def apply(self, key, logits, x, y, surrogate=None):
        clean = logits(x)
        wrong = jnp.where(jax.nn.one_hot(y, clean.shape[1], dtype=bool), -jnp.inf, clean)
        likeliest = jnp.argsort(-wrong, axis=1)

        def find(number):
            target = None
            if self.targets:
                target = jnp.take(likeliest, number % self.targets, axis=1)

            def value(inputs):
                return objective(self.loss, self.logit_scale * logits(inputs), y, target)

            return self.search(jax.random.fold_in(key, number), value, x)

        return worst_of(self.restarts * max(self.targets, 1), find, logits, x, y)
