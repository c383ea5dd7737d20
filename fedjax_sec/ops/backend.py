"""Which backend a kernel is traced for."""

import jax


def on_cpu() -> bool:
    """Whether computations are lowered for CPU, decided when a function is traced."""
    return jax.default_backend() == "cpu"
