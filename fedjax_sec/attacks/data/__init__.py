"""Attacks that poison local examples; each also defines the backdoor that evaluation measures."""
