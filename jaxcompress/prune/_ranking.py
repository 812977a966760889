"""The k lowest scores, exactly and without sorting: a search on counts over the scores' bit patterns.

A float's bits, read as an unsigned integer after a fix of the sign, are in the float's order. So the k-th lowest score
is found by asking, for one integer after another, how many keys lie below it: one pass over the scores and, over a
mesh, one scalar all-reduce a question. The next integer to try is interpolated between the two known counts, or the
middle where interpolation does not pay, so random weights need about ten passes and any weights at most about seventy.
Counts are exact integers: the answer does not depend on how the scores are laid out over devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Count = Callable[[jax.Array], jax.Array]
"""Of a position, how many things lie below it: never decreasing."""


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
    """The key of what must not be chosen: above every score's."""
    return jnp.array(jnp.iinfo(dtype).max, dtype)


def lowest(keys: Sequence[jax.Array], k: jax.Array, stack: int = 0) -> list[jax.Array]:
    """Marks the `k` lowest of all `keys` together; of equal keys the first in index order.

    Args:
      keys: unsigned integers, one dtype, any shapes; several arrays are ranked as one.
      k: uint32 [] how many to mark, at most the number of keys other than `never`.
      stack: leading axes that index layers: each is ranked on its own, with the same `k`.

    Returns:
      bool arrays shaped like `keys`, with exactly `k` True together (a layer, with `stack`).
    """
    total = sum(math.prod(x.shape[stack:]) for x in keys)
    if total >= 1 << 32:
        raise ValueError(f"{total} scores ranked together: at most {(1 << 32) - 1} can be; rank layers apart")
    layers = keys[0].shape[:stack]
    wide = jnp.uint64 if keys[0].dtype == jnp.uint64 else jnp.uint32
    k = jnp.broadcast_to(k.astype(jnp.uint32), layers)

    def below(key: jax.Array) -> jax.Array:
        return _sum([_count(x < _over(key, x), stack) for x in keys])

    start = _Bracket.of(jnp.zeros(layers, wide), jnp.full(layers, never(keys[0].dtype), wide), total, k)
    threshold = _search(below, start, k)

    def tied_before(index: jax.Array) -> jax.Array:
        pairs = zip(keys, _indices(keys, stack), strict=True)
        return _sum([_count((x == _over(threshold.low, x)) & (i < _over(index, i)), stack) for x, i in pairs])

    ties, wanted = threshold.above - threshold.below, k - threshold.below
    start = _Bracket.of(jnp.zeros(layers, jnp.uint32), jnp.full(layers, total, jnp.uint32), ties, wanted)
    end = _search(tied_before, start, wanted).low
    return [
        (x < _over(threshold.low, x)) | ((x == _over(threshold.low, x)) & (i < _over(end, i)))
        for x, i in zip(keys, _indices(keys, stack), strict=True)
    ]


class _Bracket(NamedTuple):
    """Two positions around the one sought, each with its count. All fields have the shape of the stack's axes."""

    low: jax.Array  # unsigned integer; count(low) <= target
    high: jax.Array  # unsigned integer; the target is not above count(high)
    below: jax.Array  # uint32; count(low)
    above: jax.Array  # uint32; count(high), or a bound of it
    miss: jax.Array  # uint32; how far the last count was from the target

    @staticmethod
    def of(low: jax.Array, high: jax.Array, total: int | jax.Array, target: jax.Array) -> "_Bracket":
        above = jnp.broadcast_to(jnp.asarray(total, jnp.uint32), target.shape)
        return _Bracket(low, high, jnp.zeros_like(target), above, jnp.full_like(target, jnp.iinfo(jnp.uint32).max))

    def done(self, target: jax.Array) -> jax.Array:
        return (self.below == target) | (self.high - self.low <= 1)


def _search(count: Count, start: _Bracket, target: jax.Array) -> _Bracket:
    """Narrows the bracket until `count(low) == target`, or until low and high are neighbours."""

    def step(carry: tuple[_Bracket, jax.Array]) -> tuple[_Bracket, jax.Array]:
        bracket, halve = carry
        middle = jnp.where(halve, _halfway(bracket), _interpolated(bracket, target))
        counted = count(middle)
        left, fixed = counted > target, bracket.done(target)
        miss = jnp.where(left, counted - target, target - counted)
        moved = _Bracket(
            low=jnp.where(left, bracket.low, middle),
            high=jnp.where(left, middle, bracket.high),
            below=jnp.where(left, bracket.below, counted),
            above=jnp.where(left, counted, bracket.above),
            miss=miss,
        )
        kept = _Bracket(*(jnp.where(fixed, old, new) for old, new in zip(bracket, moved, strict=True)))
        return kept, ~halve & (miss > bracket.miss // 4)

    def unfinished(carry: tuple[_Bracket, jax.Array]) -> jax.Array:
        return ~jnp.all(carry[0].done(target))

    return lax.while_loop(unfinished, step, (start, jnp.zeros(target.shape, bool)))[0]


def _halfway(bracket: _Bracket) -> jax.Array:
    return bracket.low + (bracket.high - bracket.low) // 2


def _interpolated(bracket: _Bracket, target: jax.Array) -> jax.Array:
    """Where the target would be if the counts grew evenly, strictly inside the bracket."""
    width = bracket.high - bracket.low
    share = (target - bracket.below).astype(jnp.float32) + 0.5
    share = jnp.minimum(share / (bracket.above - bracket.below).astype(jnp.float32), 1 - 2**-22)  # no overflow below
    offset = (share * width.astype(jnp.float32)).astype(width.dtype)
    return bracket.low + jnp.clip(offset, 1, jnp.maximum(width, 2) - 1)


def _over(position: jax.Array, x: jax.Array) -> jax.Array:
    """`position`, one a layer of the stack, in the dtype of `x` and with axes to broadcast against it."""
    return position.astype(x.dtype).reshape(position.shape + (1,) * (x.ndim - position.ndim))


def _indices(keys: Sequence[jax.Array], stack: int) -> list[jax.Array]:
    """For each array the row-major index of each key in its layer, counted on from array to array; uint32."""
    indices, offset = [], 0
    for x in keys:
        index = jnp.full((1,) * x.ndim, offset, jnp.uint32)
        for axis in range(stack, x.ndim):  # made of iotas, never of a flattened array: that would gather the shards
            stride = math.prod(x.shape[axis + 1 :])
            shape = tuple(n if a == axis else 1 for a, n in enumerate(x.shape))
            index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        indices.append(index)
        offset += math.prod(x.shape[stack:])
    return indices


def _sum(counts: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, counts)


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
