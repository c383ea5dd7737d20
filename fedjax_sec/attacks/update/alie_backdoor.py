"""A Little Is Enough: the backdoor attack (Baruch et al., NeurIPS 2019, Algorithm 4)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_sec.attacks.update._directed import own_update_alone
from fedjax_sec.attacks.update._perturbation import (
    check_statistics,
    check_z_max,
    perturbation_range,
)
from fedjax_sec.core import (
    ANY_RATE,
    ANY_SCALE,
    ConfigError,
    UpdateAttack,
    component,
    numeric,
    registry,
    static,
)


@registry.attacks.register("alie_backdoor")
class AlieBackdoor(UpdateAttack):
    r"""Trains a backdoor from the mean update and clamps it to mu +- z sigma.

    From the parameters P = w + mu the adversary takes `passes` passes over its backdoor examples,
    in batches, by gradient descent on

    .. math:: \alpha\, \ell_{backdoor}(P) + (1 - \alpha)\, \ell_\Delta(P), \qquad
       \ell_\Delta = \sum_j \left(\frac{P_j - (w + \mu)_j}{\max(z \sigma_j, 10^{-5})}\right)^2

    and sends max(mu - z sigma, min(P - w, mu + z sigma)) from every malicious client; mu and sigma
    are over the updates it sees. `updates [K, D] -> [K, D]`.

    The distance's curvature reaches 2e10, far beyond what explicit gradient descent with the
    learning rate 0.1 survives, so that term is minimised in closed form in every step (a proximal
    step, the same objective): a choice. `distance="mean"` divides the sum by D.

    Raises: `ConfigError` as `alie` does; when run outside an experiment, since it needs a model and
    data.

    Source: Baruch et al. 2019, Equations 3 and 4, Algorithm 4, Section 4.2 (z = alpha = 0.2, 5
    passes). Batch 200, learning rate 0.1 and no momentum from the author code (`backdoor.py`),
    where the text is silent. `convention="author"` is that code throughout: cross-entropy + 4
    times the sum over parameter tensors of the mean squared distance (not divided by sigma) +
    weight decay 1e-4, no training when all examples are already misclassified as wished, and a
    result shifted by -2 mu in gradient units (`_attack_grads`).

    Example:
        >>> from fedjax_sec.core import registry
        >>> attack = {"name": "alie_backdoor", "backdoor": "pattern", "z": 0.2}
        >>> registry.attacks.build(attack).backdoor.target
        0
    """

    needs = frozenset({"task"})
    backdoor: Any = component(
        "attack", "pattern", "What to teach, an attack on data.", poisons=False
    )
    z: float | None = numeric(0.2, "Clamp in standard deviations (null: z_max).", low=0, high=1e6)
    alpha: float = numeric(0.2, "Weight of the backdoor loss.", low=0, high=1)
    min_scale: float = numeric(
        1e-5, "Smallest z sigma used as a divisor.", above=0, unbounded=ANY_SCALE
    )
    passes: int = static(5, "Passes over the backdoor examples each round.", low=1, high=10**6)
    batch_size: int = static(
        200, "Examples in a batch of the attacker's training.", low=1, high=10**6
    )
    learning_rate: float = numeric(
        0.1, "Learning rate of the attacker's training.", above=0, unbounded=ANY_RATE
    )
    distance: str = static(
        "sum", "`sum` over parameters as in Equation 4, or their `mean`.", choices=("sum", "mean")
    )
    convention: str = static(
        "paper", "`author`: as the released code does it.", choices=("paper", "author")
    )
    author_weight: float = numeric(4.0, "author: weight of the squared distance.", low=0, high=1e6)
    author_decay: float = numeric(
        1e-4, "author: weight decay of the attacker's training.", low=0, high=1e6
    )
    z_formula: str = static("text", "z_max, as in `alie`.", choices=("text", "neurips"))
    ddof: int = static(0, "Divisor of the variance is (count - ddof).", low=0, high=1)
    statistics: str = static(
        "seen",
        "Whose updates: of all clients that are `seen`, the adversary's too, or `honest` only.",
        choices=("seen", "honest"),
    )

    def check(self, path, setting):
        if self.backdoor.stage != "data":
            raise ConfigError(
                f"{path}.backdoor must be an attack on data such as 'pattern' or 'sample', got "
                f"{self.backdoor.registered_name!r}."
            )
        if self.convention == "author" and self.distance != "sum":
            raise ConfigError(f"{path}.distance is read by convention 'paper' only.")
        if self.z is None:
            check_z_max(path, self.z_formula, setting)
        check_statistics(path, self.statistics, setting)

    def idle(self, setting):
        return own_update_alone(self.registered_name, setting)

    def apply(self, key, updates, state, view):
        mean, std, z = perturbation_range(self, updates, view)
        sample_key, train_key = jax.random.split(key)
        memory = view.memory(self.backdoor)
        x, target = self.backdoor.examples(sample_key, memory, view)
        start = view.params + mean
        if self.convention == "author":
            trained = self._train(train_key, start, x, target, view.task, self._author_step(view))
            done = jnp.all(jnp.argmax(view.task.outputs(start, x), axis=-1) == target)
            trained = jnp.where(done, start, trained)
            crafted = trained - view.params - 2 * mean
        else:
            step = self._paper_step(z * std)
            trained = self._train(train_key, start, x, target, view.task, step)
            crafted = trained - view.params
        crafted = jnp.clip(crafted, mean - z * std, mean + z * std)
        metrics = {"backdoor_train_loss": self._loss(trained, x, target, view.task)}
        return jnp.broadcast_to(crafted, updates.shape), state, metrics

    def _loss(self, params, x, target, task):
        return task.loss(params, x, target, jnp.ones(target.shape, bool))

    def _paper_step(self, radius):
        scale = jnp.maximum(radius, self.min_scale)
        pull = 2 * (1 - self.alpha) / scale**2
        pull = pull / radius.shape[0] if self.distance == "mean" else pull

        def step(params, start, gradient):
            moved = params - start - self.learning_rate * self.alpha * gradient
            return start + moved / (1 + self.learning_rate * pull)

        return step

    def _author_step(self, view):
        tensors = view.task.unravel(jnp.zeros(view.task.dim))
        slope = jax.tree.map(lambda a: jnp.full_like(a, 2.0 / a.size), tensors)  # of the MSE
        pull = self.author_weight * ravel_pytree(slope)[0]

        def step(params, start, gradient):
            gradient = gradient + pull * (params - start) + self.author_decay * params
            return params - self.learning_rate * gradient

        return step

    def _train(self, key, start, x, target, task, step):
        count = target.shape[0]
        size = min(self.batch_size, count)
        batches = -(-count // size)

        def one_batch(params, rows):
            real = rows < count  # the last batch is padded
            rows = jnp.minimum(rows, count - 1)
            gradient = jax.grad(task.loss)(params, x[rows], target[rows], real)
            return step(params, start, gradient), None

        def one_pass(params, number):
            order = jax.random.permutation(jax.random.fold_in(key, number), count)
            rows = jnp.pad(order, (0, batches * size - count), constant_values=count)
            return jax.lax.scan(one_batch, params, rows.reshape(batches, size))

        return jax.lax.scan(one_pass, start, jnp.arange(self.passes))[0]
