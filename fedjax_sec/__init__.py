"""fedjax_sec: a batched simulator for security research in federated learning."""

from fedjax_sec.api import aggregate, attack
from fedjax_sec.config import Experiment
from fedjax_sec.experiment import Result, run
from fedjax_sec.schema import ConfigError

__version__ = "0.1.0"
__all__ = ["ConfigError", "Experiment", "Result", "aggregate", "attack", "run"]
