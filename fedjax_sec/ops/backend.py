"""Which backend a kernel is traced for, and how hard its compiler tries."""

import os

import jax


def on_cpu() -> bool:
    """Whether computations are lowered for CPU, decided when a function is traced."""
    return jax.default_backend() == "cpu"


def on_gpu() -> bool:
    """Whether computations are lowered for a GPU, decided when a function is traced."""
    return jax.default_backend() in ("gpu", "cuda")


def compiler_options(level: int | None) -> dict:
    """Options of `jax.jit` and `compile`: on a CPU, the level at which LLVM optimises (0 to 3).

    None leaves XLA's, 3. So does another backend, and a level that `XLA_FLAGS` or
    `jax_disable_most_optimizations` chooses.

    >>> compiler_options(None)
    {}
    """
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    if level is None or chosen or jax.config.values["jax_disable_most_optimizations"]:
        return {}
    return {"xla_backend_optimization_level": level} if on_cpu() else {}
