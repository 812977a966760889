"""Products with integers that have a scale a group, on a CPU that multiplies bytes: group by group, as integers.

A group of weights is one tile: its products with the input's codes are exact sums of integers, which its scale turns
into floats that are added up. So nothing is decoded but the bytes of packed codes, one group's at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from jaxcompress.arrays._bits import signed_parts
from jaxcompress.arrays._byte_products import byte_dot, less_moves, multiplies_bytes, with_ones
from jaxcompress.arrays._products import Dims
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._tiles import WORTH

LEAST = 16  # weights a group; to add up smaller ones takes longer than the other ways
OF_DIGITS = 128  # likewise where each input is three digits


def suits(x: Array, w: Quantized, dims: Dims, least: int = LEAST) -> bool:
    """Whether `group_sums` can, and is faster: groups of `least` along the first axis, the only contracted one."""
    if w.group is None or w.group[0] != -w.ndim or dims.w_contract != (0,) or dims.w_batch or jax.device_count() > 1:
        return False
    packed = w.length is not None and w.length % (8 // w.bits) == 0
    stored = w.of_integers and (packed or (w.bits == 8 and w.zero_point is None and not w.turned))
    whole = w.group[1] >= least and w.shape[0] % w.group[1] == 0 and w.ndim > 1 and w.size >= WORTH
    rows = dims.rows(x)
    return stored and whole and isinstance(rows, int) and rows > 0 and multiplies_bytes()


def group_sums(codes: Int8[Array, "digits rows n"], w: Quantized, input_zero: Any = 0) -> Float[Array, "rows k"]:
    """The product of inputs with a weight that `suits`, in float32: the sums of each group, scaled and added up.

    Args:
      codes: of the inputs; of several digits each is 256 times the next one, and the last one counts ones.
      w: `[n, *outputs]`, `k` of them.
      input_zero: the code that means zero, an int32.
    """
    assert w.group is not None  # who calls has looked
    digits, rows, n = codes.shape
    size, a_byte = w.group[1], 8 // w.bits
    groups, values = n // size, w.values.reshape(n, -1)

    def by_parts(per_block: Array) -> Array:
        """`[groups, parts, columns]`: what belongs to the first codes of all bytes, to the second ones, ..."""
        laid = jnp.broadcast_to(per_block, (groups, *w.shape[1:])).reshape(groups, -1, a_byte)
        return jnp.moveaxis(laid, -1, 1)

    inputs = jnp.moveaxis(with_ones(codes.reshape(-1, n)).reshape(-1, groups, size), 1, 0)
    zero = None if w.zero_point is None else by_parts(w.zero_point)

    def add(totals: list[Array], at: Any) -> tuple[list[Array], None]:
        group, here, scale, moves = at
        tile = lax.dynamic_slice_in_dim(values, group * size, size, 0)
        parts = signed_parts(tile, w.bits) if a_byte > 1 else [tile]
        if moves is not None:  # of so few bits that the difference is an int8 too
            parts = [part - move for part, move in zip(parts, moves, strict=True)]
        added = [scaled(byte_dot(here, part, along=0), step) for part, step in zip(parts, scale, strict=True)]
        return [total + more for total, more in zip(totals, added, strict=True)], None

    def scaled(sums: Array, step: Array) -> Array:
        first, *others = less_moves(sums, input_zero).reshape(digits, rows, -1).astype(jnp.float32)
        for digit in others:
            first = first * 256 + digit
        return first * step

    zeros = [jnp.zeros((rows, values.shape[1]), jnp.float32)] * a_byte
    totals, _ = lax.scan(add, zeros, (jnp.arange(groups), inputs, by_parts(w.steps), zero))
    return jnp.moveaxis(jnp.stack(totals), 0, -1).reshape(rows, -1)
