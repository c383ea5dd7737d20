"""Evaluators, which measure between rounds, one component a file."""
