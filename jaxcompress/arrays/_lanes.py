"""Products of a few rows of input with a compressed weight on a CPU: decoded, multiplied and added up in one pass.

XLA:CPU multiplies arrays, so a weight must be decoded into one before it meets a product, be it tile by tile. With few
rows of input a product is hardly more arithmetic than the decoding. Written as arithmetic, XLA makes one loop of both,
shares it among the cores, and reads the codes once. `LANES` rows of the weight are added up side by side, `TERMS` of
each in a pass, so that what is added up stays in the cache.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxcompress.arrays._products import Dims, compute_dtype

LANES, TERMS = 8, 8
LEAST = 1 << 8  # fewer weights along the contracted axis are not worth a loop
FEW = 4  # sums a column, all rows' and all parts'; with more of them products of tiles are faster
TWO = 2  # rows, but not of so many, whatever their parts
LARGE = 1 << 22  # so many weights a row come from memory; out of a cache tiles come as fast, and multiply faster

Decode = Callable[[Any, Any], list[Array]]
"""`(part of the weight, dtype) -> arrays` that stand interleaved along the last axis; one, where nothing is packed."""


def suits(decode: Decode, w: Any, dims: Dims, rows: int, depth: int) -> bool:
    """Whether `by_lanes` can, and is faster: few rows, one contracted axis, and the last axis not that one.

    Args:
      decode: as for `by_lanes`.
      w: the weight.
      dims: which axes meet.
      rows: of the input.
      depth: the most products that one lane may add up.
    """
    last = len(w.shape) - 1
    if len(dims.w_contract) != 1 or last not in dims.w_free(last + 1):
        return False
    n, unit = w.shape[dims.w_contract[0]], w.unit(dims.w_contract[0])
    if n % LANES or n // LANES > depth or max(unit, LANES) % min(unit, LANES):
        return False
    sums = rows * len(jax.eval_shape(lambda w: decode(w.tile(dims.w_contract[0], 0, LANES), jnp.float32), w))
    few = 0 < rows <= TWO or 0 < sums <= FEW
    return few and _terms(n) >= TERMS // 2 and n >= LEAST and math.prod(w.shape) >= LARGE * rows


def by_lanes(decode: Decode, x: Array, w: Any, dims: Dims, dtype: Any) -> Array:
    """`x @ decode(w)` with the dimension numbers `dims`: added up in floats along a lane, in `dtype` over the lanes."""
    along, number = dims.w_contract[0], compute_dtype(x)
    batch, free, outer = dims.w_batch, dims.w_free(len(w.shape)), dims.x_free(x.ndim)
    terms = _terms(w.shape[along])
    rows = dims.rows(x)
    laid = jnp.transpose(x, (*dims.x_contract, *dims.x_batch, *outer)).astype(number)
    stacked = [x.shape[axis] for axis in dims.x_batch]
    xs = laid.reshape(-1, terms, LANES, *stacked, rows, *[1] * len(free))

    def parts(start: Array) -> list[Array]:
        decoded = decode(w.tile(along, start, LANES), number)
        in_order = [jnp.transpose(part, (along, *batch, *free)) for part in decoded]
        return [jnp.expand_dims(part, 1 + len(batch)) for part in in_order]

    def step(sums: list[Array], at: tuple[Array, Array]) -> tuple[list[Array], None]:
        i, inputs = at
        for term in range(terms):  # each cuts its own part out, or XLA would write the cut-out part to memory
            here = parts((i * terms + term) * LANES)
            sums = [total + inputs[term] * part for total, part in zip(sums, here, strict=True)]
        return sums, None

    shapes = [(LANES, *stacked, rows, *part.shape[2 + len(batch) :]) for part in jax.eval_shape(parts, jnp.int32(0))]
    start = [jnp.zeros(shape, number) for shape in shapes]
    sums, _ = lax.scan(step, start, (jnp.arange(xs.shape[0]), xs))
    columns = [jnp.sum(total.astype(dtype), axis=0) for total in sums]
    together = columns[0] if len(columns) == 1 else jnp.stack(columns, axis=-1)
    return together.reshape(*stacked, *(x.shape[axis] for axis in outer), *(w.shape[axis] for axis in free))


def _terms(n: int) -> int:
    return max(terms for terms in range(1, TERMS + 1) if n // LANES % terms == 0)
