"""Plain versions of the kernels: the rules as one would write them down, slow and obvious.

Same signatures and conventions as the kernels of the same names, which are tested against these,
and these against NumPy. They promise no speed, no low memory and, unlike the kernels, no care for
cancellation or overflow beyond what a rule needs with huge values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sort_clients(updates: Float[Array, "K D"]) -> Float[Array, "K D"]:
    """Sort every coordinate over the clients.

    >>> sort_clients(jnp.array([[2.0], [1.0]])).tolist()
    [[1.0], [2.0]]
    """
    return jnp.sort(updates, axis=0)


def _order(updates, valid):
    filled = jnp.where(valid[:, None], updates, jnp.inf)
    return filled, jnp.sort(filled, axis=0), valid.sum()


def _share(filled, valid, lowest, highest, with_kept):
    if not with_kept:
        return None
    inside = (lowest[None, :] <= filled) & (filled <= highest[None, :]) & valid[:, None]
    return inside.mean(axis=1, dtype=filled.dtype)


def _finish(value, n):
    return jnp.where(n > 0, value, 0.0)


def median(updates, valid, *, lower=False, with_kept=True):
    """Mean of the two middle values, or the smaller of them.

    >>> median(jnp.array([[0.0], [4.0]]), jnp.ones(2, bool))[0].tolist()
    [2.0]
    """
    filled, v, n = _order(updates, valid)
    low = v[(n - 1) // 2]
    high = low if lower else v[n // 2]
    value = jnp.where(low == high, low, 0.5 * low + 0.5 * high)
    return _finish(value, n), _share(filled, valid, low, high, with_kept)


def trimmed_mean(updates, valid, num_trim, *, with_kept=True):
    """Mean of ``v[b : n-b]``.

    >>> trimmed_mean(jnp.array([[0.0], [4.0], [9.0]]), jnp.ones(3, bool), 1)[0].tolist()
    [4.0]
    """
    filled, v, n = _order(updates, valid)
    b = jnp.minimum(num_trim, (n - 1) // 2)
    row = jnp.arange(len(v))[:, None]
    value = jnp.mean(v, axis=0, where=(b <= row) & (row < n - b))
    return _finish(value, n), _share(filled, valid, v[b], v[n - 1 - b], with_kept)


def mean_near_median(updates, valid, num_drop, *, with_kept=True):
    """Mean of the ``n - num_drop`` values nearest to the median; the smaller value wins a tie.

    >>> mean_near_median(jnp.array([[0.0], [4.0], [9.0]]), jnp.ones(3, bool), 1)[0].tolist()
    [2.0]
    """
    filled, v, n = _order(updates, valid)
    center, _ = median(updates, valid)
    row = jnp.arange(len(v))[:, None]
    distance = jnp.where(row < n, jnp.abs(v - center[None, :]), jnp.inf)
    nearest = jnp.argsort(distance, axis=0, stable=True)
    kept = jnp.argsort(nearest, axis=0) < jnp.maximum(n - num_drop, 1)
    value = jnp.mean(v, axis=0, where=kept)
    lowest = jnp.min(v, axis=0, where=kept, initial=jnp.inf)
    highest = jnp.max(v, axis=0, where=kept, initial=-jnp.inf)
    return _finish(value, n), _share(filled, valid, lowest, highest, with_kept)


def kmeans_mean(updates, valid, threshold, *, with_kept=True):
    """Mean of the larger of the two clusters of the best split, if their centres lie far apart.

    >>> kmeans_mean(jnp.array([[0.0], [2.0], [9.0]]), jnp.ones(3, bool), 4.0)[0].tolist()
    [1.0]
    """
    filled, v, n = _order(updates, valid)
    row = jnp.arange(len(v))[:, None]
    center, _ = median(updates, valid)
    v0 = jnp.where(row < n, v - center[None, :], 0.0)
    everything = _finish(jnp.mean(v0, axis=0, where=row < n), n)

    def split(s):
        left = jnp.mean(v0, axis=0, where=row < s)
        right = jnp.sum(v0, axis=0, where=(row >= s) & (row < n)) / jnp.maximum(n - s, 1)
        score = jnp.sqrt(s * jnp.maximum(n - s, 0).astype(v.dtype)) * (right - left)
        apart = (s < n) & (right - left > threshold)
        keep_left, keep_right = apart & (s > n - s), apart & (s < n - s)
        value = jnp.where(keep_left, left, jnp.where(keep_right, right, everything))
        lowest = jnp.where(keep_right, v[s], v[0])
        highest = jnp.where(keep_left, v[s - 1], v[n - 1])
        return jnp.where(s < n, score, -jnp.inf), value, lowest, highest

    score, *bounds = jax.vmap(split)(jnp.arange(1, max(len(v), 2)))
    best = jnp.argmax(score, axis=0)[None, :]
    value, lowest, highest = (jnp.take_along_axis(a, best, axis=0)[0] for a in bounds)
    return _finish(center + value, n), _share(filled, valid, lowest, highest, with_kept)


def weighted_mean(updates, weights):
    """``sum_i w_i u_i / sum_i w_i`` over the rows with a weight.

    >>> weighted_mean(jnp.array([[0.0], [4.0]]), jnp.array([1.0, 3.0])).tolist()
    [3.0]
    """
    share = weights / jnp.where(weights.sum() == 0, 1.0, weights.sum())
    return jnp.sum(jnp.where((weights != 0)[:, None], share[:, None] * updates, 0.0), axis=0)


def mean_and_std(updates, mask, ddof=0):
    """Mean and standard deviation over the rows of the mask.

    >>> [float(a[0]) for a in mean_and_std(jnp.array([[1.0], [3.0]]), jnp.ones(2, bool))]
    [2.0, 1.0]
    """
    n = mask.sum()
    mean = jnp.sum(jnp.where(mask[:, None], updates, 0.0), axis=0) / jnp.maximum(n, 1)
    square = jnp.where(mask[:, None], (updates - mean[None, :]) ** 2, 0.0)
    return mean, jnp.sqrt(jnp.sum(square, axis=0) / jnp.maximum(n - ddof, 1))


def row_norms(updates):
    """Euclidean norms.

    >>> row_norms(jnp.array([[3.0, 4.0]])).tolist()
    [5.0]
    """
    return jnp.sqrt(jnp.sum(updates**2, axis=1))


def finite_rows(updates):
    """Which rows hold only numbers.

    >>> finite_rows(jnp.array([[1.0], [jnp.nan]])).tolist()
    [True, False]
    """
    return jnp.isfinite(updates).all(axis=1)


def sign_votes(updates, valid):
    """Sum of the signs.

    >>> sign_votes(jnp.array([[2.0], [3.0], [-1.0]]), jnp.ones(3, bool)).tolist()
    [1.0]
    """
    return jnp.sum(jnp.where(valid[:, None], jnp.sign(updates), 0.0), axis=0)


def distances_from(updates, center):
    """Euclidean distances from a point.

    >>> distances_from(jnp.array([[3.0, 5.0]]), jnp.array([0.0, 1.0])).tolist()
    [5.0]
    """
    return row_norms(updates - center[None, :])


def geometric_median(updates, weights, start, num_iterations, smoothing=1e-6):
    """Weiszfeld's iteration: means weighted by the inverse distances from the last mean.

    >>> geometric_median(jnp.array([[0.0], [4.0]]), jnp.ones(2), jnp.ones(1), 1)[0].tolist()
    [1.0]
    """
    center, influence = start, jnp.zeros_like(weights)
    for _ in range(num_iterations):
        distance = jnp.maximum(distances_from(updates, center), smoothing)
        influence = jnp.where(weights > 0, weights / distance, 0.0)
        center = weighted_mean(updates, influence)
    total = influence.sum()
    return center, influence / jnp.where(total == 0, 1.0, total)


def centered_clip(updates, valid, start, num_iterations, radius):
    """Repeatedly add the mean of the differences, each no longer than the radius.

    >>> x = jnp.array([[0.0], [9.0]])
    >>> centered_clip(x, jnp.ones(2, bool), jnp.zeros(1), 1, 3.0)[0].tolist()
    [1.5]
    """
    center, factor = start, jnp.zeros(len(updates), updates.dtype)
    for _ in range(num_iterations):
        distance = distances_from(updates, center)
        factor = jnp.where(distance > radius, radius / distance, 1.0)
        factor = jnp.where(valid, factor, 0.0)
        difference = jnp.where(valid[:, None], updates - center[None, :], 0.0)
        center = center + factor @ difference / jnp.maximum(valid.sum(), 1)
    return center, factor


def squared_distances(updates, valid):
    """Squared distances from differences, unscaled (scale one).

    >>> squared_distances(jnp.array([[0.0], [2.0]]), jnp.ones(2, bool))[0].tolist()
    [[0.0, 4.0], [4.0, 0.0]]
    """
    clean = jnp.where(valid[:, None], updates, 0.0)
    squares = jax.lax.map(lambda row: jnp.sum((clean - row[None, :]) ** 2, axis=1), clean)
    squares = jnp.where(jnp.isnan(squares), jnp.inf, squares)
    squares = jnp.where(jnp.eye(len(updates), dtype=bool), 0.0, squares)
    both = valid[:, None] & valid[None, :]
    return jnp.where(both, squares, jnp.inf), jnp.ones((), updates.dtype)


def cosine_similarities(updates, valid):
    """``<u_i, u_j> / (|u_i| |u_j|)``.

    >>> cosine_similarities(jnp.array([[3.0], [-1.0]]), jnp.ones(2, bool))[0].tolist()
    [1.0, -1.0]
    """
    rows = jnp.where(valid[:, None], updates, 0.0)
    norms = jnp.sqrt(jnp.sum(rows * rows, axis=1, keepdims=True))
    units = rows / jnp.where(norms > 0, norms, 1.0)
    return units @ units.T


def cosines_to(updates, direction, valid):
    """``<u_i, g> / (|u_i| |g|)``.

    >>> cosines_to(jnp.array([[3.0], [-1.0]]), jnp.array([2.0]), jnp.ones(2, bool)).tolist()
    [1.0, -1.0]
    """
    rows = jnp.where(valid[:, None], updates, 0.0)
    product = jnp.sqrt(jnp.sum(rows * rows, axis=1) * jnp.sum(direction * direction))
    return rows @ direction / jnp.where(product > 0, product, 1.0)


def krum_scores(sqdist, alive, num_neighbours, squared=True):
    """Sum of the smallest distances to other clients that are alive.

    >>> krum_scores(jnp.array([[0.0, 4.0], [4.0, 0.0]]), jnp.ones(2, bool), 1).tolist()
    [4.0, 4.0]
    """
    distance = sqdist if squared else jnp.sqrt(sqdist)
    near = jnp.minimum(jnp.maximum(num_neighbours, 1), alive.sum() - 1)

    def score(i):
        other = alive & (jnp.arange(len(sqdist)) != i)
        ordered = jnp.sort(jnp.where(other, distance[i], jnp.inf))
        total = jnp.sum(ordered, where=jnp.arange(len(sqdist)) < near)
        return jnp.where(alive[i], jnp.minimum(total, jnp.finfo(total.dtype).max), jnp.inf)

    return jax.vmap(score)(jnp.arange(len(sqdist)))


def krum_sequence(sqdist, valid, num_select, num_select_actual, neighbours_fn, squared=True):
    """Take the lowest Krum score, remove it, score the rest again.

    >>> d = jnp.array([[0.0, 4.0, 1.0], [4.0, 0.0, 9.0], [1.0, 9.0, 0.0]])
    >>> krum_sequence(d, jnp.ones(3, bool), 2, 2, lambda n: n - 2)[1].tolist()
    [0, 1]
    """
    alive, order = valid, []
    for t in range(num_select):
        scores = krum_scores(sqdist, alive, neighbours_fn(alive.sum()), squared)
        go = (t < num_select_actual) & alive.any()
        order.append(jnp.where(go, jnp.argmin(scores), -1))
        alive = alive & (jnp.arange(len(valid)) != order[-1])
    return valid & ~alive, jnp.stack(order) if order else jnp.zeros(0, int)
