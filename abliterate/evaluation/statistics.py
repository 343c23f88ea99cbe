"""How sure a figure is: Wilson intervals of rates, percentile bootstraps of means and of differences. All at 95 %."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""Of the normal distribution, 95 % two-sided."""
RESAMPLES = 2000
TAILS = (2.5, 97.5)


@dataclass(frozen=True)
class Rate:
    """A share of trials, with its Wilson score interval (Wilson 1927).

    Unlike the usual plus-minus it is right for small numbers and at 0 and 1: of 0 in 48 it says 0 to 7.4 %.

    Attributes:
        hits: of `total`, at most as many. `total`: at least one.
    """

    hits: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.total or self.total == 0:
            raise ValueError(f"{self.hits} of {self.total} is no rate")

    @property
    def value(self) -> float:
        """In 0..1."""
        return self.hits / self.total

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return max(0.0, self._middle - self._reach) if self.hits else 0.0

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return min(1.0, self._middle + self._reach) if self.hits < self.total else 1.0

    @property
    def _middle(self) -> float:
        return (self.hits + Z * Z / 2) / (self.total + Z * Z)

    @property
    def _reach(self) -> float:
        spread = self.hits * (self.total - self.hits) / self.total + Z * Z / 4
        return Z * math.sqrt(spread) / (self.total + Z * Z)


@dataclass(frozen=True)
class Mean:
    """A mean, or a difference of means, with its interval; NaN where nothing was measured, or not a number."""

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Mean:
    """The mean, with a percentile bootstrap over the values (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: one an independent unit: a prompt, a window of text.
        weights: how much each counts, such as the tokens it is itself a mean over; None counts all alike.
    """
    drawn = np.asarray(values, dtype=np.float64)
    counts = np.ones_like(drawn) if weights is None else np.asarray(weights, dtype=np.float64)
    if counts.shape != drawn.shape:
        raise ValueError(f"{drawn.size} values, and {counts.size} weights")
    if not np.isfinite(drawn).all() or counts.sum() == 0:
        return Mean(math.nan, math.nan, math.nan)
    if (drawn == drawn[0]).all():
        return Mean(float(drawn[0]), float(drawn[0]), float(drawn[0]))
    picks = np.random.default_rng(seed).integers(0, drawn.size, size=(RESAMPLES, drawn.size))
    weighted, total = (drawn * counts)[picks].sum(axis=1), counts[picks].sum(axis=1)
    low, high = np.percentile(weighted / total, TAILS)
    value = float(drawn @ counts / counts.sum())
    # of few values the rounding of sums may put the mean a hair outside
    return Mean(value, min(value, float(low)), max(value, float(high)))


def paired(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> Mean:
    """The mean of after − before on the same units, with a bootstrap over the pairs.

    What both have in common (some prompts are refused by every model) does not widen the interval, as it would that of
    two rates that are compared.

    Raises:
        ValueError: they are not of the same length.
    """
    return bootstrap([b - a for a, b in zip(before, after, strict=True)], weights, seed)
