"""Quantized arrays that are written to: caches of keys and values, whose new rows are rounded as they come."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._bits import pack_signed
from jaxcompress.arrays._inputs import quantize_between, quantize_input, to_small_floats
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
    plain = w.group is None and w.levels is None and not w.turned and w.scale.dtype == jnp.float32
    plain = plain and w.values.dtype.itemsize == 1
    if not (plain and is_float(update) and all(update.shape[axis] == w.shape[axis] for axis in whole)):
        return NotImplemented
    at = [jnp.int32(0) if axis in whole else jnp.asarray(start, jnp.int32) for axis, start in enumerate(starts)]

    def written(there: Array, new: Array) -> Array:
        return lax.dynamic_update_slice(there, new.astype(there.dtype), at)

    if not w.of_integers:
        codes, step = to_small_floats(update, w.values.dtype, own)
        return dataclasses.replace(w, values=written(w.values, codes), scale=written(w.scale, step))
    if w.zero_point is None:
        codes, step = quantize_input(update, w.bits, keep=own)
        zero_point = None
    else:
        codes, step, zero = quantize_between(update, w.bits, keep=own)
        zero_point = written(w.zero_point, zero)
    values = written(w.values, codes if w.length is None else pack_signed(codes, w.bits))
    return dataclasses.replace(w, values=values, scale=written(w.scale, step), zero_point=zero_point)
