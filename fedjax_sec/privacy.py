"""The Python interface to attacks on privacy: `reconstruct` on any update vector."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sec.core import ConfigError, Known, registry, value_of
from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.components import INPUTS
from fedjax_sec.core.types import InputSpec
from fedjax_sec.runs.reconstruct import reconstruct_all, task_of
from fedjax_sec.stacks import as_key, floats


class Reconstructed(NamedTuple):
    """Reconstructed examples: inputs `x [n, ...]` (None: labels alone), labels `y [n]`.

    `loss` is what the attack minimised (NaN: nothing), `trail [S, n, ...]` its inputs on the way,
    and `scores` a `fedjax_sec.ops.reconstruction.Scores` where the truth was given. With several
    updates each has a leading axis m.
    """

    x: Any
    y: Any
    loss: Any
    trail: Any
    scores: Any


def reconstruct(
    update: Any,
    attack: Any,
    *,
    model: Any,
    params: Any,
    shape: tuple[int, ...],
    num_classes: int,
    examples: int = 1,
    batch_size: int | None = None,
    steps: int = 1,
    rate: float = 1.0,
    l2: float = 0.0,
    clients: int = 1,
    batch_statistics: bool = False,
    labels: Any = None,
    kind: str = "pixels",
    mean: Any = 0.0,
    std: Any = 1.0,
    truth: Any = None,
    key: Any = None,
    **fields,
) -> Reconstructed:
    """Reconstructs the examples behind an update, of any model, with no experiment around it.

    Args:
      update: a client's local parameters minus the global ones, [D] or like `params`; of one step
        minus the rate times the gradient. [m, D] attacks m updates in one program.
      attack: a privacy attack, its name or a mapping with `name` and fields.
      model: the network, its name, a mapping, or an instance of a flax module.
      params: the parameters before the update, [D], or the model's tree, or [m, D].
      shape: of one input.
      num_classes: classes, or tokens of the vocabulary.
      examples: n, the examples behind the update.
      batch_size: examples in a local step (None: all of them).
      steps: local steps of plain gradient descent.
      rate: their learning rate.
      l2: weight of the L2 term in them.
      clients: the update is the mean of so many clients', each with an equal share of the examples.
      batch_statistics: the network normalised by its batches' statistics.
      labels: [n], or [m, n], where they are known, for `labels: known` of an attack.
      kind: `pixels` in [0, 1], `features`, or `tokens`.
      mean: of the normalisation at the model's entry, a number or one a channel.
      std: likewise.
      truth: (x [n, ...], y [n]), or with a leading axis m, to score against; no attack sees it.
      key: a seed or a JAX key for the attack's draws; None: seed 0.
      **fields: fields of the attack when it is given by its name alone.

    Raises: `ConfigError` for shapes that do not fit, and whatever the attack refuses.

    >>> import fedjax_sec
    >>> from fedjax_sec.core import make_space, registry
    >>> model = registry.models.build("logistic_regression").make((2, 2, 1), 3)
    >>> space, x = make_space(model), jnp.array([[0.1, 0.9, 0.5, 0.3]])
    >>> params = space.split(model.init(jax.random.key(0)))[0]
    >>> def loss(w):
    ...     logits = model.apply(space.join(w, ()), x.reshape(1, 2, 2, 1), train=False, key=None)
    ...     return -jax.nn.log_softmax(logits)[0, 2]
    >>> update = -0.1 * jax.grad(loss)(params)
    >>> like = dict(model="logistic_regression", params=params, shape=(2, 2, 1), num_classes=3)
    >>> made = fedjax_sec.reconstruct(update, "analytic", **like, rate=0.1)
    >>> print([round(float(value), 3) for value in made.x.reshape(4)], made.y)
    [0.1, 0.9, 0.5, 0.3] [2]
    """
    if kind not in INPUTS:
        raise ConfigError(
            f"kind must be one of {', '.join(sorted(INPUTS))}, got {shown(kind)}."
            f"{suggestion(kind, INPUTS)}"
        )
    for name, value, low in (
        ("examples", examples, 1),
        ("steps", steps, 1),
        ("clients", clients, 1),
    ):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name} must be an integer >= {low}, got {shown(value)}.")
    if not float(rate) > 0:
        raise ConfigError(f"rate must be > 0, got {shown(rate)}.")
    if examples % clients:
        raise ConfigError(
            f"examples must be a multiple of clients, {clients}, got {examples}: each has an equal "
            f"share."
        )
    spec = {"name": attack, **fields} if isinstance(attack, str) else attack
    if fields and not isinstance(attack, str):
        raise ConfigError(
            f"fields go into the attack's mapping, got {', '.join(fields)} beside it."
        )
    built = registry.privacy_attacks.build(spec, "attack")
    if kind not in built.inputs:
        raise ConfigError(
            f"attack: {built.registered_name!r} works on {' or '.join(sorted(built.inputs))}, and "
            f"the inputs are {kind}."
        )
    if labels is not None and value_of(built, "labels") != "known":
        raise ConfigError(
            f"labels are not read by {built.registered_name!r} as it is; leave them out, or give "
            f"an attack with labels='known'."
        )
    if batch_size is not None and not 1 <= batch_size <= examples:
        raise ConfigError(
            f"batch_size must be between 1 and {examples}, the examples, got {shown(batch_size)}."
        )
    network = registry.models.build(model, "model")
    channels = shape[-1] if kind == "pixels" else 1
    inputs = InputSpec(
        kind,
        tuple(shape),
        1.0,
        _per_channel(mean, channels, "mean"),
        _per_channel(std, channels, "std"),
    )
    task = task_of(network.make(tuple(shape), num_classes), inputs, num_classes)
    rows, alone = _rows(update, task.dim, "update", None)
    before, _ = _rows(params, task.dim, "params", rows.shape[0])
    known = Known(
        rate=float(rate),
        steps=steps,
        batch=batch_size or examples,
        classes=num_classes,
        examples=examples,
        l2=float(l2),
        clients=clients,
        batch_statistics=batch_statistics,
    )
    if labels is not None:
        labels = _stacked(labels, rows.shape[0], alone, "labels", jnp.int32)
        if labels.shape[1] != examples:
            raise ConfigError(
                f"labels must be [{examples}] for each update, got {labels.shape[1]}."
            )
    if truth is not None:
        x = _stacked(truth[0], rows.shape[0], alone, "truth[0]", jnp.float32)
        truth = x, _stacked(truth[1], rows.shape[0], alone, "truth[1]", jnp.int32)
        if x.shape[1:] != (examples, *shape):
            raise ConfigError(
                f"truth[0] must be {[examples, *shape]} for each update, got {list(x.shape[1:])}."
            )
    keys = jax.random.split(as_key(key), rows.shape[0])
    made = reconstruct_all(built, keys, rows, before, task, known, labels, truth)
    if alone:
        made = jax.tree.map(lambda leaf: leaf[0], made)
    guess = made.guess
    return Reconstructed(guess.x, guess.y, guess.loss, guess.trail, made.scores)


def _rows(value, dim: int, name: str, count: int | None):
    """(the vectors [m, D] of one or several, whether it was one)."""
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim in (1, 2):
        rows = floats(value, name)
    else:
        rows = ravel_pytree(jax.tree.map(lambda leaf: floats(leaf, name), value))[0]
    alone = rows.ndim == 1
    rows = rows[None] if alone else rows
    if rows.shape[1] != dim:
        raise ConfigError(
            f"{name} must hold the model's {dim} parameters, got {rows.shape[1]}; it is a vector "
            f"[{dim}], the model's tree, or [m, {dim}]."
        )
    if count is not None:
        if rows.shape[0] not in (1, count):
            raise ConfigError(f"{name} must be one for all, or {count}, got {rows.shape[0]}.")
        rows = jnp.broadcast_to(rows, (count, dim))
    return rows.astype(jnp.float32), alone


def _stacked(value, count: int, alone: bool, name: str, dtype):
    array = jnp.asarray(np.asarray(value), dtype)
    array = array[None] if alone else array
    if array.shape[0] != count:
        raise ConfigError(f"{name} must be of {count} updates, got {array.shape[0]}.")
    return array


def _per_channel(value, channels: int, name: str) -> tuple[float, ...]:
    given = tuple(np.atleast_1d(np.asarray(value, float)).tolist())
    if len(given) not in (1, channels):
        raise ConfigError(
            f"{name} must be a number, or {channels}, one a channel, got {len(given)}."
        )
    return given
