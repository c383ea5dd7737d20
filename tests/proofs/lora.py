"""LoRA around another network: its base is frozen, pairs A B beside its layers are trained."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, component, registry, static


@registry.models.register("adapted")
class Adapted:
    """x W + x A B for every kernel W of two axes."""

    base: Any = component("model", "mlp", "The network that is frozen.")
    rank: int = static(2, "Columns of A.", low=1, high=COUNT)

    def make(self, input_shape, num_classes):
        base = self.base.make(input_shape, num_classes)

        def pairs(key, params):
            leaves = jax.tree.leaves_with_path(params)
            named = [(jax.tree_util.keystr(p, simple=True, separator="/"), v) for p, v in leaves]
            kernels = {n.rpartition("/")[0]: v for n, v in named if n.endswith("/kernel")}
            made = {}
            for i, (at, kernel) in enumerate(kernels.items()):
                if kernel.ndim == 2:
                    rows, columns = kernel.shape
                    a = jax.random.normal(jax.random.fold_in(key, i), (rows, self.rank))
                    made[at] = {"a": a / rows**0.5, "b": jnp.zeros((self.rank, columns))}
            return made

        def init(key):
            variables = base.init(key)
            return {**variables, "lora": pairs(key, variables["params"])}

        def apply(variables, x, **options):
            beside, used = variables["lora"], set()

            def add(call, args, kwargs, context):  # by path: a layer's class may be anybody's
                out, at = call(*args, **kwargs), "/".join(context.module.path)
                if (
                    at in beside
                    and context.method_name == "__call__"
                    and isinstance(out, jax.Array)
                ):
                    used.add(at)
                    out = out + args[0] @ beside[at]["a"] @ beside[at]["b"]
                return out

            rest = {name: part for name, part in variables.items() if name != "lora"}
            with nn.intercept_methods(add):
                out = base.apply(rest, x, **options)
            if used != set(beside):
                raise ConfigError(f"model: no layer is called at {sorted(set(beside) - used)}.")
            return out

        return base._replace(
            init=init, apply=apply, trainable=lambda name: name.startswith("lora/"), head=""
        )
