"""Partitioners: which client holds which training example. One file each, found by the registry.

A partitioner runs on the host, with NumPy, once an experiment:
`split(rng, labels [T], num_clients) -> Partition`.
"""
