"""The k lowest scores, exactly and without sorting: a search on counts over the bit patterns of floats.

A float's bits, read as an unsigned integer after a fix of the sign, are in the float's order. So the k-th lowest score
is found by asking, for one bit pattern after another, how many scores lie below its value: one pass over the scores
and, over a mesh, one scalar all-reduce a question. The next pattern to try is the middle of the bracket at first, and
then interpolated between the bracket's counts, which needs about 18 passes for random weights where halving needs 27.
Counts are exact integers: the answer does not depend on how the scores are laid out over devices.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FIRST, LAST = 8, 24  # passes between which interpolation is tried: before, bit patterns are too unevenly spread


class Ranking(NamedTuple):
    """Scores that are ranked together, and how many of them to mark. A score that is NaN is never marked."""

    arrays: Sequence[jax.Array]  # floating point, one dtype, any shapes; several arrays are ranked as one
    k: jax.Array  # uint32 []; how many to mark, at most the number of scores that are not NaN
    stack: int = 0  # leading axes that index layers: each is ranked on its own, with the same `k`
    score: Callable[[jax.Array], jax.Array] | None = None  # an entry's score: worked out in each pass, never stored


def lowest(rankings: Sequence[Ranking]) -> list[list[jax.Array]]:
    """Marks, in each ranking, the `k` lowest scores; of equal ones the first in row-major order, array by array.

    All rankings are searched in one loop: a model of many small layers costs one small program.

    Returns:
      For each ranking, bool arrays shaped like its arrays, of which exactly `k` entries are True (a layer of a stack).

    Raises:
      ValueError: more scores in one ranking than uint32 can count.
    """
    parts, sizes = _parts(rankings)
    value, k = _kth(rankings, parts, sizes)
    index = _search(
        lambda at: _counts(parts, [part.equal(value.low) & part.before(at) for part in parts]),
        jnp.zeros_like(k),
        _a_layer(rankings, sizes, jnp.uint32) + 1,
        value.above - value.below,
        k - value.below,
    )
    marked: list[list[jax.Array]] = [[] for _ in rankings]
    for part in parts:
        marked[part.ranking].append(part.below(value.low) | (part.equal(value.low) & part.before(index.low)))
    return marked


def kth_lowest(ranking: Ranking) -> jax.Array:
    """The `k`-th lowest score of a ranking (the lowest for k = 1), exactly; [] or one a layer of the stack."""
    parts, sizes = _parts([ranking])
    found, _ = _kth([ranking], parts, sizes)
    layers = ranking.arrays[0].shape[: ranking.stack]
    # everything below `low` was counted: the greatest of it is the k-th, unless it is tied and stands at `low` itself
    greatest = [jnp.max(part.scores(), axis=part.axes, where=part.below(found.low), initial=-jnp.inf) for part in parts]
    tied = _value(found.low, parts[0].dtype).reshape(layers)
    exact = (found.below == ranking.k.astype(jnp.uint32)).reshape(layers)
    return jnp.where(exact, functools.reduce(jnp.maximum, greatest), tied)


def common_dtype(arrays: Sequence[jax.Array]) -> jnp.dtype:
    """The dtype in which several arrays' scores compare; floats of one byte JAX promotes to no other dtype."""
    dtypes = {x.dtype for x in arrays}
    return jnp.result_type(*(jnp.float32 if len(dtypes) > 1 and x.itemsize == 1 else x for x in dtypes))


