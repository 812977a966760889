"""How likely each symbol of a stream is, told in a few bytes: a dyadic histogram.

The alphabet of `2**width` symbols is halved again and again where halving pays, and left alone ("all symbols in here
are equally likely") where it doesn't. So a spike at zero, a bell, an unused range cost a few bytes each, and a table
never costs more than it saves. Which halvings pay is exact: the tree of least description length, found from the
leaves upwards.

A table is a bit string, least significant bit first. Each node in order (parent, left half, right half) is one bit,
halved or not, and where it is halved `b` bits for the share of its left half. The share is `s(k / (2**b - 1))` with
`s(t) = t**2 (3 - 2 t)`, whose steps are finest near 0 and 1, in proportion to how exactly `n` samples tell a
probability; then `2**b = sqrt(n)` levels cost least, and the number of bits follows from what is expected in the node:
`b = max(2, (n.bit_length() + 1) // 2)`, where `n` is the whole part of the stream's symbols times the node's
probability. That is 1 at the root, and is multiplied by the share for the left half, by one less the share for the
right one, in float64; a node that is not halved gives each of its symbols the same part. A node that is empty (of
probability 0), or a single symbol, has nothing to tell.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxcompress.pack._error import PackError

LONGEST = 1024
"""No table has as many bytes: at most 255 halvings of at most 1 + 24 bits and 128 pairs left whole."""


class Model(NamedTuple):
    """The symbols' probabilities, float64 [2**width], and the table that tells them."""

    probabilities: np.ndarray
    table: bytes


class Plan(NamedTuple):
    """How a table will tell what was counted."""

    counts: np.ndarray
    """How often each symbol occurs: int [2**width]."""
    bits: float
    """What table and coded symbols will take together, nearly."""
    halved: list[np.ndarray]
    """For each level from the root on, whether each node is halved."""


def entropy_bits(counts: np.ndarray) -> float:
    """The bits that `counts.sum()` symbols of these counts hold when each is coded by its frequency (order 0)."""
    used = counts[counts > 0].astype(np.float64)
    return float(used.sum() * np.log2(used.sum()) - (used * np.log2(used)).sum()) if used.size else 0.0


def plan(counts: np.ndarray) -> Plan:
    """The tree of least description length for symbols of these counts, an integer array [2**width]."""
    node = counts.astype(np.float64)
    weighted = _log2_weighted(node)
    cost = np.zeros_like(node)  # a single symbol has nothing to tell
    halved: list[np.ndarray] = []
    size = 1
    while node.size > 1:
        node, size = node[0::2] + node[1::2], 2 * size
        halves, weighted = weighted[0::2] + weighted[1::2], _log2_weighted(node)
        whole = 1 + node * math.log2(size)
        # the last term is what rounding the share to sqrt(n) levels costs, n / (2 K**2) nats
        half = 1 + _share_bits(node) + weighted - halves + 0.72 + cost[0::2] + cost[1::2]
        halved.append((half < whole) & (node > 0))
        cost = np.where(node > 0, np.minimum(half, whole), 0.0)
    return Plan(counts, float(cost[0]), halved[::-1])


def fit(plan: Plan) -> Model:
    """The model that a plan describes."""
    counts, _, halved = plan
    total = int(counts.sum())
    below = np.concatenate([[0], np.cumsum(counts)])
    probabilities = np.zeros(counts.size)
    table, used = 0, 0
    nodes = [(0, counts.size, 1.0)]
    while nodes:
        start, size, share = nodes.pop()
        if size == 1:
            probabilities[start] = share
            continue
        level = (counts.size // size).bit_length() - 1
        if not halved[level][start // size]:
            probabilities[start : start + size] = share / size
            used += 1
            continue
        half = size // 2
        left = int(below[start + half] - below[start])
        bits = _share_bits_int(int(total * share))
        k = _nearest_level(left, int(below[start + size] - below[start]), bits)
        table |= (1 | k << 1) << used
        used += 1 + bits
        nodes.extend(_halves(start, half, share, _share(k, bits)))
    return Model(probabilities, table.to_bytes(-(-used // 8), "little"))


def read(data: bytes, total: int, width: int) -> Model:
    """The model whose table `data` begins with, for a stream of `total` symbols.

    Raises:
      PackError: `data` ends within the table.
    """
    probabilities = np.zeros(2**width)
    window = int.from_bytes(data, "little")
    limit, used = 8 * len(data), 0
    nodes = [(0, probabilities.size, 1.0)]
    while nodes:
        start, size, share = nodes.pop()
        if size == 1:
            probabilities[start] = share
            continue
        used += 1
        if window >> (used - 1) & 1:
            bits = _share_bits_int(int(total * share))
            k = window >> used & ((1 << bits) - 1)
            used += bits
            nodes.extend(_halves(start, size // 2, share, _share(k, bits)))
        else:
            probabilities[start : start + size] = share / size
        if used > limit:
            raise PackError("a table of probabilities is cut short")
    return Model(probabilities, data[: -(-used // 8)])


def _halves(start: int, half: int, share: float, left: float) -> list[tuple[int, int, float]]:
    """The halves that hold anything, the left one last: it is taken from the stack first."""
    parts = [(start + half, half, share * (1 - left)), (start, half, share * left)]
    return [part for part, here in zip(parts, (1 - left, left), strict=True) if here > 0]


def _share(k: int, bits: int) -> float:
    t = k / ((1 << bits) - 1)  # plain arithmetic: the same number on every machine
    return t * t * (3 - 2 * t)


def _nearest_level(left: int, both: int, bits: int) -> int:
    """The level whose share is nearest to `left / both`; the outermost two mean that a half is empty."""
    last = (1 << bits) - 1
    if left in (0, both):
        return last if left else 0
    t = 0.5 - math.sin(math.asin(1 - 2 * left / both) / 3)  # the inverse of s
    return min(max(round(t * last), 1), last - 1)


def _share_bits_int(expected: int) -> int:
    """Bits for a share among `expected` symbols: half of its bit length, which makes about sqrt(n) levels."""
    return max(2, (expected.bit_length() + 1) // 2)


def _share_bits(expected: np.ndarray) -> np.ndarray:
    return np.maximum(2, (np.frexp(expected)[1] + 1) // 2)


def _log2_weighted(n: np.ndarray) -> np.ndarray:
    """`n log2 n`, 0 at 0."""
    return n * np.log2(np.maximum(n, 1))
