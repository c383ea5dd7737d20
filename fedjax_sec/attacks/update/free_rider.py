"""Free-riders: clients that want the model and do not train (Fraboni 2021, Lin 2019)."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._models import check_read, global_model, trained
from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry, static

_REMEMBER = ("disguised", "delta_weights", "advanced_delta_weights")


@registry.attacks.register("free_rider")
class FreeRider(UpdateAttack):
    r"""Malicious clients do not train: they send nothing new, noise, or the last global step again.

    With :math:`w_0, w_1, \dots` the global models that the adversary receives, one a round, and
    :math:`w_t` this round's, `updates [K, D] -> [K, D]` by `mode`:

    - `plain`: :math:`u = 0`, the global model as it is.
    - `disguised`: noise that fades as training converges,

      .. math:: u \sim \mathcal{N}\left(0, (c\, \sigma\, \max(t, 1)^{-\gamma})^2 I\right), \qquad
                \sigma = \frac{1}{D} \sum_j |w_{1,j} - w_{0,j}|

      with c the `multiplier` and :math:`\gamma` the `decay`; :math:`\sigma` is measured once, and
      in round t = 0, before there is a step to measure, it is `initial_std`.
    - `random`: :math:`u \sim \mathcal{U}[-R, R)^D`, R being `half_width`.
    - `delta_weights`: :math:`u = w_t - w_{t-1}`, the last global step; 0 in round 0.
    - `advanced_delta_weights`: that, plus :math:`\mathcal{N}(0, noise\_std^2 I)`, in round 0 too.

    Noise is drawn for each client. A round counts, and shows the adversary the model, if one of its
    clients is malicious in it; where few clients take part, or with `threat.every`, the last step
    spans several rounds, and with `threat.start` t begins there. Running statistics are sent as
    they were received, and what an algorithm sends beside the model is zero: choices. A free-rider
    reports its own number of examples. On a stack (`fedjax_sec.attack`) the round is t = 0.

    Raises: `ConfigError` for fields that the mode does not read, and where clients send fewer
    numbers than a model has.

    Source: Fraboni, Vidal, Lorenzi 2021 (Free-rider attacks on model aggregation in federated
    learning), plain and disguised free-riding; :math:`\sigma`, `initial_std` and round t = 0 as in
    the author code (`Freeloader_functions.py`), which runs c in {1, 3} and gamma in {0.5, 1, 2};
    the defaults are that script's. Lin, Du, Liu 2019 (Free-riders in federated learning: attacks
    and defenses), random weights, delta weights and advanced delta weights; the default of
    `half_width` is a choice.

    Example:
        >>> import fedjax_sec
        >>> bad = [True, False]
        >>> print(fedjax_sec.attack([[1.0], [2.0]], "free_rider", malicious=bad)[:, 0])
        [0. 2.]
    """

    separable = True
    mode: str = static(
        "plain",
        "What is sent: nothing new (`plain`), fading noise (`disguised`), noise (`random`), the "
        "last global step (`delta_weights`), or that with noise (`advanced_delta_weights`).",
        choices=("plain", "disguised", "random", "delta_weights", "advanced_delta_weights"),
    )
    multiplier: float = numeric(
        1.0, "c, of the noise of `disguised`.", above=0, unbounded=ANY_SCALE
    )
    decay: float = numeric(1.0, "gamma, how fast that noise fades.", low=0, high=1e3)
    initial_std: float = numeric(
        1e-3, "sigma of `disguised` before it is measured.", above=0, unbounded=ANY_SCALE
    )
    half_width: float = numeric(1e-3, "R, of `random`.", above=0, unbounded=ANY_SCALE)
    noise_std: float = numeric(
        1e-3,
        "Deviation of the noise of `advanced_delta_weights`.",
        above=0,
        unbounded=ANY_SCALE,
    )

    def check(self, path, setting):
        disguised = ("disguised",)
        readers = {
            "multiplier": disguised,
            "decay": disguised,
            "initial_std": disguised,
            "half_width": ("random",),
            "noise_std": ("advanced_delta_weights",),
        }
        check_read(self, path, "mode", readers)

    def init(self, num_clients, dim):
        if self.mode not in _REMEMBER:
            return ()
        return {"model": jnp.zeros(dim), "rounds": jnp.int32(0), "sigma": jnp.float32(0)}

    def apply(self, key, updates, state, view):
        shape, dtype = updates.shape, updates.dtype
        weights = trained(view, shape[1])
        if self.mode in _REMEMBER:
            step, state = self._look(weights, state, view)
        if self.mode == "plain":
            sent = jnp.zeros(shape, dtype)
        elif self.mode == "random":
            sent = self.half_width * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
        elif self.mode == "disguised":
            sent = self._std(state) * jax.random.normal(key, shape)
        else:
            sent = jnp.broadcast_to(step[None], shape)
            if self.mode == "advanced_delta_weights":
                sent = sent + self.noise_std * jax.random.normal(key, shape)
        return jnp.where(weights[None], sent, 0.0).astype(dtype), state, {}

    def _look(self, weights, state, view):
        """The step [D] to this round's model from the one before, and what is known from now on."""
        model = global_model(view, weights.shape[0]).astype(state["model"].dtype)
        step = jnp.where(state["rounds"] > 0, model - state["model"], 0.0)
        moved = jnp.where(weights, jnp.abs(step), 0.0).sum() / weights.sum()
        new = {
            "model": model,
            "rounds": state["rounds"] + 1,
            "sigma": jnp.where(state["rounds"] == 1, moved, state["sigma"]),
        }
        there = jnp.any(view.malicious)
        return step, {name: jnp.where(there, one, state[name]) for name, one in new.items()}

    def _std(self, state):
        """The deviation of this round's noise; `state` counts this round already."""
        t = state["rounds"] - 1
        sigma = jnp.where(t > 0, state["sigma"], self.initial_std)
        return self.multiplier * sigma * jnp.maximum(t, 1).astype(jnp.float32) ** -self.decay
