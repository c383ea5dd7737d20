"""Numerical kernels on the stack of client updates ``[K, D]``.

Everything that reduces over the client axis lives here, once, in a form that is fast on CPU
(where XLA's own sorts and column reductions are slow) and on accelerators, next to the plain
version it is tested against.

===================  ==========================================================================
module               contents
===================  ==========================================================================
``sorting``          `sort_clients`, and `map_columns` which keeps a whole rule inside the cache
``selection``        `order_statistic`, for more clients than a sorting network pays for
``coordinatewise``   `median`, `trimmed_mean`, `mean_near_median`, `kmeans_mean`
``moments``          `weighted_mean`, `mean_and_std`, `row_norms`, `finite_rows`
``distances``        `squared_distances`, `cosine_similarities`, `cosines_to`, `krum_scores`,
                     `krum_sequence`
``iterative``        `distances_from`, `geometric_median`, `centered_clip`
``signs``            `sign_votes`
``perturbation``     `z_max`
``layers``           `layer_sizes`, `layer_mask`: which flat parameters are a layer's
``precision``        `wide`, the type of sums, and `root`, with a derivative at zero
``reference``        the same signatures in plain ``jnp``: slow and obviously right
===================  ==========================================================================

Shared rules. ``valid`` (bool ``[K]``, may be traced) marks the rows that exist: the others may
hold anything, NaN and infinity included, and the result is that of the valid rows alone. Counts
that depend on the number ``n`` of valid rows are floored so that no mean is over nothing. With no
valid row at all the result is zero. Valid rows must not hold NaN, except for the distances.

Results have the type of the updates (distances at least float32); half precision is added up in
float32. Gradients exist where the mathematics has one: not for votes, counts and Krum's choice.
Where two values tie or a norm is zero they are finite, and rows that do not take part get zero,
whatever they hold, also under `vmap`.
"""
