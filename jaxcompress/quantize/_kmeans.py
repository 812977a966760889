"""One-dimensional k-means on the host: few centroids for many weights, by counts, in float64.

A layer's weights are first counted into bins (4,096 by default, or one a distinct value where there are no more), so
that what follows does not depend on how many they are: 100 million weights take two passes. Counts are integers and
sums are float64: exact beyond the 2**24 at which float32 counts stop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

STARTS = ("optimal", "linear", "density", "forgy")


class Bins(NamedTuple):
    """Weights counted into bins, in increasing order, empty ones left out."""

    means: Float[np.ndarray, " bins"]  # float64, of the weights in each
    counts: Int[np.ndarray, " bins"]  # int64

    @property
    def total(self) -> int:
        """How many weights."""
        return int(self.counts.sum())


def binned(values: Float[np.ndarray, " n"], bins: int = 4096, chunk: int = 1 << 22) -> Bins:
    """Counts finite `values` into `bins` of equal width; a bin a value where there are no more values than bins."""
    if values.size <= bins:
        means, counts = np.unique(values.astype(np.float64), return_counts=True)
        return Bins(means, counts.astype(np.int64))
    low, high = float(values.min()), float(values.max())
    counts, sums = np.zeros(bins, np.int64), np.zeros(bins)
    number: Any = np.float32 if 1e-30 < high - low < 1e38 else np.float64  # differences and scales that float32 has
    scale = number(bins / (high - low)) if high > low else number(0)
    for start in range(0, values.size, chunk):
        part = values[start : start + chunk]
        index = np.minimum(((part.astype(number, copy=False) - number(low)) * scale).astype(np.int32), bins - 1)
        counts += np.bincount(index, minlength=bins)
        sums += np.bincount(index, weights=part, minlength=bins)
    used = counts > 0
    return Bins(sums[used] / counts[used], counts[used])


def start(bins: Bins, k: int, how: str, rng: np.random.Generator) -> Float[np.ndarray, " k"]:
    """`k` centroids to begin with, increasing (Han et al. 2016, section 3.2).

    `"linear"`: evenly from the smallest to the largest weight, which keeps the few large ones apart; `"density"`: at
    evenly spaced quantiles; `"forgy"`: weights drawn at random.
    """
    if how == "linear":
        return np.linspace(bins.means[0], bins.means[-1], k)
    if how == "density":
        ranks = np.cumsum(bins.counts) - bins.counts / 2
        return np.interp((np.arange(k) + 0.5) / k * bins.total, ranks, bins.means)
    return np.sort(rng.choice(bins.means, k, replace=bins.means.size < k, p=bins.counts / bins.total))


def lloyd(bins: Bins, centroids: Float[np.ndarray, " k"], iterations: int) -> Float[np.ndarray, " k"]:
    """Lloyd's iterations until nothing moves: each centroid goes to the mean of the weights nearest to it.

    A centroid without weights stays where it is.
    """
    weight = np.concatenate([[0.0], np.cumsum(bins.counts)])
    total = np.concatenate([[0.0], np.cumsum(bins.counts * bins.means)])
    for _ in range(iterations):
        edges = np.searchsorted(bins.means, (centroids[1:] + centroids[:-1]) / 2, side="right")
        edges = np.concatenate([[0], edges, [bins.means.size]])
        inside = np.diff(weight[edges])
        moved = np.where(inside > 0, np.diff(total[edges]) / np.maximum(inside, 1), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def optimal(bins: Bins, k: int) -> Float[np.ndarray, " k"]:
    """The centroids of least squared error, exactly: Wang & Song 2011, "Ckmeans.1d.dp", by divide and conquer.

    The best last cluster of the first `i` bins starts no earlier than that of the first `i - 1`. So each of the `k`
    layers of the dynamic program is filled from the middle outwards in `log(bins)` vectorised rounds.
    """
    n = bins.means.size
    if k >= n:
        return np.concatenate([bins.means, np.full(k - n, bins.means[-1])])
    centre = bins.means[n // 2]  # sums around a middle value lose fewer digits
    shifted = bins.means - centre
    weight = np.concatenate([[0.0], np.cumsum(bins.counts, dtype=np.float64)])
    first = np.concatenate([[0.0], np.cumsum(bins.counts * shifted)])
    second = np.concatenate([[0.0], np.cumsum(bins.counts * shifted**2)])

    def cost(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        inside, total = weight[end] - weight[begin], first[end] - first[begin]
        return second[end] - second[begin] - total**2 / np.maximum(inside, 1e-300)

    best = cost(np.zeros(n + 1, int), np.arange(n + 1))
    starts = np.zeros((k, n + 1), np.int32)
    rounds = _middles(n + 1)
    for layer in range(1, k):
        fresh, where = np.full(n + 1, np.inf), starts[layer]
        fresh[: layer + 1] = 0.0  # as many clusters as bins, or more
        where[: layer + 1] = np.arange(layer + 1)
        for ends, left, right in rounds:
            inside = ends > layer
            ends_in = ends[inside]
            lowest = np.maximum(np.where(left[inside] >= 0, where[left[inside]], 0), layer)
            highest = np.where(right[inside] <= n, where[np.minimum(right[inside], n)], n)
            highest = np.maximum(np.minimum(highest, ends_in - 1), lowest)
            sizes = highest - lowest + 1
            offsets = np.cumsum(sizes) - sizes
            begins = np.arange(sizes.sum()) - np.repeat(offsets - lowest, sizes)
            candidates = best[begins] + cost(begins, np.repeat(ends_in, sizes))
            if ends_in.size:
                least = np.minimum.reduceat(candidates, offsets)
                hits = np.flatnonzero(candidates == np.repeat(least, sizes))
                owner = np.searchsorted(offsets, hits, side="right") - 1
                firsts = hits[np.concatenate([[True], owner[1:] != owner[:-1]])]
                fresh[ends_in], where[ends_in] = least, begins[firsts]
        best = fresh
    edges = [n]
    for layer in range(k - 1, 0, -1):
        edges.append(int(starts[layer, edges[-1]]))
    bounds = np.array([*edges, 0][::-1])
    return centre + np.diff(first[bounds]) / np.maximum(np.diff(weight[bounds]), 1e-300)


def _middles(n: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The numbers below `n` in rounds: each with its nearest smaller and larger number of earlier rounds (-1, n)."""
    rounds: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    spans = [(0, n)]
    while spans:
        middles = [(a + b) // 2 for a, b in spans]
        rounds.append((np.array(middles), np.array([a - 1 for a, _ in spans]), np.array([b for _, b in spans])))
        halves = [((a, m), (m + 1, b)) for (a, b), m in zip(spans, middles, strict=True)]
        spans = [span for pair in halves for span in pair if span[0] < span[1]]
    return rounds


def assigned(
    values: Float[np.ndarray, " n"], centroids: Float[np.ndarray, " k"], chunk: int = 1 << 20
) -> Int[np.ndarray, " n"]:
    """The index of each value's nearest centroid (of two as near, the lower), uint8. `centroids` increase."""
    exact = centroids.astype(np.float64)
    edges = ((exact[1:] + exact[:-1]) / 2).astype(values.dtype)
    out = np.zeros(values.size, np.uint8)
    find = _by_comparison(edges) if edges.size < 32 else _by_table(edges)
    for begin in range(0, values.size, chunk):
        find(values[begin : begin + chunk], out[begin : begin + chunk])
    return out


def _by_comparison(edges: np.ndarray) -> Callable[[np.ndarray, np.ndarray], None]:
    def find(values: np.ndarray, out: np.ndarray) -> None:
        for edge in edges:
            out += values > edge

    return find


def _by_table(edges: np.ndarray, cells: int = 1 << 16) -> Callable[[np.ndarray, np.ndarray], None]:
    """Looks up the cell of a value, of which at most one edge is inside; searches where cells are too wide for that.

    The cell is an increasing function of the value, the edges' too: so the comparison with that edge is exact.
    """
    span = float(edges[-1]) - float(edges[0])
    scale = np.float32((cells - 1) / max(span, 1e-30))

    def cell(x: np.ndarray) -> np.ndarray:
        return np.clip((x - edges[0]) * scale, -1, cells).astype(np.int32) + 1

    of_edges = cell(edges) if span < 1e38 else np.zeros(edges.size)
    if np.unique(of_edges).size < edges.size:
        return lambda values, out: np.copyto(out, np.searchsorted(edges, values, side="left").astype(np.uint8))
    below = np.searchsorted(of_edges, np.arange(cells + 2), side="left").astype(np.uint8)
    inside = np.full(cells + 2, np.inf, np.float32)
    inside[of_edges] = edges

    def find(values: np.ndarray, out: np.ndarray) -> None:
        at = cell(values)
        np.add(below[at], values > inside[at], out=out, casting="unsafe")

    return find
