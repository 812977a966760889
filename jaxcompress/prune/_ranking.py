"""The k lowest scores, exactly and without sorting: a search on counts over the scores' bit patterns.

A float's bits, read as an unsigned integer after a fix of the sign, are in the float's order. So the k-th lowest score
is found by asking, for one integer after another, how many keys lie below it: one pass over the scores and, over a
mesh, one scalar all-reduce a question. The next integer to try is the middle of the bracket at first, and then
interpolated between the bracket's counts, which needs about 18 passes for random weights where halving needs 27.
Counts are exact integers: the answer does not depend on how the scores are laid out over devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FIRST, LAST = 6, 24  # passes between which interpolation is tried: before, bit patterns are too unevenly spread


class Ranking(NamedTuple):
    """Keys that are ranked together, and how many of them to mark."""

    keys: Sequence[jax.Array]  # unsigned integers of one dtype, any shapes; several arrays are ranked as one
    k: jax.Array  # uint32 []; how many to mark, at most the number of keys other than `never`
    stack: int = 0  # leading axes that index layers: each is ranked on its own, with the same `k`


def sort_keys(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of `scores`, of the same shape: uint16, uint32 or uint64.

    Both zeros get one key. NaN gets the highest: a weight whose score is not a number is kept, where the training loop
    can see it, and never silently replaced by zero. The greatest integer is left free (`never`).
    """
    if scores.dtype.itemsize == 1:
        scores = scores.astype(jnp.float32)
    uint = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[scores.dtype.itemsize]
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, jnp.zeros_like(scores), scores), uint)
    sign = jnp.array(1 << (8 * scores.dtype.itemsize - 1), uint)
    keys = jnp.where(bits & sign != 0, ~bits, bits | sign)
    return jnp.where(jnp.isnan(scores), never(uint) - 1, keys)


def never(dtype: jnp.dtype) -> jax.Array:
    """The key of what must not be marked: above every score's."""
    return jnp.array(jnp.iinfo(dtype).max, dtype)


def lowest(rankings: Sequence[Ranking]) -> list[list[jax.Array]]:
    """Marks, in each ranking, the `k` lowest keys; of equal keys the first in row-major order, array by array.

    All rankings are searched in one loop: a model of many small layers costs one small program.

    Returns:
      For each ranking, bool arrays shaped like its keys, of which exactly `k` entries are True (a layer of a stack).

    Raises:
      ValueError: more keys in one ranking than uint32 can count.
    """
    parts, sizes = _parts(rankings)
    layers = [math.prod(r.keys[0].shape[: r.stack]) for r in rankings]
    wide = jnp.uint64 if any(part.keys.dtype == jnp.uint64 for part in parts) else jnp.uint32

    def a_layer(values: Sequence[jax.Array | int], dtype: jnp.dtype) -> jax.Array:
        return jnp.concatenate([jnp.full(n, v, dtype) for v, n in zip(values, layers, strict=True)])

    def counts(hits: Sequence[jax.Array]) -> jax.Array:
        by_ranking: dict[int, jax.Array] = {}
        for part, hit in zip(parts, hits, strict=True):
            by_ranking[part.ranking] = by_ranking.get(part.ranking, jnp.uint32(0)) + _count(hit, part.stack)
        return jnp.concatenate([count.reshape(-1) for count in by_ranking.values()])

    k, total = a_layer([r.k for r in rankings], jnp.uint32), a_layer(sizes, jnp.uint32)
    high = a_layer([jnp.iinfo(r.keys[0].dtype).max for r in rankings], wide)
    value = _search(lambda at: counts([part.below(at) for part in parts]), high, total, k)
    index = _search(
        lambda at: counts([part.equal(value.low) & part.before(at) for part in parts]),
        total + 1,
        value.above - value.below,
        k - value.below,
    )
    marked: list[list[jax.Array]] = [[] for _ in rankings]
    for part in parts:
        marked[part.ranking].append(part.below(value.low) | (part.equal(value.low) & part.before(index.low)))
    return marked


