"""Calibrated ranges of activations: which part of the values that were seen the integers are to cover."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcompress._numbers import real, whole
from jaxcompress.arrays import is_leaf
from jaxcompress.calibrate import input_values
from jaxcompress.paths import Rules, match, named_leaves
from jaxcompress.quantize._affine import Affine
from jaxcompress.quantize._convert import Scheme


class Range(NamedTuple):
    """What the integers of one weight's inputs cover, zero included. `*stacked`: of weights that `scan` slices.

    Where it is the same both ways the grid is symmetric, else it has a zero point.
    """

    low: Float[np.ndarray, "*stacked"]
    high: Float[np.ndarray, "*stacked"]


class Seen(NamedTuple):
    """The values of one weight's inputs, as a method sees them."""

    low: Float[np.ndarray, " batches"]
    high: Float[np.ndarray, " batches"]
    middles: Float[np.ndarray, " bins"]
    counts: Int[np.ndarray, " bins"]
    symmetric: bool


class Method(Protocol):
    """How a range is chosen: `MinMax`, `Percentile`, `LeastSquares`, `Entropy`, or anything like these."""

    @property
    def bins(self) -> int:
        """Of the histogram that it needs; 0 for none."""

    def choose(self, seen: Seen, bits: int) -> tuple[float, float]:
        """The range: `low <= 0 <= high`."""


@dataclass(frozen=True)
class MinMax:
    """The whole range that was seen, so that nothing is clipped; with `symmetric` the largest magnitude ("absmax").

    Attributes:
      momentum: instead, a moving average of the batches' ranges, `momentum * old + (1 - momentum) * new` (Jacob et al.
        2018, section 3.1).
    """

    momentum: float | None = None

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= real("momentum", self.momentum) < 1:
            raise ValueError(f"momentum is None or in [0, 1), got {self.momentum}")

    @property
    def bins(self) -> int:
        """None are needed."""
        return 0

    def choose(self, seen: Seen, bits: int) -> tuple[float, float]:
        """The range that was seen, or its average over batches."""
        if self.momentum is None:
            return float(seen.low.min()), float(seen.high.max())
        low, high = float(seen.low[0]), float(seen.high[0])
        for new_low, new_high in zip(seen.low[1:], seen.high[1:], strict=True):
            low = self.momentum * low + (1 - self.momentum) * float(new_low)
            high = self.momentum * high + (1 - self.momentum) * float(new_high)
        return low, high


@dataclass(frozen=True)
class Percentile:
    """The range of all but the outermost values: `100 - percent` per cent are clipped (half of them at each end)."""

    percent: float = 99.99
    bins: int = 2048

    def __post_init__(self) -> None:
        if not 1 < real("percent", self.percent) <= 100 or whole("bins", self.bins) < 2:  # 0.999 is meant as a share
            raise ValueError(f"percent is above 1 and at most 100, of at least 2 bins, got {self.percent}, {self.bins}")

    def choose(self, seen: Seen, bits: int) -> tuple[float, float]:
        """To within a bin's width."""
        if seen.symmetric:
            low, high = self._ends(*_folded(seen), one_sided=True)
        else:
            low, high = self._ends(seen.middles, seen.counts, one_sided=seen.middles[0] > 0)
        return low, high

    def _ends(self, middles: np.ndarray, counts: np.ndarray, one_sided: bool) -> tuple[float, float]:
        below = np.concatenate([[0], np.cumsum(counts)]) / max(1, counts.sum())
        half = (middles[1] - middles[0]) / 2
        edges = np.concatenate([middles - half, middles[-1:] + half])
        clipped = (1 - self.percent / 100) / (1 if one_sided else 2)
        high = float(np.interp(1 - clipped, below, edges))
        return (0.0 if one_sided else float(np.interp(clipped, below, edges))), high


@dataclass(frozen=True)
class LeastSquares:
    """The range whose rounding has the least squared error ("MSE"), of 100 fractions of the range that was seen."""

    bins: int = 2048
    fractions: int = 100

    def __post_init__(self) -> None:
        _check_histogram(self.bins, self.fractions)

    def choose(self, seen: Seen, bits: int) -> tuple[float, float]:
        """By the histogram's bin middles."""

        def error(low: float, high: float) -> float:
            scale, zero, (least, most) = input_grid(low, high, bits)
            codes = np.clip(np.round(seen.middles / scale) + zero, least, most)
            return float(np.sum(seen.counts * (seen.middles - (codes - zero) * scale) ** 2))

        return _best(seen, np.arange(1, self.fractions + 1) / self.fractions, error)


