"""Revealing labels from gradients (Dang, Thakkar, Ramaswamy, Mathews, Chin and Beaufays, 2021)."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog

from fedjax_sec.attacks.privacy import _labels, _matching
from fedjax_sec.core import ConfigError, Guess, PrivacyAttack, registry, static


@registry.privacy_attacks.register("label_bag")
class LabelBag(PrivacyAttack):
    r"""Which classes a batch holds, by linear programs on the gradient of the last layer.

    The gradient of the last kernel is :math:`\Delta W = H^T G`, `[F, C]`, with H the features of
    the n examples and G = softmax minus one-hot, `[n, C]`, of rank S = n at most. A row of G has
    its only negative entry at its example's label. With :math:`\Delta W = P \Sigma Q` the singular
    value decomposition and q_c the columns of the first S rows of Q, class c is there where some r
    in R^S has

    .. math:: q_c \cdot r \le -\epsilon, \qquad q_j \cdot r \ge 0 \quad (j \ne c), \qquad
              |r_s| \le limit

    which a linear program decides, minimising :math:`q_c \cdot r` (HiGHS, by SciPy): the class is
    accepted where its optimum is below `accept`. A column with a negative entry is accepted without
    it where features are never negative (`positive_features`). `y [n]`, no inputs: every accepted
    class once, strongest first, and where fewer than n are accepted, the rest by the sums of their
    columns, each as often as one example changes them (a choice: the paper gives the set only).

    Raises: `ConfigError` for clients that do not take plain gradient steps, for a model whose head
    is no dense layer, and for n examples that are not fewer than features and classes.

    Source: Dang et al. 2021 (Revealing and protecting labels in distributed training), Section 3;
    author code `rlg.py` (googleinterns/learning-bag-of-words): epsilon 1e-10 for images,
    accepting below -0.1. It samples columns and asks a perceptron first; all columns and the bound
    on r, which keeps the program finite, are choices for up to some hundred classes.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build("label_bag").limit
        5.0
    """

    inputs = frozenset({"pixels", "features"})
    needs_labels = True
    epsilon: float = static(
        1e-10, "How far below zero the class's own product must be.", low=0, high=1
    )
    accept: float = static(0.1, "Accepted where the optimum is below minus this.", low=0, high=1e6)
    limit: float = static(5.0, "Largest entry of r.", above=0, high=1e6)
    positive_features: bool = static(True, "Features are never negative, as behind a ReLU.")

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        kernel, _ = _labels.head_of(slope, params, task)
        features, classes = kernel.shape
        if known.count >= min(features, classes):
            raise ConfigError(
                f"attack: label_bag needs fewer examples than features and classes, got "
                f"{known.count} examples, {features} features and {classes} classes."
            )
        shape = jax.ShapeDtypeStruct((known.count,), jnp.int32)
        y = jax.pure_callback(
            lambda matrix: self._solve(np.asarray(matrix, np.float64), known.count),
            shape,
            kernel,
            vmap_method="sequential",
        )
        return Guess(None, y)

    def _solve(self, matrix: np.ndarray, count: int) -> np.ndarray:
        """The labels [n] of a kernel's gradient [F, C]."""
        columns = np.linalg.svd(matrix, full_matrices=False)[2][:count]  # [S, C]
        optima = np.array([self._optimum(columns, c) for c in range(matrix.shape[1])])
        present = optima < -self.accept
        sums = matrix.sum(axis=0)
        if self.positive_features:
            present |= (matrix < -1e-12).any(axis=0)
        order = np.lexsort((optima, sums))
        labels = [c for c in order if present[c]][:count]
        left, impact = sums.copy(), -np.minimum(sums, 0).sum() / count
        left[labels] += impact
        while len(labels) < count:
            labels.append(int(np.argmin(left)))
            left[labels[-1]] += impact
        return np.array(labels, np.int32)

    def _optimum(self, columns: np.ndarray, label: int) -> float:
        """The least product of r and the label's column; 0 where no r is allowed."""
        others = np.delete(columns, label, axis=1)
        answer = linprog(
            columns[:, label],
            A_ub=np.vstack([columns[:, label][None], -others.T]),
            b_ub=np.concatenate([[-self.epsilon], np.zeros(others.shape[1])]),
            bounds=(-self.limit, self.limit),
            method="highs",
        )
        return float(answer.fun) if answer.status == 0 else 0.0
