"""fedjax_sec: a batched simulator for security research in federated learning."""

from fedjax_sec import fedml
from fedjax_sec.api import ArenaResult, SweepResult, aggregate, arena, attack, run, sweep
from fedjax_sec.core import ConfigError
from fedjax_sec.privacy import Reconstructed, reconstruct
from fedjax_sec.report.drawing import plot_curves, plot_heatmap
from fedjax_sec.report.frames import load
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result

__version__ = "0.2.0"
__all__ = [
    "ArenaResult",
    "ConfigError",
    "Experiment",
    "Reconstructed",
    "Result",
    "SweepResult",
    "aggregate",
    "arena",
    "attack",
    "fedml",
    "load",
    "plot_curves",
    "plot_heatmap",
    "reconstruct",
    "run",
    "sweep",
]
