"""Attacks that reconstruct clients' examples, one component a file."""
