"""Rank correlations over pairs, what a third variable leaves of them, and bootstrap intervals."""

import numpy as np
from scipy import stats


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of the last axis; NaN where either has no order."""
    return _correlation(_ranks(x), _ranks(y))


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Rank correlation of what a third variable's ranks leave of both, of the last axis.

    NaN where they leave nothing.
    """
    a, b, c = (_ranks(v) for v in (x, y, given))
    ab, ac, bc = _correlation(a, b), _correlation(a, c), _correlation(b, c)
    rest = (1 - ac**2) * (1 - bc**2)
    some = rest > 1e-12
    return np.where(some, (ab - ac * bc) / np.sqrt(np.where(some, rest, 1)), np.nan)


def auc(score: np.ndarray, fell: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of the last axis: how often one that fell scores higher.

    NaN where all fell or none.
    """
    positive = fell.sum(axis=-1)
    both = positive * (fell.shape[-1] - positive)
    above = (stats.rankdata(score, axis=-1) * fell).sum(axis=-1) - positive * (positive + 1) / 2
    return np.where(both > 0, above / np.maximum(both, 1), np.nan)


def _ranks(x: np.ndarray) -> np.ndarray:
    """From the middle one on."""
    return stats.rankdata(x, axis=-1) - (np.shape(x)[-1] + 1) / 2


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = (a * a).sum(axis=-1) * (b * b).sum(axis=-1)
    ordered = norms > 0
    return np.where(ordered, (a * b).sum(axis=-1) / np.sqrt(np.where(ordered, norms, 1)), np.nan)
