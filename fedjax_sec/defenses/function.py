"""A plain Python function as an aggregator."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import ConfigError, Stage, one_line, qualified, registry, shown, static
from fedjax_sec.ops.moments import weighted_mean


@registry.defenses.register("function")
class Function(Stage):
    r"""A function of the stack, given from Python: `defense=lambda updates: ...`.

    `f(updates [K, D]) -> [D]`, made of `jax.numpy`. Rows cannot be taken out of a stack whose shape
    is fixed when the program is compiled, so rows that hold NaN or infinity, and those of clients
    that sent nothing, are the mean of the other rows: a mean then leaves them out exactly, and a
    rule that tolerates f bad rows never meets more of them than were sent. A function with two
    arguments, `f(updates, valid [K])`, gets those rows as zeros and the mask, and decides itself.
    Where no row is valid the aggregate is zero.

    A function does not say what it kept, so `kept` is 1 for every valid row. A configuration holds
    its qualified name, which does not bring it back: give it again, to `fedjax_sec.run` of the
    resumed run too.

    Raises: `ConfigError` where the function is not given, where JAX cannot trace it, and where it
    does not return one vector like a row.

    Source: whatever the user's function is from.

    Example:
        >>> import jax.numpy as jnp
        >>> import fedjax_sec
        >>> rule = lambda updates: jnp.median(updates, axis=0)
        >>> print(fedjax_sec.aggregate([[1.0], [2.0], [9.0]], rule))
        [2.]
    """

    stands_alone = False
    from_python = True

    stage = "aggregate"
    function: Any = static(None, "The function; in a written configuration its qualified name.")

    def dump_spec(self) -> dict:
        """As it is written in a configuration."""
        return {"name": self.registered_name, "function": qualified(self.function)}

    def check(self, path, setting):
        if isinstance(self.function, str) and setting.num_parameters is None:
            return  # a finished run's configuration may be read; only a run needs the function
        self._refuse_missing(path)
        clients, dim = setting.num_clients, setting.num_parameters or 8
        shape = jax.ShapeDtypeStruct
        rows, valid = shape((clients, dim), jnp.float32), shape((clients,), jnp.bool_)
        try:
            out = jax.eval_shape(self._call, rows, valid)
        except ConfigError:
            raise
        except Exception as error:  # the caller's own function
            raise ConfigError(
                f"{path}: {qualified(self.function)} fails on updates [K, D] = [{clients}, {dim}] "
                f"({type(error).__name__}: {one_line(error, 200)}); it must be made of jax.numpy."
            ) from error
        if getattr(out, "shape", None) != (dim,):
            raise ConfigError(
                f"{path}: {qualified(self.function)} must return one vector [D] = [{dim}] for "
                f"updates [{clients}, {dim}], got {shown(out)}."
            )

    def init(self, num_clients, dim):
        return ()

    def _refuse_missing(self, path: str) -> None:
        if not callable(self.function):
            named = f" {self.function!r}" if isinstance(self.function, str) else ""
            raise ConfigError(
                f"{path}: the function{named} is Python's and in no file; give it again: "
                f"fedjax_sec.run(config, defense=FUNCTION)."
            )

    def _call(self, updates, valid):
        if _arguments(self.function) > 1:
            return self.function(jnp.where(valid[:, None], updates, 0.0), valid)
        mean = weighted_mean(jnp.where(valid[:, None], updates, 0.0), valid.astype(updates.dtype))
        return self.function(jnp.where(valid[:, None], updates, mean[None]))

    def apply(self, key, updates, state, view):
        self._refuse_missing("defense")
        aggregate = self._call(updates, view.valid).astype(updates.dtype)
        aggregate = jnp.where(jnp.any(view.valid), aggregate, 0.0)
        return aggregate, state, {"kept": view.valid.astype(updates.dtype)}


def _arguments(function: Callable) -> int:
    """How many arguments without default it takes by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)