@dataclass(frozen=True)
class Entropy:
    """The range under which the rounded values' distribution is nearest to the true one (Migacz 2017, TensorRT).

    The Kullback-Leibler divergence from the histogram, clipped values counted into its outermost bins, to its rounded
    form: the mean of all bins that share an integer, laid over those that are not empty. Made for 8 bits.

    Attributes:
      count_zeros: whether exact zeros count. They lie on the grid of any range, but would share their integer with what
        is near them: behind a rectifier half of all values are zeros, and the least divergence would then be that of a
        range so short that zero's bin has an integer of its own. Without, that bin counts as its neighbours do.
    """

    bins: int = 2048
    fractions: int = 128
    count_zeros: bool = False

    def __post_init__(self) -> None:
        _check_histogram(self.bins, self.fractions)

    def choose(self, seen: Seen, bits: int) -> tuple[float, float]:
        """Of ranges that leave at least one bin an integer."""
        middles, counts = _folded(seen) if seen.symmetric else (seen.middles, seen.counts)
        counts = counts if self.count_zeros else _without_zeros(middles, counts)

        def divergence(low: float, high: float) -> float:
            inside = (middles >= low) & (middles <= high)
            scale, zero, _ = input_grid(low, high, bits)
            true = np.where(inside, counts, 0).astype(float)
            kept = true.copy()
            where = np.flatnonzero(inside)
            true[where[0]] += counts[: where[0]].sum()
            true[where[-1]] += counts[where[-1] + 1 :].sum()
            codes = (np.round(middles / scale) + zero).astype(int)
            codes -= codes.min()
            filled = (kept > 0).astype(float)
            mean = np.bincount(codes, kept) / np.maximum(np.bincount(codes, filled), 1)
            rounded = np.where(filled > 0, mean[codes], 0.0)
            p, q = true / true.sum(), rounded / max(rounded.sum(), 1e-300)
            used = p > 0
            return float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-9))))

        least = min(1.0, 2**bits / len(seen.middles))
        return _best(seen, np.linspace(least, 1.0, self.fractions), divergence)


def _check_histogram(bins: Any, fractions: Any) -> None:
    if whole("bins", bins) < 2 or whole("fractions", fractions) < 1:
        raise ValueError(f"a histogram has at least 2 bins, of at least 1 fraction, got {bins}, {fractions}")


def input_ranges(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules[Scheme | None],
    method: Method = MinMax(),
    *,
    symmetric: bool = True,
) -> dict[str, Range]:
    """The range of the inputs of each weight whose rule quantizes them, from calibration batches.

        ranges = quantize.input_ranges(model.apply, params, batches, rules, quantize.Percentile(99.9))
        small = quantize.static(quantize.convert(params, rules), ranges)  # int8 x int8, the steps known beforehand

    Args:
      fn: `fn(params, batch)`, any function, as `calibrate.input_values` takes.
      params: a tree of arrays, float or compressed (weights that GPTQ rounded, say).
      batches: calibration data, like those of training; a list, where the method needs a histogram.
      rules: those of `convert`; weights whose rule has no `activation_bits` are left out.
      method: `MinMax` (of all batches, or a moving average), `Percentile`, `LeastSquares` or `Entropy`; or what has
        `bins`, of the histogram that it needs (0 for none), and `choose(seen, bits) -> (low, high)`, where `seen` has
        `low` and `high` of each batch, the histogram's `middles` and `counts`, and whether the range is `symmetric`.
      symmetric: the same range both ways, without a zero point. Otherwise all integers cover [low, high], which is a
        bit more for what comes out of a rectifier, at the price of a correction of each product.

    Returns:
      Ranges by path, for `static`, `fake` and `learn`.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError: no rule asks for quantized inputs; and as `calibrate.input_values`.
    """
    names = [name for name, _ in named_leaves(params, is_leaf)]
    specs = {
        name: spec
        for name, spec in zip(names, match(rules, names, None), strict=True)
        if isinstance(spec, Affine) and spec.activation_bits is not None
    }
    if not specs:
        raise ValueError("no rule asks for quantized inputs: give an Affine activation_bits")
    if isinstance(method, type) or not (hasattr(method, "choose") and hasattr(method, "bins")):
        raise TypeError(
            f"method is MinMax(), Percentile(99.9), LeastSquares(), Entropy() or has bins and choose; got {method!r}"
        )
    if method.bins < 0 or method.bins % 2:
        raise ValueError(f"a method's histogram has an even number of bins, which fold into magnitudes: {method}")
    measure = [(f"^{re.escape(name)}$", True) for name in specs]
    seen = input_values(fn, params, batches, measure, bins=method.bins, symmetric=symmetric)
    return {name: _chosen(method, seen[name], specs[name].activation_bits or 8, symmetric) for name in specs}


