"""Exact products of int8 with int8, in the form in which XLA:CPU is quick with them.

It multiplies a row that stands alone by a plain loop over widened integers, and two rows by the instructions made for
bytes. A long contracted axis that isn't the last one stored it walks in strides that miss every cache, and one short
product it leaves to one core. Both are cured by the shape: the row twice, and the contracted axis in pieces, whose sums
are added up.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int8

from jaxcompress.arrays._products import Dims, doubled

FEW, MANY = 8, 64  # rows; from MANY on the pieces' sums take more memory than they save time
QUARTER, LONG, LONGER = 4, 1 << 10, 1 << 11  # for FEW rows a piece is a fourth and not LONG, for more not LONGER
LEAST = 1 << 7  # shorter pieces cost more than they save
FEWER, SMALL = 4, 1 << 19  # rows and weights of a product that is quicker so than `integer_codes`


def multiply_integers(x: Int8[Array, "..."], w: Int8[Array, "..."], dims: Dims) -> Int[Array, "..."]:
    """`dot_general` with the dimension numbers `dims`, in int32; on a single CPU in the quick form."""

    def plain(x: Array, w: Array) -> Array:
        return lax.dot_general(x, w, dims.numbers, preferred_element_type=jnp.int32)

    rows = dims.rows(x)
    known = isinstance(rows, int) and 0 < rows < MANY  # under jax.export it may be a symbol
    if not known or jax.device_count() > 1 or len(dims.w_contract) != 1:  # pieces of a sharded axis would be gathered
        return plain(x, w)
    return lax.platform_dependent(x, w, cpu=lambda x, w: _quick(x, w, dims, rows), default=plain)


def beats_bytes(x: Array, w_shape: Sequence[int], dims: Dims) -> bool:
    """Whether pieces of a weight stored so are quicker than `integer_codes`, where both can."""
    rows = dims.rows(x)
    few = isinstance(rows, int) and rows <= FEWER and math.prod(w_shape) < SMALL
    return few and len(dims.w_contract) == 1 and dims.w_contract[0] < len(w_shape) - 1


def _quick(x: Array, w: Array, dims: Dims, rows: int) -> Array:
    def product(x: Array) -> Array:
        return _in_pieces(x, w, dims, _piece(w, dims, rows))

    return product(x) if rows > 1 else doubled(product, x, dims)


def _piece(w: Array, dims: Dims, rows: int) -> int:
    """The longest piece that divides the contracted axis and is short enough; the whole axis where there is none."""
    n = w.shape[dims.w_contract[0]]
    most = min(LONG, n // QUARTER) if rows <= FEW else LONGER
    return max((size for size in range(LEAST, most + 1) if n % size == 0), default=n)


def _in_pieces(x: Array, w: Array, dims: Dims, size: int) -> Array:
    (x_axis,), (w_axis,) = dims.x_contract, dims.w_contract

    def split(operand: Array, axis: int) -> Array:
        return operand.reshape(*operand.shape[:axis], -1, size, *operand.shape[axis + 1 :])

    pieces = Dims(
        x_contract=(x_axis + 1,),
        w_contract=(w_axis + 1,),
        x_batch=(x_axis, *(axis + (axis > x_axis) for axis in dims.x_batch)),
        w_batch=(w_axis, *(axis + (axis > w_axis) for axis in dims.w_batch)),
    )
    split_x, split_w = split(x, x_axis), split(w, w_axis)
    sums = lax.dot_general(split_x, split_w, pieces.numbers, preferred_element_type=jnp.int32)
    return jnp.sum(sums, axis=0, dtype=jnp.int32)


Products = Callable[[list[Array], bool], tuple[list[Array], Any]]
"""`(parts, also) -> (products, sums)`: of each int8 part with a weight's codes, int32; and, where `also`, of ones."""


def exact(codes: Array, zero: Array | None, products: Products) -> Array:
    """The product of `codes - zero` with a weight's, in float32, from exact sums of products of int8.

    Args:
      codes: int8 or int16.
      zero: the inputs' zero point, along the output.
      products: of int8 codes with the weight's.
    """
    zero = None if zero is None else zero.astype(jnp.int32)
    if codes.dtype == jnp.int8:
        (sums,), of_ones = products([codes], zero is not None)
        return (sums if zero is None else sums - zero * of_ones).astype(jnp.float32)
    # 16 bits are two times 8, the lower ones moved to where they are signed; the zero point likewise, or its product
    # with the weights' sum would leave int32
    high, low = (codes >> 8).astype(jnp.int8), ((codes & 255) - 128).astype(jnp.int8)
    (upper, lower), of_ones = products([high, low], True)
    if zero is None:
        lower = lower + 128 * of_ones
    else:
        upper, lower = upper - (zero >> 8) * of_ones, lower + (128 - (zero & 255)) * of_ones
    return upper.astype(jnp.float32) * 256 + lower.astype(jnp.float32)


def one_by_one(product: Callable[[Array], Array], weight_sums: Callable[[], Array]) -> Products:
    """A product for each part; `weight_sums()` is that of ones."""
    return lambda parts, also: ([product(part) for part in parts], weight_sums() if also else None)
