"""FedSecurity's Byzantine attack, which acts on models: zeros, noise, or the update reversed."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._models import check_read, global_model, trained
from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry, static


@registry.attacks.register("byzantine")
class Byzantine(UpdateAttack):
    r"""Malicious clients send a model of zeros, of random numbers, or mirrored at the global one.

    With the global model :math:`w_g` and the client's own trained model :math:`w_l`, it sends

    .. math:: w = 0, \qquad w \sim \mathcal{U}[-scale, scale)^D, \qquad w = w_g + (w_g - w_l)

    for `mode` `zero`, `random` and `flip`. As updates `[K, D] -> [K, D]`, what a client sends is
    :math:`w - w_g`: minus the global model, noise minus the global model, and its update reversed.
    The attacks `zero` and `random` act on updates instead: a zero update leaves the global model
    where it is, a zero model draws it to zero. `flip` equals `sign_flip`.

    A network's running statistics stay as the client trained them, and so does what an algorithm
    sends beside the model. The client reports its own number of examples. On a stack
    (`fedjax_sec.attack`) the global model is `params`, zeros where it is not given.

    The author code draws the attackers anew in every round: `threat.redraw`.

    Raises: `ConfigError` for a `scale` that the mode does not read, and where clients send fewer
    numbers than a model has.

    Source: Han et al. 2024 (FedSecurity), Section 3.1, zero, random and flipping mode. The text
    gives no distribution: [-1, 1) is the author code's (`byzantine_attack.py`), which has no field
    for it, and which leaves running statistics out (`is_weight_param`). The text does not say that
    attackers change from round to round.

    Example:
        >>> import fedjax_sec
        >>> bad = [True, False]
        >>> print(fedjax_sec.attack([[1.0], [2.0]], "byzantine", malicious=bad, params=[5.0]))
        [[-5.]
         [ 2.]]
    """

    separable = True
    mode: str = static("zero", "The model that is sent.", choices=("zero", "random", "flip"))
    scale: float = numeric(
        1.0, "Half-width of the weights, for `random`.", above=0, unbounded=ANY_SCALE
    )

    def check(self, path, setting):
        check_read(self, path, "mode", {"scale": ("random",)})

    def apply(self, key, updates, state, view):
        dim = updates.shape[1]
        model = global_model(view, dim).astype(updates.dtype)[None]
        if self.mode == "flip":
            crafted = -updates
        elif self.mode == "random":
            crafted = self.scale * jax.random.uniform(key, updates.shape, updates.dtype, -1.0, 1.0)
            crafted = crafted - model
        else:
            crafted = -model
        return jnp.where(trained(view, dim)[None], crafted, updates), state, {}
