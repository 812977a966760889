"""Products of a few rows of floats with integer codes on a CPU, as products of integers.

A row of input is its largest value times `(d0 + d1 / 256 + d2 / 256^2) / 127`, with digits of a byte each: as near to
it as float32 is to its largest value. The digits' products with the codes are exact sums of integers, which a
CPU adds up faster than floats, and without decoding the weight.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from jaxcompress.arrays import _digit_groups as in_groups
from jaxcompress.arrays._byte_products import DEEP, integer_sums, multiplies_bytes
from jaxcompress.arrays._leaf import Leaf
from jaxcompress.arrays._products import Dims, derived_from, is_float
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._tiles import WORTH

FEW = 128  # rows; with more of them three products of integers take longer than decoding and one of floats
WHOLE = 127 * 256**2  # of half precision too: beside one large number two digits lose what its small ones have
LITTLE, FEWER = 1 << 12, 4  # weights of that many on, less than are worth tiles, pay for so many rows


def is_laid_for_integers(x: Array, w: Quantized, dims: Dims) -> bool:
    """Whether `integer_codes` can multiply the two, and fast: a matrix of integers, on a single device.

    Weights of more axes are matrices too, if the contracted ones are the first of them or the last.
    """
    at_outputs = w.zero_point is None or all(w.zero_point.shape[axis] == 1 for axis in dims.w_contract)
    plain = w.of_integers and at_outputs and not dims.w_batch and not (w.turned and w.ndim > 2)
    if not plain or not dims.w_contract or jax.device_count() > 1:
        return False
    along, packed = _along(w, dims), w.bits < 8
    if along is None or dims.depth(w.shape) > DEEP:
        return False
    if packed and (w.length is None or w.length % (8 // w.bits) or w.size < WORTH):
        return False
    if (packed or along == 0) and not multiplies_bytes():
        return False
    # codes stored with the contracted axis first are laid out anew for each product, for which one row does not pay
    return along == 1 or dims.rows(x) != 1


def integer_codes(codes: Int8[Array, "*input"], w: Quantized, dims: Dims) -> Int32[Array, "*output"]:
    """The exact product of an input's codes with the weight's, of a weight that `is_laid_for_integers`."""
    (sums,) = _sums(as_rows(codes, dims)[None], w, dims)
    return as_output(sums, codes, w, dims)


def suits(x: Array, w: Quantized, dims: Dims) -> bool:
    """Whether `by_digits` can, and is faster."""
    rows = dims.rows(x)
    most = FEW if w.size >= WORTH else FEWER if w.size >= LITTLE and _along(w, dims) == 1 else 0
    known = isinstance(rows, int) and 0 < rows <= most  # under jax.export it may be a symbol
    return known and is_narrow(x) and is_laid_for_integers(x, w, dims)


def is_narrow(x: Array) -> bool:
    return is_float(x) and x.dtype.itemsize <= 4


def by_digits(otherwise: Callable[[Array, Quantized], Array], x: Array, w: Quantized, dims: Dims) -> Array:
    """`otherwise(x, w)`, the unscaled product; on a CPU by digits. Derivatives are those of `otherwise`."""
    return _on_cpu(functools.partial(_product, dims=dims), otherwise, x, w)


def groups_by_digits(otherwise: Callable[[Array, Quantized], Array], x: Array, w: Quantized, dims: Dims) -> Array:
    """`otherwise(x, w)`, the product with a weight that has a scale a group, likewise where that can be, and pays."""
    if not (is_narrow(x) and in_groups.suits(x, w, dims, in_groups.OF_DIGITS) and 1 < dims.rows(x) <= FEW):
        return otherwise(x, w)
    return _on_cpu(functools.partial(_grouped_product, dims=dims), otherwise, x, w)


def groups_by_codes(
    otherwise: Callable[[], Array], codes: Array, zero: Array | None, w: Quantized, dims: Dims
) -> Array:
    """The same with the codes of integer inputs, which need no digits, and their zero point."""
    if codes.dtype != jnp.int8 or not in_groups.suits(codes, w, dims):
        return otherwise()

    def fast() -> Array:
        at_zero = 0 if zero is None else zero.reshape(()).astype(jnp.int32)  # unstacked weights bring a single one
        return as_output(in_groups.group_sums(as_rows(codes, dims)[None], w, at_zero), codes, w, dims)

    return lax.platform_dependent(cpu=fast, default=otherwise)


def _on_cpu(fast: Callable[..., Array], otherwise: Callable[..., Array], x: Array, w: Quantized) -> Array:
    return lax.platform_dependent(cpu=lambda: derived_from(otherwise, fast, x, w), default=lambda: otherwise(x, w))


def _product(x: Array, w: Quantized, dims: Dims) -> Float[Array, "*output"]:
    codes, largest = in_digits(as_rows(x, dims))
    return as_output(of_digits(_sums(codes, w, dims), largest), x, w, dims)


def _grouped_product(x: Array, w: Quantized, dims: Dims) -> Float[Array, "*output"]:
    codes, largest = in_digits(as_rows(x, dims))
    return as_output(in_groups.group_sums(codes, w) / WHOLE * largest, x, w, dims)


def in_digits(rows: Array) -> tuple[Int8[Array, "3 rows n"], Float[Array, "rows 1"]]:
    """The digits' codes, of which the last ones count in `1 / WHOLE` of the row's largest value; and those."""
    rows = rows.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), 1e-36)
    number = jnp.round(rows / largest * WHOLE).astype(jnp.int32)
    number += 128 * (1 + 256 + 256**2)  # so that each byte of it is a digit's code, 128 larger
    shifts = jnp.asarray([16, 8, 0])[:, None, None]
    codes = lax.optimization_barrier(((number >> shifts & 255) - 128).astype(jnp.int8))  # or XLA makes them twice
    return codes, largest


def of_digits(sums: Iterable[Array], largest: Float[Array, "rows 1"]) -> Float[Array, "rows columns"]:
    """What the sums of each digit's products stand for."""
    total: Any = 0.0
    for of_digit in sums:
        total = total * 256 + of_digit.astype(jnp.float32)
    return total / WHOLE * largest


