"""Krum attack: the farthest step against the server's direction that Krum still selects."""

import jax.numpy as jnp
from jax import lax

from fedjax_sec.attacks.update._directed import direction, sees_all, sees_one_row, stand_ins
from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry, static, trained_part
from fedjax_sec.ops.distances import krum_scores, squared_distances


@registry.attacks.register("krum_attack")
class KrumAttack(UpdateAttack):
    r"""All malicious clients send the longest step against the honest direction that Krum selects.

    .. math:: u_{mal} = -\lambda s

    with s the sign of the mean update without an attack, and lambda the first of
    :math:`\lambda_0, \lambda_0 / 2, \lambda_0 / 4, \dots` for which Krum selects it. The first is
    the bound beyond which it cannot be selected,

    .. math:: \lambda_0 = \sqrt{\frac{\min_i \sum_{l \in \Gamma_i} \|u_i - u_l\|^2}{(K - 2c - 1) D}}
              + \frac{\max_i \|u_i\|}{\sqrt D}

    over honest clients i and their K - c - 2 nearest honest clients :math:`\Gamma_i`. Below
    `threshold` the search ends and that lambda is used; `krum_attack/selected` says whether Krum
    would take it.

    With full knowledge (`threat.knowledge: omniscient`) c malicious clients send this one vector
    among the honest updates. With partial knowledge the malicious clients' own updates stand in for
    the honest ones, and as few copies of the vector as necessary, from 1 to c, are among them.
    `updates [K, D] -> [K, D]`; D in lambda_0 counts no running statistics, as Krum's distances.

    Raises: `ConfigError` when the adversary sees a single update: Krum would never select the
    vector.

    Source: Fang, Cao, Jia, Gong 2020 (Local model poisoning attacks), Section 4.2 and Theorem 1,
    threshold 1e-5. All copies are equal, the limit of its epsilon. With partial knowledge K is the
    c stand-ins and the copies, so Krum sums c - 2 distances (at least 1), a choice where the text
    is silent. `convention="author"` takes the first lambda of FLAIR's released code (`attack.py`,
    `lambda_max`): the smallest sum of squares itself, not its root, over
    :math:`\sqrt{K - 2c - 1} \sqrt D`. `toward="krum"` uses the sign of what Krum would select
    without an attack, as in SAFEFL and FLDetector, instead of the mean's.

    Example:
        >>> import fedjax_sec, numpy as np
        >>> updates = np.random.default_rng(0).normal(0.3, 1.0, (12, 4))
        >>> mask = np.arange(12) < 2
        >>> attack = {"name": "krum_attack"}
        >>> sent = fedjax_sec.attack(updates, attack, malicious=mask, knowledge="omniscient")
        >>> picked = fedjax_sec.aggregate(sent, "krum", num_byzantine=2)
        >>> bool((picked == sent[0]).all())
        True
    """

    threshold: float = numeric(1e-5, "Smallest lambda that is tried.", above=0, unbounded=ANY_SCALE)
    convention: str = static(
        "paper",
        "First lambda: Theorem 1's, or that of FLAIR's code (`author`).",
        choices=("paper", "author"),
    )
    toward: str = static(
        "mean",
        "The direction to go against: the `mean` update's, or Krum's choice.",
        choices=("mean", "krum"),
    )

    def idle(self, setting):
        if sees_one_row(setting):
            return (
                "krum_attack would send next to nothing, for the adversary sees one update, its "
                "own, between which and a crafted one Krum cannot choose. Give it 2 malicious "
                "clients or more (threat.num_malicious), or let it see all (knowledge omniscient)."
            )
        return None

    def apply(self, key, updates, state, view):
        clients = updates.shape[0]
        place = trained_part(view.space, updates.shape[1])  # over which Krum measures
        rows, dim = updates[:, place], place.stop - place.start
        honest, full = stand_ins(view), sees_all(view)
        bad = view.malicious.sum()
        neighbours = jnp.where(full, clients - bad - 2, honest.sum() - 2)
        neighbours = jnp.maximum(neighbours, 1)
        honest_rows = jnp.where(honest[:, None], rows, 0.0)
        squares, scale = squared_distances(honest_rows, honest)
        pairs = honest[:, None] & honest[None, :] & ~jnp.eye(clients, dtype=bool)
        squares = jnp.where(pairs, squares / scale**2, jnp.inf)
        sign = direction(updates, view)
        if self.toward == "krum":
            everyone, unit = squared_distances(rows, view.visible)
            scores = krum_scores(everyone / unit**2, view.visible, neighbours)
            chosen = updates[jnp.argmin(scores)]
            sign = jnp.where(chosen < 0, -1.0, 1.0).astype(updates.dtype)

        # |-lambda s - u|^2 = lambda^2 D + 2 lambda <s, u> + |u|^2: no further pass over the stack.
        norms, along = jnp.sum(honest_rows * honest_rows, axis=1), honest_rows @ sign[place]
        nearest = _smallest(squares, neighbours)
        spread = jnp.min(jnp.where(honest, nearest, jnp.inf))
        spread = jnp.where(jnp.any(honest), spread, 0.0)
        rest = jnp.maximum(clients - 2 * bad - 1, 1)
        bound = jnp.sqrt(spread / rest / dim)
        if self.convention == "author":
            bound = spread / jnp.sqrt(rest) / jnp.sqrt(dim)
        start = bound + jnp.sqrt(jnp.max(norms)) / jnp.sqrt(dim)

        def selected(size, copies):
            """Whether Krum takes the vector, `copies` times among the rows `honest`."""
            far = jnp.where(honest, size * size * dim + 2 * size * along + norms, jnp.inf)
            rank = jnp.arange(clients)
            repeated = jnp.where(rank[None, :] < copies, far[:, None], jnp.inf)
            others = _smallest(jnp.concatenate([squares, repeated], axis=1), neighbours)
            to_own = jnp.where(rank < copies - 1, 0.0, jnp.inf)  # the other copies
            crafted = _smallest(jnp.concatenate([far, to_own])[None], neighbours)[0]
            return crafted < jnp.min(jnp.where(honest, others, jnp.inf))

        def searching(carry):
            size, copies, selects = carry
            return ~selects & ((size >= self.threshold) | (copies < bad))

        def search(carry):
            size, copies, _ = carry
            selects = selected(size, copies)
            smaller = size / 2
            exhausted = ~selects & (smaller < self.threshold) & (copies < bad)
            copies = jnp.where(exhausted, copies + 1, copies)
            smaller = jnp.where(exhausted, start, smaller)
            return jnp.where(selects, size, smaller), copies, selects

        begin = (start, jnp.where(full, bad, jnp.minimum(bad, 1)), jnp.array(False))
        size, _, selects = lax.while_loop(searching, search, begin)
        crafted = jnp.broadcast_to((-size * sign).astype(updates.dtype), updates.shape)
        return crafted, state, {"lambda": size, "selected": selects.astype(jnp.float32)}


def _smallest(distances, count):
    """The sum of the `count` smallest of each row [n, k] -> [n]; missing ones (infinite) are 0."""
    ordered = jnp.sort(distances, axis=1)
    wanted = (jnp.arange(distances.shape[1]) < count)[None] & jnp.isfinite(ordered)
    return jnp.sum(jnp.where(wanted, ordered, 0.0), axis=1)
