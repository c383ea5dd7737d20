"""Shared parts of attacks on updates: the known updates, and the server's direction."""

import jax.numpy as jnp

from fedjax_sec.ops.moments import mean_and_std


def sees_all(view):
    """Whether the adversary has full knowledge: some honest client's update is visible. []"""
    return jnp.any(view.honest)


def stand_ins(view):
    """[K]: the rows that the adversary takes for honest ones.

    With full knowledge the honest rows themselves; with partial knowledge what its own clients
    would have sent without an attack.
    """
    return jnp.where(sees_all(view), view.honest, view.corrupted)


def sees_one_row(setting):
    """Whether the adversary never sees more than one update, its own. Knowledge unknown: no."""
    clients, bad = setting.num_clients, setting.num_malicious
    if setting.malicious_per_round is not None:
        bad = setting.malicious_per_round
    if bad is None or setting.knowledge is None:
        return False
    return min(clients, bad) == 1 if setting.knowledge == "corrupted" else clients == 1


def own_update_alone(name, setting):
    """Why an attack on statistics would send the update that it is given, or None."""
    if sees_one_row(setting):
        return (
            f"{name} would send its client's own update, for the adversary sees no other: the "
            f"deviation of one update is 0. Give it 2 malicious clients or more "
            f"(threat.num_malicious), or let it see all (knowledge omniscient)."
        )
    return None


def direction(updates, view):
    """[D]: the sign of the mean of all visible updates before the attack, +1 where it is zero.

    The attacks push the global model against it.
    """
    total = jnp.sum(jnp.where(view.visible[:, None], updates, 0.0), axis=0)
    return jnp.where(total < 0, -1.0, 1.0).astype(updates.dtype)


def beyond(updates, view, sign, chance, b, convention):
    """[K, D]: the Trim attack's values with full knowledge, past the honest extreme.

    `sign [D]` as `direction`, `chance [K, D]` in [0, 1) says where in its interval a value lies.
    """
    sign, known, origin = sign[None], stand_ins(view), view.params[None]
    if convention == "author":
        known, origin = view.visible, jnp.zeros_like(origin)
    values = origin + updates
    low = jnp.min(jnp.where(known[:, None], values, jnp.inf), axis=0, keepdims=True)
    high = jnp.max(jnp.where(known[:, None], values, -jnp.inf), axis=0, keepdims=True)
    base = jnp.where(sign > 0, low, high)
    inwards = jnp.sign(base) == sign  # towards zero is against the direction
    if convention == "author":
        r = 1 + (b - 1) * chance
        crafted = jnp.where(inwards, base / r, base * r)
    else:
        end = jnp.where(inwards, base / b, base * b)
        crafted = base + (end - base) * chance
    return crafted - origin


def away(updates, view, sign, chance, near, far):
    """[K, D]: its values with partial knowledge, standard deviations from the own mean."""
    mean, std = mean_and_std(updates, view.corrupted, 0)
    return mean[None] - sign[None] * (near + (far - near) * chance) * std[None]
