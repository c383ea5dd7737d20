"""FedML's residual networks for CIFAR: ResNet20, and what it calls ResNet56."""

import dataclasses

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, convolution_field, flax_model
from fedjax_sec.models._residual import Normalization, Residual, kernels_of
from fedjax_sec.ops.convolution import UNPOOLED

#: block -> convolutions in a block.
_LAYERS = {"basic": 2, "bottleneck": 3}


@registry.models.register("fedml_resnet")
class FedmlResNet(Network):
    r"""ResNet of FedML: conv 3x3x16, three stages of n blocks (16, 32, 64), mean, classes.

    `x [B, H, W, C] -> logits [B, classes]`. A `basic` block is two 3x3 convolutions, so
    n = (depth - 2) / 6; a `bottleneck` is 1x1, 3x3 and 1x1, the last four times as wide, so
    n = (depth - 2) / 9. Where a block changes the shape its shortcut is a 1x1 convolution with
    batch normalisation (shortcuts B of He et al.); in `resnet` it has no parameters (A). Trained
    parameters for images 32x32x3 and ten classes:

    - depth 20, `basic`: 272,474, FedML's ResNet20;
    - depth 56, `bottleneck`: 591,322, FedML's "ResNet56", 6-6-6 blocks (614,452 for 100 classes);
    - depth 56, `basic`: 855,770, He et al.'s 9-9-9 blocks with these shortcuts.

    `init="fedml"` draws convolutions from N(0, 2 / (k k outputs)) (Kaiming, fan out) and the last
    layer as PyTorch does. Running statistics move by a tenth of the batch's, whose variance has the
    divisor n - 1 as in PyTorch, and are averaged by the server as weights are; `local` keeps none,
    see `resnet`.

    Raises: `ConfigError` for images smaller than 4 x 4, or a depth that is not 6 n + 2, with
    `bottleneck` 9 n + 2.

    Source: FedML, `python/fedml/model/cv/resnet.py` (`resnet20`, `resnet56`), which FedSecurity
    (Han et al. 2024), Section 5, uses on CIFAR-10 and CIFAR-100; after He et al., CVPR 2016.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> def trained(classes=10, **fields):
        ...     spec = {"name": "fedml_resnet", **fields}
        ...     model = registry.models.build(spec).make((32, 32, 3), classes)
        ...     shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
        ...     return sum(leaf.size for leaf in jax.tree.leaves(shapes))
        >>> trained(), trained(depth=56)
        (272474, 855770)
        >>> trained(depth=56, block="bottleneck"), trained(100, depth=56, block="bottleneck")
        (591322, 614452)
    """

    inputs = frozenset({"pixels"})
    depth: int = static(
        20, "Layers with weights: 6 n + 2, with `bottleneck` 9 n + 2.", low=8, high=1802
    )
    block: str = static("basic", "Kind of the residual blocks.", choices=tuple(_LAYERS))
    statistics: str = static(
        "aggregated",
        "Running statistics of batch norm: part of the model, or none that leave a client.",
        choices=("aggregated", "local"),
    )
    momentum: float = static(0.9, "What running statistics keep of themselves.", low=0, below=1)
    init: str = static("fedml", "Initial weights.", choices=("fedml", *INITS))
    convolution: str = convolution_field(UNPOOLED)

    def shortened(self):
        return dataclasses.replace(self, depth=3 * _LAYERS[self.block] + 2)

    def make(self, input_shape, num_classes):
        if len(input_shape) != 3 or min(input_shape[:2]) < 4:
            raise ConfigError(
                f"model: fedml_resnet needs images of at least 4 x 4 pixels, got {input_shape}; "
                f"choose another model such as 'mlp'."
            )
        each = 3 * _LAYERS[self.block]
        blocks, rest = divmod(self.depth - 2, each)
        if rest or not blocks:
            low = each * max(blocks, 1) + 2
            raise ConfigError(
                f"model.depth must be {each} n + 2 with {self.block!r} blocks, got {self.depth}; "
                f"nearest: {low} and {low + each}."
            )
        keeps = self.statistics == "aggregated"
        network = Residual(
            num_classes,
            blocks,
            self.block,
            "conv",
            Normalization("batch", 1, keeps, self.momentum, unbiased=True),
            kernels_of("fan_out" if self.init == "fedml" else self.init),
            "pytorch" if self.init == "fedml" else self.init,
            self.convolution,
        )
        return flax_model(
            network,
            input_shape,
            convolves=True,
            trains_differently=True,
            keeps_statistics=keeps,
            pools_batch=True,
            deep=True,
        )
