"""Which backend a kernel is traced for, and how hard its compiler tries."""

import functools
import os

import jax


def on_cpu() -> bool:
    """Whether computations are lowered for CPU, decided when a function is traced."""
    return jax.default_backend() == "cpu"


def on_gpu() -> bool:
    """Whether computations are lowered for a GPU, decided when a function is traced."""
    return jax.default_backend() in ("gpu", "cuda")


def compiler_options(level: int | None) -> dict:
    """Options of `jax.jit` and `compile` on a CPU, for code at a level of LLVM's (0 to 3).

    None leaves all to XLA, whose level is 3. A level is for short runs, so that the older emitters
    of loops come with it: they compile sooner, and rounds of many clients are somewhat slower. What
    `XLA_FLAGS` or `jax_disable_most_optimizations` choose stays as it is.

    >>> compiler_options(None)
    {}
    """
    if level is None or not on_cpu():
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": level}
    options = {name: value for name, value in wanted.items() if name not in flags}
    if jax.config.values["jax_disable_most_optimizations"]:
        options.pop("xla_backend_optimization_level", None)
    return {name: value for name, value in options.items() if _accepted(name, value)}


@functools.cache
def _accepted(option: str, value: int) -> bool:
    """Whether this version of XLA still has an option."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
