"""Sweeps: many experiments with one compilation for each distinct structure."""

from fedjax_sec.sweeps.arena import Arena, Refusal, admit, plan_arena
from fedjax_sec.sweeps.estimate import Cost, duration_on, estimate
from fedjax_sec.sweeps.grid import Cell, Sweep, from_mapping, load, make_cells, named
from fedjax_sec.sweeps.groups import Group, collect, plan, unfinished, work
from fedjax_sec.sweeps.launchers import Launcher
from fedjax_sec.sweeps.launchers.choice import build_launcher
from fedjax_sec.sweeps.launchers.local import Local
from fedjax_sec.sweeps.run import SweepFailed, run_cells
from fedjax_sec.sweeps.status import survey

__all__ = [
    "Arena",
    "Cell",
    "Cost",
    "Group",
    "Launcher",
    "Local",
    "Refusal",
    "Sweep",
    "SweepFailed",
    "admit",
    "build_launcher",
    "collect",
    "duration_on",
    "estimate",
    "from_mapping",
    "load",
    "make_cells",
    "named",
    "plan",
    "plan_arena",
    "run_cells",
    "survey",
    "unfinished",
    "work",
]
