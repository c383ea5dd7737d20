"""Attacks that rewrite the adversary's rows of the stacked updates [K, D]."""