class _Part(NamedTuple):
    """One array of a ranking, and where in the vectors of one entry a layer its own entries are."""

    array: jax.Array
    score: Callable[[jax.Array], jax.Array] | None
    ranking: int
    stack: int
    slot: int  # its first entry in a vector that has an entry for each layer of each ranking
    offset: int  # the index of its first score in its ranking

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(self.stack, self.array.ndim))

    @property
    def dtype(self) -> jnp.dtype:
        dtype = jnp.result_type(jax.eval_shape(self.score, self.array) if self.score else self.array)
        return jnp.dtype(jnp.float32) if dtype.itemsize == 1 else dtype

    def scores(self, array: jax.Array | None = None) -> jax.Array:
        array = self.array if array is None else array
        return (self.score(array) if self.score else array).astype(self.dtype)

    def below(self, at: jax.Array) -> jax.Array:
        array, at = self._afresh(at)
        return self.scores(array) < _value(self._own(at), self.dtype)

    def equal(self, at: jax.Array) -> jax.Array:
        array, at = self._afresh(at)
        return self.scores(array) == _value(self._own(at), self.dtype)

    def before(self, at: jax.Array) -> jax.Array:
        """Whether an entry's row-major index in the ranking is below `at`.

        Made of iotas, never of a flattened array, which would gather shards. The longest axis is left to the
        comparison, so that no index as large as the scores is kept through the search.
        """
        shape = self.array.shape
        longest = max(self.axes, key=lambda axis: shape[axis], default=None)

        def index(axis: int) -> jax.Array:
            line = tuple(n if a == axis else 1 for a, n in enumerate(shape))
            return lax.broadcasted_iota(jnp.uint32, line, axis) * jnp.uint32(math.prod(shape[axis + 1 :]))

        rest = sum((index(axis) for axis in self.axes if axis != longest), jnp.uint32(self.offset))
        left = self._own(at) - jnp.minimum(rest, self._own(at))
        return (index(longest) if longest is not None else jnp.zeros(shape, jnp.uint32)) < left

    def _own(self, at: jax.Array) -> jax.Array:
        layers = self.array.shape[: self.stack]
        own = lax.slice_in_dim(at, self.slot, self.slot + math.prod(layers))
        return own.reshape(layers + (1,) * len(self.axes))

    def _afresh(self, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hides that the array is the same in every pass: XLA would store its scores through the whole search."""
        return lax.optimization_barrier((self.array, at)) if self.score else (self.array, at)


def _parts(rankings: Sequence[Ranking]) -> tuple[list[_Part], list[int]]:
    """The arrays of all rankings, and the number of scores in (a layer of) each ranking."""
    parts, sizes, slot = [], [], 0
    for i, r in enumerate(rankings):
        size = 0
        for x in r.arrays:
            parts.append(_Part(x, r.score, i, r.stack, slot, size))
            size += math.prod(x.shape[r.stack :])
        if size > (1 << 32) - 2:
            raise ValueError(f"{size} scores ranked together: at most {(1 << 32) - 2} can be; rank layers apart")
        slot += math.prod(r.arrays[0].shape[: r.stack])
        sizes.append(size)
    return parts, sizes


def _a_layer(rankings: Sequence[Ranking], values: Sequence[jax.Array | int], dtype: jnp.dtype) -> jax.Array:
    """A vector of one entry for each layer of each ranking, from one value a ranking."""
    layers = [math.prod(r.arrays[0].shape[: r.stack]) for r in rankings]
    return jnp.concatenate([jnp.full(n, v, dtype) for v, n in zip(values, layers, strict=True)])


def _counts(parts: Sequence[_Part], hits: Sequence[jax.Array]) -> jax.Array:
    """How many are True, one entry for each layer of each ranking."""
    by_ranking: dict[int, jax.Array] = {}
    for part, hit in zip(parts, hits, strict=True):
        by_ranking[part.ranking] = by_ranking.get(part.ranking, jnp.uint32(0)) + _count(hit, part.stack)
    return jnp.concatenate([count.reshape(-1) for count in by_ranking.values()])


def _kth(rankings: Sequence[Ranking], parts: Sequence[_Part], sizes: Sequence[int]) -> tuple["_Bracket", jax.Array]:
    """Brackets of the positions below which `k` scores are; and the `k`s. One entry a layer."""
    dtypes = {part.ranking: part.dtype for part in parts}.values()
    wide = jnp.uint64 if any(dtype.itemsize == 8 for dtype in dtypes) else jnp.uint32
    k = _a_layer(rankings, [r.k for r in rankings], jnp.uint32)
    low = _a_layer(rankings, [_position(-jnp.inf, dtype) for dtype in dtypes], wide)
    high = _a_layer(rankings, [_position(jnp.inf, dtype) + 1 for dtype in dtypes], wide)
    total = _a_layer(rankings, sizes, jnp.uint32)
    return _search(lambda at: _counts(parts, [part.below(at) for part in parts]), low, high, total, k), k


def _position(value: float, dtype: jnp.dtype) -> int:
    """The unsigned integer that stands, in their order, where `value` stands among floats of `dtype`."""
    width = 8 * dtype.itemsize
    bits = int.from_bytes(np.asarray(value, dtype).tobytes(), sys.byteorder)
    return (~bits if bits >> (width - 1) else bits | 1 << (width - 1)) & ((1 << width) - 1)


def _value(position: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The float of `dtype` at a position: the inverse of `_position`."""
    uint = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[dtype.itemsize]
    position, sign = position.astype(uint), jnp.array(1 << (8 * dtype.itemsize - 1), uint)
    return lax.bitcast_convert_type(jnp.where(position & sign != 0, position ^ sign, ~position), dtype)


class _Bracket(NamedTuple):
    """Two positions around each one sought, with their counts. Every field but `passes` has one entry a layer."""

    low: jax.Array  # unsigned; count(low) <= target
    high: jax.Array  # unsigned; count(high) >= target
    below: jax.Array  # uint32; count(low)
    above: jax.Array  # uint32; count(high), or a bound of it
    miss: jax.Array  # uint32; how far the last count was from the target
    run: jax.Array  # int32; how often in a row the last counts were above (positive) or below (negative) the target
    halve: jax.Array  # bool; whether the next position is the middle
    passes: jax.Array  # int32 []


def _search(
    count: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array, total: jax.Array, target: jax.Array
) -> _Bracket:
    """Brackets of the positions in [`low`, `high`] at which `count` is `target`, or where it jumps over it.

    In the end `count(low) == target`, or `high - low == 1` and the target is between their counts.

    Args:
      count: of positions (an entry a layer) how many scores lie below each: uint32, never decreasing.
      low: unsigned; positions with a count of 0.
      high: unsigned; a position above each one sought.
      total: uint32; their counts, or a bound of them.
      target: uint32; what is sought, at most `count(high)`.
    """
    zero, never_missed = jnp.zeros_like(target), jnp.full_like(target, jnp.iinfo(jnp.uint32).max)
    no = jnp.zeros(target.shape, bool)
    start = _Bracket(low, high, zero, total, never_missed, zero.astype(jnp.int32), ~no, jnp.zeros((), jnp.int32))

    def found(b: _Bracket) -> jax.Array:
        return (b.below == target) | (b.high - b.low <= 1)

    def step(b: _Bracket) -> _Bracket:
        width = b.high - b.low
        middle = b.low + jnp.where(b.halve, width // 2, _interpolated(b, width, target))
        counted = count(middle)
        left, done = counted > target, found(b)
        run = jnp.where(left, jnp.maximum(b.run, 0) + 1, jnp.minimum(b.run, 0) - 1)
        low, high = jnp.where(done | left, b.low, middle), jnp.where(done | ~left, b.high, middle)
        miss = jnp.where(left, counted - target, target - counted)
        stuck = ~b.halve & (high - low > width // 2) & (miss > b.miss - b.miss // 3)
        return _Bracket(
            low=low,
            high=high,
            below=jnp.where(done | left, b.below, counted),
            above=jnp.where(done | ~left, b.above, counted),
            miss=miss,
            run=jnp.clip(run, -20, 20),
            halve=stuck | (b.passes + 1 < FIRST) | (b.passes + 1 >= LAST),
            passes=b.passes + 1,
        )

    return lax.while_loop(lambda b: ~jnp.all(found(b)), step, start)


def _interpolated(b: _Bracket, width: jax.Array, target: jax.Array) -> jax.Array:
    """How far from `low` the target would be if the counts grew evenly; further, the longer one end has not moved."""
    share = ((target - b.below).astype(jnp.float32) + 0.5) / (b.above - b.below).astype(jnp.float32)
    pull = 2.0 ** jnp.maximum(jnp.abs(b.run) - 1, 0).astype(jnp.float32)
    share = jnp.where(b.run > 0, 1 - (1 - share) * pull, share * pull)
    offset = jnp.clip(share, 0, 1 - 2**-22) * width.astype(jnp.float32)  # still below 2**32 when rounded
    return jnp.clip(offset.astype(width.dtype), 1, jnp.maximum(width, 2) - 1)


def _count(hits: jax.Array, stack: int) -> jax.Array:
    """How many are True over all axes but the first `stack`; uint32."""
    plain = functools.partial(jnp.sum, axis=tuple(range(stack, hits.ndim)), dtype=jnp.uint32)
    lanes, depth, width = _lanes(math.prod(hits.shape[stack:]))
    if depth == 1 or jax.device_count() > 1:  # flattening would gather what is sharded
        return plain(hits)

    def by_bytes(hits: jax.Array) -> jax.Array:  # XLA:CPU adds columns of bytes ten times faster than words
        blocks = hits.reshape(*hits.shape[:stack], lanes, depth, width)
        return jnp.sum(jnp.sum(blocks, axis=-2, dtype=jnp.uint8), axis=(-2, -1), dtype=jnp.uint32)

    return lax.platform_dependent(hits, cpu=by_bytes, default=plain)


@functools.cache
def _lanes(size: int) -> tuple[int, int, int]:
    """`size` as a product of three: any, a number that a byte can count, a width worth adding side by side."""
    depth = next((n for n in range(255, 1, -1) if size % n == 0), 1) if size else 1
    width = next(n for n in range(2048, 0, -1) if size // depth % n == 0) if size else 1
    return size // max(1, depth * width), depth, width
