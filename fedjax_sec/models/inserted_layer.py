"""Another network behind a dense layer that takes the input itself."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, Network, component, registry, static

#: The names of the layer, and of the one that leads back to the input's shape.
LAYER, BACK = "inserted", "inserted_back"


@registry.models.register("inserted_layer")
class InsertedLayer(Network):
    r"""A dense layer with ReLU between the normalised input and the network `base`.

    With x the normalised input, flat, of F numbers, and h of `units`,

    .. math:: h = \max(0, x W + b), \qquad
              x' = \begin{cases} h V + c & \text{connection: linear} \\
              x + \mathrm{mean}(h) & \text{connection: addition} \end{cases}

    and the base takes x' in the shape of x. A malicious server puts it in front of an honest
    network to read inputs from its gradient: `imprint` and `curious_abandon_honesty` insert it
    themselves. Initially W is normal of variance 1 / F, V of 1 / units, and b and c are 0.

    Source: Fowl et al. 2022 (Robbing the Fed), Section 3; the connections are those of breaching
    (Geiping et al.), `imprint.py`.

    Example:
        >>> from fedjax_sec.core import make_space, registry
        >>> spec = {"name": "inserted_layer", "units": 2, "base": "logistic_regression"}
        >>> make_space(registry.models.build(spec).make((4, 4, 1), 10)).dim  # 170 without it
        252
    """

    inputs = frozenset({"pixels", "features"})
    base: Any = component("model", "mlp", "The network behind the layer.")
    units: int = static(64, "Units of the layer.", low=1, high=COUNT)
    connection: str = static(
        "linear", "How the layer leads to the network.", choices=("linear", "addition")
    )

    def make(self, input_shape, num_classes):
        base = self.base.make(input_shape, num_classes)
        features = 1
        for size in input_shape:
            features *= size

        def init(key):
            first, second, rest = jax.random.split(key, 3)
            variables = dict(base.init(rest))
            added = {LAYER: _dense(first, features, self.units)}
            if self.connection == "linear":
                added[BACK] = _dense(second, self.units, features)
            return variables | {"params": {**variables["params"], **added}}

        def through(params, x):
            flat = x.reshape(x.shape[0], features)
            h = jax.nn.relu(flat @ params[LAYER]["kernel"] + params[LAYER]["bias"][None])
            if self.connection == "linear":
                flat = h @ params[BACK]["kernel"] + params[BACK]["bias"][None]
            else:
                flat = flat + h.mean(axis=1, keepdims=True)
            return flat.reshape(x.shape)

        def behind(variables):
            params = variables["params"]
            kept = {name: one for name, one in params.items() if name not in (LAYER, BACK)}
            return {**variables, "params": kept}

        def apply(variables, x, **options):
            return base.apply(behind(variables), through(variables["params"], x), **options)

        def observe(variables, x, mask, key):
            out, moved = base.observe(behind(variables), through(variables["params"], x), mask, key)
            return out, {**moved, "params": variables["params"]}

        return base._replace(
            init=init, apply=apply, observe=None if base.observe is None else observe, parts={}
        )


def _dense(key, inputs: int, units: int) -> dict:
    kernel = jax.random.normal(key, (inputs, units)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(units)}
