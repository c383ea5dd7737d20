"""Other programs' versions of what we time; each is optional and named as it is installed.

ByzFL (`pip install byzfl`, which needs PyTorch) has the same rules for PyTorch tensors and NumPy
arrays. Its Krum sums n - f - 1 distances where Blanchard et al. sum n - f - 2: the same work.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable

import numpy as np

from fedjax_sec.bench.timing import Case, queued
from fedjax_sec.ops.backend import on_cpu


def missing() -> list[str]:
    """Peers that are not installed here."""
    return [name for name in ("byzfl", "torch") if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str | None]:
    """Versions of the peers, None for those that are missing."""
    return {
        name: None if name in missing() else importlib.metadata.version(name)
        for name in ("byzfl", "torch")
    }


def byzfl_aggregators(f: int, num_iterations: int, radius: float) -> dict[str, Callable]:
    """Our names of rules -> ByzFL's objects of the same setting; empty where it is missing."""
    if "byzfl" in missing():
        return {}
    import byzfl

    return {
        "mean": byzfl.Average(),
        "median": byzfl.Median(),
        "trimmed_mean": byzfl.TrMean(f=f),
        "near_median": byzfl.Meamed(f=f),
        "krum": byzfl.Krum(f=f),
        "multi_krum": byzfl.MultiKrum(f=f),
        "geometric_median": byzfl.GeometricMedian(nu=0.1, T=num_iterations),
        # It keeps its last result as the next centre: a new one for each call starts at zero.
        "centered_clipping": lambda stack: byzfl.CenteredClipping(L=1, tau=radius)(stack),
    }


def byzfl_cases(rule: Callable, updates: np.ndarray) -> list[Case]:
    """The rule on a PyTorch tensor, on our device, and on a CPU on a NumPy array too."""
    import torch

    if on_cpu():
        tensor = torch.from_numpy(updates.copy())
        return [
            Case("ByzFL on PyTorch", lambda: rule(tensor)),
            Case("ByzFL on NumPy", lambda: rule(updates)),
        ]
    tensor = torch.from_numpy(updates).to("cuda")
    return [queued("ByzFL on PyTorch", lambda: rule(tensor), lambda _: torch.cuda.synchronize())]
