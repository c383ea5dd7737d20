"""A privacy attack on a linear model: its gradient is the example times the residual."""

import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import PrivacyAttack, registry


@registry.privacy_attacks.register("residuals")
class Residuals(PrivacyAttack):
    """One example from the row of the class whose bias rises, once for each in the batch."""

    def reconstruct(self, key, message, params, task, known):
        bias = message.vector[task.space.slices[f"{task.head}/bias"]]
        kernel = message.vector[task.space.slices[f"{task.head}/kernel"]]
        label = jnp.argmax(bias)
        x = kernel.reshape(-1, bias.shape[0])[:, label] / bias[label]
        x = x.reshape(1, *task.inputs.shape)
        ones = (1,) * (x.ndim - 1)
        mean, std = (np.array(v, np.float32) for v in (task.inputs.mean, task.inputs.std))
        x = x * std.reshape(*ones, -1) + mean.reshape(*ones, -1)
        return jnp.repeat(x, known.batch, axis=0), jnp.full(known.batch, label)
