"""LeNets: those of the attacks that reconstruct data from gradients, and the classical one."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, Convolutional, convolution_field, flax_model

#: variant -> strides of its sigmoid convolutions 5x5x12.
_STRIDES = {"fedml": (2, 2, 1, 1), "dlg": (2, 2, 1)}


class _Sigmoid(nn.Module):
    """Sigmoid convolutions 5x5x12 with padding, and a linear layer."""

    num_classes: int
    strides: tuple[int, ...]
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x):
        images = Convolutional(self.lowering, self.scheme)
        for i, stride in enumerate(self.strides):
            x = nn.sigmoid(images.same_conv(12, 5, x, f"conv_{i}", stride, bias=True))
        return images.dense(self.num_classes, images.flat(x), "output")


class _Classical(nn.Module):
    """Two convolutions 5x5, each with ReLU and a pooling, and three dense layers."""

    num_classes: int
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x):
        images = Convolutional(self.lowering, self.scheme)
        for i, width in enumerate((6, 16)):
            x = images.max_pool(images.conv(width, 5, x, f"conv_{i}"), 2)
            x = images.relu(x)  # after the pooling it does the same as before
        x = images.flat(x)
        for i, width in enumerate((120, 84)):
            x = nn.relu(images.dense(width, x, f"hidden_{i}"))
        return images.dense(self.num_classes, x, "output")


@registry.models.register("lenet")
class LeNet(Network):
    """LeNet of FedML's gradient attacks (`fedml`), of DLG (`dlg`), or the classical `lenet5`.

    `x [B, H, W, C] -> logits [B, classes]`:

    - `fedml`: four convolutions 5x5x12 with padding 2 and strides 2, 2, 1, 1, a sigmoid behind
      each, and a linear layer: 19,438 parameters for 32x32x3 and ten classes;
    - `dlg`: without the fourth convolution, 85,036 parameters for 32x32x3 and a hundred classes;
    - `lenet5`: conv 5x5x6, pool 2, conv 5x5x16, pool 2, dense 120, 84, with ReLU and without
      padding: 62,006 parameters for 32x32x3 and ten classes.

    Weights and biases of `dlg` are drawn from U(-0.5, 0.5), those of the others as PyTorch does,
    unless `init` says otherwise.

    Raises: `ConfigError` for images smaller than 4 x 4, with `lenet5` 16 x 16.

    Source: FedML, `python/fedml/core/security/common/net.py`; Zhu et al.: Deep leakage from
    gradients (NeurIPS 2019), author code `models/vision.py`; `lenet5` after LeCun et al. 1998 as in
    FedML's `CNN_WEB`. The code of edge-case backdoors calls `cnn_dropout` LeNet.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> def parameters(variant, classes):
        ...     model = registry.models.build({"name": "lenet", "variant": variant})
        ...     init = model.make((32, 32, 3), classes).init
        ...     shapes = jax.eval_shape(init, jax.random.key(0))
        ...     return sum(leaf.size for leaf in jax.tree.leaves(shapes))
        >>> parameters("fedml", 10), parameters("dlg", 100), parameters("lenet5", 10)
        (19438, 85036, 62006)
    """

    inputs = frozenset({"pixels"})
    variant: str = static("fedml", "Which LeNet.", choices=("fedml", "dlg", "lenet5"))
    init: str = static(
        "source",
        "Initial weights and biases; `source`: as the variant's.",
        choices=("source", *INITS),
    )
    convolution: str = convolution_field(("xla", "patches", "rows"))  # `lenet5` alone pools

    def make(self, input_shape, num_classes):
        side = 16 if self.variant == "lenet5" else 4
        if len(input_shape) != 3 or min(input_shape[:2]) < side:
            raise ConfigError(
                f"model: lenet with variant {self.variant!r} needs images of at least {side} x "
                f"{side} pixels, got {input_shape}; choose another model such as 'mlp'."
            )
        scheme = "pytorch" if self.init == "source" else self.init
        if self.variant == "lenet5":
            network = _Classical(num_classes, scheme, self.convolution)
        else:
            network = _Sigmoid(num_classes, _STRIDES[self.variant], scheme, self.convolution)
        model = flax_model(network, input_shape, convolves=True)
        if self.variant != "dlg" or self.init != "source":
            return model

        def init(key):
            leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, key))
            keys = jax.random.split(key, len(leaves))
            drawn = [
                jax.random.uniform(k, leaf.shape, jnp.float32, -0.5, 0.5)
                for k, leaf in zip(keys, leaves, strict=True)
            ]
            return jax.tree.unflatten(tree, drawn)

        return model._replace(init=init)
