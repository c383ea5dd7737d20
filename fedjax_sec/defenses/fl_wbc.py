"""FL-WBC, white blood cells for federated learning (Sun et al., NeurIPS 2021)."""

import math

import jax
import jax.numpy as jnp

from fedjax_sec.core import ConfigError, Hooks, Stage, numeric, registry, static, value_of


@registry.defenses.register("fl_wbc")
class FlWbc(Stage):
    r"""Clients perturb the parameters that their local steps hardly move: a stage of training.

    What an attack did to a parameter stays there where the loss is flat, in the null space of the
    clients' Hessians. Each client looks for it by how its steps change from one to the next, and
    adds noise there. Behind local step i = 2, 3, ... of a round, with :math:`\Delta_i` the change
    of the client's parameters by step i, :math:`\eta` its learning rate and :math:`\Upsilon` drawn
    anew in every step from a Laplace distribution,

    .. math:: w \leftarrow w + \eta \Upsilon \odot M, \qquad
              M = [\, |\Delta_i - \Delta_{i-1}| \le \eta |\Upsilon| \,]

    coordinate by coordinate. Only kernels are perturbed, variables of rank two and more, biases and
    factors of normalisation are not. `[T] -> [T]` after each local step, on what is trained of the
    client's vector, whichever the algorithm and its own corrections; it stands before all other
    stages: `defense: [fl_wbc, mean]`. A server that trains on a root data set is no client and does
    not follow it.

    `convention="paper"`: the noise has the standard deviation s, and :math:`\Delta_{i-1}` holds the
    noise of that step. `author`: s is numpy's `scale`, so the standard deviation is
    :math:`\sqrt 2 s`; gradients are compared instead, :math:`|g_i - g_{i-1}| \le |\Upsilon|`; and
    where the client trains for `epochs`, the first step of each is skipped, not of the round. With
    plain SGD and one epoch the two differ in the scale, and by the noise in :math:`\Delta_{i-1}`.

    Malicious clients do not follow the defence, as in the author code, where theirs is another
    branch; `malicious_follow` lets them.

    Raises: `ConfigError` where the client's optimizer has no learning rate or `client.max_norm`
    projects its steps, and where nothing could happen: with one local step in a round, or strength
    0.

    Source: Sun et al. 2021 (FL-WBC: enhancing robustness against model poisoning attacks in
    federated learning from a client perspective). Of its text only the abstract was at hand: that
    s is a standard deviation is from the README of the author code (jeremy313/FL-WBC), the
    criterion from FedML's restatement of the algorithm (`core/security/defense/wbc_defense.py`).
    Signs, kernels, the default of s and `author`: the author code (`src/update.py`,
    `update_weights`; `src/options.py`), which tells kernels by the name `weight`, that factors of a
    batch norm bear in PyTorch too: they are perturbed there. Its example for CIFAR10 takes s = 0.4.

    Example:
        >>> from fedjax_sec.core import registry
        >>> stage = registry.defenses.build({"name": "fl_wbc", "strength": 0.4})
        >>> stage.stage, stage.strength
        ('client', 0.4)
    """

    stage = "client"
    strength: float = numeric(1e-4, "s, the strength of the noise.", low=0, high=1e6)
    malicious_follow: bool = static(False, "Whether malicious clients perturb as well.")
    convention: str = static(
        "paper",
        "`paper`: s is a standard deviation, parameters are compared. `author`: s is a scale, "
        "gradients are compared.",
        choices=("paper", "author"),
    )

    def check(self, path, setting):
        if setting.client is not None and _rate_of(setting.client) is None:
            raise ConfigError(
                f"{path}: fl_wbc adds noise in units of the client's learning rate; give "
                f"client.optimizer a number or a schedule over rounds as learning_rate."
            )
        if setting.client is not None and value_of(setting.client, "max_norm") is not None:
            raise ConfigError(
                f"{path}: fl_wbc compares each local step with the last, and client.max_norm = "
                f"{value_of(setting.client, 'max_norm')} projects between them; leave one out."
            )

    def idle(self, setting):
        if self.strength == 0:
            return "fl_wbc would do nothing: its strength is 0; raise it, or leave fl_wbc out."
        steps = _most_steps(setting, whole_round=self.convention == "paper")
        if steps == 1:
            unit = "round" if self.convention == "paper" else "epoch"
            return (
                f"fl_wbc would do nothing: it never acts on the first local step of "
                f"{'a' if unit == 'round' else 'an'} {unit}, and there is no other; raise the "
                f"local steps, or leave fl_wbc out."
            )
        return None

    def hooks(self, view):
        rate, kernels = _rate_of(view.client), _kernels(view.task.space)
        compares_gradients = self.convention == "author"
        scale = self.strength if compares_gradients else self.strength / math.sqrt(2.0)
        epoch = None  # steps in which gradients are remembered; None: all of the round's
        if compares_gradients and value_of(view.client, "epochs") is not None:
            epoch = jnp.maximum(-(-view.data.count // view.client.batch_size), 1)

        def after_step(key, delta, gradient, memory):
            step, before, last = memory
            noise = scale * jax.random.laplace(key, delta.shape, delta.dtype)
            if compares_gradients:
                still = jnp.abs(gradient - last) <= jnp.abs(noise)
            else:
                still = jnp.abs(delta - before - last) <= rate * jnp.abs(noise)
            first = step == 0 if epoch is None else step % epoch == 0
            moved = jnp.where(still & kernels & ~first, delta + rate * noise, delta)
            return moved, (step + 1, moved, gradient if compares_gradients else moved - before)

        nothing = jnp.zeros(kernels.shape)
        return Hooks(after_step=after_step, memory=(jnp.int32(0), nothing, nothing))


def _rate_of(client):
    """The learning rate of a client's optimizer; None where it has none that is a number."""
    return getattr(value_of(client, "optimizer"), "learning_rate", None)


def _most_steps(setting, whole_round: bool) -> int | None:
    """The most local steps of a client in a round, or in an epoch; None where they are unknown."""
    steps, epochs, size = (
        None if setting.client is None else value_of(setting.client, name)
        for name in ("steps", "epochs", "batch_size")
    )
    if steps is not None:
        return steps
    if None in (epochs, size, setting.capacity):
        return None
    batches = -(-setting.capacity // size)
    return epochs * batches if whole_round else batches


def _kernels(space):
    """Which of the trained entries [T] belong to a variable of rank two or more."""
    start = space.trained.start
    places = sorted((place.start, name) for name, place in space.slices.items())
    parts = [
        jnp.full(space.slices[name].stop - at, len(space.shapes[name]) > 1)
        for at, name in places
        if at >= start
    ]
    return jnp.concatenate(parts or [jnp.zeros(0, bool)])
