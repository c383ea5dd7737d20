"""The examples of a linear layer, read from its gradient."""

import math

import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError, PrivacyAttack, registry


@registry.privacy_attacks.register("linear_inversion")
class LinearInversion(PrivacyAttack):
    r"""One example a class from the gradient of a linear model with a bias, in closed form.

    Of a model :math:`z = W^T x + b` with cross-entropy the gradients are, for one example with
    probabilities p and label y,

    .. math:: \nabla_W = x (p - e_y)^T, \qquad \nabla_b = p - e_y

    so any column of the first divided by its entry of the second is x, and the label is the only
    class whose bias a step raises. An update of plain SGD is minus the rate times the gradient, and
    the rate cancels. With one example and one step this is exact up to rounding. Of a batch each
    class gives one guess, of the classes whose bias rises most: the mean of its examples weighted
    by :math:`p - e_y`, in which those of other classes enter as well. `x [B, ...]` in the units in
    which components see inputs, kept in their range, `y [B]`.

    Raises: `ConfigError` for a model whose last layer, a kernel and a bias, does not take the input
    itself.

    Source: Phong, Aono, Hayashi, Wang, Moriai 2018 (Privacy-preserving deep learning via additively
    homomorphic encryption), Section III, Examples 1 and 2; the label: Zhao, Mopuri, Bilen 2020
    (iDLG), Section 3.1.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build("linear_inversion").registered_name
        'linear_inversion'
    """

    inputs = frozenset({"pixels", "features"})

    def reconstruct(self, key, message, params, task, known):
        kernel, bias = self._layer(message.vector, task)
        count = min(known.count, bias.shape[0])
        labels = jnp.argsort(-bias)[:count]
        labels = jnp.concatenate([labels, jnp.repeat(labels[:1], known.count - count)])
        step = bias[labels]
        safe = jnp.where(step == 0, 1.0, step)
        x = (kernel[:, labels] / safe[None]).T.reshape(known.count, *task.inputs.shape)
        shape = (1,) * (x.ndim - 1) + (-1,)
        mean, std = (np.array(v, np.float32) for v in (task.inputs.mean, task.inputs.std))
        x = x * std.reshape(shape) + mean.reshape(shape)
        return jnp.clip(x, task.inputs.low, task.inputs.high), labels

    def _layer(self, vector, task):
        """The update of the only layer: (kernel [F, C], bias [C])."""
        slices, features = task.space.slices, math.prod(task.inputs.shape)
        names = {f"{task.head}/bias", f"{task.head}/kernel"}
        if set(slices) != names or task.dim != (features + 1) * task.num_classes:
            raise ConfigError(
                f"evaluation.monitors: 'linear_inversion' needs a model of one linear layer with "
                f"a bias, such as logistic_regression; this one has {', '.join(sorted(slices))}."
            )
        kernel = vector[slices[f"{task.head}/kernel"]].reshape(features, task.num_classes)
        return kernel, vector[slices[f"{task.head}/bias"]]
