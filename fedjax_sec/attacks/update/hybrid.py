"""Two attacks at once: a few clients aim at no defence, the others at the robust ones."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, UpdateAttack, component, registry, static


@registry.attacks.register("hybrid")
class Hybrid(UpdateAttack):
    r"""The first `num_solo` malicious clients run `solo`, the other ones `main`, in every round.

    ALIE does little against the plain mean; one client dedicated to it ("No Defense") breaks that
    too, and the defences that discard this client still face the others. Both attacks are computed
    from the honest updates that the adversary sees. `updates [K, D] -> [K, D]`.

    Raises: `ConfigError` unless there are more malicious clients than `num_solo`.

    Source: Baruch et al. 2019, Section 4.1 ("one worker is dedicated to attack No Defense with
    attacks detailed in earlier papers") and Section 4.2.

    Example:
        >>> import fedjax_sec
        >>> updates = [[1.0], [3.0], [2.0], [2.0]]
        >>> mask = [True, True, False, False]
        >>> hybrid = {"name": "hybrid", "solo": "zero"}
        >>> print(fedjax_sec.attack(updates, hybrid, malicious=mask)[:, 0])
        [0.  3.5 2.  2. ]
    """

    main: Any = component("attack", {"name": "alie", "z": 1.5}, "What the other clients send.")
    solo: Any = component("attack", "mean_control", "What the dedicated clients send.")
    num_solo: int = static(1, "Dedicated clients.", low=1, high=COUNT)

    @property
    def separable(self):
        return self.main.separable and self.solo.separable

    def shares(self, ranks):
        """Which of the malicious clients, by their ranks, carry out each of the two."""
        return {"main": ranks >= self.num_solo, "solo": ranks < self.num_solo}

    def check(self, path, setting):
        for name in ("main", "solo"):
            part = getattr(self, name)
            if part.stage != "update":
                raise ConfigError(
                    f"{path}.{name} must be an attack on updates, got {part.registered_name!r}."
                )
        if setting.num_malicious is not None and setting.num_malicious <= self.num_solo:
            raise ConfigError(
                f"{path}.num_solo must be < the {setting.num_malicious} malicious clients, "
                f"got {self.num_solo}; raise threat.num_malicious to {self.num_solo + 1} or more."
            )

    def init(self, num_clients, dim):
        return {
            "main": self.main.init(num_clients, dim),
            "solo": self.solo.init(num_clients, dim),
        }

    def apply(self, key, updates, state, view):
        ranks = jnp.cumsum(view.malicious) - 1 if view.ranks is None else view.ranks
        alone = view.malicious & self.shares(ranks)["solo"]
        solo_key, main_key = jax.random.split(key)
        main_view = view._replace(ranks=ranks - self.num_solo)
        crafted, main_state, metrics = self.main.apply(main_key, updates, state["main"], main_view)
        everyone = view.malicious if view.adversary is None else view.adversary
        solo_view = view._replace(malicious=alone, adversary=everyone, ranks=ranks)
        single, solo_state, _ = self.solo.apply(solo_key, updates, state["solo"], solo_view)
        crafted = jnp.where(alone[:, None], single, crafted)
        return crafted, {"main": main_state, "solo": solo_state}, metrics

    def remember(self, state, message, rows, view):
        return {
            "main": self.main.remember(state["main"], message, rows, view),
            "solo": self.solo.remember(state["solo"], message, rows, view),
        }
