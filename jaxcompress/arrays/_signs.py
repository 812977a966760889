"""Products of a few rows of floats with weights of two or three values on a CPU, as products of integers.

Two values are their mean and their half distance, with a sign. Three are the first one, half of what is between the
others, with a sign or zero, and what both have more than the first; for ternary weights with one magnitude that is
nothing. So a weight's signs meet the digits of the input (`_digits.py`), a byte each while they do, and no float is
chosen for any weight.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from jaxcompress.arrays._bits import index_part
from jaxcompress.arrays._byte_products import DEEP, multiplies_bytes, packed_sums
from jaxcompress.arrays._codebook import Codebook, values_of
from jaxcompress.arrays._digits import FEW, as_output, as_rows, in_digits, is_narrow, matrix_axis, of_digits
from jaxcompress.arrays._products import Dims
from jaxcompress.arrays._tiles import WORTH

FEWER = 32  # rows; three values may take two products, which for more rows take longer than choosing floats


def suits(x: Array, w: Codebook, dims: Dims) -> bool:
    """Whether `by_signs` can, and is faster: a large matrix, one codebook an output at most, on a single device."""
    rows, k = dims.rows(x), w.centroids.shape[-1]
    if k not in (2, 3) or not isinstance(rows, int) or not 0 < rows <= (FEW if k == 2 else FEWER):
        return False  # under jax.export rows may be a symbol
    matrix = matrix_axis(dims, w.ndim) is not None and dims.w_contract and not dims.w_batch
    shared = all(w.centroids.shape[axis] == 1 for axis in dims.w_contract)
    if not matrix or not shared or w.length % (8 // w.bits) or w.size < WORTH:
        return False
    exact = dims.depth(w.shape) <= DEEP
    return exact and is_narrow(x) and jax.device_count() == 1 and multiplies_bytes()


def by_signs(x: Array, w: Codebook, dims: Dims) -> Float[Array, "*output"]:
    """The product of an input and a weight that `suits`, in float32."""
    along, rows = matrix_axis(dims, w.ndim), as_rows(x, dims)
    assert along is not None  # who calls has looked
    codes, largest = in_digits(rows)
    digits, n_rows, n = codes.shape
    packed = w.indices.reshape((-1, n * w.bits // 8) if along else (n, -1))
    values = values_of(w.centroids, w.keep_zeros).astype(jnp.float32)
    values = jnp.broadcast_to(values, (*dims.outputs(w.shape), values.shape[-1])).reshape(1, -1, values.shape[-1])

    def product(signs: Any) -> Float[Array, "rows k"]:
        sums = packed_sums(codes.reshape(-1, n), packed, along, w.bits, functools.partial(_part, signs=signs))
        return of_digits(sums.reshape(digits, n_rows, -1), largest)

    of_ones = of_digits(jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32), largest)
    if values.shape[-1] == 2:
        low, high = values[..., 0] / 2, values[..., 1] / 2
        return as_output(of_ones * (low + high) + product(_of_two) * (high - low), x, w, dims)
    first, plus, minus = (values[..., i] for i in range(3))
    more = plus / 2 + minus / 2 - first
    out = of_ones * first + product(_of_three) * (plus / 2 - minus / 2)
    out = lax.cond(jnp.any(more != 0), lambda: out + product(_but_first) * more, lambda: out)
    return as_output(out, x, w, dims)


def _part(packed: UInt8[Array, "*shape"], bits: int, first: Array, signs: Any) -> Int8[Array, "*shape"]:
    return signs(index_part(packed, bits, first).astype(jnp.int8))


def _of_two(index: Int8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    return 2 * index - 1


def _of_three(index: Int8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    return (index & 1) - (index >> 1)  # 0, 1 and 2: 0, 1 and -1


def _but_first(index: Int8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    return (index & 1) + (index >> 1)
