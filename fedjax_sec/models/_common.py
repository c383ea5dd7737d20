"""Shared parts of the networks: initialisers and the adapter from flax to `Model`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.core import Model, static
from fedjax_sec.ops import convolution, polyphase
from fedjax_sec.ops.backend import on_cpu

INITS = ("pytorch", "lecun", "glorot", "he")


def convolution_field(lowerings: tuple[str, ...] = convolution.POOLING) -> Any:
    """The field by which a network's user chooses how its convolutions are computed.

    `lowerings` are those that can pay for the network; the fastest is looked for among them.
    """
    return static(
        "auto",
        "How convolutions are computed, see `fedjax_sec.ops.convolution`; same up to rounding.",
        choices=("auto", *lowerings),
    )


def kernel_init(name: str):
    """`pytorch` is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), its default for linear and conv layers."""
    if name == "pytorch":
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    others = {"lecun": "lecun_normal", "glorot": "glorot_uniform", "he": "he_normal"}
    return getattr(nn.initializers, others[name])()


def bias_init(name: str, fan_in: int):
    """PyTorch's default U(-1/sqrt(fan_in), 1/sqrt(fan_in)); zero for the other initialisers."""
    if name != "pytorch":
        return nn.initializers.zeros
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def dense(width: int, x, init: str, name: str, kernel: str | None = None, layer=nn.Dense):
    """A fully connected layer on the last axis of `x`."""
    return layer(
        width,
        kernel_init=kernel_init(kernel or init),
        bias_init=bias_init(init, x.shape[-1]),
        name=name,
    )(x)


def _channels(x) -> int:
    return x.parts[0][0].shape[0] if isinstance(x, polyphase.Phases) else x.shape[-1]


class _Dense(nn.Module):
    """`nn.Dense`, whose bias enters by a matrix product, so that its gradient is one as well.

    As a sum over the batch XLA would fuse it, on a CPU and inside a loop over clients, into the
    write of the client's row: the sum would then be worked out for every number of the row, under a
    mask that is zero nearly everywhere (docs/performance.md).
    """

    features: int
    kernel_init: Any
    bias_init: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return x @ kernel + jnp.ones((x.shape[0], 1), x.dtype) @ bias[None]


class _Conv(nn.Module):
    features: int
    size: int
    kernel_init: Any
    bias_init: Any  # None: no bias
    lowering: str
    stride: int

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, _channels(x), self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.bias_init is None:
            return convolution.conv2d(x, kernel, self.lowering, self.stride)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        if isinstance(x, polyphase.Phases):
            return polyphase.conv2d(x, kernel).map(lambda part: part + bias[:, None])
        return convolution.conv2d(x, kernel, self.lowering, self.stride) + bias[None, None, None]


class Convolutional:
    """The layers of one network on images, in the arrangement that suits how it convolves.

    Images enter by `enter` and leave by `flat`; what lies between may be [B, H, W, C] or
    `polyphase.Phases`, so a network must not look at the axes itself.
    """

    def __init__(self, lowering: str, init: str, lowerings=convolution.POOLING):
        by_rule = lowering == "auto"
        self.lowering = convolution.rule_lowering(lowerings) if by_rule else lowering
        self.init = init

    def enter(self, x, pooled: int):
        """[B, H, W, C] in this network's own arrangement.

        `pooled` is the product of the poolings to come, or of those up to where `enter` is called
        again: large windows one after another would make too many phases.
        """
        if self.lowering != "polyphase":
            return x
        x = polyphase.join(x) if isinstance(x, polyphase.Phases) else x
        return polyphase.split(x, pooled)

    def conv(self, width: int, size: int, x, name: str, kernel: str | None = None):
        """A valid convolution with stride 1 and a square kernel."""
        bias = bias_init(self.init, size * size * _channels(x))
        kernel = kernel_init(kernel or self.init)
        return _Conv(width, size, kernel, bias, self.lowering, 1, name=name)(x)

    def same_conv(self, width: int, size: int, x, name: str, stride: int = 1, bias: bool = False):
        """The same on [B, H, W, C] with zeros around and a stride; `bias=False` before a norm."""
        around = (size - 1) // 2
        inputs = size * size * _channels(x)
        x = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
        layer = _Conv(
            width,
            size,
            kernel_init(self.init),
            bias_init(self.init, inputs) if bias else None,
            self.lowering,
            stride,
            name=name,
        )
        return layer(x)

    def relu(self, x):
        """max(x, 0). After a pooling it does the same as before, on fewer numbers."""
        return x.map(nn.relu) if isinstance(x, polyphase.Phases) else nn.relu(x)

    def max_pool(self, x, size: int):
        """The maximum over disjoint windows."""
        by_phase = isinstance(x, polyphase.Phases)
        return (polyphase if by_phase else convolution).max_pool(x, size)

    def flat(self, x):
        """[B, H W C], alike for every arrangement."""
        x = polyphase.join(x) if isinstance(x, polyphase.Phases) else x
        return x.reshape(x.shape[0], -1)

    def dense(self, width: int, x, name: str):
        """A fully connected layer behind the images, `x [B, F]`."""
        return dense(width, x, self.init, name, layer=_Dense if on_cpu() else nn.Dense)


def flax_model(
    module: nn.Module,
    input_shape: tuple[int, ...],
    convolves: bool = False,
    trains_differently: bool = False,
    pools_batch: bool = False,
    keeps_statistics: bool = False,
    dtype: Any = jnp.float32,
    head: str = "params/output",
    deep: bool = False,
) -> Model:
    """The pure-function form of a linen module for inputs [B, *input_shape] of this type.

    `trains_differently`: the module takes `train` (it has dropout); others never see it.
    `pools_batch`: it takes `mask` too, because a batch's examples change each other's outputs.
    `deep` is as in `Model`.
    `keeps_statistics`: in training it moves its collection `batch_stats` towards the batch's.
    """

    def init(key):
        return module.init(key, jnp.zeros((1, *input_shape), dtype))

    def apply(variables, x, *, train=False, key=None, mask=None):
        rngs = None if key is None else {"dropout": key}
        options = {"train": train} if trains_differently else {}
        options |= {"mask": mask} if pools_batch else {}
        return module.apply(variables, x, rngs=rngs, **options)

    def observe(variables, x, mask, key):
        rngs = None if key is None else {"dropout": key}
        out, moved = module.apply(
            variables, x, train=True, mask=mask, rngs=rngs, mutable=["batch_stats"]
        )
        return out, {**variables, **moved}

    return Model(
        init,
        apply,
        convolves,
        pools_batch,
        observe if keeps_statistics else None,
        head=head,
        deep=deep,
    )
