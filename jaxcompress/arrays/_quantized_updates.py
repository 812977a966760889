"""Quantized arrays that are written to: caches of keys and values, whose new rows are rounded as they come."""

import dataclasses
from collections.abc import Callable, Sequence
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
    update, own, whole = jnp.asarray(update), _own(w), _whole(w)
    if not (_can_be_written(w, update) and all(update.shape[axis] == w.shape[axis] for axis in whole)):
        return NotImplemented
    at = [jnp.int32(0) if axis in whole else jnp.asarray(start, jnp.int32) for axis, start in enumerate(starts)]
    return _written(w, update, own, lambda there, new: lax.dynamic_update_slice(there, new, at))


@register(lax.scatter_p)
def _scatter(w: Quantized, indices: ArrayLike, update: ArrayLike, **params: Any) -> Any:
    """As `dynamic_update_slice` at many places: what its `vmap` becomes, each row of a batch at a place of its own.

    So does `cache.at[rows, places].set(new)`. Of a place that is written twice one write stays, whose is open on a GPU,
    and there it may be the codes of one and the steps of the other.
    """
    numbers, update = params["dimension_numbers"], jnp.asarray(update)
    out_of_window = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(w.ndim) if axis not in out_of_window]
    window = {axis: int(there) for axis, there in zip(kept, numbers.update_window_dims, strict=True)}
    if params["update_jaxpr"] is not None or not _can_be_written(w, update):
        return NotImplemented
    if any((update.shape[window[axis]] if axis in window else 1) != w.shape[axis] for axis in _whole(w)):
        return NotImplemented
    if w.length is not None and window.get(w.ndim - 1) != update.ndim - 1:
        return NotImplemented
    one_step = [window[axis] for axis in kept if axis not in _own(w)]
    own = [axis for axis in range(update.ndim) if axis not in one_step]
    # an index that doesn't fit the whole of an axis doesn't fit its bytes or its one step either
    return _written(w, update, own, lambda there, new: lax.scatter_p.bind(there, indices, new, **params))


def _own(w: Quantized) -> list[int]:
    """The axes along which each index has a step of its own."""
    return [axis for axis in range(w.ndim) if w.scale.shape[axis] == w.shape[axis] and w.shape[axis] != 1]


def _whole(w: Quantized) -> list[int]:
    """The axes along which no part can be written: they share a step, or a byte."""
    own = _own(w)
    return [axis for axis in range(w.ndim) if axis not in own or (w.length is not None and axis == w.ndim - 1)]


def _can_be_written(w: Quantized, update: Array) -> bool:
    plain = w.group is None and w.levels is None and not w.turned and w.scale.dtype == jnp.float32
    return plain and w.values.dtype.itemsize == 1 and is_float(update)


def _written(w: Quantized, update: Array, own: Sequence[int], write: Callable[[Array, Array], Array]) -> Quantized:
    """The leaf with an update that is rounded with steps of its own at each index of its `own` axes.

    `write(there, new)` puts them in their place, in each of the leaf's children.
    """

    def put(there: Array, new: Array) -> Array:
        return write(there, new.astype(there.dtype))

    if not w.of_integers:
        codes, step = to_small_floats(update, w.values.dtype, own)
        return dataclasses.replace(w, values=put(w.values, codes), scale=put(w.scale, step))
    if w.zero_point is None:
        codes, step = quantize_input(update, w.bits, keep=own)
        zero_point = None
    else:
        codes, step, zero = quantize_between(update, w.bits, keep=own)
        zero_point = put(w.zero_point, zero)
    values = put(w.values, codes if w.length is None else pack_signed(codes, w.bits))
    return dataclasses.replace(w, values=values, scale=put(w.scale, step), zero_point=zero_point)
