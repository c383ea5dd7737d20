"""Model replacement: constrain-and-scale and train-and-scale (Bagdasaryan et al., AISTATS 2020)."""

import bisect
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._replacement import replacement_factor
from fedjax_sec.attacks.update._training import gradient, measure, sgd_step
from fedjax_sec.core import (
    ANY_RATE,
    ANY_SCALE,
    ConfigError,
    UpdateAttack,
    component,
    numeric,
    refuse_unread,
    registry,
    static,
)
from fedjax_sec.ops.precision import root


@registry.attacks.register("model_replacement")
class ModelReplacement(UpdateAttack):
    r"""Trains a backdoored model X, and sends what makes the global model X in one round.

    From the global parameters w the adversary trains X by SGD on batches of its clients' examples,
    `poisoned` of which are replaced by those of `backdoor`. Every malicious client sends

    .. math:: u_{mal} = \gamma (X - w)

    `updates [K, D] -> [K, D]`. With `mode: constrain_and_scale` the loss of a batch is

    .. math:: \alpha\, \ell_{class}(X) + (1 - \alpha)\, \ell_{ano}(X), \qquad
       \ell_{ano} = \|X - w\|_2

    over the trained parameters, or with `anomaly: cosine` the author code's
    :math:`10^3 (1 - \cos(\gamma (X - w) + w,\, w))`; the factor is that of the average:

    .. math:: \gamma = \frac{\sum_i w_i}{\eta \sum_{i \in M} w_i} \quad (\mathrm{participants}),
       \qquad \gamma = \frac{N}{m} \quad (\mathrm{registered})

    with w the numbers of examples, :math:`\eta` the server's rate, M the m malicious clients of the
    round. `participants` is exact in a weighted mean over the K clients of a round. `registered` is
    the author code's, whose server divides the sum of the updates by all N clients and not by the K
    that are there: set the server's rate to K / N, with which both are equal for equal weights and
    the paper's :math:`\eta` is 1. A `factor` that is given is divided by m too. With
    `mode: train_and_scale` there is no :math:`\ell_{ano}`, and :math:`\gamma = S / \|X - w\|_2`
    with S the bound `max_norm` that a detector tolerates; the length is that of the trained
    parameters.

    Training ends early, after an epoch or before the first, when the mean loss of the backdoor's
    examples is at most `stop_loss`. In rounds without a malicious client nothing is trained. With
    `alpha` 1, the author code's default, the anomaly term is off. The slope of the distance is 1
    however small it is, so X leaves w only where the gradient of the classification loss is longer
    than (1 - alpha) / alpha.

    Raises: `ConfigError` when `backdoor` is no attack on data, for more poisoned examples than a
    batch has, for fields that the mode does not read; with `participants` and a server whose step
    is not a rate times the aggregate; outside an experiment, since it needs a model and data.

    Source: Bagdasaryan et al. 2020 (How to backdoor federated learning), Section 4, Equations 3 to
    5 and Algorithm 1. Constants from the author code (`utils/params.yaml`): learning rate 0.05
    with momentum 0.9 and the weight decay 5e-4 that its optimizer is given (`poison_decay` is not
    read), 15 epochs of 200 batches of 64, the rate times 0.1 from 20% and from 80% of the epochs
    on, divided by 50 where the backdoor's accuracy is above 20% before training and by 100 more
    where it is above 60%, N(0, 0.01^2) noise on poisoned images in normalised units. It has each
    of its backdoor's images once in a batch, 7 of the wall, which is `poisoned: 7`; 20 is a choice.
    Scaling multiplies running
    statistics too; `statistics: trained` sends those of X unscaled. The text gives no alpha: 0.9 is
    a choice. The author code stops only where the accuracy on the test set is no lower either,
    which an adversary cannot see; here the backdoor's accuracy is on its examples. Its clean
    examples are any of the training set, here those of the malicious clients, drawn with
    replacement; both are choices.

    Example:
        >>> from fedjax_sec.core import refuse_unread, registry
        >>> attack = {"name": "model_replacement", "backdoor": "trojan", "alpha": 0.7}
        >>> registry.attacks.build(attack).epochs
        15
    """

    mode: str = static(
        "constrain_and_scale",
        "Train with the anomaly term and scale by the average's factor, or without it and scale "
        "to `max_norm`.",
        choices=("constrain_and_scale", "train_and_scale"),
    )
    backdoor: Any = component(
        "attack", "pattern", "What to teach, an attack on data.", poisons=False
    )
    average: str = static(
        "participants",
        "Factor null: of a mean over the round's `participants`, or over the `registered` clients.",
        choices=("participants", "registered"),
    )
    factor: float | None = numeric(
        None, "gamma before it is divided by m (null: by `average`).", above=0, unbounded=ANY_SCALE
    )
    max_norm: float | None = numeric(
        None,
        "S, the length of what train_and_scale sends, without running statistics.",
        above=0,
        unbounded=ANY_SCALE,
    )
    alpha: float = numeric(0.9, "Weight of the classification loss.", above=0, high=1)
    anomaly: str = static(
        "l2", "The anomaly term: L2 distance, or that of directions.", choices=("l2", "cosine")
    )
    cosine_weight: float = numeric(1e3, "Factor of the term `cosine`.", above=0, high=1e6)
    epochs: int = static(15, "Epochs of the adversary's training.", low=1, high=10**6)
    steps: int = static(200, "Batches in an epoch.", low=1, high=10**6)
    batch_size: int = static(64, "Examples in a batch.", low=1, high=10**6)
    poisoned: int = static(20, "Of these, examples of the backdoor.", low=1, high=10**6)
    noise: float = numeric(
        0.01, "Standard deviation of the noise on them, in normalised units.", low=0, high=1e6
    )
    learning_rate: float = numeric(
        0.05, "Learning rate of the adversary's training.", low=0, unbounded=ANY_RATE
    )
    momentum: float = numeric(0.9, "Its momentum.", low=0, high=1)
    weight_decay: float = numeric(5e-4, "Its weight decay, as PyTorch's.", low=0, high=1e6)
    decay_at: tuple[float, ...] = static(
        (0.2, 0.8), "Shares of the epochs from which on the rate decays once more.", low=0, high=1
    )
    decay: float = numeric(0.1, "What the rate is multiplied by there.", low=0, high=1)
    known_above: float = numeric(
        0.2, "Backdoor accuracy above which the rate is divided.", low=0, high=1
    )
    known_divisor: float = numeric(50.0, "By how much.", low=1, high=1e6)
    learned_above: float = numeric(
        0.6, "Backdoor accuracy above which it is divided once more.", low=0, high=1
    )
    learned_divisor: float = numeric(100.0, "By how much.", low=1, high=1e6)
    stop_loss: float = numeric(
        1e-4, "Training ends when the backdoor's loss is no larger.", low=0, high=1e6
    )
    statistics: str = static(
        "scaled",
        "Running statistics: `scaled` as all else, or sent as `trained`.",
        choices=("scaled", "trained"),
    )

    @property
    def needs(self):
        computed = self.mode == "constrain_and_scale" and self.factor is None
        rate = computed and self.average == "participants"
        return frozenset({"task", "rate"} if rate else {"task"})

    def check(self, path, setting):
        if self.backdoor.stage != "data":
            raise ConfigError(
                f"{path}.backdoor must be an attack on data such as 'trojan' or 'edge_images', got "
                f"{self.backdoor.registered_name!r}."
            )
        if self.poisoned > self.batch_size:
            raise ConfigError(
                f"{path}.poisoned must be <= batch_size = {self.batch_size}, got {self.poisoned}."
            )
        if self.factor is not None and self.average != "participants":
            raise ConfigError(
                f"{path}.average {self.average!r} computes the factor, but factor = {self.factor} "
                f"is given; set factor to null, or average to participants."
            )
        bounded = self.mode == "train_and_scale"
        if bounded != (self.max_norm is not None):
            raise ConfigError(
                f"{path}.max_norm belongs to mode 'train_and_scale', and to that only; got "
                f"mode={self.mode!r}, max_norm={self.max_norm}."
            )
        if bounded:
            unread = ("factor", "average", "alpha", "anomaly", "cosine_weight")
            refuse_unread(self, path, unread, "by mode 'train_and_scale'")
        elif self.alpha == 1:
            refuse_unread(self, path, ("anomaly", "cosine_weight"), "with alpha 1")
        elif self.anomaly == "l2":
            refuse_unread(self, path, ("cosine_weight",), "with anomaly 'l2'")

    def init(self, num_clients, dim):
        return {"registered": jnp.float32(num_clients)}

    def apply(self, key, updates, state, view):
        gamma = self._gamma(state, view)

        def craft():
            trained, loss = self._train(key, gamma, view)
            moved = trained - view.params
            length = jnp.linalg.norm(moved[view.task.space.trained])
            scale = gamma
            if self.mode == "train_and_scale":
                scale = self.max_norm / jnp.where(length > 0, length, 1.0)
            sent = scale * moved
            if self.statistics == "trained":
                observed = view.task.space.observed
                sent = sent.at[observed].set(moved[observed])
            metrics = {"backdoor_train_loss": loss, "factor": scale, "distance": length}
            return sent.astype(updates.dtype), metrics

        def nothing():
            unknown = jnp.float32(jnp.nan)
            names = ("backdoor_train_loss", "factor", "distance")
            return jnp.zeros(updates.shape[1:], updates.dtype), dict.fromkeys(names, unknown)

        sent, metrics = jax.lax.cond(jnp.any(view.malicious), craft, nothing)
        return jnp.broadcast_to(sent, updates.shape), state, metrics

    def _gamma(self, state, view):
        """The factor of constrain_and_scale."""
        present = jnp.maximum(view.malicious.sum(), 1)
        if self.factor is not None:
            return jnp.float32(self.factor) / present
        if self.average == "registered":
            return state["registered"] / present
        return replacement_factor(view)

    def _objective(self, gamma, view):
        """(class loss, parameters) -> what is minimised."""
        start, part = view.params, view.task.space.trained
        center = start[part]

        def objective(loss, params):
            if self.mode == "train_and_scale":
                return loss
            moved = params[part] - center
            if self.anomaly == "l2":
                return self.alpha * loss + (1 - self.alpha) * root(jnp.sum(moved**2))
            scaled = gamma * moved + center
            lengths = root(jnp.sum(scaled**2)) * root(jnp.sum(center**2))
            cosine = jnp.sum(scaled * center) / jnp.maximum(lengths, 1e-8)
            return self.alpha * loss + (1 - self.alpha) * self.cosine_weight * (1 - cosine)

        return objective

    def _train(self, key, gamma, view):
        """(X [D], the last mean loss of the backdoor's examples)."""
        task, start = view.task, view.params
        examples_key, train_key = jax.random.split(key)
        x, target = self.backdoor.examples(examples_key, view.memory(self.backdoor), view)
        loss, known = measure(task, start, x, target, self.batch_size)
        rate = self.learning_rate / jnp.where(known > self.known_above, self.known_divisor, 1.0)
        rate = rate / jnp.where(known > self.learned_above, self.learned_divisor, 1.0)
        objective, every = self._objective(gamma, view), jnp.ones(self.batch_size, bool)
        milestones = sorted(share * self.epochs for share in self.decay_at)
        passed = [bisect.bisect_right(milestones, epoch + 1) for epoch in range(self.epochs)]
        decays = jnp.array(passed, jnp.float32)

        def step(number, carry, epoch):
            params, velocity = carry
            step_key = jax.random.fold_in(train_key, epoch * self.steps + number)
            batch_key, dropout = jax.random.split(step_key)
            batch = self._batch(batch_key, x, target, view)
            slope, seen = gradient(task, params, *batch, every, dropout, objective)
            now = rate * self.decay ** decays[epoch]
            return sgd_step(
                task, params, velocity, slope, seen, now, self.momentum, self.weight_decay
            )

        def one_epoch(carry):
            epoch, params, velocity, _ = carry
            params, velocity = jax.lax.fori_loop(
                0, self.steps, lambda number, inner: step(number, inner, epoch), (params, velocity)
            )
            return epoch + 1, params, velocity, measure(task, params, x, target, self.batch_size)[0]

        carry = jnp.int32(0), start, jnp.zeros_like(start), loss
        carry = jax.lax.while_loop(
            lambda carry: (carry[0] < self.epochs) & ~(carry[3] <= self.stop_loss), one_epoch, carry
        )
        return carry[1], carry[3]

    def _batch(self, key, x, target, view):
        """(inputs, labels) of a batch whose first `poisoned` examples are the backdoor's."""
        clean_key, which_key, noise_key = jax.random.split(key, 3)
        inputs, labels = view.sample(clean_key, self.batch_size)
        count = target.shape[0]
        rows = jax.random.permutation(which_key, count)[jnp.arange(self.poisoned) % count]
        images = x[rows]
        if jnp.issubdtype(images.dtype, jnp.floating):
            std = jnp.asarray(view.task.inputs.std, images.dtype)
            std = std.reshape((1,) * (images.ndim - 1) + (-1,))
            images = images + self.noise * std * jax.random.normal(noise_key, images.shape)
        return inputs.at[: self.poisoned].set(images), labels.at[: self.poisoned].set(target[rows])
