"""Runs: from a configuration to results."""
