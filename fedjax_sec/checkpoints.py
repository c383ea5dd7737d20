"""Saving and restoring the common state of a group of runs, with orbax."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Checkpoints:
    """The newest complete state in a folder.

    Orbax writes into a temporary folder and renames it, so a kill in the middle leaves the older
    checkpoint in force.
    """

    def __init__(self, folder: str | Path):
        import orbax.checkpoint as ocp  # slow to import, and not needed without an output folder

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, create=True, enable_async_checkpointing=False
            ),
        )

    def save(self, done: int, state: Any, elapsed: float) -> None:
        """Saves the state after `done` rounds and the seconds spent so far."""
        # Copied: the next scan reuses the state's donated buffers.
        leaves = {f"{i:04d}": np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        content = {"leaves": leaves, "elapsed": np.float64(elapsed)}
        self._manager.save(done, args=self._ocp.args.StandardSave(content))
        self._manager.wait_until_finished()

    def restore(self, state: Any) -> tuple[Any, int, float]:
        """The saved state, the rounds done and the seconds spent; `state`, 0, 0 when none is."""
        done = self._manager.latest_step()
        if done is None:
            return state, 0, 0.0
        leaves, treedef = jax.tree.flatten(state)
        target = {
            "leaves": {f"{i:04d}": np.zeros(a.shape, a.dtype) for i, a in enumerate(leaves)},
            "elapsed": np.float64(0.0),
        }
        content = self._manager.restore(done, args=self._ocp.args.StandardRestore(target))
        restored = [
            jnp.array(content["leaves"][f"{i:04d}"], dtype=leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, restored), done, float(content["elapsed"])
