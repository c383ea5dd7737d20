"""Monitors, which look at a round, one component a file."""
