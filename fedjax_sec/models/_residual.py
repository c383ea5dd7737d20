"""Residual networks for small images, whose equal blocks are one loop where there are many.

XLA compiles a loop's body once, so a deeper network compiles no longer. The variables are those of
a network written out block by block; they are stacked where the loop begins.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.models._common import Convolutional, kernel_init
from fedjax_sec.ops import convolution

#: Channels of the three stages, inside their blocks.
WIDTHS = (16, 32, 64)
#: block -> (letter, size of the kernel, whether the stride is here) of each convolution.
_LAYERS = {
    "basic": (("a", 3, True), ("b", 3, False)),
    "bottleneck": (("a", 1, False), ("b", 3, True), ("c", 1, False)),
}
#: block -> channels behind a block, in units of those inside.
_EXPANSION = {"basic": 1, "bottleneck": 4}
#: Fewer equal blocks are written out: a loop copies what its backward pass reads.
_LOOPED = 4


class Normalization(NamedTuple):
    """How channels are normalised.

    `norm` is `batch` or `group` (over `groups` groups). With `keeps_statistics`, running ones keep
    `momentum` of themselves in a step, and `unbiased` says whether they follow the variance with
    divisor n - 1, as PyTorch's, or n, as flax's.
    """

    norm: str
    groups: int
    keeps_statistics: bool
    momentum: float
    unbiased: bool = False


class Order(NamedTuple):
    """Where images have their channels and their batch: first and last, or last and first.

    Rows and columns are the axes 1 and 2 of either.
    """

    channels_first: bool

    @property
    def examples(self) -> int:
        """The axis of the examples, also of means over rows and columns."""
        return -1 if self.channels_first else 0

    def turned(self, x):
        """[B, H, W, C] in this order, or back."""
        return x.transpose(3, 1, 2, 0) if self.channels_first else x

    def of_channels(self, values):
        """[C], to be broadcast against images."""
        return values[:, None, None, None] if self.channels_first else values[None, None, None]

    def of_examples(self, values):
        """[B], to be broadcast against means over rows and columns."""
        return values[None] if self.channels_first else values[:, None]

    def conv(self, x, kernel, lowering: str, stride: int):
        """A convolution whose output is as large as its input, divided by the stride."""
        around = (kernel.shape[0] - 1) // 2
        if self.channels_first:
            return convolution.conv2d_chwn(x, kernel, stride, around)
        if around:
            x = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
        return convolution.conv2d(x, kernel, lowering, stride)

    def widened(self, x, more: int):
        """With `more` channels of zeros on either side."""
        around = [(0, 0)] * 4
        around[0 if self.channels_first else 3] = (more, more)
        return jnp.pad(x, around)

    def pooled(self, x):
        """[B, C], the means over rows and columns."""
        x = x.mean((1, 2))
        return x.T if self.channels_first else x


class _Kernel(nn.Module):
    """The kernel of a convolution without bias, not applied."""

    size: int
    inputs: int
    features: int
    init: Any

    @nn.compact
    def __call__(self):
        shape = (self.size, self.size, self.inputs, self.features)
        return self.param("kernel", self.init, shape, jnp.float32)


class _Norm(nn.Module):
    """Scale, bias and, where they are kept, running statistics, not applied."""

    width: int
    keeps_statistics: bool

    @nn.compact
    def __call__(self):
        width = (self.width,)
        held = {
            "scale": self.param("scale", nn.initializers.ones, width, jnp.float32),
            "bias": self.param("bias", nn.initializers.zeros, width, jnp.float32),
        }
        if self.keeps_statistics:
            for name, fill in (("mean", jnp.zeros), ("var", jnp.ones)):
                held[name] = self.variable("batch_stats", name, fill, width)
        return held


def normalized(x, held: dict, how: Normalization, mask, train: bool, order: Order):
    """(x normalised, the running statistics as this batch moves them).

    Statistics are over the examples of `mask` [B] (None: all).
    """
    kept = {name: held[name] for name in ("mean", "var") if name in held}
    if how.norm == "group":
        layer = nn.GroupNorm(how.groups, epsilon=1e-5, parent=None)
        return order.turned(layer.apply({"params": held}, order.turned(x))), kept
    if train or not how.keeps_statistics:
        examples = order.examples
        member = jnp.ones(x.shape[examples]) if mask is None else mask.astype(x.dtype)
        share = order.of_examples(member / jnp.maximum(member.sum(), 1))
        mean = jnp.sum(share * x.mean((1, 2)), axis=examples)
        apart = jnp.square(x - order.of_channels(mean))
        var = jnp.sum(share * apart.mean((1, 2)), axis=examples)
        if kept:
            count = member.sum() * (x.shape[1] * x.shape[2])
            factor = count / jnp.maximum(count - 1, 1) if how.unbiased else 1.0
            for name, seen in (("mean", mean), ("var", factor * var)):
                moved = how.momentum * kept[name] + (1 - how.momentum) * seen
                kept[name] = jnp.where(member.sum() > 0, moved, kept[name])
    else:
        mean, var = kept["mean"], kept["var"]
    # An aggregate of variances that attackers had a part in may be negative.
    factor = held["scale"] * jax.lax.rsqrt(jnp.maximum(var, 0.0) + 1e-5)
    shift = held["bias"] - mean * factor
    return x * order.of_channels(factor) + order.of_channels(shift), kept


class Residual(nn.Module):
    """conv 3x3x16, three stages of `blocks` residual blocks, mean, classes.

    `block` is `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3, 1x1, the last four times as
    wide); `shortcut` is `pad` (every other pixel, zeros in new channels) or `conv` (a 1x1
    convolution and a normalisation) where a block changes the shape.
    """

    num_classes: int
    blocks: int
    block: str
    shortcut: str
    normalization: Normalization
    kernels: Any  # initialiser of the convolutions
    scheme: str  # initial values of the last layer, see `kernel_init`
    lowering: str

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        images = Convolutional(self.lowering, self.scheme, convolution.UNPOOLED)
        how = self.normalization
        order = Order(channels_first=images.lowering == "chwn")

        def declare(name, size, inputs, width):
            kernel = _Kernel(size, inputs, width, self.kernels, name=f"conv_{name}")()
            norm = _Norm(width, how.keeps_statistics, name=f"norm_{name}")()
            return {"kernel": kernel, **norm}

        def layer(x, held, stride=1):
            x = order.conv(x, held["kernel"], images.lowering, stride)
            return normalized(x, held, how, mask, train, order)

        def residual(x, layers, stride):
            """(the block's output, its layers' statistics)"""
            y, moved = x, {}
            for letter, _, strides in _LAYERS[self.block]:
                y = nn.relu(y) if moved else y
                y, moved[letter] = layer(y, layers[letter], stride if strides else 1)
            if "s" in layers:
                x, moved["s"] = layer(x, layers["s"], stride)
            elif x.shape != y.shape:
                x = order.widened(x[:, ::stride, ::stride], (outputs - inputs) // 2)
            return nn.relu(y + x), moved

        stem = declare("0", 3, x.shape[-1], WIDTHS[0])
        x, moved = layer(order.turned(x), _values(stem))
        self._keep(stem, moved, train)
        x, inputs = nn.relu(x), WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            outputs = width * _EXPANSION[self.block]
            equal = []  # the blocks of the stage that change no shape
            for number in range(self.blocks):
                stride = 2 if stage and not number else 1
                layers, before = {}, inputs
                for letter, size, _ in _LAYERS[self.block]:
                    last = letter == _LAYERS[self.block][-1][0]
                    after = outputs if last else width
                    layers[letter] = declare(f"{stage}{number}{letter}", size, before, after)
                    before = after
                if stride == 1 and inputs == outputs:
                    equal.append(layers)
                    continue
                if self.shortcut == "conv":
                    layers["s"] = declare(f"{stage}{number}s", 1, inputs, outputs)
                x, moved = residual(x, _values(layers), stride)
                self._keep(layers, moved, train)
                inputs = outputs
            x, moved = _in_turn(lambda x, layers: residual(x, layers, 1), x, equal)
            for layers, one in zip(equal, moved, strict=True):
                self._keep(layers, one, train)
        return images.dense(self.num_classes, order.pooled(x), "output")

    def _keep(self, held: dict, moved: dict, train: bool) -> None:
        """Puts the moved statistics where `held` has variables."""
        if not train or not self.is_mutable_collection("batch_stats"):
            return
        for name, part in held.items():
            if isinstance(part, dict):
                self._keep(part, moved[name], train)
            elif isinstance(part, nn.Variable):
                part.value = moved[name]


def _values(held: dict) -> dict:
    """The numbers, also of variables."""
    return jax.tree.map(
        lambda one: one.value if isinstance(one, nn.Variable) else one,
        held,
        is_leaf=lambda one: isinstance(one, nn.Variable),
    )


def _in_turn(fn, x, items: Sequence[dict]):
    """`fn(x, item) -> (x, out)` over all items: the last x, and the list of outs."""
    values = [_values(item) for item in items]
    if len(values) < _LOOPED:
        outs = []
        for one in values:
            x, out = fn(x, one)
            outs.append(out)
        return x, outs
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
    x, outs = jax.lax.scan(fn, x, stacked)
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], outs) for i in range(len(values))]


def fan_out(key, shape, dtype=jnp.float32):
    """PyTorch's `kaiming_normal_(mode="fan_out", nonlinearity="relu")`: N(0, 2 / (k k outputs))."""
    return nn.initializers.variance_scaling(2.0, "fan_out", "normal")(key, shape, dtype)


def kernels_of(init: str):
    """The initialiser of the convolutions: `fan_out`, or one of `kernel_init`'s."""
    return fan_out if init == "fan_out" else kernel_init(init)
