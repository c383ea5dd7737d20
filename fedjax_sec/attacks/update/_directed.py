"""What Fang et al.'s attacks share: whose updates are known, and where the server is heading."""

import jax.numpy as jnp


def sees_all(view):
    """Whether the adversary has full knowledge: some honest client's update is visible. []"""
    return jnp.any(view.visible & ~view.malicious)


def stand_ins(view):
    """[K]: the rows that the adversary takes for honest ones.

    With full knowledge the honest rows themselves; with partial knowledge what its own clients
    would have sent without an attack.
    """
    honest = view.visible & ~view.malicious
    return jnp.where(sees_all(view), honest, view.malicious)


def direction(updates, view):
    """[D]: the sign of the mean of all visible updates before the attack, +1 where it is zero.

    The attacks push the global model against it.
    """
    total = jnp.sum(jnp.where(view.visible[:, None], updates, 0.0), axis=0)
    return jnp.where(total < 0, -1.0, 1.0).astype(updates.dtype)
