"""Residual-based reweighting around a repeated median line (Fu et al., 2019)."""

import jax.numpy as jnp
from jax import lax

from fedjax_sec.core import ConfigError, Stage, numeric, registry, static
from fedjax_sec.ops import coordinatewise
from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.ops.client_axis import over_columns
from fedjax_sec.ops.moments import weighted_mean
from fedjax_sec.ops.precision import root, wide
from fedjax_sec.ops.sorting import sort_block


@registry.defenses.register("residual_reweighting")
class ResidualReweighting(Stage):
    r"""Clients lose weight by their distances from a robust line through the sorted values.

    In every coordinate the n clients get their ranks x = 0, ..., n - 1 by value, and a line is laid
    through the points (rank, value) by repeated medians,

    .. math:: s = \mathrm{med}_i \, \mathrm{med}_{j \ne i} \frac{y_i - y_j}{x_i - x_j}, \quad
              \hat y_i = \mathrm{med}(y) + s \left( x_i - \frac{n - 1}{2} \right), \quad
              r_i = y_i - \hat y_i

    With tau the scale of the residuals and h the diagonal of the hat matrix of [1, x],

    .. math:: \tau = 1.4826 \left( 1 + \frac{5}{n - 1} \right) \mathrm{med}' |r| + 10^{-7}, \quad
              h_i = \frac{1}{n} + \frac{(x_i - \frac{n-1}{2})^2}{\sum_j (x_j - \frac{n-1}{2})^2}

    .. math:: e_i = \frac{r_i}{\tau}, \quad
              w_i = \frac{\sqrt{1 - h_i}}{e_i} \,
              \Psi\!\left( \frac{e_i}{\sqrt{1 - h_i}} \right), \quad
              \Psi(a) = \max(-Z, \min(Z, a)), \quad Z = \lambda \sqrt{2 / n}

    (med' leaves the smallest residual out; w = 1 where e = 0). A value with w < delta is replaced
    by the line's. A client's score is the sum over all coordinates of w times the standard
    deviation (n - 1) of w over the clients; the aggregate is the mean of the corrected updates,
    weighted by the squares of the scores. Nothing is iterated, in spite of the name IRLS.

    `updates [K, D] -> [D]`. Models and updates give the same, since the line moves with its points.
    `kept` is a client's weight relative to the largest. Clients whose update is not finite are left
    out. Slopes are K^2 numbers a coordinate; they are worked out in blocks of columns, so the rule
    holds one corrected stack beside the updates.

    Where all w are one, as of equal updates, all scores are zero and the division is not defined
    (the author code gives NaN): then clients weigh the same, a choice. So they do where fewer than
    3 are left, through whom any line passes.

    Raises: `ConfigError` with fewer than 3 clients.

    Source: Fu, Xie, Li, Chen 2019, "Attack-Resistant Federated Learning with Residual-based
    Reweighting", arXiv:1912.11464; lambda = 2, delta = 0.1, the squares and the standard deviation
    are the author code's (`averaging.py`, `IRLS_aggregation_split_restricted` and
    `reweight_algorithm_restricted`), as are the other lines: `median` is flat, `theil_sen` has the
    median slope of all pairs. `gaussian` weights, :math:`\exp(-e^2 / 2 \lambda^2)`, are its
    `irls_gaussian`. FedML has those three alone, stops where a model's first tensor has 2,000
    entries or more, and no hook calls it.

    Example:
        >>> import fedjax_sec
        >>> updates = [[1.0, 2.0], [1.1, 2.1], [1.2, 1.9], [1.3, 2.2], [9.0, -5.0]]
        >>> print(fedjax_sec.aggregate(updates, "residual_reweighting").round(2))
        [1.15 2.05]
    """

    stage = "aggregate"
    width: float = numeric(
        2.0, "lambda, how far from the line a value counts fully.", above=0, high=1e6
    )
    threshold: float = numeric(0.1, "delta: values with less weight are replaced.", low=0, high=1)
    line: str = static(
        "repeated_median",
        "How the line is laid.",
        choices=("repeated_median", "theil_sen", "median"),
    )
    weights: str = static(
        "clipped", "How weights fall with the residual.", choices=("clipped", "gaussian")
    )

    def check(self, path, setting):
        if setting.num_clients < 3:
            raise ConfigError(
                f"{path}: residual_reweighting needs at least 3 clients, since a line passes "
                f"through any two, got K = {setting.num_clients}."
            )

    def apply(self, key, updates, state, view):
        corrected, score = over_columns(
            lambda rows: self._corrected(rows, view.valid), updates, total=(False, True)
        )
        top = score.max()
        share = jnp.where(top > 0, (score / jnp.where(top > 0, top, 1.0)) ** 2, 1.0)
        share = jnp.where(view.valid, share, 0.0).astype(updates.dtype)
        return weighted_mean(corrected, share), state, {"kept": share}

    def _corrected(self, updates, valid):
        """The corrected updates [K, D], and the scores [K], to which zeros add nothing."""
        clients, dim = updates.shape
        # Slopes of a block: K^2 C numbers, in a few copies.
        chunk = min(dim, max(1, (2**21 if on_cpu() else 2**25) // clients**2))

        def block(number, carry):
            corrected, score = carry
            start = jnp.minimum(number * chunk, dim - chunk)
            values = lax.dynamic_slice_in_dim(updates, start, chunk, axis=1)
            fixed, one = self._reweighted(values, valid)
            new = start + jnp.arange(chunk) >= number * chunk  # the last block overlaps
            score = score + jnp.sum(jnp.where(new[None], one, 0.0), axis=1)
            fixed = fixed.astype(updates.dtype)
            return lax.dynamic_update_slice_in_dim(corrected, fixed, start, axis=1), score

        start = jnp.zeros_like(updates), jnp.zeros(clients, wide(updates.dtype))
        return lax.fori_loop(0, -(-dim // chunk), block, start)

    def _reweighted(self, values, valid):
        """The corrected values [K, C], and w times its standard deviation [K, C]."""
        dtype = wide(values.dtype)
        values = jnp.where(valid[:, None], values.astype(dtype), jnp.inf)
        clients, n = values.shape[0], valid.sum()
        lower = (values[:, None] < values[None]).sum(axis=0)
        row = jnp.arange(clients)
        ties = (values[:, None] == values[None]) & (row[:, None] < row[None])[..., None]
        rank = (lower + ties.sum(axis=0)).astype(dtype)
        middle = (n - 1).astype(dtype) / 2
        ordered = sort_block(values)
        center = _middle(ordered, n)
        slope = self._slope(jnp.where(row[:, None] < n, ordered, 0.0), n)
        line = center[None] + slope[None] * (rank - middle)
        residual = jnp.where(valid[:, None], values, 0.0) - jnp.where(valid[:, None], line, 0.0)
        sizes = sort_block(jnp.where(valid[:, None], jnp.abs(residual), jnp.inf))
        # Without the smallest; of a single client nothing would be left.
        scale = 1.4826 * (1 + 5 / jnp.maximum(n - 1, 1)) * _middle(sizes[1:], jnp.maximum(n - 1, 1))
        scale = jnp.where(n > 2, scale, 0.0)
        error = residual / (scale + 1e-7)[None]
        if self.weights == "gaussian":
            weight = jnp.exp(-(error**2) / (2 * self.width**2))
        else:
            count = n.astype(dtype)
            squares = count * (count * count - 1) / 12  # sum of (x - middle)^2
            hat = 1 / count + (rank - middle) ** 2 / jnp.maximum(squares, 1e-6)
            spread = root(jnp.maximum(1 - hat, 0.0))
            limit = self.width * jnp.sqrt(2 / n)
            size = jnp.abs(error)
            # Psi(a) / a with a = e / spread: one up to the limit.
            outside = size > limit * spread
            weight = jnp.where(outside, limit * spread / jnp.where(outside, size, 1.0), 1.0)
        weight = jnp.where(valid[:, None] & (n > 2), weight, 1.0)
        mean = jnp.where(valid[:, None], weight, 0.0).sum(axis=0) / n
        square = jnp.where(valid[:, None], (weight - mean[None]) ** 2, 0.0).sum(axis=0)
        deviation = root(square / jnp.maximum(n - 1, 1))
        fixed = jnp.where(weight >= self.threshold, values, line)
        fixed = jnp.where(valid[:, None], fixed, 0.0)
        return fixed, jnp.where(valid[:, None], weight * deviation[None], 0.0)

    def _slope(self, ordered, n):
        """The slope [C] of the line through the n first sorted values of [K, C]."""
        clients, columns = ordered.shape
        if self.line == "median":
            return jnp.zeros(columns, ordered.dtype)
        if self.line == "theil_sen":
            low, high = jnp.triu_indices(clients, 1)
            distance = (high - low).astype(ordered.dtype)
            slopes = (ordered[high] - ordered[low]) / distance[:, None]
            return coordinatewise.median(slopes, high < n, with_kept=False)[0]
        # Row s of `other` holds, for every place, the s-th of the other places: all columns then
        # have their n - 1 slopes in the first rows.
        place = jnp.arange(clients)
        other = (place[None] + place[: clients - 1, None] + 1) % jnp.maximum(n, 1)
        distance = jnp.where(other == place[None], 1, other - place[None]).astype(ordered.dtype)
        slopes = (ordered[other] - ordered[None]) / distance[..., None]
        slopes = slopes.reshape(clients - 1, clients * columns)
        used = place[: clients - 1] < n - 1
        inner = coordinatewise.median(slopes, used, with_kept=False)[0].reshape(clients, columns)
        return _middle(sort_block(jnp.where(place[:, None] < n, inner, jnp.inf)), n)


def _middle(ordered, n):
    """The median [C] of the first n of sorted rows [K, C]."""
    low, high = (
        lax.dynamic_index_in_dim(ordered, jnp.maximum(at, 0) // 2, keepdims=False)
        for at in (n - 1, n)
    )
    return jnp.where(low == high, low, 0.5 * low + 0.5 * high)
