"""Callers' stacks, vectors, masks and keys, checked and in floating point.

Errors are one line, name the argument, and never print an array.
"""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fedjax_sec.core import ConfigError, Space, tree_space
from fedjax_sec.core.advice import one_line, shown

_KEPT = (jnp.float16, jnp.bfloat16, jnp.float32)
_DEEPEST = 32  # nested lists


class Stack(NamedTuple):
    """Clients' updates as rows, and the way back to what the caller has.

    `like` is the first client's pytree with arrays in floating point, None where the caller gave
    vectors; `restore` makes of a vector [D] what one client's update is: a pytree like it, or the
    vector itself. `space` says where the pytree's leaves lie, None for vectors.
    """

    rows: Float[Array, "K D"]
    like: Any
    restore: Callable
    space: Space | None = None

    @property
    def one(self) -> str:
        """In words, what one client's update is."""
        if self.like is None:
            return f"a vector [D] = [{self.rows.shape[1]}]"
        return "a pytree like one client's"


def _typed(array) -> str:
    return f"{array.dtype} with shape {tuple(array.shape)}"


def floats(value: Any, name: str) -> Array:
    """Real numbers as an array of a floating type.

    float16, bfloat16 and float32 stay; integers and float64 become float32 (float64 where JAX has
    64 bits enabled), rounded once, on the host. `ConfigError` for what holds no real numbers, and
    for a finite number that would become infinite.

    >>> floats([[2**40, 0.5]], "updates").tolist()
    [[1099511627776.0, 0.5]]
    """
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(
            f"{name} is traced: aggregate and attack check the values that they get, so they "
            f"cannot be called inside jax.jit, vmap or grad."
        )
    if isinstance(value, np.ma.MaskedArray):
        raise ConfigError(f"{name} is a masked array; replace what is masked: {name}.filled(0).")
    if not isinstance(value, (np.ndarray, jax.Array)):
        value = _array(value, name)
    if value.dtype == object:
        value = _unboxed(value, name)
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise ConfigError(f"{name} must hold real numbers, got {_typed(value)}.")
    target = jax.dtypes.canonicalize_dtype(np.float64)
    if value.dtype in (*_KEPT, target):
        return jnp.asarray(value)
    wide = np.asarray(value)
    if not (jnp.issubdtype(wide.dtype, jnp.floating) and wide.dtype.itemsize >= 8):
        wide = wide.astype(np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(target)
    lost = np.isfinite(wide) & ~np.isfinite(narrow)
    if lost.any():
        at = tuple(map(int, np.argwhere(lost)[0]))
        raise ConfigError(
            f"{name}{list(at) if at else ''} = {np.format_float_scientific(wide[at], 3)} is beyond "
            f"the range of {target}, {np.finfo(target).max:.3g}; scale the numbers down."
        )
    return jnp.asarray(narrow)


def _array(value, name) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # an object's own conversion raises whatever it likes
        raise ConfigError(
            f"{name} cannot be read as an array ({type(error).__name__}: {one_line(error, 200)})."
        ) from error


def _unboxed(array, name) -> np.ndarray:
    """Python numbers beyond 64 bits, or of a table's mixed columns, as float64."""
    for item in array.flat:
        if not isinstance(item, numbers.Real) or isinstance(item, (bool, np.bool_)):
            hint = "; make it dense: .toarray()" if hasattr(item, "toarray") else ""
            raise ConfigError(
                f"{name} must hold real numbers, got {shown(item)} ({type(item).__name__}){hint}."
            )
    try:
        return array.astype(np.float64)
    except OverflowError as error:
        raise ConfigError(f"{name} holds a number beyond float64's range.") from error


# --- Stacks -------------------------------------------------------------------------------------


def as_stack(updates: Any) -> Stack:
    """Updates of K clients: an array [K, D], nested lists of numbers, or a list of K pytrees.

    The pytrees (dicts, lists of layers, a model's variables) agree in structure, shapes and types.

    >>> stack = as_stack([{"w": np.ones((2, 2)), "b": np.zeros(2)}] * 3)
    >>> stack.rows.shape, stack.restore(stack.rows[0])["w"].shape
    ((3, 6), (2, 2))
    """
    if isinstance(updates, Mapping) or hasattr(updates, "_fields"):
        raise ConfigError(
            f"updates must be an array [K, D] or a list with one pytree for each client, got one "
            f"{type(updates).__name__}; write [client_0, client_1, ...]."
        )
    if isinstance(updates, (list, tuple)):
        if not all(map(_is_vector, updates)):
            return _stack_trees(updates)
        updates = _rows(updates)
    rows = floats(updates, "updates")
    if rows.ndim != 2 or 0 in rows.shape:
        hints = {
            1: " Give one row for each client: updates[:, None] are K clients with one number each,"
            " updates[None] is one client.",
            3: " Flatten what a client sends, updates.reshape(K, -1), or give a list with one "
            "pytree for each client.",
        }
        raise ConfigError(
            f"updates must be a non-empty array [K, D], got shape {rows.shape}."
            f"{hints.get(min(rows.ndim, 3), '') if rows.size else ''}"
        )
    return Stack(rows, None, lambda vector: vector)


def _is_vector(client, depth=0) -> bool:
    """Whether it is no pytree: a vector, a number, (nested) numbers, or no update at all."""
    if isinstance(client, (list, tuple)) and not hasattr(client, "_fields"):
        if depth == _DEEPEST:
            raise ConfigError(f"updates is nested more than {_DEEPEST} lists deep.")
        if set(map(type, client)) <= {int, float}:  # quick, for long lists
            return True
        return all(_is_vector(item, depth + 1) and not getattr(item, "ndim", 0) for item in client)
    if (ndim := getattr(client, "ndim", None)) is not None:
        return ndim < 2
    return client is None or (
        not isinstance(client, Mapping) and jax.tree_util.all_leaves([client])
    )


def _rows(vectors):
    """A list of vectors as rows; the first that has another length is named."""
    for i, vector in enumerate(vectors):
        if _size(vector) != _size(vectors[0]):
            raise ConfigError(
                f"updates must be [K, D]: updates[{i}] holds {_size(vector)}, updates[0] "
                f"{_size(vectors[0])}."
            )
        if isinstance(vector, (list, tuple)) and {bool, np.bool_} & set(map(type, vector)):
            raise ConfigError(f"updates[{i}] must hold real numbers, got true or false.")
    if any(getattr(vector, "ndim", 0) for vector in vectors):
        return jnp.stack([floats(vector, f"updates[{i}]") for i, vector in enumerate(vectors)])
    return vectors


def _size(vector) -> str:
    length = np.shape(vector)[:1] if hasattr(vector, "ndim") else None
    if isinstance(vector, (list, tuple)):
        length = (len(vector),)
    return f"{length[0]} numbers" if length else "one value"


def _stack_trees(clients) -> Stack:
    trees = []
    for i, client in enumerate(clients):
        if getattr(client, "ndim", 0) > 1:
            raise ConfigError(
                f"updates[{i}] has shape {tuple(client.shape)}: in a list each client sends a "
                f"vector or a pytree such as [layer, ...]; wrap it: [[update] for update in "
                f"updates]."
            )
        trees.append(_arrays(client, f"updates[{i}]"))
        _same_form(trees[i], trees[0], f"updates[{i}]", "updates[0]")
    space = tree_space(trees[0], clients[0])
    return Stack(jnp.stack([space.split(tree)[0] for tree in trees]), trees[0], space.join, space)


def _arrays(tree, name):
    """The pytree with every leaf an array in floating point."""
    try:
        paths, structure = jax.tree.flatten_with_path(tree)
    except Exception as error:  # keys that cannot be sorted, a node's own mistakes
        raise ConfigError(
            f"{name} is no pytree that JAX can flatten ({one_line(error, 200)})."
        ) from error
    leaves = [floats(leaf, f"{name}{jax.tree_util.keystr(path)}") for path, leaf in paths]
    if not sum(leaf.size for leaf in leaves):
        raise ConfigError(f"{name} holds no numbers.")
    return jax.tree.unflatten(structure, leaves)


def _same_form(tree, like, name, other):
    """Raises where the two differ in structure, or a leaf in shape or type."""
    mine, theirs = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(one)}
        for one in (tree, like)
    )
    for path in theirs:
        if path not in mine:
            raise ConfigError(f"{name} has no leaf {path}, which {other} has.")
    for path in mine:
        if path not in theirs:
            raise ConfigError(f"{name} has a leaf {path}, which {other} does not have.")
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ConfigError(f"{name} has the leaves of {other} in containers of other types.")
    for path, leaf in mine.items():
        if (leaf.shape, leaf.dtype) != (theirs[path].shape, theirs[path].dtype):
            raise ConfigError(
                f"{name}{path} must be as {other}{path}, {theirs[path].dtype} with shape "
                f"{theirs[path].shape}; got {leaf.dtype} with shape {leaf.shape}."
            )


