"""Bootstrap intervals over seeds, and over the pairs in each."""

from collections.abc import Callable, Sequence

import numpy as np


def clustered(
    function: Callable[..., np.ndarray], columns: Sequence[np.ndarray], resamples: int
) -> list[float]:
    """The middle 95 % of a bootstrap that draws seeds, and in each seed pairs.

    Args:
        function: Of columns ``[resamples items]``, along the last axis: ``-> [resamples]``.
        columns: ``[seeds pairs]`` each; the same draws of all of them.
        resamples: Number of draws; those without a value are left out.

    Returns:
        Two numbers, NaN if no draw has a value.
    """
    seeds, pairs = columns[0].shape
    rng = np.random.default_rng(0)
    which = rng.integers(seeds, size=(resamples, seeds, 1))
    items = rng.integers(pairs, size=(resamples, seeds, pairs))
    found = function(*(x[which, items].reshape(resamples, -1) for x in columns))
    found = found[np.isfinite(found)]
    return [float(x) for x in np.quantile(found, (0.025, 0.975))] if found.size else [np.nan] * 2


def mean_of(x: np.ndarray) -> np.ndarray:
    """Mean of the last axis, for `clustered`."""
    return x.mean(axis=-1)


def mean_of_known(x: np.ndarray) -> np.ndarray:
    """Mean of what is a number in the last axis, NaN if nothing is, for `clustered`."""
    known = np.isfinite(x)
    count = known.sum(axis=-1)
    return np.where(count > 0, np.where(known, x, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)
