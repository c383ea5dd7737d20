"""Low-rank adaptation around another network (Hu et al., ICLR 2022)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    Network,
    component,
    make_space,
    one_line,
    registry,
    static,
)

_PAIRS = "lora"


@registry.models.register("lora")
class Lora(Network):
    r"""Freezes the network `base` and trains a pair of thin matrices beside each of its layers.

    A layer with kernel :math:`W` [in, out] computes, with A [in, r] and B [r, out],

    .. math:: x W + \frac{\alpha}{r} (x A) B

    A begins with normal numbers of variance 1 / in, B with zeros, so that training begins at the
    base. Layers are those with a kernel of two axes; convolutions and biases stay frozen without a
    pair. D is the number of parameters of all pairs, r (in + out) each: only they are trained,
    sent, attacked and defended. Running statistics of the base are observed as without LoRA. The
    frozen base is held once, whatever the number of clients, seeds and replicas.

    Without `base_params` the base is drawn once, from a fixed key, the same for all seeds. With
    `checkpoint.keep_params: true` a finished run keeps its parameters in `params.npy`, in the order
    that `base_params` needs.

    Raises: `ConfigError` for a base without a kernel of two axes, one whose layer with such a
    kernel is never called as a layer (flax's `OptimizedLSTMCell` joins its kernels), and for a file
    that does not hold the base's parameters.

    Source: Hu et al. 2021 (LoRA: low-rank adaptation of large language models), Section 4.1,
    Equation 3: alpha / r, B = 0, A normal; its variance is a choice. The paper adapts attention
    weights only.

    Example:
        >>> from fedjax_sec.core import make_space, registry
        >>> model = registry.models.build({"name": "lora", "rank": 2}).make((28, 28, 1), 10)
        >>> make_space(model).dim  # of 79,510
        1988
    """

    base: Any = component("model", "mlp", "The network that is frozen.")
    rank: int = static(4, "r, columns of A.", low=1, high=COUNT)
    alpha: float = static(8.0, "Weight of the pairs, divided by r.", above=0, high=1e6)
    base_params: str | None = static(
        None, "File of the base's parameters [D], `params.npy` of a run (null: drawn)."
    )

    def make(self, input_shape, num_classes):
        base = self.base.make(input_shape, num_classes)
        scale = self.alpha / self.rank
        shapes = jax.eval_shape(base.init, jax.random.key(0))
        kernels = _kernels(shapes["params"])
        if not kernels:
            raise ConfigError(
                f"model.base: {self.base.registered_name!r} has no layer with a kernel [in, out], "
                f"so lora has nothing to adapt."
            )

        def init(key):
            pairs = {}
            for i, (at, (rows, columns)) in enumerate(kernels.items()):
                a = jax.random.normal(jax.random.fold_in(key, i), (rows, self.rank))
                pairs[at] = {"a": a / rows**0.5, "b": jnp.zeros((self.rank, columns))}
            return {**base.init(key), _PAIRS: pairs}

        def with_pairs(variables, call):
            """What `call(the base's variables)` gives when each layer adds its pair's output."""
            pairs, used = variables[_PAIRS], set()

            def add(layer, args, kwargs, context):
                out = layer(*args, **kwargs)
                # By path: by class one of our own layers, such as `_Dense`, would be missed.
                at = "/".join(context.module.path)
                if at in pairs and context.method_name == "__call__" and hasattr(out, "ndim"):
                    used.add(at)
                    pair = pairs[at]
                    # x A first: A B, and W + A B, would be a matrix of W's size for each client.
                    out = out + scale * ((args[0] @ pair["a"]) @ pair["b"])
                return out

            with nn.intercept_methods(add):
                result = call({name: v for name, v in variables.items() if name != _PAIRS})
            if missed := sorted(set(pairs) - used):
                raise ConfigError(
                    f"model.base: {self.base.registered_name!r} never calls {missed[0]!r} as a "
                    f"layer, so lora cannot adapt it."
                )
            return result

        def apply(variables, x, **options):
            return with_pairs(variables, lambda rest: base.apply(rest, x, **options))

        def observe(variables, x, mask, key):
            out, moved = with_pairs(variables, lambda rest: base.observe(rest, x, mask, key))
            return out, {**moved, _PAIRS: variables[_PAIRS]}

        def init_frozen():
            drawn = init(jax.random.key(0))
            if self.base_params is None:
                return drawn
            return {**_read(self.base_params, base), _PAIRS: drawn[_PAIRS]}

        return base._replace(
            init=init,
            apply=apply,
            observe=None if base.observe is None else observe,
            trainable=lambda name: name.startswith(f"{_PAIRS}/"),
            init_frozen=init_frozen,
            parts={},
            head="",
        )


def _kernels(params) -> dict[str, tuple[int, int]]:
    """layer -> the shape of its kernel, of all layers whose kernel has two axes."""
    shapes = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        layer, _, leaf_name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        if leaf_name == "kernel" and len(leaf.shape) == 2:
            shapes[layer] = leaf.shape
    return shapes


def _read(path: str, base) -> Any:
    """The base's variables from a file of its parameters [D]."""
    space, file = make_space(base), Path(path).expanduser().absolute()
    try:
        flat = np.load(file, allow_pickle=False)
    except Exception as error:  # NumPy raises whatever damaged bytes make it raise
        raise ConfigError(
            f"model.base_params: {str(file)!r} cannot be read ({type(error).__name__}: "
            f"{one_line(error, 200)})."
        ) from error
    if getattr(flat, "shape", None) != (space.dim,):
        raise ConfigError(
            f"model.base_params: {str(file)!r} must hold the base's {space.dim} parameters, got "
            f"shape {getattr(flat, 'shape', None)}; give model.base as in the run that wrote it."
        )
    return space.join(jnp.asarray(flat, jnp.float32), ())
