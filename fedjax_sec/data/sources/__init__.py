"""Data sets, one component a file."""
