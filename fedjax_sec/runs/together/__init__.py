"""One run by several processes that something else starts, each with devices of its own."""

from fedjax_sec.runs.together.choice import STARTERS, build_starter
from fedjax_sec.runs.together.execution import execute
from fedjax_sec.runs.together.members import RunFailed
from fedjax_sec.runs.together.ray import Ray

__all__ = ["STARTERS", "Ray", "RunFailed", "build_starter", "execute"]
