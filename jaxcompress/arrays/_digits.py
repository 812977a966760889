"""Products of a few rows of floats with int8 codes on a CPU, as products of integers.

A row of input is a step times `d0 + d1 / 254 + d2 / 254^2`, with digits from -127 to 127: as near to it as float32 is
to its largest value. The digits' products with the codes are exact sums of integers, which a CPU adds up four at a
time and without decoding the weight, if the contracted axis is the last one stored.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcompress.arrays._products import Dims, is_float
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._tiles import WORTH

FEW = 32  # rows; with more of them three products of integers take longer than decoding and one of floats
LITTLE, FEWER = 1 << 12, 4  # weights of that many on, less than are worth tiles, pay for so many rows
DEEP = (1 << 31) // (127 * 128)  # contracted weights whose products int32 can add up
BASE = 254


def is_laid_for_integers(w: Quantized, dims: Dims) -> bool:
    """Whether the weight is a matrix of int8 codes, and the axis that is contracted the last one stored."""
    plain = w.values.dtype == jnp.int8 and w.of_integers and w.length is None and w.zero_point is None
    return plain and w.ndim == 2 and dims.w_contract == (int(not w.turned),) and w.values.shape[-1] <= DEEP


def suits(x: Array, w: Quantized, dims: Dims) -> bool:
    """Whether `by_digits` can, and is faster."""
    rows = math.prod(x.shape[axis] for axis in dims.x_free(x.ndim))
    most = FEW if w.size >= WORTH else FEWER if w.size >= LITTLE else 0
    known = isinstance(rows, int) and 0 < rows <= most  # under jax.export it may be a symbol
    return known and jax.device_count() == 1 and is_float(x) and is_laid_for_integers(w, dims)


def by_digits(otherwise: Callable[[Array, Quantized], Array], x: Array, w: Quantized, dims: Dims) -> Array:
    """`otherwise(x, w)`, the unscaled product; on a CPU by digits. Derivatives are those of `otherwise`."""
    dtype = jax.eval_shape(otherwise, x, w).dtype
    multiply = jax.custom_jvp(lambda x, w: _product(x, w, dims).astype(dtype))
    multiply.defjvp(lambda at, along: (multiply(*at), jax.jvp(otherwise, at, along)[1]))
    return lax.platform_dependent(cpu=lambda: multiply(x, w), default=lambda: otherwise(x, w))


def _product(x: Array, w: Quantized, dims: Dims) -> Float[Array, "*outer columns"]:
    outer = [x.shape[axis] for axis in dims.x_free(x.ndim)]
    rows = jnp.moveaxis(x, dims.x_contract[0], -1).reshape(-1, w.values.shape[-1]).astype(jnp.float32)
    step = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True) / 127, 1e-36)
    digits, rest = [], rows / step
    for _ in range(3 if x.dtype == jnp.float32 else 2):  # of half precision two hold all there is
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * BASE
    codes = jnp.concatenate(digits).astype(jnp.int8)
    sums = lax.dot_general(codes, w.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    total: Any = 0.0
    for of_digit in reversed(jnp.split(sums.astype(jnp.float32), len(digits))):
        total = total / BASE + of_digit
    return (total * step).reshape(*outer, -1)
