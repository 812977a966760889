"""Products with a weight that is decoded tile by tile, so that its dense value never exists as a whole.

XLA fuses the decoding of a weight into a product on GPU and TPU. On a CPU it does not: it writes the whole float weight
to memory first, and a product that should read a byte a weight moves nine. Here a loop decodes a tile that fits the
cache, multiplies, and adds up; a gradient decodes again instead of keeping the tiles. For few rows of input there is
the faster `by_lanes`.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxcompress.arrays._lanes import Decode, by_lanes, suits
from jaxcompress.arrays._products import Dims, derived_from

W = TypeVar("W", bound="Tileable")

TILE = 1 << 16  # weights decoded at a time: 256 KB of float32
WIDTH = 1 << 10  # of them along the output
LARGER = 4  # times as large where there are many rows
LARGEST, TILES = 8, 32  # up to so many times where there still are so many tiles: 3 % of the float weight
FEW, WIDE = 4, 1 << 12  # below so many rows of input reading the weight is what takes time, and long lines read faster
MANY = 32  # from so many rows on products take the time
WORTH, SMALL = 1 << 18, 1 << 17  # smaller weights are decoded whole; for fewer than MANY rows those below SMALL


class Tileable(Protocol):
    """A compressed weight of which a part can be cut out without decoding the rest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense value."""

    def unit(self, axis: int) -> int:
        """A part along `axis` begins at a multiple of this, and its size is one, but for the last part's."""

    def tile(self, axis: int, start: Array | int, size: int) -> Self:
        """The part `start : start + size` along `axis`."""


def tiled(
    product: Callable[[Array, W], Array],
    x: Array,
    w: W,
    dims: Dims,
    *,
    whole: Callable[[], Array] | None = None,
    rows: int | None = None,
    depth: int = TILE,
    decode: Decode | None = None,
) -> Array:
    """`product(x, w)`, tile by tile on a single CPU; for few rows of `x` decoded and multiplied at once.

    Args:
      product: of an input and a weight with the dimension numbers `dims`, in the dtype to add up in: it is summed over
        parts of a contracted axis, and laid side by side over parts of a free axis of the weight.
      x: the input.
      w: the weight.
      dims: which axes meet.
      whole: what to do where tiles don't pay; `product(x, w)` by default.
      rows: the most rows of input for which tiles pay; any number by default.
      depth: the most contracted weights that one tile may add up.
      decode: what `product` multiplies by, as `by_lanes` wants it; without, few rows go tile by tile too.
    """
    at_once = whole if whole is not None else lambda: product(x, w)
    count = dims.rows(x)
    known = isinstance(count, int)  # under jax.export it may be a symbol
    plan = _plan_for(x, w, dims, depth)
    few = rows is None or not known or count <= rows
    if plan is None and rows is None:
        plan = _plan_for_most(x, w, dims, depth)
    if plan is None or not few or jax.device_count() > 1:  # a loop over the parts of a sharded weight would gather it
        return at_once()

    def loops(x: Array, w: W) -> Array:
        return _loops_and_rest(product, x, w, dims, depth, *plan)

    if decode is None or not known or not suits(decode, w, dims, count, depth):
        return lax.platform_dependent(cpu=lambda: loops(x, w), default=at_once)
    return lax.platform_dependent(cpu=lambda: _lanes(product, loops, decode, x, w, dims), default=at_once)


def _lanes(product: Callable[[Array, W], Array], loops: Any, decode: Decode, x: Array, w: W, dims: Dims) -> Array:
    dtype = jax.eval_shape(product, x, w).dtype
    # derivatives are those of the tiles: XLA makes slow loops of the transposed passes
    return derived_from(loops, lambda x, w: by_lanes(decode, x, w, dims, dtype), x, w)


def is_tiled(x: Array, w: Tileable, dims: Dims) -> bool:
    """Whether `tiled` would cut the weight up on a CPU, if `rows` and `depth` are as by default."""
    return _plan_for(x, w, dims, TILE) is not None or _plan_for_most(x, w, dims, TILE) is not None


