"""Net influence: whose parameters the server moves, the backdoor's or the honest clients'."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fedjax_sec.core import (
    COUNT,
    BoundTask,
    ConfigError,
    Metrics,
    Monitor,
    registry,
    static,
    suggestion,
)
from fedjax_sec.ops.backend import on_cpu

#: Floats of per-example gradients held at once under `fisher` (at least one image's), however many
#: probes. On a CPU no more than its cache holds: one image at a time is 2.4 times as fast for the
#: 1.2 million parameters of `rlr_cnn`. Elsewhere 256 MiB.
_FLOATS_CPU, _FLOATS = 2**21, 2**26


class Probes(NamedTuple):
    """Trojaned images in [0, 1], the attacker's labels, their true labels, and which count."""

    x: Float[Array, " P *shape"]
    target: Int[Array, " P"]
    base: Int[Array, " P"]
    include: Bool[Array, " P"]


@registry.monitors.register("influence")
class Influence(Monitor):
    """Net influence, summed over the rounds, see `influence`; every round costs two passes a probe.

    Probes are the test examples with the backdoor's trigger that are not truly of its target class.
    Metrics: `net_influence` and, of the round, `influence/...`.

    Raises: `ConfigError` where the backdoor has no such probes, or `top` exceeds D.

    Source: Ozdayi et al. 2021 (RLR), Section 4 and Figure 4, see `influence`.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.monitors.build({"name": "influence", "top": 50}).convention
        'author'
    """

    prefix = ""
    needs_labels = True
    top: int = static(100, "Parameters that count as important to each mapping.", low=1, high=COUNT)
    convention: str = static(
        "author",
        "What a parameter's importance is: of logits summed over a batch (`author`), or the "
        "diagonal of the Fisher information (`fisher`).",
        choices=("author", "fisher"),
    )
    batch_size: int = static(
        256, "Probes in a batch; matters under `author` only.", low=1, high=COUNT
    )
    max_images: int | None = static(
        None, "Measure on the first probes only (null: all).", low=1, high=COUNT
    )

    def check(self, path, setting):
        dim = setting.num_parameters
        if dim is not None and self.top > dim:
            raise ConfigError(
                f"{path}.top must be <= {dim}, the model's parameters, got {self.top}."
            )

    def positions(self, task, test, backdoor, state):
        """The first `max_images` test examples that count as probes."""
        name = backdoor.registered_name

        def counted(x, y):
            _, target, include = backdoor.probes(state, task.inputs.decode(x), y, task)
            return include & (y != target)

        # Two examples tell whether the probes are the test examples, or others without labels.
        pair = [jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype) for a in test]
        probes = lambda x, y: backdoor.probes(state, task.inputs.decode(x), y, task)[0]  # noqa: E731
        if jax.eval_shape(probes, *pair).shape[0] != 2:
            raise ConfigError(
                f"evaluation.influence needs probes with true labels; those of attack {name!r} are "
                f"not the test images. Choose another backdoor, such as 'trojan', or set "
                f"evaluation.influence to null."
            )
        positions = np.flatnonzero(np.asarray(jax.jit(counted)(*test)))[: self.max_images]
        if not len(positions):
            raise ConfigError(
                f"evaluation.influence has nothing to measure on: attack {name!r} has no probe "
                f"among the {len(test.y)} test images that is not truly of its target class; "
                f"choose another base or target."
            )
        return positions

    def init(self, setting, task, message):
        return jnp.zeros(())

    def observe(self, key, state, trace, task):
        backdoor, memory = trace.backdoor
        positions = trace.probes
        x, y = task.inputs.decode(trace.test.x[positions]), trace.test.y[positions]
        x, target, include = backdoor.probes(memory, x, y, task)
        probes = Probes(x, target, y, include & (y != target) & (positions >= 0))
        metrics = influence(
            task,
            trace.before,
            trace.after,
            sign_flipped(trace.aggregates),
            probes,
            top=self.top,
            convention=self.convention,
            batch_size=self.batch_size,
        )
        total = state + metrics.pop("net")
        shown = {f"influence/{name}": value for name, value in metrics.items()}
        return total, shown | {"net_influence": total}


def sign_flipped(aggregates: Sequence[Float[Array, " D"]]) -> Bool[Array, " D"] | None:
    """Coordinates that the stages behind the aggregator negated; None where there are none.

    Sign flips are detected from the aggregates, not reported by the defence: a coordinate that
    became minus itself up to rounding. Zeros do not flip, nor does what noise or clipping changes,
    even where its sign does.

    >>> print(sign_flipped((jnp.array([1.0, 2.0, 0.0]), jnp.array([-1.0, 2.0, 0.0]))))
    [ True False False]
    """
    flipped = None
    for before, after in itertools.pairwise(aggregates):
        now = (before != 0) & (jnp.abs(after + before) <= 1e-6 * jnp.abs(before))
        flipped = now if flipped is None else flipped ^ now
    return flipped


