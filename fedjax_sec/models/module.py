"""A flax module of the user's own as a model."""

import dataclasses
import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.core import ConfigError, Model, Network, one_line, registry, static


class _Held:
    """A module as a static value: `nn.Sequential([...])`, with its list, cannot be hashed."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __eq__(self, other):
        return isinstance(other, _Held) and self.module is other.module

    def __hash__(self):
        return id(self.module)


@registry.models.register("module")
class Module(Network):
    """An instance of a `flax.linen.Module`, given from Python: `model=Net(...)`.

    `x [B, ...] -> logits [B, C]`, with C classes, or for tokens [B, L] logits [B, L, V]. A module
    that takes `train` gets true in local training and false elsewhere, and a key for dropout. One
    that takes `mask [B]` gets the examples that count, true except where a last batch is filled up.
    Running statistics are those of the collection `batch_stats`; a module with them takes `train`.

    A configuration holds the module's class and fields as text, which does not bring it back: give
    it again, to `fedjax_sec.run` of the resumed run too. Its code is not compared.

    Raises: `ConfigError` where the module is not given, where it is no instance of a linen module,
    where it fails on the data's inputs, and where the last axis of its outputs is not C.

    Source: whatever the user's module is from.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> net = nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(10)])
        >>> model = registry.models.build({"name": "module", "module": net}).make((8, 8, 1), 10)
        >>> sum(p.size for p in jax.tree.leaves(model.init(jax.random.key(0))))
        650
    """

    stands_alone = False
    from_python = True

    module: Any = static(None, "The module; in a written configuration its class and fields.")

    def __post_init__(self):
        if isinstance(self.module, nn.Module):
            object.__setattr__(self, "module", _Held(self.module))

    def dump_spec(self) -> dict:
        """As it is written in a configuration."""
        return {"name": self.registered_name, "module": _text(self.module)}

    def make(self, input_shape, num_classes):
        module = self.module.module if isinstance(self.module, _Held) else self.module
        if isinstance(module, str) or module is None:
            named = f" {module}" if module else ""
            raise ConfigError(
                f"model: the module{named} is Python's and in no file; give it again: "
                f"fedjax_sec.run(config, model=MODULE)."
            )
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"model: expected an instance of a flax.linen.Module, got {type(module).__name__}."
            )
        takes = set(inspect.signature(type(module).__call__).parameters)
        still = {"train": False} if "train" in takes else {}

        dtype = _input_type(module, input_shape, still)

        def init(key):
            return module.init(key, jnp.zeros((1, *input_shape), dtype), **still)

        def call(variables, x, train, key, mask, **options):
            rngs = None if key is None else {"dropout": key}
            options |= {"train": train} if "train" in takes else {}
            options |= {"mask": mask} if "mask" in takes else {}
            return module.apply(variables, x, rngs=rngs, **options)

        def apply(variables, x, *, train=False, key=None, mask=None):
            return call(variables, x, train, key, mask)

        def observe(variables, x, mask, key):
            out, moved = call(variables, x, True, key, mask, mutable=["batch_stats"])
            return out, {**variables, **moved}

        variables = jax.eval_shape(init, jax.random.key(0))
        statistics = "batch_stats" in variables
        if statistics and "train" not in takes:
            raise ConfigError(
                f"model: {type(module).__name__} has running statistics (batch_stats), so its "
                f"__call__ must take 'train', true where they are to move."
            )
        inputs = jax.ShapeDtypeStruct((2, *input_shape), dtype)
        outputs = functools.partial(jax.eval_shape, apply, variables, inputs)
        _check_outputs(module, outputs, input_shape, num_classes, dtype == jnp.int32)
        return Model(
            init, apply, pools_batch="mask" in takes, observe=observe if statistics else None
        )


def _input_type(module, input_shape, still):
    """The type of inputs that the module takes: numbers, else tokens."""
    first = None
    for dtype in (jnp.float32, jnp.int32):
        zeros = jnp.zeros((1, *input_shape), dtype)
        try:
            jax.eval_shape(lambda key, x=zeros: module.init(key, x, **still), jax.random.key(0))
            return dtype
        except Exception as error:  # the user's own module
            first = first or error
    raise _failed(module, first)


def _failed(module, error) -> ConfigError:
    return ConfigError(
        f"model: {type(module).__name__} fails on the data's inputs ({type(error).__name__}: "
        f"{one_line(error, 200)})."
    )


def _check_outputs(module, outputs, input_shape, num_classes: int, tokens: bool) -> None:
    """Raises where the outputs for two inputs are no numbers for each class."""
    try:
        out = outputs()
    except Exception as error:  # the user's own module
        raise _failed(module, error) from error
    shape = getattr(out, "shape", None)  # None: a tree, which the task has to understand
    allowed = [(2, num_classes)] + ([(2, *input_shape, num_classes)] if tokens else [])
    if shape is not None and shape not in allowed:
        raise ConfigError(
            f"model: {type(module).__name__} gives outputs of shape {list(shape)} for two inputs "
            f"{[2, *input_shape]}; they must be {list(allowed[-1])}, one number for each class."
        )


def _text(module: Any) -> Any:
    """The class and the fields of a module on one line, the same in every process."""
    if isinstance(module, _Held):
        module = module.module
    if not isinstance(module, nn.Module):
        return module
    cls, fields = type(module), []
    for field in dataclasses.fields(module):
        if field.name not in ("parent", "name"):
            value = getattr(module, field.name)
            fields.append(
                f"{field.name}={_text(value) if isinstance(value, nn.Module) else value!r}"
            )
    text = f"{cls.__module__}.{cls.__qualname__}({', '.join(fields)})"
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", text))
