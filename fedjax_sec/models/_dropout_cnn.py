"""The small convolutional network with two dropouts of RLR's and FedML's experiments."""

from flax import linen as nn

from fedjax_sec.models._common import Convolutional


class DropoutCnn(nn.Module):
    """Convolutions 3x3x32 and 3x3x64, pool 2, dropout, dense 128, dropout, and the classes."""

    num_classes: int
    dropout: tuple[float, float]
    whole_channels: bool
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x, train=False):
        images = Convolutional(self.lowering, self.scheme)
        x = images.enter(x, 2)
        for i, width in enumerate((32, 64)):
            x = images.relu(images.conv(width, 3, x, f"conv_{i}"))
        # After flattening, so that the masks do not depend on the order of axes.
        x = images.flat(images.max_pool(x, 2))
        if self.whole_channels:  # [B, places, channels]: one draw for all places
            shape, x = x.shape, x.reshape(x.shape[0], -1, 64)
            x = nn.Dropout(self.dropout[0], broadcast_dims=(1,), deterministic=not train)(x)
            x = x.reshape(shape)
        else:
            x = nn.Dropout(self.dropout[0], deterministic=not train)(x)
        x = nn.relu(images.dense(128, x, "hidden"))
        x = nn.Dropout(self.dropout[1], deterministic=not train)(x)
        return images.dense(self.num_classes, x, "output")
