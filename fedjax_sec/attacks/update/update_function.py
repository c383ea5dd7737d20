"""A plain Python function as an attack on updates."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    ConfigError,
    UpdateAttack,
    one_line,
    qualified,
    registry,
    shown,
    static,
    suggestion,
)
from fedjax_sec.ops.moments import weighted_mean

#: What a function may name beside the stack -> its shape, where it is an array.
KNOWN = ("visible", "malicious", "params", "round", "key")


@registry.attacks.register("update_function")
class UpdateFunction(UpdateAttack):
    r"""A function of the stack, given from Python: `attack=lambda updates: -updates`.

    `f(updates [K, D]) -> [K, D]`, or one vector `[D]` that all malicious clients send, made of
    `jax.numpy`. Only malicious rows of the result are used. Rows that the adversary does not see
    are the mean of those that it sees. A function may name further arguments, each of which it is
    given: `visible [K]` and `malicious [K]` (booleans), `params [D]` (the global parameters),
    `round` and `key` (a JAX key of the round). One that names `visible` gets the other rows as
    zeros, and decides itself.

    A configuration holds its qualified name, which does not bring it back: give it again, to
    `fedjax_sec.run` of the resumed run too.

    Raises: `ConfigError` where the function is not given, where it names another argument, where
    JAX cannot trace it, and where it returns neither a stack nor a vector.

    Source: whatever the user's function is from.

    Example:
        >>> import fedjax_sec
        >>> flip = lambda updates, malicious: -2.0 * updates
        >>> print(fedjax_sec.attack([[1.0], [2.0]], flip, malicious=[False, True])[:, 0])
        [ 1. -4.]
    """

    stands_alone = False
    from_python = True

    function: Any = static(None, "The function; in a written configuration its qualified name.")

    def dump_spec(self) -> dict:
        """As it is written in a configuration."""
        return {"name": self.registered_name, "function": qualified(self.function)}

    def check(self, path, setting):
        if isinstance(self.function, str) and setting.num_parameters is None:
            return  # a finished run's configuration may be read; only a run needs the function
        self._refuse_missing(path)
        name = qualified(self.function)
        wanted = [one for one in _arguments(self.function) if one not in KNOWN]
        if wanted:
            raise ConfigError(
                f"{path}: {name} takes {wanted[0]!r}, which is none of {', '.join(KNOWN)}, the "
                f"arguments that a function may name behind the updates."
                f"{suggestion(wanted[0], KNOWN)}"
            )
        clients, dim = setting.num_clients, setting.num_parameters or 8
        shape = jax.ShapeDtypeStruct
        mask = shape((clients,), jnp.bool_)
        given = {
            "visible": mask,
            "malicious": mask,
            "params": shape((dim,), jnp.float32),
            "round": shape((), jnp.int32),
            "key": jax.eval_shape(lambda: jax.random.key(0)),
        }
        try:
            out = jax.eval_shape(self._call, shape((clients, dim), jnp.float32), given)
        except ConfigError:
            raise
        except Exception as error:  # the caller's own function
            raise ConfigError(
                f"{path}: {name} fails on updates [K, D] = [{clients}, {dim}] "
                f"({type(error).__name__}: {one_line(error, 200)}); it must be made of jax.numpy."
            ) from error
        if getattr(out, "shape", None) not in ((dim,), (clients, dim)):
            raise ConfigError(
                f"{path}: {name} must return a stack [K, D] = [{clients}, {dim}] or one vector "
                f"[{dim}], got {shown(out)}."
            )

    def _refuse_missing(self, path: str) -> None:
        if not callable(self.function):
            named = f" {self.function!r}" if isinstance(self.function, str) else ""
            raise ConfigError(
                f"{path}: the function{named} is Python's and in no file; give it again: "
                f"fedjax_sec.run(config, attack=FUNCTION)."
            )

    def _call(self, updates, given):
        names = _arguments(self.function)
        if "visible" not in names:
            seen = given["visible"]
            mean = weighted_mean(updates, seen.astype(updates.dtype))
            updates = jnp.where(seen[:, None], updates, mean[None])
        return self.function(updates, **{name: given[name] for name in names})

    def apply(self, key, updates, state, view):
        self._refuse_missing("attack")
        given = {
            "visible": view.visible,
            "malicious": view.malicious,
            "params": view.params,
            "round": view.round,
            "key": key,
        }
        sent = self._call(jnp.where(view.visible[:, None], updates, 0.0), given)
        return jnp.broadcast_to(sent.astype(updates.dtype), updates.shape), state, {}


def _arguments(function: Callable) -> list[str]:
    """The names of its arguments behind the first one that have no default, or that we know."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have none
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        p.name
        for p in parameters[1:]
        if p.kind in named and (p.default is p.empty or p.name in KNOWN)
    ]
