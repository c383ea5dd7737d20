"""FedSecurity's lazy worker: a client that sends an old model, masked, instead of training."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._models import check_read, global_model, trained
from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry, static


@registry.attacks.register("lazy_worker")
class LazyWorker(UpdateAttack):
    r"""Malicious clients send the global model, or their own previous one, behind a mask of noise.

    With the global model :math:`w_g`, the previous model :math:`p_i` and a mask :math:`m_i`,
    client i sends :math:`p_i + m_i`; as an update

    .. math:: u_i = p_i - w_g + m_i

    `updates [K, D] -> [K, D]`. With `base: global`, :math:`p_i = w_g`, so what is left is the mask.
    With `base: client` it is the model that the client sent when it trained last: in rounds in
    which it is not malicious (`threat.redraw`, `threat.every`), and the first time that it takes
    part, when it has none yet and sends its honest update. From then on a client that stays
    malicious sends that one model for ever.

    The mask is drawn for each client and round: none; `uniform`, one number from
    :math:`\mathcal{U}[-scale, scale)` for all weights; `random`, one for each weight; `gaussian`,
    :math:`\mathcal{N}(mean, scale^2)` for each weight. Running statistics are sent without a mask.

    With `base: client` the state has one model for each of the N registered clients, whoever takes
    part: N D numbers of 4 bytes. On a stack (`fedjax_sec.attack`), where there is one round,
    `base: client` is refused.

    `convention: fedsecurity` is the author code with a counter of rounds that advances (in the code
    it stays at 1, so the attack never acts, which is not offered):

    - nobody is lazy in the first round, whatever the base;
    - the previous model is that of the client's position in the round, which is another client's
      where some clients are drawn in each round;
    - masks are written into the model that they hide. With `base: client` they add up from round
      to round. With `base: global` all lazy clients share one model: each of them sends the global
      model and the sum of all their masks.

    Raises: `ConfigError` for a `scale` or `mean` that the mask does not read, for a run that ends
    before the attack begins, and where clients send fewer numbers than a model has.

    Source: Han et al. 2024 (FedSecurity), Table 1, which names the attack and cites Fraboni et al.
    2021 and Wang 2022 for it; bases, masks and their numbers are those of the author code
    (`lazy_worker.py`), which has no field for the width of `uniform` and `random`. Both defaults,
    and an honest first round of each client, are choices.

    Example:
        >>> import fedjax_sec
        >>> bad = [True, False]
        >>> print(fedjax_sec.attack([[1.0], [2.0]], "lazy_worker", malicious=bad)[:, 0])
        [0. 2.]
    """

    base: str = static(
        "global",
        "The model that is sent again: the `global` one, or the `client`'s own previous one.",
        choices=("global", "client"),
    )
    mask: str = static(
        "none",
        "Noise on it: `none`, `uniform`: one number for all weights, `random` or `gaussian`: one "
        "for each.",
        choices=("none", "uniform", "random", "gaussian"),
    )
    scale: float = numeric(
        1.0, "Half-width of the mask, of `gaussian` its deviation.", above=0, unbounded=ANY_SCALE
    )
    mean: float = numeric(0.0, "Mean of a `gaussian` mask.", unbounded=ANY_SCALE)
    convention: str = static(
        "paper",
        "Each client's own model and a new mask (`paper`), or as `fedsecurity`'s code does it.",
        choices=("paper", "fedsecurity"),
    )

    @property
    def separable(self):
        return self.convention == "paper"  # fedsecurity's adds up all attackers' masks

    @property
    def warm_up(self):
        return int(self.base == "client" or self.convention == "fedsecurity")

    def check(self, path, setting):
        masks = ("uniform", "random", "gaussian")
        check_read(self, path, "mask", {"scale": masks, "mean": ("gaussian",)})

    def init(self, num_clients, dim):
        if self.base == "client":
            return {"held": jnp.zeros(num_clients, bool), "models": jnp.zeros((num_clients, dim))}
        return {"held": jnp.zeros((), bool)} if self.convention == "fedsecurity" else ()

    def _slots(self, view):
        """Whose previous model each row is: the client's, or that of the position."""
        if self.convention == "paper":
            return view.client_ids
        return jnp.arange(view.client_ids.shape[0])

    def _masks(self, key, shape, view):
        """[K, D], zero where nothing is trained."""
        if self.mask == "none":
            return jnp.zeros(shape)
        if self.mask == "gaussian":
            drawn = self.mean + self.scale * jax.random.normal(key, shape)
        else:
            count = 1 if self.mask == "uniform" else shape[1]
            drawn = self.scale * jax.random.uniform(key, (shape[0], count), minval=-1.0, maxval=1.0)
        return jnp.where(trained(view, shape[1])[None], drawn, 0.0)

    def apply(self, key, updates, state, view):
        masks = self._masks(key, updates.shape, view)
        if self.base == "global":
            if self.convention == "paper":
                return masks.astype(updates.dtype), state, {}
            shared = view.malicious.astype(masks.dtype) @ masks
            return jnp.where(state["held"], shared[None].astype(updates.dtype), updates), state, {}
        slots, model = self._slots(view), global_model(view, updates.shape[1])
        held, sent = state["held"][slots], state["models"][slots] + masks
        if self.convention == "fedsecurity":
            masked = (held & view.malicious)[:, None]
            kept = jnp.where(masked, sent, state["models"][slots])
            state = state | {"models": state["models"].at[slots].set(kept)}
        crafted = (sent - model[None]).astype(updates.dtype)
        return jnp.where(held[:, None], crafted, updates), state, {}

    def remember(self, state, message, rows, view):
        if self.base == "global":
            return {"held": jnp.ones((), bool)} if self.convention == "fedsecurity" else state
        slots, dim = self._slots(view), message.vector.shape[1]
        held, old = state["held"][slots], state["models"][slots]
        trains = rows & (~view.malicious | ~held)
        model = global_model(view, dim)[None] + message.vector
        new = jnp.where(trains[:, None], model, old)
        return {
            "held": state["held"].at[slots].set(held | trains),
            "models": state["models"].at[slots].set(new.astype(old.dtype)),
        }
