"""The gradient adaptive attack: ascent through the defence itself, whichever it is."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._directed import away, beyond, direction, sees_all, stand_ins
from fedjax_sec.core import (
    UpdateAttack,
    numeric,
    registry,
    static,
    trained_part,
    with_statistics,
)
from fedjax_sec.ops.moments import row_norms, unit_rows


@registry.attacks.register("gradient_adaptive")
class GradientAdaptive(UpdateAttack):
    r"""Malicious clients ascend the deviation of the aggregate through the server's own rule.

    With the rule A and the aggregate g of the updates without an attack,

    .. math:: h(U') = s^T (g - A(U')), \qquad s = \mathrm{sign}(g),

    is raised over the malicious rows by `steps` steps along its gradient,

    .. math:: u'_i \leftarrow \Pi\left(u'_i + \eta\, r\, \frac{\nabla_i h}{\|\nabla_i h\|}\right),

    r being the longest update taken for honest and :math:`\Pi` the projection to vectors no longer
    than `max_norm` r. A step that does not raise h is taken back, and the step size halved; so h
    never falls. Where the rule has no gradient (only a row that is selected, only votes) the start
    is what is sent. Lengths, h and the ascent are of the trained parameters; running statistics
    stay as at the start.

    `updates [K, D] -> [K, D]`. Metrics: h at the start and at the end. With `threat.knowledge:
    corrupted` the rows that are not seen are replaced by the malicious clients' own updates, in
    turn, and the mean of these is taken for what the server learns from its own examples.

    Raises: `ConfigError` outside an experiment unless the defence is named.

    Source: our own; the objective is that of Cao et al. 2021 (FLTrust), Section V, whose attack
    (`fltrust_adaptive`) estimates the gradient by random differences. Everything else is a choice.

    Example:
        >>> import fedjax_sec, numpy as np
        >>> updates = np.random.default_rng(0).normal(1.0, 1.0, (8, 5))
        >>> bad = np.arange(8) < 2
        >>> sent = fedjax_sec.attack(
        ...     updates, "gradient_adaptive", malicious=bad, knowledge="omniscient",
        ...     defense="median",
        ... )
        >>> bool(fedjax_sec.aggregate(sent, "median").sum()
        ...      < fedjax_sec.aggregate(updates, "median").sum())
        True
    """

    needs = frozenset({"rule"})
    steps: int = static(20, "Steps of the ascent.", low=1, high=10**6)
    step_size: float = numeric(0.2, "eta, of the longest honest update.", above=0, high=1e6)
    max_norm: float = numeric(
        1.0, "Longest malicious update, of the longest honest one.", above=0, high=1e6
    )
    begin: str = static(
        "best",
        "Where the ascent starts: the `trim` attack, the `reversed` mean, the clients' `own` "
        "updates, or all three, of which the `best` end is sent.",
        choices=("best", "trim", "reversed", "own"),
    )
    b: float = numeric(2.0, "Of the Trim attack.", low=1, high=1e6)

    def apply(self, key, updates, state, view):
        bad, known = view.malicious[:, None], stand_ins(view)
        count = jnp.maximum(view.corrupted.sum(), 1)
        order = jnp.argsort(~view.corrupted, stable=True)  # the adversary's rows, one after another
        turn = (jnp.cumsum(~view.visible) - 1) % count
        stack = jnp.where(view.visible[:, None], updates, updates[order[turn]])
        guess = None
        if view.server_update is None:
            guess = jnp.sum(jnp.where(view.corrupted[:, None], updates, 0.0), axis=0) / count

        place = trained_part(view.space, updates.shape[1])

        def lengths(rows):
            return row_norms(rows[:, place])

        def learned(vectors):
            return with_statistics(view.space, vectors, jnp.zeros_like(vectors))

        clean = view.defend(stack, guess)
        sign = learned(jnp.where(clean < 0, -1.0, 1.0).astype(updates.dtype))
        longest = jnp.max(jnp.where(known, lengths(updates), 0.0))
        limit = self.max_norm * longest

        def project(rows):
            norms = lengths(rows)
            short = jnp.where((norms > limit)[:, None], limit * unit_rows(rows, norms), rows)
            return with_statistics(view.space, short, rows)

        def worth(rows):
            return sign @ (clean - view.defend(jnp.where(bad, rows, stack), guess))

        starts = []
        if self.begin in ("best", "trim"):
            heading = direction(updates, view)
            chance = jax.random.uniform(key, updates.shape, updates.dtype)
            trim = jnp.where(
                sees_all(view),
                beyond(updates, view, heading, chance, self.b, "paper"),
                away(updates, view, heading, chance, 3.0, 4.0),
            )
            starts.append(trim)
        if self.begin in ("best", "reversed"):
            total = jnp.sum(jnp.where(known[:, None], updates, 0.0), axis=0)
            mean = total / jnp.maximum(known.sum(), 1)
            starts.append(jnp.broadcast_to(-mean[None], updates.shape))
        if self.begin in ("best", "own"):
            starts.append(stack)

        def step(_, carry):
            rows, best, size = carry
            gradient = jnp.where(bad, jax.grad(worth)(rows), 0.0)
            gradient = learned(jnp.where(jnp.isfinite(gradient), gradient, 0.0))
            moved = project(rows + size * longest * unit_rows(gradient, row_norms(gradient)))
            value = worth(moved)
            better = value > best
            rows = jnp.where(better, moved, rows)
            return rows, jnp.maximum(value, best), jnp.where(better, size, size / 2)

        def ascend(start):
            start = jnp.where(bad, project(start), 0.0)
            size = jnp.asarray(self.step_size, updates.dtype)
            before = worth(start)
            rows, best, _ = jax.lax.fori_loop(0, self.steps, step, (start, before, size))
            return rows, before, best

        rows, before, best = jax.lax.map(ascend, jnp.stack(starts))
        winner = jnp.argmax(best)
        metrics = {"objective_before": before[winner], "objective": best[winner]}
        return rows[winner], state, metrics
