"""Partitioners: which client holds which training example. One file each, found by the registry.

A partitioner runs on the host, with NumPy, once an experiment:
`split(rng, labels [T], num_clients, users=None) -> Partition`, where `users` [T] says who made each
example, None where the data set does not.
"""
