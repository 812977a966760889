"""Quantized arrays that are written to: caches of keys and values, whose new rows are rounded as they come."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._bits import pack_signed
from jaxcompress.arrays._inputs import quantize_input
from jaxcompress.arrays._leaf import register
from jaxcompress.arrays._products import is_float
from jaxcompress.arrays._quantized import Quantized


@register(lax.dynamic_update_slice_p)
def _update(w: Quantized, update: ArrayLike, *starts: ArrayLike) -> Any:
    """What is written gets steps of its own, where the whole has a step an index; what is there stays as it is.

    A cache `[batch, length, heads, size]` with a step for each of the first three has one a token and head. Along axes
    that share a step, or are packed, the update must be as long as the whole.
    """
    update = jnp.asarray(update)
    own = [axis for axis in range(w.ndim) if w.scale.shape[axis] == w.shape[axis] and w.shape[axis] > 1]
    whole = [axis for axis in range(w.ndim) if axis not in own or (w.length is not None and axis == w.ndim - 1)]
    plain = w.zero_point is None and w.group is None and w.levels is None and not w.turned
    plain = plain and w.values.dtype in (jnp.int8, jnp.uint8)
    if not (plain and is_float(update) and all(update.shape[axis] == w.shape[axis] for axis in whole)):
        return NotImplemented
    codes, step = quantize_input(update, w.bits, keep=own)
    at = [0 if axis in whole else start for axis, start in enumerate(starts)]
    values = lax.dynamic_update_slice(w.values, pack_signed(codes, w.bits).astype(w.values.dtype), _starts(at))
    return dataclasses.replace(w, values=values, scale=lax.dynamic_update_slice(w.scale, step, _starts(at)))


def _starts(at: list[Any]) -> list[Array]:
    return [jnp.asarray(start, jnp.int32) for start in at]
