"""Gradient SHAP of finished runs on images that a backdoor has stamped."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from fedjax_sec.evaluation import attribution
from fedjax_sec.runs import loading, prepare
from fedjax_sec.runs.config import Experiment


class Models:
    """The final models of runs that share the data, the network and a backdoor with a base class.

    Args:
      experiment: one of the runs' experiments.
      folders: name -> the folder of a finished run that kept its parameters.
    """

    def __init__(self, experiment: Experiment, folders: Mapping[str, Path]):
        self.backdoor = experiment.backdoor
        self._source = prepare.load_source(experiment)
        self._logits = loading.logits_of(experiment)
        self._params = {name: loading.final_params(folder) for name, folder in folders.items()}

    def stamped(self, most: int) -> tuple[jax.Array, np.ndarray, dict[str, np.ndarray]]:
        """The first test images of the base class, stamped, their labels, and what models read.

        Returns: images [B, H, W, C] in [0, 1], labels [B], name -> predicted classes [B]; B is at
        most `most`.
        """
        source = self._source
        chosen = np.flatnonzero(source.y_test == self.backdoor.base)[:most]
        labels = source.y_test[chosen]
        clean = source.x_test[chosen] / np.float32(source.scale)
        images, _, _ = self.backdoor.probes((), jax.numpy.asarray(clean), labels, None)
        read = {
            name: np.argmax(self._logits(tree, images), axis=-1)
            for name, tree in self._params.items()
        }
        return images, labels, read

    def explain(self, name: str, images: jax.Array) -> attribution.FeatureMap:
        """Gradient SHAP of one model, against the first 64 training images."""
        source, tree = self._source, self._params[name]
        baselines = jax.numpy.asarray(source.x_train[:64] / np.float32(source.scale))
        return attribution.explain(
            lambda some: self._logits(tree, some), images, baselines, jax.random.key(0)
        )
