"""Norm clipping of the updates before aggregation (Sun et al., 2019)."""

import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, Stage, numeric, registry, with_statistics
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops.moments import row_norms
from fedjax_sec.ops.precision import wide


@registry.defenses.register("clip_norm")
class ClipNorm(Stage):
    r"""Scales every update down to L2 norm `max_norm`: a stage before aggregation.

    .. math:: u_i \leftarrow u_i \min(1, M / \|u_i\|_2)

    `updates [K, D] -> [K, D]`. Running statistics neither count towards the norm nor are scaled, as
    in FedML (`norm_diff_clipping_defense.py`): their moves follow the data's scale.

    Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", Section 3, "norm
    thresholding"; the paper tunes M for each task, so the default is a choice.

    Example:
        >>> import fedjax_sec
        >>> clipped = [{"name": "clip_norm", "max_norm": 2.0}, "mean"]
        >>> print(fedjax_sec.aggregate([[3.0], [1.0]], clipped))
        [1.5]
    """

    stage = "before"
    max_norm: float = numeric(
        1.0, "M, the largest L2 norm of an update.", above=0, unbounded=ANY_SCALE
    )

    def apply(self, key, updates, state, view):
        # In float16 a norm, or `max_norm`, may be infinite.
        norms = row_norms(trained_columns(updates, view).astype(wide(updates.dtype)))
        scale = jnp.minimum(1.0, self.max_norm / jnp.maximum(norms, self.max_norm * 1e-6))
        clipped = jnp.mean((scale < 1.0) & view.valid)
        shortened = updates * scale[:, None].astype(updates.dtype)
        shortened = with_statistics(view.space, shortened, updates)
        return shortened, view, state, {"clipped": clipped}