def influence(
    task: BoundTask,
    before: Float[Array, " D"],
    after: Float[Array, " D"],
    flipped: Bool[Array, " D"] | None,
    probes: Probes,
    *,
    top: int = 100,
    convention: str = "author",
    batch_size: int = 256,
) -> Metrics:
    r"""How far one round moved the parameters that only one of two mappings depends on.

    The adversarial mapping takes trojaned images to the attacker's label, the honest one takes the
    same images to their true label. Let A and H be the `top` parameters most important to each at
    the parameters `before` the round (`importances`; among equals the first), :math:`A' = A
    \setminus H`, :math:`H' = H \setminus A`, :math:`\Delta` = `after` - `before`, and let + and -
    be the parameters whose aggregate the defence kept and those where it flipped the sign. Then

    .. math:: net = (\|\Delta_{H'+}\| - \|\Delta_{H'-}\|) - (\|\Delta_{A'+}\| - \|\Delta_{A'-}\|)

    with Euclidean norms. The cumulative sum over the rounds is the paper's net influence.

    Args:
        task: the network on flat parameters.
        before, after: global parameters around the server's step.
        flipped: where the defence flipped the aggregate's sign; None: nowhere, so all is +, as
            with every rule but the robust learning rate.
        probes: the images; those with `include` false count nowhere.
        top: parameters taken for each mapping.
        convention, batch_size: as in `importances`.

    Returns: `honest_plus`, `honest_minus`, `adversary_plus`, `adversary_minus`, the four norms,
    and `net`.

    Source: Ozdayi, Kantarcioglu and Gel 2021 (RLR), Section 4 and Figure 4. The text defines net
    influence as "the cumulative sum of differences between the influences of honest agents and the
    adversarial agents for the mapping of trojaned samples", by "parameter attribution [...] to find
    out which parameters are most important to adversarial/honest mapping, and then tracking how
    they are updated over the rounds"; it leaves importance, their number and the measure of an
    update to an appendix. The formula above is the author code's (`plot_sign_agreement`). It looks
    at distances only: whether a move strengthens or weakens a mapping does not enter, and a
    minus means that the server moved against the aggregate.
    """
    adversary, honest = importances(
        task,
        before,
        probes.x,
        jnp.stack([probes.target, probes.base]),
        probes.include,
        convention=convention,
        batch_size=batch_size,
    )
    top_adversary, top_honest = (jax.lax.top_k(values, top)[1] for values in (adversary, honest))
    move = after - before
    minus = jnp.zeros(move.shape, bool) if flipped is None else flipped

    def norms(positions, others):
        shared = jnp.zeros(move.shape, bool).at[others].set(True)[positions]
        squares = jnp.where(shared, 0.0, jnp.square(move[positions]))
        return tuple(
            jnp.sqrt(jnp.sum(jnp.where(side, squares, 0.0)))
            for side in (~minus[positions], minus[positions])
        )

    honest_plus, honest_minus = norms(top_honest, top_adversary)
    adversary_plus, adversary_minus = norms(top_adversary, top_honest)
    return {
        "honest_plus": honest_plus,
        "honest_minus": honest_minus,
        "adversary_plus": adversary_plus,
        "adversary_minus": adversary_minus,
        "net": (honest_plus - honest_minus) - (adversary_plus - adversary_minus),
    }


def importances(
    task: BoundTask,
    params: Float[Array, " D"],
    x: Float[Array, " P *shape"],
    labels: Int[Array, "L P"],
    include: Bool[Array, " P"],
    *,
    convention: str = "author",
    batch_size: int = 256,
) -> Float[Array, "L D"]:
    r"""Every parameter's importance to L ways of labelling the same P images.

    With n the number of images that count, logits z and :math:`c_i` the label of image i,

    .. math:: F^{fisher}_j = \frac{1}{n} \sum_i \Big(\frac{\partial \log p(c_i | x_i)}
                             {\partial \theta_j}\Big)^2, \qquad
              F^{author}_j = \frac{1}{n} \sum_b \Big(\frac{\partial \sum_{i \in b} z_{c_i}(x_i)}
                             {\partial \theta_j}\Big)^2

    The first is the diagonal of the Fisher information with the given labels in place of the
    model's own. The author code computes the second, b being consecutive batches of `batch_size`
    images that count, the last one smaller: logits instead of log-probabilities (those are
    computed but not used), and summed over a batch before they are squared, so a larger batch makes
    consistent gradients weigh more. Dropout is off. Per-example gradients are held for a few images
    at a time, which makes `fisher` the slower one by far.

    Raises: `ValueError` for an unknown convention.
    """
    if convention not in ("author", "fisher"):
        raise ValueError(
            f"convention must be one of 'author', 'fisher', got {convention!r}."
            f"{suggestion(convention, ('author', 'fisher'))}"
        )
    count, kinds = x.shape[0], labels.shape[0]
    # Those that count first, so that batches are the same whatever lies between them.
    order = jnp.argsort(~include, stable=True)
    x, labels, include = x[order], labels[:, order], include[order]
    if convention == "fisher":
        floats = _FLOATS_CPU if on_cpu() else _FLOATS
        batch_size = max(1, floats // (kinds * task.dim))
    batch_size = min(batch_size, count)
    missing = -count % batch_size
    x = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
    labels, mask = jnp.pad(labels, ((0, 0), (0, missing))), jnp.pad(include, (0, missing))

    def gradients(x, labels, mask):
        """[L, D], the gradients of the batch's summed outcome."""
        logits, pull = jax.vjp(lambda p: task.outputs(p, x), params)
        slopes = jax.nn.one_hot(labels, task.num_classes, dtype=logits.dtype)
        if convention == "fisher":
            slopes = slopes - jax.nn.softmax(logits)[None]
        return jnp.stack([pull(slope * mask[:, None])[0] for slope in slopes])

    def squares(x, labels, mask):
        if convention == "author":
            return jnp.square(gradients(x, labels, mask))
        alone = lambda x, labels, mask: gradients(x[None], labels[:, None], mask[None])  # noqa: E731
        return jnp.square(jax.vmap(alone, in_axes=(0, 1, 0))(x, labels, mask)).sum(0)

    def body(total, batch):
        start = batch * batch_size
        part = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, start, batch_size, axis)  # noqa: E731
        return total + squares(part(x, 0), part(labels, 1), part(mask, 0)), None

    nothing = jnp.zeros((kinds, *params.shape), params.dtype)
    total, _ = jax.lax.scan(body, nothing, jnp.arange(x.shape[0] // batch_size))
    return total / jnp.maximum(include.sum(), 1)
