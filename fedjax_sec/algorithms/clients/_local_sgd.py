"""Minibatch training of one client, shared by the components that differ in what they train on."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    ANY_SCALE,
    COUNT,
    NO_HOOKS,
    Client,
    ConfigError,
    Trained,
    component,
    numeric,
    static,
)
from fedjax_sec.ops.permutation import permute

_EPOCH = 1 << 16  # numbers of an epoch's steps, for randomness that padding does not change
_SEND = (1 << 31) - 1  # of what is done once behind the steps; its draws are one level deeper
_AUGMENT = 1 << 31  # from here on numbers are those of augmentations; all others are smaller
_MANY = 10  # local steps, of which the first alone is not worth compiling: a choice


def _within(vector, radius):
    """The vector, scaled down to the L2 norm `radius` where it is longer."""
    norm = jnp.linalg.norm(vector)
    return vector * jnp.where(norm > radius, radius / jnp.maximum(norm, radius), 1.0)


@dataclasses.dataclass(frozen=True)
class LocalSgd(Client):
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
        "M: after each step the update, without running statistics, is scaled back to this L2 "
        "norm (null: never).",
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
    drop_last: bool = static(
        False, "Leave out an epoch's last batch where it would be smaller than the others."
    )
    augmentation: Any = component(
        "augmentation",
        None,
        "Random changes of each batch's inputs, one or a list; evaluation never sees them.",
        many=True,
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

    def gradients(self, capacity):
        if self.steps is not None:
            return self.steps * self.batch_size
        return None if capacity is None else self.epochs * capacity

    def examples(self, key, params, x, y, mask, task):
        """The batch that a step at `params` trains on in place of (x, y): here the batch itself."""
        return x, y

    def _batches(self, data):
        """The batches of an epoch, at least one."""
        whole = data.count // self.batch_size
        return jnp.maximum(whole if self.drop_last else -(-data.count // self.batch_size), 1)

    def drawn(self, key, data, step):
        batches = self._batches(data)
        if self.epochs is None:
            epoch, place = jnp.divmod(data.round * self.steps + step, batches)
        else:
            epoch, place = data.round * self.epochs + step // batches, step % batches
        if self.sampling == "uniform":
            number = step if self.epochs is None else step // batches * _EPOCH + step % batches
            draw = jax.random.fold_in(jax.random.fold_in(key, data.round), 2 * number)
            position = jax.random.randint(draw, (self.batch_size,), 0, jnp.maximum(data.count, 1))
            some = (data.count > 0) & (place < batches)
            return position, jnp.broadcast_to(some, (self.batch_size,))
        used = data.count // self.batch_size * self.batch_size if self.drop_last else data.count
        slot = place * self.batch_size + jnp.arange(self.batch_size)
        return permute(key, slot, data.count, number=epoch), slot < used

    def gradient(self, key, params, x, y, mask, task, dropout_key):
        """A batch's loss, its gradient [D], and the statistics [S] as the step moves them."""
        if not _size(task.space.observed):
            loss = functools.partial(task.loss, train=True, key=dropout_key)
            return *jax.value_and_grad(loss)(params, x, y, mask), None
        loss = functools.partial(task.loss_and_observed, key=dropout_key)
        (value, seen), slope = jax.value_and_grad(loss, has_aux=True)(params, x, y, mask)
        return value, slope, seen

    def init(self, dim: int):
        return self.optimizer.transformation().init(jnp.zeros(dim))

    def apply(self, key, params, state, data, task, hooks=NO_HOOKS):
        optimizer, space = self.optimizer.transformation(), task.space
        opt_state = state if self.keep_optimizer_state else self.init(params.shape[0])
        batches = self._batches(data)
        round_key = jax.random.fold_in(key, data.round)
        # With epochs a client takes as many steps as it has batches: one after another, small
        # clients cost less; side by side, they wait for the largest.
        steps = self.steps or self.epochs * batches

        def train_step(step, params, carry):
            delta, opt_state, memory, summed = carry
            # Of the step's randomness: two numbers for batch and dropout, one for `examples`.
            number, example_number = step, 2 * steps + step
            if self.epochs is not None:
                number = step // batches * _EPOCH + step % batches
                example_number = (1 << 30) + number
            position, mask = self.drawn(key, data, step)
            x, y = data.fetch(position)
            if self.augmentation:
                draw = jnp.asarray(number).astype(jnp.uint32) + jnp.uint32(_AUGMENT)
                augment_key = jax.random.fold_in(round_key, draw)
            for i, augmentation in enumerate(self.augmentation):
                x = augmentation.apply(jax.random.fold_in(augment_key, i), x, task.inputs)
            example_key = jax.random.fold_in(round_key, example_number)
            x, y = self.examples(example_key, params, x, y, mask, task)
            dropout_key = jax.random.fold_in(round_key, 2 * number + 1)
            noise_key = jax.random.fold_in(example_key, 2)
            loss, gradient, seen = self.gradient(noise_key, params, x, y, mask, task, dropout_key)
            if hooks.mean_gradient:
                summed = summed + jnp.where(jnp.any(mask), gradient[space.trained], 0.0)
            if self.clip_gradient is not None:
                gradient = _within(gradient, self.clip_gradient)
            decayed = params
            if seen is not None:  # statistics do not decay
                decayed = params.at[space.observed].set(0.0)
            gradient = gradient + self.l2 * decayed
            if hooks.correct is not None:
                corrected = hooks.correct(gradient[space.trained], delta[space.trained])
                gradient = _put(gradient, space.trained, corrected)
            change, new_state = optimizer.update(gradient, opt_state, params)
            if seen is not None:
                moved_by = change[space.observed] + (seen - params[space.observed])
                change = change.at[space.observed].set(moved_by)
            active = jnp.any(mask)  # not for a client without examples
            moved = delta + change
            if hooks.after_step is not None:
                trained, memory = hooks.after_step(
                    jax.random.fold_in(example_key, 1),
                    moved[space.trained],
                    gradient[space.trained],
                    memory,
                )
                moved = _put(moved, space.trained, trained)
            if self.max_norm is not None:
                short = _within(moved[space.trained], self.max_norm)
                moved = _put(moved, space.trained, short)
            delta = jnp.where(active, moved, delta)
            new_state = jax.tree.map(lambda a, b: jnp.where(active, a, b), new_state, opt_state)
            return (delta, new_state, memory, summed), jnp.where(active, loss, 0.0), active

        summed = jnp.zeros(_size(space.trained)) if hooks.mean_gradient else ()
        carry = jnp.zeros_like(params), opt_state, hooks.memory, summed

        def body(step, looped):
            carry, total, count = looped
            carry, loss, active = train_step(step, params + carry[0], carry)
            return carry, total + loss, count + active

        result, begin = (carry, jnp.zeros(()), jnp.zeros(())), 0
        few = self.steps is not None and self.steps < _MANY
        if self.steps == 1 or (few and task.first_step_apart):
            carry, loss, active = train_step(0, params, carry)
            result, begin = (carry, loss, active.astype(jnp.float32)), 1
        if self.steps != 1:
            result = jax.lax.fori_loop(begin, steps, body, result)
        (delta, opt_state, _, summed), total, count = result
        if hooks.send is not None:
            send_key = jax.random.fold_in(jax.random.fold_in(round_key, _SEND), 0)
            sent = _put(delta, space.trained, hooks.send(send_key, delta[space.trained]))
            delta = jnp.where(count > 0, sent, delta)
        divisor = jnp.maximum(count, 1.0)
        return Trained(
            delta,
            opt_state if self.keep_optimizer_state else state,
            count,
            summed / divisor if hooks.mean_gradient else None,
            {"train_loss": total / divisor},
        )


def _size(part: slice) -> int:
    return part.stop - part.start


def _put(vector, part: slice, values):
    """The vector [D] with a part replaced; the values themselves where the part is all of it."""
    return values if _size(part) == vector.shape[0] else vector.at[part].set(values)
