"""Attacks by what they touch: local `data`, or the `update` sent to the server."""
