"""TAG: gradient attack on language models (Deng, Wang, Li, Wang, Shang, Liu and others, 2021)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_sec.attacks.privacy import _matching, _search
from fedjax_sec.core import ConfigError, Guess, PrivacyAttack, numeric, registry, static
from fedjax_sec.ops import interception


@registry.privacy_attacks.register("tag")
class Tag(PrivacyAttack):
    r"""Searches embeddings of texts, and labels, whose gradient is nearest to the client's.

    With :math:`g_l` the gradient of the network's tensor l, of L in its order, :math:`z` embeddings
    `[n, T, E]` and :math:`s` scores of labels,

    .. math:: \min_{z, s} \sum_l \| \nabla_l \ell(z, \sigma(s)) - g_l \|_2^2
              + \alpha \, c_l \| \nabla_l \ell(z, \sigma(s)) - g_l \|_1, \qquad
              c_l = \frac{L - l + 1}{L}

    by AdamW with a rate that rises over `warm_up` steps and falls to 0 on a line, the gradients by
    z and by s each clipped to length 1, from normal noise, clipped to one deviation, times `start`.
    The table of embeddings is left out of the sum, since the guesses are not taken from it. A
    guessed token is the one whose embedding has the largest cosine with the guess, among all, or
    among those of whose row the gradient is not 0 (`candidates: gradient`), which names a batch's
    tokens by itself. `x [n, T]` tokens, `y` the most probable labels: `[n]`, or `[n, T]` for a
    network that predicts at every place. Of `restarts` the lowest loss is kept.

    Raises: `ConfigError` for clients that do not take one plain gradient step, for inputs that are
    no tokens, and for a network without an embedding.

    Source: Deng et al. 2021 (TAG), Section 3, Equations 1 to 5, alpha 0.1; rate 0.05, 1,000 steps,
    clipping, start and the weights c_l (a guess at the text's, as is its warm-up) from breaching
    (Geiping et al.), `config/attack/tag.yaml`. Its loss is half of this one, its rate ends above 0,
    and it counts tensors in PyTorch's order; here it is the vector's.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build({"name": "tag", "iterations": 200}).alpha
        0.1
    """

    inputs = frozenset({"tokens"})
    iterations: int = static(1000, "Steps of AdamW.", low=8, high=10**7)
    learning_rate: float = numeric(0.05, "Its rate.", above=0, high=1e6)
    warm_up: int = static(50, "Steps over which the rate rises.", low=0, high=10**6)
    alpha: float = numeric(0.1, "Weight of the absolute differences.", low=0, high=1e6)
    start: float = numeric(0.1, "Factor of the noise at the start.", low=0, high=1e6)
    candidates: str = static(
        "gradient",
        "Tokens that may be guessed: those with a gradient of their embedding, or all.",
        choices=("gradient", "all"),
    )
    restarts: int = static(
        1, "Independent starts, of which the lowest loss is kept.", low=1, high=10**6
    )
    snapshots: int = static(0, "Inputs to keep on the way, evenly spaced.", low=0, high=1000)

    def reconstruct(self, key, message, params, task, known):
        if (known.steps or 1) > 1 or known.clients > 1:
            raise ConfigError(
                f"attack: tag matches the gradient of one client's one step, got {known.steps} "
                f"steps of {known.clients} client(s)."
            )
        slope = _matching.slope_of(message, params, task, known)
        part, name = task.space.trained, interception.table_of(task)
        rows, width = task.space.shapes[name]
        whole = task.space.slices[name]
        table = params[whole].reshape(rows, width)
        guessed = jax.ShapeDtypeStruct((known.count, task.inputs.shape[0], width), jnp.float32)
        outputs = jax.eval_shape(lambda z: interception.outputs_for(params, z, task), guessed)
        size = int(np.prod(guessed.shape))
        total = size + int(np.prod(outputs.shape))
        distance = self.objective(slope, params, task)
        clip = optax.clip_by_global_norm(1.0)

        def split(vector):
            return vector[:size].reshape(guessed.shape), vector[size:].reshape(outputs.shape)

        def loss(vector):
            return distance(*split(vector))

        def gradient_of(step, vector):
            gradient = jax.grad(loss)(vector)
            clipped = (clip.update(one, clip.init(one))[0] for one in split(gradient))
            return jnp.concatenate([one.reshape(-1) for one in clipped])

        falling = optax.linear_schedule(
            self.learning_rate, 0.0, max(self.iterations - self.warm_up, 1)
        )
        rising = optax.linear_schedule(0.0, self.learning_rate, max(self.warm_up, 1))
        rate = optax.join_schedules([rising, falling], [self.warm_up])
        optimizer = optax.adamw(rate, eps=1e-6, weight_decay=0.01)
        allowed = jnp.ones(rows, bool)
        if self.candidates == "gradient":
            place = slice(whole.start - part.start, whole.stop - part.start)
            touched = jnp.abs(slope[place].reshape(rows, width)).max(axis=1) > 0
            allowed = jnp.where(touched.any(), touched, allowed)

        def tokens(vector):
            values, _ = split(vector)
            unit = table / jnp.maximum(jnp.linalg.norm(table, axis=1, keepdims=True), 1e-12)
            return jnp.argmax(jnp.where(allowed, values @ unit.T, -jnp.inf), axis=-1)

        def search(key):
            noise = jnp.clip(jax.random.normal(key, (total,)), -1.0, 1.0)
            vector, trail = _search.descend(
                gradient_of, self.start * noise, optimizer, self.iterations, self.snapshots
            )
            labels = jnp.argmax(split(vector)[1], axis=-1).astype(jnp.int32)
            trail = None if trail is None else jax.vmap(tokens)(trail)
            return Guess(tokens(vector).astype(jnp.int32), labels, loss(vector), trail)

        return _matching.best_of(jax.vmap(search)(jax.random.split(key, self.restarts)))

    def objective(self, slope, params, task):
        """(embeddings [n, T, E], scores of labels) -> the distance of their gradient to `slope`."""
        part, name = task.space.trained, interception.table_of(task)
        whole = task.space.slices[name]
        counted = jnp.ones(slope.shape[0]).at[whole.start - part.start : whole.stop - part.start]
        counted, weights = counted.set(0.0), self._weights(task, name)

        def distance(values, scores):
            def client(trained):
                made = interception.outputs_for(params.at[part].set(trained), values, task)
                logs = jax.nn.log_softmax(made)
                return -(jax.nn.softmax(scores) * logs).sum(axis=-1).mean()

            apart = counted * (jax.grad(client)(params[part]) - slope)
            return jnp.sum(apart**2) + self.alpha * jnp.sum(weights * jnp.abs(apart))

        return distance

    def _weights(self, task, table: str):
        """c_l of every coordinate [T], the table's being left out."""
        begin = task.space.trained.start
        places = {n: p for n, p in task.space.slices.items() if p.start >= begin and n != table}
        weights = np.zeros(task.space.trained.stop - begin, np.float32)
        ordered = sorted(places.values(), key=lambda p: p.start)
        for number, place in enumerate(ordered):
            share = (len(ordered) - number) / len(ordered)
            weights[place.start - begin : place.stop - begin] = share
        return weights
