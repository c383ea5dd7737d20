"""Residual networks for small images, with their normalisation's statistics in the open."""

import dataclasses

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, convolution_field, flax_model, kernel_init
from fedjax_sec.models._residual import Normalization, Residual
from fedjax_sec.ops.convolution import UNPOOLED


@registry.models.register("resnet")
class ResNet(Network):
    """ResNet: conv 3x3x16, three stages of n residual blocks (16, 32, 64), mean, classes.

    `x [B, H, W, C] -> logits [B, classes]`, with n = (depth - 2) / 6; for 32x32x3, 10 classes and a
    depth of 20 these are 269,722 trained parameters.
    Shortcuts have no parameters: where a stage begins they skip every other pixel and fill the new
    channels with zeros.

    `norm="batch"` normalises each channel over its batch in training (padding does not count). The
    numbers that evaluation normalises with are `statistics`:

    - `aggregated`: running means and variances, 1,376 more entries of the parameters at depth 20.
      Clients move them, send the difference and the server aggregates it as it does weights; weight
      decay leaves them alone. Attacks see them too; norms, distances and cosines do not count them.
    - `local`: nothing leaves the client, and the global model has none; whatever is evaluated is
      normalised over its own batch (`evaluation.batch_size` examples), so its logits depend on it.

    `norm="group"` normalises every example for itself, over `groups` groups of channels, and keeps
    nothing. `scripts/fltrust.py norms` measures what the choice does to FLTrust's trust scores.

    Raises: `ConfigError` for images smaller than 4 x 4, a depth that is not 6 n + 2, or `groups`
    that do not divide 16.

    Source: He et al.: Deep residual learning for image recognition (CVPR 2016), Section 4.2 with
    shortcuts A, and its initialisation; FLTrust (Cao et al. 2021), Section VI-A, names the network
    and no more. Momentum 0.9 is MXNet's default, in which FLTrust's author code is written. Group
    norm in federated learning: Hsieh et al., ICML 2020.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("resnet").make((32, 32, 3), 10)
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0))
        >>> {name: sum(p.size for p in jax.tree.leaves(tree)) for name, tree in shapes.items()}
        {'batch_stats': 1376, 'params': 269722}
    """

    inputs = frozenset({"pixels"})
    depth: int = static(
        20, "Layers with weights: 6 n + 2 (8, 14, 20, 32, 44, 56, 110).", low=8, high=1202
    )
    norm: str = static("batch", "Normalisation.", choices=("batch", "group"))
    statistics: str = static(
        "aggregated",
        "Running statistics of batch norm: part of the model, or none that leave a client.",
        choices=("aggregated", "local"),
    )
    groups: int = static(8, "Groups of channels, with norm `group`.", low=1, high=16)
    momentum: float = static(0.9, "What running statistics keep of themselves.", low=0, below=1)
    init: str = static("he", "Initial weights.", choices=INITS)
    convolution: str = convolution_field(UNPOOLED)

    def shortened(self):
        return dataclasses.replace(self, depth=8)

    def make(self, input_shape, num_classes):
        if len(input_shape) != 3 or min(input_shape[:2]) < 4:
            raise ConfigError(
                f"model: resnet needs images of at least 4 x 4 pixels, got {input_shape}; "
                f"choose another model such as 'mlp'."
            )
        blocks, rest = divmod(self.depth - 2, 6)
        if rest:
            low = 6 * blocks + 2
            raise ConfigError(
                f"model.depth must be 6 n + 2, got {self.depth}; nearest: {low} and {low + 6}."
            )
        if 16 % self.groups:
            raise ConfigError(f"model.groups must be 1, 2, 4, 8 or 16, got {self.groups}.")
        keeps = self.norm == "batch" and self.statistics == "aggregated"
        network = Residual(
            num_classes,
            blocks,
            "basic",
            "pad",
            Normalization(self.norm, self.groups, keeps, self.momentum),
            kernel_init(self.init),
            self.init,
            self.convolution,
        )
        return flax_model(
            network,
            input_shape,
            convolves=True,
            trains_differently=True,
            keeps_statistics=keeps,
            pools_batch=self.norm == "batch",
            deep=True,
        )