class _Part(NamedTuple):
    """One array of a ranking, and where in the vectors of one entry a layer its own entries are."""

    keys: jax.Array
    ranking: int
    stack: int
    slot: int  # its first entry in a vector that has an entry for each layer of each ranking
    offset: int  # the index of its first key in its ranking

    def below(self, at: jax.Array) -> jax.Array:
        return self.keys < self._own(at).astype(self.keys.dtype)

    def equal(self, at: jax.Array) -> jax.Array:
        return self.keys == self._own(at).astype(self.keys.dtype)

    def before(self, at: jax.Array) -> jax.Array:
        """Whether a key's row-major index in the ranking is below `at`.

        Made of iotas, never of a flattened array, which would gather shards. The longest axis is left to the
        comparison, so that no index as large as the keys is kept through the search.
        """
        shape, axes = self.keys.shape, range(self.stack, self.keys.ndim)
        longest = max(axes, key=lambda axis: shape[axis], default=None)
        stride = {axis: jnp.uint32(math.prod(shape[axis + 1 :])) for axis in axes}

        def index(axis: int) -> jax.Array:
            line = tuple(n if a == axis else 1 for a, n in enumerate(shape))
            return lax.broadcasted_iota(jnp.uint32, line, axis) * stride[axis]

        rest = sum((index(axis) for axis in axes if axis != longest), jnp.uint32(self.offset))
        left = self._own(at) - jnp.minimum(rest, self._own(at))
        return (index(longest) if longest is not None else jnp.zeros(shape, jnp.uint32)) < left

    def _own(self, at: jax.Array) -> jax.Array:
        layers = self.keys.shape[: self.stack]
        own = lax.slice_in_dim(at, self.slot, self.slot + math.prod(layers))
        return own.reshape(layers + (1,) * (self.keys.ndim - self.stack))


def _parts(rankings: Sequence[Ranking]) -> tuple[list[_Part], list[int]]:
    """The arrays of all rankings, and the number of keys in (a layer of) each ranking."""
    parts, sizes, slot = [], [], 0
    for i, r in enumerate(rankings):
        size = 0
        for x in r.keys:
            parts.append(_Part(x, i, r.stack, slot, size))
            size += math.prod(x.shape[r.stack :])
        if size > (1 << 32) - 2:
            raise ValueError(f"{size} scores ranked together: at most {(1 << 32) - 2} can be; rank layers apart")
        slot += math.prod(r.keys[0].shape[: r.stack])
        sizes.append(size)
    return parts, sizes


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


def _search(count: Callable[[jax.Array], jax.Array], high: jax.Array, total: jax.Array, target: jax.Array) -> _Bracket:
    """Brackets of the positions in [0, `high`] at which `count` is `target`, or where it jumps over it.

    In the end `count(low) == target`, or `high - low == 1` and the target is between their counts.

    Args:
      count: of positions (an entry a layer) how many keys lie below each: uint32, never decreasing, 0 at 0.
      high: unsigned; a position above each one sought.
      total: uint32; their counts, or a bound of them.
      target: uint32; what is sought, at most `count(high)`.
    """
    zero, never_missed = jnp.zeros_like(target), jnp.full_like(target, jnp.iinfo(jnp.uint32).max)
    no = jnp.zeros(target.shape, bool)
    start = _Bracket(
        jnp.zeros_like(high), high, zero, total, never_missed, zero.astype(jnp.int32), ~no, jnp.zeros((), jnp.int32)
    )

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
    lane = _lane(math.prod(hits.shape[stack:]))
    if lane == 1 or jax.device_count() > 1:  # flattening would gather what is sharded
        return plain(hits)

    def by_bytes(hits: jax.Array) -> jax.Array:  # XLA:CPU adds bytes four times faster than words
        lanes = hits.reshape(*hits.shape[:stack], -1, lane)
        return jnp.sum(jnp.sum(lanes, axis=-1, dtype=jnp.uint8), axis=-1, dtype=jnp.uint32)

    return lax.platform_dependent(hits, cpu=by_bytes, default=plain)


def _lane(size: int) -> int:
    """The greatest number up to 128 that divides `size`: what a byte can count."""
    return next(n for n in range(128, 0, -1) if size % n == 0) if size else 1
