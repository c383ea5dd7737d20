"""Progress of what runs: rounds, speed, time left and newest metrics, in the form of its place."""

from fedjax_sec.progress.displays import Display, Lines, Notebook, Terminal, choose, in_notebook
from fedjax_sec.progress.watching import OfRun, OfSweep
from fedjax_sec.progress.words import Rate, State, duration, newest, sentence

__all__ = [
    "Display",
    "Lines",
    "Notebook",
    "OfRun",
    "OfSweep",
    "Rate",
    "State",
    "Terminal",
    "choose",
    "duration",
    "in_notebook",
    "newest",
    "sentence",
]
