"""Attacks on a trained model's inputs, by which its robust accuracy is measured."""
