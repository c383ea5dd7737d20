"""Attacks by what they touch: local `data`, the `update` sent, or a trained model's inputs."""