# --- Vectors, masks and keys --------------------------------------------------------------------


def as_vector(value: Any, name: str, stack: Stack) -> Float[Array, " D"]:
    """A value of the form of one client's update as a vector in the stack's type; all finite."""
    if stack.space is None:
        vector = floats(value, name)
        if vector.shape != stack.rows.shape[1:]:
            raise ConfigError(f"{name} must be {stack.one}, got shape {vector.shape}.")
    else:
        tree = _arrays(value, name)
        _same_form(tree, stack.like, name, "updates[0]")
        vector = stack.space.split(tree)[0]
    vector = vector.astype(stack.rows.dtype)
    if not bool(jnp.all(jnp.isfinite(vector))):
        raise ConfigError(f"{name} must be finite in {stack.rows.dtype}, got NaN or infinity.")
    return vector


def as_weights(value: Any, stack: Stack) -> Float[Array, " K"]:
    """The clients' weights [K] in the stack's type: finite, none negative, not all zero."""
    clients, dtype = stack.rows.shape[0], stack.rows.dtype
    if value is None:
        return jnp.ones(clients, dtype)
    weights = np.asarray(floats(value, "weights"), np.float64)
    if weights.shape != (clients,):
        raise ConfigError(f"weights must be [K] = [{clients}], got shape {weights.shape}.")
    tiny, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    for i, weight in enumerate(weights):
        if not (weight == 0 or tiny <= weight <= most):  # NaN fails too
            raise ConfigError(
                f"weights[{i}] = {weight:.3g}: a weight must be 0 or between {tiny:.2g} and "
                f"{most:.2g}."
            )
    if not weights.any():
        raise ConfigError("weights are all zero, so no client would count; give one above 0.")
    if weights.sum() > most:
        raise ConfigError(
            f"weights have the sum {weights.sum():.3g}, beyond float32's {most:.2g}; scale them "
            f"down, only their ratios count."
        )
    # Only ratios count. float16 ends at 65504, and beyond any count quotients may overflow.
    if weights.sum() > min(float(jnp.finfo(dtype).max), 2.0**64):
        weights = np.ldexp(weights, -int(np.frexp(weights.sum())[1]))
    return jnp.asarray(weights.astype(np.float32)).astype(dtype)


