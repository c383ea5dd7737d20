"""Which backend a kernel is traced for."""

import jax


def on_cpu() -> bool:
    """Whether computations are lowered for CPU, decided when a function is traced."""
    return jax.default_backend() == "cpu"


def on_gpu() -> bool:
    """Whether computations are lowered for a GPU, decided when a function is traced."""
    return jax.default_backend() in ("gpu", "cuda")