def _sums(codes: Int8[Array, "groups rows n"], w: Quantized, dims: Dims) -> list[Int32[Array, "rows columns"]]:
    along, n = _along(w, dims), codes.shape[-1]
    assert along is not None  # who calls has looked
    products = integer_sums(codes, w.values.reshape((-1, n * w.bits // 8) if along else (n, -1)), along, w.bits)
    if w.zero_point is None:
        return products
    zero = jnp.broadcast_to(w.spread(w.zero_point).astype(jnp.int32), dims.outputs(w.shape)).reshape(1, -1)
    of_inputs = jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32)
    return [sums - zero * of_input for sums, of_input in zip(products, of_inputs, strict=True)]


def _along(w: Quantized, dims: Dims) -> int | None:
    """Which axis of the stored values, seen as a matrix, is contracted; `None`: they are none."""
    along = matrix_axis(dims, w.ndim)
    return None if along is None else along ^ int(w.turned)


def matrix_axis(dims: Dims, ndim: int) -> int | None:
    """Which axis of a weight, seen as a matrix, is contracted; `None`: neither its first axes are, nor its last."""
    contract, n = sorted(dims.w_contract), len(dims.w_contract)
    first, last = contract == list(range(n)), contract == list(range(ndim - n, ndim))
    return int(last) if first or last else None


def as_rows(x: Array, dims: Dims) -> Array:
    """`[rows, n]`, the contracted axes in the weight's order."""
    order = [axis for _, axis in sorted(zip(dims.w_contract, dims.x_contract, strict=True))]
    moved = jnp.transpose(x, (*dims.x_free(x.ndim), *order))
    return moved.reshape(-1, math.prod(x.shape[axis] for axis in order))


def as_output(product: Array, x: Array, w: Leaf, dims: Dims) -> Array:
    """`[rows, columns]` with the axes of the product of `x` and `w`."""
    outer = [x.shape[axis] for axis in dims.x_free(x.ndim)]
    return product.reshape(*outer, *(w.shape[axis] for axis in dims.w_free(w.ndim)))
