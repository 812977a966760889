"""Means over seeds, and the interval of a paired difference."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval, over `count` values."""

    mean: float
    low: float
    high: float
    confidence: float
    count: int


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Raises:
      ValueError: there are no values, or one is not finite.
    """
    return float(statistics.mean(_finite(values)))


def std(values: Sequence[float]) -> float | None:
    """The sample standard deviation (divisor `n - 1`); `None` for a single value, which has none.

    Raises:
      ValueError: there are no values, or one is not finite.
    """
    return float(statistics.stdev(values)) if len(_finite(values)) > 1 else None


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of `first[i] - second[i]` with Student's interval, `d +- t(n-1, (1+confidence)/2) * s_d / sqrt(n)`.

    Args:
      first, second: one value a seed, both in the same order of seeds.
      confidence: the interval's coverage, if differences are normal.

    Raises:
      ValueError: fewer than two pairs, lengths that differ, a value that is not finite, or a confidence outside (0, 1).
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"a paired difference needs two or more pairs; got {len(first)} and {len(second)} values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    differences = [a - b for a, b in zip(_finite(first), _finite(second), strict=True)]
    count, centre, spread = len(differences), statistics.mean(differences), statistics.stdev(differences)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * spread / math.sqrt(count)
    return Interval(float(centre), centre - half, centre + half, confidence, count)


def _finite(values: Sequence[float]) -> Sequence[float]:
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"want one or more finite values; got {list(values)}")
    return values
