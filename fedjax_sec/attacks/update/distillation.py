"""Distillation attack on Krum: a student that only looks robust (Zizzo et al. 2020)."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import ConfigError, UpdateAttack, component, numeric, registry, static
from fedjax_sec.ops.layers import layer_mask, layer_sizes


@registry.attacks.register("distillation")
class Distillation(UpdateAttack):
    r"""Malicious clients train by defensive distillation instead of adversarially.

    From the global parameters w each malicious client trains a teacher on its data with softmax at
    temperature T, relabels examples with the teacher's soft labels p, and trains a student, again
    from w, at the same temperature:

    .. math:: \min_{w'} -\frac{1}{B} \sum_i \log \mathrm{softmax}(z(w'; x_i) / T)_{y_i},
              \qquad p_i = \mathrm{softmax}(z(w'; x_i) / T)

    .. math:: \min_v -\frac{1}{B} \sum_i \sum_c p_{ic} \log \mathrm{softmax}(z(v; x_i) / T)_c

    It sends v - w. `updates [K, D] -> [K, D]`. The student trains only the `layer` with the fewest
    weights, so that the update stays close enough to honest ones for Krum to choose it. Trained at
    a high temperature and used at temperature 1, a network's softmax saturates: gradients vanish
    and PGD finds nothing, though the decisions are easily changed.

    Raises: `ConfigError` for a `layer` that the model does not have, and outside an experiment,
    since it needs a model and data.

    Source: Zizzo et al. 2020 (FAT), Section 3.2, T = 100. The text gives no numbers of steps, no
    batch, no optimizer of the adversary, nor whether its clients act alike: here every malicious
    client trains for itself (`alike` makes one train for all of them), on batches drawn with
    replacement from the data that the adversary sees, with Adam at the rate 0.001. All of these are
    choices, and fields.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.attacks.build({"name": "distillation", "teacher_steps": 5}).temperature
        100.0
    """

    needs = frozenset({"task"})
    temperature: float = numeric(100.0, "T, of teacher and student.", above=0, high=1e6)
    teacher_steps: int = static(10, "Steps of the teacher in a round.", low=1, high=10**6)
    student_steps: int = static(10, "Steps of the student in a round.", low=1, high=10**6)
    batch_size: int = static(64, "Examples in a batch.", low=1, high=10**6)
    layer: str | None = static(
        None,
        "What the student trains: a layer's name, `all`, or null: the one with the fewest weights.",
    )
    alike: bool = static(False, "All malicious clients send one update, in Krum's eyes a crowd.")
    optimizer: Any = component(
        "optimizer", {"name": "adam", "learning_rate": 0.001}, "Of teacher and student."
    )

    def check(self, path, setting):
        known = setting.layers
        if known is not None and self.layer not in (None, "all", *known):
            raise ConfigError(
                f"{path}.layer: the model has no layer {self.layer!r}; known: all, "
                f"{', '.join(known)}."
            )

    def apply(self, key, updates, state, view):
        if view.task is None or view.sample is None:
            raise ConfigError("attack: distillation needs a model and data; run an experiment.")
        task, start = view.task, view.params
        tree = task.unravel(start)
        sizes = layer_sizes(tree)
        layer = self.layer or min(sizes, key=sizes.get)
        every = layer_mask(tree)
        trained = every if layer == "all" else layer_mask(tree, layer)

        def log_probs(params, x, train_key):
            logits = task.outputs(params, x, train=True, key=train_key)
            return jax.nn.log_softmax(logits / self.temperature)

        def descend(own_key, loss, steps, mask):
            """`steps` steps from the global parameters along the gradient's entries in `mask`."""
            optimizer = self.optimizer.transformation()

            def step(number, carry):
                params, held = carry
                draw, dropout = jax.random.split(jax.random.fold_in(own_key, number))
                x, y = view.sample(draw, self.batch_size)
                slope = jax.grad(loss)(params, x, y, dropout)
                change, held = optimizer.update(jnp.where(mask, slope, 0.0), held, params)
                return params + jnp.where(mask, change, 0.0), held

            return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0]

        def craft(row_key):
            first, second = jax.random.split(row_key)

            def hard(params, x, y, dropout):
                chosen = jax.nn.one_hot(y, task.num_classes)
                return -jnp.sum(chosen * log_probs(params, x, dropout)) / y.shape[0]

            teacher = descend(first, hard, self.teacher_steps, every)

            def soft(params, x, y, dropout):
                labels = jax.nn.softmax(task.outputs(teacher, x) / self.temperature)
                return -jnp.sum(labels * log_probs(params, x, dropout)) / y.shape[0]

            return descend(second, soft, self.student_steps, trained) - start

        if self.alike:
            one = craft(key).astype(updates.dtype)
            return jnp.where(view.malicious[:, None], one, 0.0), state, {}
        # One client after another, and no work for honest ones.
        numbers = jnp.arange(updates.shape[0])
        crafted = jax.lax.map(
            lambda row: jax.lax.cond(
                view.malicious[row],
                lambda: craft(jax.random.fold_in(key, row)).astype(updates.dtype),
                lambda: jnp.zeros(task.dim, updates.dtype),
            ),
            numbers,
        )
        return crafted, state, {}
