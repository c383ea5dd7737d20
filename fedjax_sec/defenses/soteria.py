"""Soteria: a perturbed representation (Sun, Li, Wang, Yang, Li and Chen, CVPR 2021)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import Hooks, Stage, numeric, registry, static
from fedjax_sec.ops.interception import sensitivity


@registry.defenses.register("soteria")
class Soteria(Stage):
    r"""Each client hides the entries of its representation that tell most of an input.

    With r the input of the first dense layer and x an example of the client's,

    .. math:: score_i = \frac{\| \partial r_i / \partial x \|_2}{r_i + 0.1}

    The rows of the layer's kernel in the update whose score is below the `share`-quantile of the
    scores become 0. `[T] -> [T]`, once behind all local steps; scores are means over the client's
    first `num_examples` examples at the global parameters (a choice: the author code takes the one
    image of its batch). Each example costs a forward pass for every pixel that an entry of r sees
    (all of them where the network is not convolutional), or a backward pass for every entry where
    those are fewer. Malicious clients follow only with `malicious_follow`.

    Raises: `ConfigError` for models without a trained dense layer.

    Source: Sun et al. 2021 (Provable defense against privacy leakage in federated learning from
    representation perspective), Section 4; author code `reconstruct_image.py`
    (jeremy313/Soteria): the score, which approximates the paper's
    :math:`\|r_i (\partial r_i / \partial x)^{-1}\|`, 0.1 and a share of 0.6.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.defenses.build("soteria").share
        0.6
    """

    stage = "client"
    share: float = numeric(0.6, "Share of the entries that are hidden.", low=0, high=1)
    num_examples: int = static(1, "Examples that scores are means over.", low=1, high=10**6)
    malicious_follow: bool = static(False, "Whether malicious clients do so as well.")

    def idle(self, setting):
        return "soteria would do nothing: its share is 0." if self.share == 0 else None

    def hooks(self, view):
        task, data, params = view.task, view.data, view.params

        def send(key, delta):
            positions = jnp.arange(min(self.num_examples, data.capacity))
            x, _ = data.fetch(jnp.minimum(positions, jnp.maximum(data.count - 1, 0)))
            names = []

            def score(one):
                features, slopes, name = sensitivity(params, one, task)
                names.append(name)
                return slopes / (features + 0.1)

            scores = jax.vmap(score)(x).mean(axis=0)
            hidden = scores < jnp.quantile(scores, self.share)
            place, begin = task.space.slices[names[0]], task.space.trained.start
            part = slice(place.start - begin, place.stop - begin)
            kernel = delta[part].reshape(task.space.shapes[names[0]])
            return delta.at[part].set(jnp.where(hidden[:, None], 0.0, kernel).reshape(-1))

        return Hooks(send=send)