def as_mask(value: Any, clients: int) -> Bool[Array, " K"]:
    """Which clients are malicious [K]."""
    wanted = f"malicious must be K = {clients} booleans, one for each client"
    mask = value if isinstance(value, (np.ndarray, jax.Array)) else _array(value, "malicious")
    if isinstance(mask, (np.ma.MaskedArray, jax.core.Tracer)):
        raise ConfigError(f"{wanted}, got a {type(mask).__name__}.")
    if mask.dtype == bool and mask.shape == (clients,):
        if not mask.any():
            raise ConfigError("malicious marks no client, so the attack would do nothing.")
        return jnp.asarray(mask)
    remedy = ""
    if jnp.issubdtype(mask.dtype, jnp.integer) and mask.ndim == 1 and mask.size:
        host = np.asarray(mask)
        if mask.shape == (clients,) and host.min() >= 0 and host.max() <= 1:
            remedy = "; for zeros and ones write numpy.asarray(malicious, bool)"
        else:
            some = shown(host.tolist())
            remedy = f"; for positions write numpy.isin(numpy.arange({clients}), {some})"
    raise ConfigError(f"{wanted}, got {_typed(mask)}{remedy}.")


def as_key(key: Any) -> Array:
    """A JAX key: the given one, of a seed, or of JAX's older arrays of uint32; None is seed 0.

    >>> bool(as_key(7) == as_key(jax.random.PRNGKey(7)))
    True
    """
    if key is None:
        key = 0
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        if 0 <= key < 2**32:
            return jax.random.key(int(key))
    elif isinstance(key, (jax.Array, np.ndarray)) and not isinstance(key, jax.core.Tracer):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.shape == ():
                return key
        elif key.dtype == np.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
            return jax.random.wrap_key_data(jnp.asarray(key))
    raise ConfigError(
        f"key must be a seed from 0 to 2**32 - 1 or one JAX key such as jax.random.key(0), got "
        f"{shown(key)}."
    )
