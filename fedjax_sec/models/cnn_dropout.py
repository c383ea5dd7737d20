"""FedML's convolutional network with dropout, for Federated EMNIST."""

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, convolution_field, flax_model
from fedjax_sec.models._dropout_cnn import DropoutCnn


@registry.models.register("cnn_dropout")
class CnnDropout(Network):
    """CNN_DropOut: conv 3x3x32, conv 3x3x64, pool 2, dropout, dense 128, dropout, classes.

    `x [B, 28, 28, 1] -> logits [B, classes]`, convolutions without padding: 1,206,590 parameters
    for the 62 classes of FEMNIST, 1,199,882 for ten. The dropout masks are drawn anew for every
    client and local step, and there are none in evaluation. With `drops="channels"` the first
    dropout drops a channel at all places or at none.

    Raises: `ConfigError` for images smaller than 6 x 6, which leave nothing to pool, or where
    `dropout` has not two numbers.

    Source: FedML, `python/fedml/model/cv/cnn.py`, `CNN_DropOut`, with PyTorch's initialisation,
    which FedSecurity (Han et al. 2024) uses on FEMNIST; after Reddi et al. 2021 (Adaptive federated
    optimization), Appendix C. The code of edge-case backdoors (Wang et al. 2020, `Net` of its
    `utils.py`, "lenet" there) is this network for ten classes with `drops="channels"`: its
    `Dropout2d` drops channels behind the pooling, and single units of the dense layer.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("cnn_dropout").make((28, 28, 1), 62)
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        1206590
    """

    inputs = frozenset({"pixels"})
    dropout: tuple[float, ...] = static(
        (0.25, 0.5),
        "Shares dropped in training: behind the pooling, and behind the dense layer.",
        low=0,
        below=1,
    )
    drops: str = static(
        "units",
        "What the first dropout drops: single `units`, or whole `channels`.",
        choices=("units", "channels"),
    )
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    convolution: str = convolution_field()

    def make(self, input_shape, num_classes):
        if len(input_shape) != 3 or min(input_shape[:2]) < 6:
            raise ConfigError(
                f"model: cnn_dropout needs images of at least 6 x 6 pixels, got {input_shape}; "
                f"choose another model such as 'mlp'."
            )
        if len(self.dropout) != 2:
            raise ConfigError(f"model.dropout must hold two numbers, got {list(self.dropout)}.")
        network = DropoutCnn(
            num_classes, tuple(self.dropout), self.drops == "channels", self.init, self.convolution
        )
        return flax_model(network, input_shape, convolves=True, trains_differently=True)