def _plan_for(x: Array, w: Any, dims: Dims, depth: int) -> tuple[int, int, int, int] | None:
    count = dims.rows(x)
    count = count if isinstance(count, int) else FEW
    size, unit = math.prod(w.shape), w.unit(len(w.shape) - 1)
    apart = unit if unit <= 8 else 1  # more are a group, and no codes of a byte
    if size < (WORTH if count >= MANY else SMALL):
        return None
    # the codes of a byte are multiplied apart, and each part shall be a tile
    larger = max(LARGER if count >= MANY else 1, min(LARGEST, size // (TILES * apart * TILE)))
    width = WIDE if count < FEW or larger > LARGER else math.isqrt(larger) * WIDTH
    return _plan(w, dims, depth, apart * larger * TILE, apart * width)


def _plan(w: Any, dims: Dims, depth: int, tile: int, width: int) -> tuple[int, int, int, int] | None:
    """(contracted axis, its tile, free axis, its tile) of the weight; `None` where tiles don't pay or don't fit."""
    free = dims.w_free(len(w.shape))
    if not free or not dims.w_contract:
        return None
    along, across = _longest(w, dims)
    rest = math.prod(w.shape) // (w.shape[along] * w.shape[across])
    beside = math.prod(w.shape[axis] for axis in dims.w_contract if axis != along)
    width = _part(w, across, min(width // max(1, rest // beside), tile // (w.unit(along) * rest)))
    part = _part(w, along, min(tile // (width * rest), depth // beside))
    worth = width * part * rest >= tile // 8  # an axis of few divisors makes tiles too small
    if width * part * rest > tile and any(w.shape[axis] % w.unit(axis) for axis in (along, across)):
        return None  # the whole axis, for want of a part with whole groups
    return (along, part, across, width) if worth and part * beside <= depth else None


def _longest(w: Any, dims: Dims) -> tuple[int, int]:
    """The longest contracted axis of the weight, and the longest free one."""
    along, across = (max(axes, key=lambda axis: w.shape[axis]) for axes in (dims.w_contract, dims.w_free(len(w.shape))))
    return along, across


def _plan_for_most(x: Array, w: Any, dims: Dims, depth: int) -> tuple[int, int, int, int] | None:
    """`_plan_for` of most of a weight, where an axis has few divisors, or its last group is shorter."""
    if not dims.w_contract or not dims.w_free(len(w.shape)):
        return None
    along, across = _longest(w, dims)
    n, m = w.shape[along], w.shape[across]
    for even in (1, 4, 16, 64):  # the least that is left over
        a, b = n - n % (even * w.unit(along)), m - m % (even * w.unit(across))
        for part, width in ((n, b), (a, m), (a, b)):
            if part and width and (part, width) != (n, m):
                most = jax.eval_shape(lambda w, p=part, q=width: w.tile(along, 0, p).tile(across, 0, q), w)
                plan = _plan_for(x, most, dims, depth)
                if plan is not None:
                    return plan
    return None


def _part(w: Any, axis: int, most: int) -> int:
    """The largest divisor of an axis that can be cut out and is no longer than `most`, or the smallest there is."""
    n, unit = w.shape[axis], w.unit(axis)
    sizes = [size for size in range(unit, n + 1, unit) if n % size == 0] or [n]
    return max((size for size in sizes if size <= most), default=sizes[0])


def _loops(
    product: Callable[[Array, Any], Array], x: Array, w: Any, dims: Dims, along: int, part: int, across: int, width: int
) -> Array:
    """The product with as much of the weight as whole tiles have."""
    x_axis = dims.x_contract[dims.w_contract.index(along)]

    def column(j: Array) -> Array:
        def at(i: Array) -> Array:
            here = w.tile(along, i * part, part).tile(across, j * width, width)
            return product(lax.dynamic_slice_in_dim(x, i * part, part, x_axis), here)

        first, again = jax.eval_shape(at, jnp.int32(0)), jax.checkpoint(at, prevent_cse=False)
        zeros, steps = jnp.zeros(first.shape, first.dtype), jnp.arange(w.shape[along] // part)
        return lax.scan(lambda total, i: (total + again(i), None), zeros, steps)[0]

    if width == w.shape[across]:
        return column(jnp.int32(0))
    one = jax.eval_shape(column, jnp.int32(0))
    axis, columns = _out_axis(x, w, dims, across), w.shape[across] // width

    def put(out: Array, j: Array) -> tuple[Array, None]:  # in its place at once: stacked columns would be moved there
        return lax.dynamic_update_slice_in_dim(out, column(j), j * width, axis), None

    out = jnp.zeros([columns * width if i == axis else size for i, size in enumerate(one.shape)], one.dtype)
    return lax.scan(put, out, jnp.arange(columns))[0]


def _loops_and_rest(
    product: Callable[[Array, Any], Array],
    x: Array,
    w: Any,
    dims: Dims,
    depth: int,
    along: int,
    part: int,
    across: int,
    width: int,
) -> Array:
    """`_loops`, and the ends of the two axes that its tiles leave over."""
    (n, m), x_axis = (w.shape[along], w.shape[across]), dims.x_contract[dims.w_contract.index(along)]
    a, b = n - n % part, m - m % width

    def rest(i: int, j: int, size: int) -> Array:
        here = w.tile(along, i, n - i).tile(across, j, size)
        return tiled(product, lax.slice_in_dim(x, i, n, axis=x_axis), here, dims, depth=depth)

    out = _loops(product, x, w, dims, along, part, across, width)
    if a < n:
        out = out + rest(a, 0, b)
    return out if b == m else lax.concatenate([out, rest(0, b, m - b)], _out_axis(x, w, dims, across))


def _out_axis(x: Array, w: Any, dims: Dims, across: int) -> int:
    return len(dims.x_batch) + len(dims.x_free(x.ndim)) + dims.w_free(len(w.shape)).index(across)


def part_by_part(product: Callable[[Array, W], Array], x: Array, w: W, dims: Dims, along: int, size: int) -> Array:
    """`product(x, w)`, added up over parts of a contracted axis, which are `size` long and divide it."""
    across = dims.w_free(len(w.shape))
    if not across or w.shape[along] % size:
        return product(x, w)
    return _loops(product, x, w, dims, along, size, across[0], w.shape[across[0]])


def _side_by_side(parts: Array, axis: int) -> Array:
    """[parts, ...] joined along what is `axis` of a part."""
    return lax.collapse(jnp.moveaxis(parts, 0, axis), axis, axis + 2)


def tiled_outputs(convolve: Callable[[W], Array], w: W, w_axis: int, out_axis: int) -> Array:
    """`convolve(w)` on a single CPU for a part of the outputs (`w_axis` of the weight) at a time."""
    size = w.shape[w_axis]
    width = _part(w, w_axis, 4 * TILE * size // max(1, math.prod(w.shape)))
    if math.prod(w.shape) < WORTH or width == size or width < 4 or jax.device_count() > 1:
        return convolve(w)

    def loop() -> Array:
        body = jax.checkpoint(lambda j: convolve(w.tile(w_axis, j * width, width)), prevent_cse=False)
        return _side_by_side(lax.map(body, jnp.arange(size // width)), out_axis)

    return lax.platform_dependent(cpu=loop, default=lambda: convolve(w))
