"""Minibatch training of one client, shared by the components that differ in what they train on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, COUNT, ConfigError, component, numeric, static
from fedjax_sec.ops.permutation import permute

_EPOCH = 1 << 16  # numbers of an epoch's steps, for randomness that padding does not change


def _within(vector, radius):
    """The vector, scaled down to the L2 norm `radius` where it is longer."""
    norm = jnp.linalg.norm(vector)
    return vector * jnp.where(norm > radius, radius / jnp.maximum(norm, radius), 1.0)


@dataclasses.dataclass(frozen=True)
class LocalSgd:
    """Fields and training loop of `sgd`; `examples` may replace a batch before each step."""

    optimizer: Any = component(
        "optimizer",
        {"name": "sgd", "learning_rate": 0.1},
        "An optimizer of optax, by its name (`fedjax-sec show optimizer`).",
    )
    batch_size: int = static(32, "Examples in a local batch, B.", low=1, high=COUNT)
    steps: int | None = static(None, "Local steps in a round.", low=1, high=2**29)
    epochs: int | None = static(
        None, "Local passes over the client's data in a round.", low=1, high=2**14 - 1
    )
    l2: float = numeric(
        0.0, "Weight of the L2 regularisation, as PyTorch's weight decay.", low=0, high=1e6
    )
    keep_optimizer_state: bool = static(
        False, "Keep each client's optimizer state (momentum, moments) from round to round."
    )
    max_norm: float | None = numeric(
        None,
        "M: after each step the update is scaled back to this L2 norm (null: never).",
        above=0,
        unbounded=ANY_SCALE,
    )
    clip_gradient: float | None = numeric(
        None,
        "Largest L2 norm of a batch's gradient, without the L2 term (null: any).",
        above=0,
        unbounded=ANY_SCALE,
    )
    sampling: str = static(
        "epoch",
        "Batches: `epoch` without replacement in each epoch, `uniform` drawn independently.",
        choices=("epoch", "uniform"),
    )

    @property
    def keeps_state(self) -> bool:
        return self.keep_optimizer_state

    def check(self, path: str, setting) -> None:
        if (self.steps is None) == (self.epochs is None):
            both = f"set {path}.steps or {path}.epochs to null"
            remedy = f"such as {path}.steps=1" if self.steps is None else both
            raise ConfigError(
                f"{path}: give exactly one of 'steps' and 'epochs', "
                f"got steps={self.steps}, epochs={self.epochs}; {remedy}."
            )
        if setting.capacity is not None and self.batch_size > setting.capacity:
            raise ConfigError(
                f"{path}.batch_size must be <= {setting.capacity}, the examples of the largest "
                f"client, got {self.batch_size}."
            )

        batches = -(-(setting.capacity or 0) // self.batch_size)
        if self.epochs is not None and batches > _EPOCH:
            raise ConfigError(
                f"{path}.batch_size must be >= {-(-setting.capacity // _EPOCH)} with epochs, which "
                f"have at most {_EPOCH} batches, got {self.batch_size}."
            )

    def shortened(self, steps: int):
        """The same work for at most so many local steps, to measure how fast a step is."""
        return dataclasses.replace(self, steps=min(self.steps or steps, steps), epochs=None)

    def examples(self, key, params, x, y, mask, task):
        """What a step at `params` trains on instead of the batch (x, y): here the batch itself."""
        return x, y

    def init(self, dim: int):
        return self.optimizer.transformation().init(jnp.zeros(dim))

    def apply(self, key, params, state, local, task):
        optimizer = self.optimizer.transformation()
        opt_state = state if self.keep_optimizer_state else self.init(params.shape[0])
        batches = jnp.maximum(-(-local.count // self.batch_size), 1)  # in one epoch
        round_key = jax.random.fold_in(key, local.round)
        # With epochs a client takes as many steps as it has batches: one after another, small
        # clients cost less; side by side, they wait for the largest.
        steps = self.steps or self.epochs * batches

        def batch(step, number):
            if self.epochs is None:
                epoch, place = jnp.divmod(local.round * self.steps + step, batches)
            else:
                epoch, place = local.round * self.epochs + step // batches, step % batches
            if self.sampling == "uniform":
                draw = jax.random.fold_in(round_key, 2 * number)
                position = jax.random.randint(
                    draw, (self.batch_size,), 0, jnp.maximum(local.count, 1)
                )
                some = (local.count > 0) & (place < batches)
                return position, jnp.broadcast_to(some, (self.batch_size,))
            slot = place * self.batch_size + jnp.arange(self.batch_size)
            position = permute(key, slot, local.count, number=epoch)
            return position, slot < local.count

        def train_step(step, params, delta, opt_state):
            # Of the step's randomness: two numbers for batch and dropout, one for `examples`.
            number, own = step, 2 * steps + step
            if self.epochs is not None:
                number = step // batches * _EPOCH + step % batches
                own = (1 << 30) + number
            position, mask = batch(step, number)
            x, y = local.fetch(position)
            own_key = jax.random.fold_in(round_key, own)
            x, y = self.examples(own_key, params, x, y, mask, task)
            loss, gradient = jax.value_and_grad(task.loss)(
                params, x, y, mask, train=True, key=jax.random.fold_in(round_key, 2 * number + 1)
            )
            if self.clip_gradient is not None:
                gradient = _within(gradient, self.clip_gradient)
            decayed = params
            if task.statistics is not None:
                decayed = jnp.where(task.statistics, 0.0, params)
            gradient = gradient + self.l2 * decayed
            change, new_state = optimizer.update(gradient, opt_state, params)
            if task.observe is not None:  # its forward pass is the gradient's, which XLA merges
                change = change + (task.observe(params, x, mask) - params)
            active = jnp.any(mask)  # not for a client without examples
            moved = delta + change
            if self.max_norm is not None:
                moved = _within(moved, self.max_norm)
            delta = jnp.where(active, moved, delta)
            new_state = jax.tree.map(lambda a, b: jnp.where(active, a, b), new_state, opt_state)
            return delta, new_state, jnp.where(active, loss, 0.0), active

        # The first step is taken outside the loop: its weights are the server's, the same for all
        # clients, so under vmap its forward pass is one matrix product over all clients' batches.
        delta, opt_state, loss, active = train_step(0, params, jnp.zeros_like(params), opt_state)

        def body(step, carry):
            delta, opt_state, total, count = carry
            delta, opt_state, loss, active = train_step(step, params + delta, delta, opt_state)
            return delta, opt_state, total + loss, count + active

        result = delta, opt_state, loss, active.astype(jnp.float32)
        if self.steps != 1:
            result = jax.lax.fori_loop(1, steps, body, result)
        delta, opt_state, total, count = result
        state = opt_state if self.keep_optimizer_state else state
        return delta, state, {"train_loss": total / jnp.maximum(count, 1.0)}
