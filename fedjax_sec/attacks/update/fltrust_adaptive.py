"""The adaptive attack on FLTrust: zeroth-order ascent against the trust-weighted mean."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._directed import (
    away,
    beyond,
    direction,
    own_update_alone,
    sees_all,
    stand_ins,
)
from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry, static, trained_part
from fedjax_sec.ops.distances import cosines_to
from fedjax_sec.ops.moments import row_norms, unit_rows


@registry.attacks.register("fltrust_adaptive")
class FLTrustAdaptive(UpdateAttack):
    r"""Malicious clients send the directions that turn FLTrust's aggregate the most.

    With unit vectors e_i = u_i / |u_i|, cosines c_i to the server update g_0, and
    :math:`g = \|g_0\| \sum_i \mathrm{ReLU}(c_i) e_i / \sum_i \mathrm{ReLU}(c_i)`, the malicious
    clients' directions e'_i maximise

    .. math:: h(e'_1, \dots, e'_m) = s^T (g - g'), \qquad s = \mathrm{sign}(g),

    where g' is the same with their directions. From the Trim attack's, in `rounds` V sweeps over
    the malicious clients each takes `steps` Q steps

    .. math:: e'_i \leftarrow e'_i + \eta \frac{h(e'_i + \gamma v) - h(e'_i)}{\gamma} v, \qquad
              v \sim N(0, \sigma^2 I),

    each brought back to length one, and sends :math:`\|g_0\| e'_i`.
    `updates [K, D] -> [K, D]`. Metrics: h before and after. Running statistics, which FLTrust does
    not measure, stay those of the first directions.

    The Trim attack's directions often point away from g_0. Nobody trusts them then, nor anything
    near them, so no difference is found and nothing moves; `begin: own` starts where there is
    trust.

    With `threat.knowledge: corrupted` the malicious clients' own updates stand in for the honest
    ones, and their mean for g_0: a choice.

    Raises: `ConfigError` with full knowledge and without `server.root`; when the adversary sees a
    single update and `rounds` is 0, since it would send just that.

    Source: Cao et al. 2021 (FLTrust), Section V and VI-A: V = Q = 10, gamma = 0.005, eta = 0.01,
    sigma^2 = 0.5. `deviation` "author" takes 0.5 for sigma, as SAFEFL's code does.

    Example:
        >>> import fedjax_sec, numpy as np
        >>> updates = np.random.default_rng(0).normal(1.0, 1.0, (8, 5))
        >>> sent = fedjax_sec.attack(
        ...     updates, "fltrust_adaptive", malicious=np.arange(8) < 2, knowledge="omniscient",
        ...     server_update=np.ones(5),
        ... )
        >>> print(np.linalg.norm(sent[:2], axis=1).round(3))
        [2.236 2.236]
    """

    needs = frozenset({"root"})
    rounds: int = static(10, "V, sweeps over the malicious clients.", low=0, high=10**6)
    steps: int = static(10, "Q, steps of one client in a sweep.", low=1, high=10**6)
    smoothing: float = numeric(
        0.005, "gamma, length of the difference.", above=0, unbounded=ANY_SCALE
    )
    step_size: float = numeric(0.01, "eta.", above=0, unbounded=ANY_SCALE)
    variance: float = numeric(
        0.5, "sigma^2 of the directions that are tried.", above=0, unbounded=ANY_SCALE
    )
    deviation: str = static(
        "paper",
        "sigma: the root of `variance`, or `variance` itself as in the `author` code.",
        choices=("paper", "author"),
    )
    begin: str = static(
        "trim",
        "The first directions: the `trim` attack's, or of the clients' `own` updates.",
        choices=("trim", "own"),
    )
    b: float = numeric(2.0, "Of the Trim attack.", low=1, high=1e6)

    def idle(self, setting):
        still = self.rounds == 0 and setting.knowledge == "corrupted"
        return own_update_alone(self.registered_name, setting) if still else None

    def apply(self, key, updates, state, view):
        full, known = sees_all(view), stand_ins(view)
        trim_key, search_key = jax.random.split(key)
        sign = direction(updates, view)
        begin = jnp.where(view.corrupted[:, None], updates, _mean(updates, view.corrupted))
        if self.begin == "trim":
            chance = jax.random.uniform(trim_key, updates.shape, updates.dtype)
            begin = jnp.where(
                full,
                beyond(updates, view, sign, chance, self.b, "paper"),
                away(updates, view, sign, chance, 3.0, 4.0),
            )
        server = _mean(updates, view.corrupted)
        if view.server_update is not None:
            server = view.server_update().astype(updates.dtype)
        place = trained_part(view.space, updates.shape[1])  # over which FLTrust measures
        rows, server, whole, begin = updates[:, place], server[place], begin, begin[:, place]
        length = jnp.linalg.norm(server)
        unit = unit_rows(rows, row_norms(rows))
        goal = unit_rows(server[None], length[None])[0]

        # The rule's sum over clients that are not the adversary's: with partial knowledge
        # the stand-ins are counted as if they were there beside it.
        trust = jax.nn.relu(cosines_to(rows, server, known))
        everyone = jax.nn.relu(cosines_to(rows, server, known | view.corrupted))
        clean = _share(everyone @ unit, everyone.sum())
        target = jnp.where(clean < 0, -1.0, 1.0).astype(updates.dtype)

        def worth(trust, pull):
            """h from two numbers: the sum of scores, and s^T of the scored directions' sum."""
            return length * (target @ clean - pull / jnp.where(trust > 0, trust, 1.0))

        crafted = jnp.where(view.malicious[:, None], unit_rows(begin, row_norms(begin)), 0.0)
        sigma = jnp.sqrt(self.variance) if self.deviation == "paper" else self.variance

        def totals(crafted):
            scores = jnp.where(view.malicious, jax.nn.relu(crafted @ goal), 0.0)
            return trust.sum() + scores.sum(), target @ (trust @ unit) + scores @ (crafted @ target)

        def one_client(i, crafted, sweep_key):
            score, pull = totals(crafted)
            mine = jax.nn.relu(crafted[i] @ goal)
            rest = score - mine, pull - mine * (crafted[i] @ target)

            def with_client(cosine, along):
                score = jax.nn.relu(cosine)
                return worth(rest[0] + score, rest[1] + score * along)

            def one_step(step, one):
                drawn = jax.random.fold_in(jax.random.fold_in(sweep_key, i), step)
                trial = sigma * jax.random.normal(drawn, one.shape, one.dtype)
                # Both values of h from six products: |one| is 1.
                far = jnp.sqrt(
                    1 + 2 * self.smoothing * (one @ trial) + self.smoothing**2 * (trial @ trial)
                )
                cosine, along = one @ goal, one @ target
                there = with_client(
                    (cosine + self.smoothing * (trial @ goal)) / far,
                    (along + self.smoothing * (trial @ target)) / far,
                )
                slope = (there - with_client(cosine, along)) / self.smoothing
                moved = one + self.step_size * slope * trial
                return moved / jnp.maximum(jnp.linalg.norm(moved), 1e-30)

            searched = jax.lax.fori_loop(0, self.steps, one_step, crafted[i])
            return crafted.at[i].set(jnp.where(view.malicious[i], searched, crafted[i]))

        # Only the adversary's rows, first in this order, are searched.
        order = jnp.argsort(~view.malicious, stable=True)
        bad = view.malicious.sum()

        def one_sweep(number, crafted):
            sweep_key = jax.random.fold_in(search_key, number)
            return jax.lax.fori_loop(
                0, bad, lambda j, crafted: one_client(order[j], crafted, sweep_key), crafted
            )

        before = worth(*totals(crafted))
        crafted = jax.lax.fori_loop(0, self.rounds, one_sweep, crafted)
        metrics = {"objective_before": before, "objective": worth(*totals(crafted))}
        sent = whole.at[:, place].set(length * crafted)
        return sent.astype(updates.dtype), state, metrics


def _mean(rows, mask):
    return jnp.sum(jnp.where(mask[:, None], rows, 0.0), axis=0) / jnp.maximum(mask.sum(), 1)


def _share(along, total):
    """The trust-weighted mean direction; zero where nobody is trusted."""
    return along / jnp.where(total > 0, total, 1.0)
