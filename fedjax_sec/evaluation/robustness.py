"""Robust accuracy: of a model whose inputs somebody moves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fedjax_sec.core import ConfigError
from fedjax_sec.evaluation.batches import in_batches


def robust_mask(
    attack: Any,
    key: PRNGKeyArray,
    outputs: Callable,
    right: Callable,
    x: Float[Array, " T *shape"],
    y: Int[Array, " T"],
    batch_size: int,
    surrogate: Callable | None = None,
) -> Bool[Array, " T"]:
    """Whether each example is still read as its class after the attack has moved it.

    `x` decoded; `outputs(x [B, ...]) -> [B, C]`, and so `surrogate`; `right(outputs, y)` is the
    task's. Batches of `batch_size`
    are attacked one after another, each with its own randomness.
    """

    def one(x, y, number):
        batch_key = jax.random.fold_in(key, number[0])
        moved = attack.apply(batch_key, outputs, x, y, surrogate)
        return right(outputs(moved), y)

    return in_batches(one, batch_size, x, y, jnp.arange(y.shape[0]))


def labels(attacks: Sequence) -> list[str]:
    """The name of each attack in metrics: its component's, numbered from the second of a kind on.

    >>> from fedjax_sec.core import registry
    >>> labels([registry.evasions.build(name) for name in ("pgd", "fgsm", "pgd")])
    ['pgd', 'fgsm', 'pgd_2']
    """
    names: list[str] = []
    for attack in attacks:
        name = attack.registered_name
        same = sum(one.registered_name == name for one in attacks[: len(names)])
        names.append(f"{name}_{same + 1}" if same else name)
    return names


def surrogates_of(attacks: Sequence, path: str) -> dict[str, str]:
    """label -> folder of the surrogate that an attack needs; `ConfigError` where none is named."""
    folders = {}
    for label, attack in zip(labels(attacks), attacks, strict=True):
        if "surrogate" not in attack.needs:
            continue
        if not attack.surrogate:
            raise ConfigError(
                f"{path}: {attack.registered_name!r} needs 'surrogate', the folder of a finished "
                f"run that kept its parameters."
            )
        folders[label] = attack.surrogate
    return folders
