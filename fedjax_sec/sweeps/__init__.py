"""Sweeps: many experiments with one compilation for each distinct structure."""

from fedjax_sec.sweeps.grid import Cell, Sweep, from_mapping, load, make_cells, named
from fedjax_sec.sweeps.groups import run_cells

__all__ = ["Cell", "Sweep", "from_mapping", "load", "make_cells", "named", "run_cells"]