def input_grid(low: Any, high: Any, bits: int) -> tuple[Any, Any, tuple[int, int]]:
    """(step, zero point, (smallest, largest integer)) of a range; a symmetric one leaves out the smallest integer."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    top = 2 ** (bits - 1) - 1
    if np.all(low == -high):
        return _step(high / top), np.zeros_like(high), (-top, top)
    step = _step((high - low) / (2**bits - 1))
    return step, np.clip(np.round(-top - 1 - low / step), -top - 1, top), (-top - 1, top)


def _step(step: np.ndarray) -> np.ndarray:
    return np.where(step >= np.finfo(np.float32).tiny, step, 1.0)


def _chosen(method: Method, values: Any, bits: int, symmetric: bool) -> Range:
    stacked = values.bounds.shape[:-1]
    low, high = np.zeros(stacked, np.float32), np.zeros(stacked, np.float32)
    for index in np.ndindex(stacked):
        middles = counts = np.zeros(0)
        if values.counts is not None:
            least, most = (float(end) for end in values.bounds[index])
            counts = values.counts[index]
            middles = least + (np.arange(counts.size) + 0.5) * ((most - least) / counts.size)
        seen = Seen(values.low[(slice(None), *index)], values.high[(slice(None), *index)], middles, counts, symmetric)
        begin, end = (0.0, 0.0) if np.all(values.bounds[index] == 0) else method.choose(seen, bits)
        begin, end = min(begin, 0.0), max(end, 0.0)
        low[index], high[index] = (-max(-begin, end), max(-begin, end)) if symmetric else (begin, end)
    return Range(low, high)


def _best(seen: Seen, fractions: np.ndarray, cost: Callable[[float, float], float]) -> tuple[float, float]:
    """The least cost among ranges that are fractions of the histogram's; of equal ones the widest."""
    half = (seen.middles[1] - seen.middles[0]) / 2
    low, high = float(seen.middles[0] - half), float(seen.middles[-1] + half)
    costs = [cost(fraction * low, fraction * high) for fraction in fractions]
    best = fractions[len(costs) - 1 - int(np.argmin(costs[::-1]))]
    return float(best * low), float(best * high)


def _folded(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """The histogram of magnitudes, of one whose bounds are the same both ways (with an even number of bins)."""
    half = len(seen.middles) // 2
    return seen.middles[half:], seen.counts[half:] + seen.counts[:half][::-1]


def _without_zeros(middles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The counts, with that of the bin which holds zero replaced by its neighbours' mean."""
    near = np.flatnonzero(np.abs(middles) < 0.51 * (middles[1] - middles[0]))  # two, where zero is the edge of both
    at = near[np.argmax(counts[near])]
    beside = [i for i in (at - 1, at + 1) if 0 <= i < counts.size]
    return np.where(np.arange(counts.size) == at, np.mean(counts[beside]), counts)


def hashable_ranges(ranges: Mapping[str, Range] | Iterable[tuple[str, Range]] | None) -> Any:
    """Ranges as pairs of a path and a `Range` of plain numbers, which a module can have as an attribute."""
    if ranges is None:
        return None
    pairs = ranges.items() if isinstance(ranges, Mapping) else ranges
    return tuple((name, Range(*(_numbers(end) for end in low_high))) for name, low_high in pairs)


def _numbers(end: Any) -> Any:
    """A number, or tuples of tuples of numbers."""
    end = np.asarray(end)
    return end.item() if end.ndim == 0 else tuple(_numbers(each) for each in end)


def check_ranges(ranges: Mapping[str, Range], wanted: Iterable[str]) -> None:
    """Raises ValueError for weights without a range, and for ranges without a weight."""
    wanted = list(wanted)
    missing, spare = [n for n in wanted if n not in ranges], [n for n in ranges if n not in wanted]
    if missing or spare:
        raise ValueError(
            f"the ranges don't fit the weights whose inputs are quantized: none for {missing}, spare for {spare}; make "
            "them by input_ranges with the same rules"
        )


def steps_of(name: str, low_high: Range, ndim: int, bits: int) -> tuple[Array, Array | None]:
    """The grid of a weight's inputs, as its leaf holds it: step and zero point (or `None`), both of the weight's rank.

    Raises:
      ValueError: a range that is not finite, does not hold zero, or has more axes than the weight.
    """
    low, high = (np.asarray(end, np.float64) for end in low_high)
    if low.shape != high.shape or low.ndim >= max(1, ndim) or not np.all(np.isfinite(high - low)):
        raise ValueError(f"{name!r}: no grid for inputs between {low} and {high} of a weight with {ndim} axes")
    if np.any(low > 0) or np.any(high < 0):
        raise ValueError(f"{name!r}: the range of inputs must hold zero, got {low} to {high}")
    step, zero, _ = input_grid(low, high, bits)
    shape = (*low.shape, *[1] * (ndim - low.ndim))
    zero_point = None if np.all(low == -high) else jnp.asarray(zero.reshape(shape), jnp.float32)
    return jnp.asarray(step.reshape(shape), jnp.float32), zero_point
