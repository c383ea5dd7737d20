"""A backdoor whose trigger the adversary improves in every round: an attack on data with memory."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, Trigger, numeric, registry, static


@registry.attacks.register("learned_trigger")
class LearnedTrigger(Trigger):
    """Adds a pattern of at most `bound` to an input; by it the model is to read class `target`."""

    inputs = frozenset({"pixels", "features"})
    target: int = static(0, "The attacker's label.", low=0, high=COUNT)
    fraction: float = numeric(0.5, "Share of a malicious client's examples.", above=0, high=1)
    bound: float = numeric(0.3, "Largest change of one input.", above=0, high=1)
    rate: float = numeric(0.05, "Length of a step in each input.", above=0, high=1)
    steps: int = static(5, "Steps in a round.", low=1, high=1000)
    examples_seen: int = static(32, "Examples that a step sees.", low=1, high=COUNT)

    def init(self, setting, task):
        noise = jax.random.normal(jax.random.key(1), task.inputs.shape)
        return self.bound * jnp.sign(noise)

    def prepare(self, key, state, view):
        x, y = view.sample(key, self.examples_seen)
        target, every = jnp.full_like(y, self.target), jnp.ones(y.shape, bool)

        def loss(pattern):
            return view.task.loss(
                view.params, self.trigger(pattern, x, None, view.task), target, every
            )

        def step(_, pattern):
            pattern = pattern - self.rate * jnp.sign(jax.grad(loss)(pattern))
            return jnp.clip(pattern, -self.bound, self.bound)

        return jax.lax.fori_loop(0, self.steps, step, state)

    def trigger(self, state, x, rank=None, task=None):
        return jnp.clip(x + state[None], task.inputs.low, task.inputs.high)
