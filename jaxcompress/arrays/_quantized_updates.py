"""Quantized arrays that are written to: caches of keys and values, whose new rows are rounded as they come.

What takes their rows in another order, as beams are, or from one of two caches takes codes and steps alike.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
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


def reordered(w: Quantized, indices: ArrayLike, params: dict[str, Any]) -> Quantized | None:
    """What a gather of a cache gives that has the cache's shape, each index with its own steps; `None`: it isn't that.

    A cache is what has steps of its own along two axes or more. A table, with fewer, is looked up for its numbers.
    """
    numbers, fill = params["dimension_numbers"], params["fill_value"]
    as_dense = fill is None or fill != fill  # NaN out of range, which a step can be, and no other number
    looked_up = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = tuple(axis for axis in range(w.ndim) if axis not in looked_up)
    in_place = tuple(numbers.offset_dims) == kept and set(numbers.start_index_map) <= set(looked_up)
    in_order = in_place and all(params["slice_sizes"][axis] == w.shape[axis] for axis in kept)
    own = all(w.scale.shape[axis] == w.shape[axis] for axis in looked_up) and w.ndim - 1 in kept
    if not (in_order and own and _is_plain(w) and len(_own(w)) > 1 and w.input_scale is None and as_dense):
        return None
    if tuple(jnp.shape(indices)[:-1]) != tuple(w.shape[axis] for axis in sorted(looked_up)):
        return None

    def take(part: Array, fill: Any) -> Array:
        sizes = tuple(part.shape[axis] if axis in kept else 1 for axis in range(w.ndim))
        return lax.gather_p.bind(part, indices, **params | {"slice_sizes": sizes, "fill_value": fill})

    zero_point = None if w.zero_point is None else take(w.zero_point, 0)
    return dataclasses.replace(w, values=take(w.values, 0), scale=take(w.scale, jnp.nan), zero_point=zero_point)


_spread: dict[int, tuple[ArrayLike, Sequence[int]]] = {}
"""By the id of a condition that was broadcast, while it lives: what it was before, and which axes these became."""


@quax.register(lax.broadcast_in_dim_p)
def _broadcast(x: ArrayLike, **params: Any) -> Array:
    out = lax.broadcast_in_dim_p.bind(x, **params)
    if out.dtype == bool:
        _spread[id(out)] = x, params["broadcast_dimensions"]
        weakref.finalize(out, _spread.pop, id(out), None)
    return out


@register(lax.broadcast_in_dim_p)
def _nothing_new(w: Quantized, *, shape: Sequence[int], **params: Any) -> Any:
    """Indexing ends with one that adds no axis."""
    return w if tuple(shape) == w.shape else NotImplemented


@register(lax.select_n_p)
def _select(which: ArrayLike, first: Quantized, second: Quantized) -> Any:
    """`jnp.where` of two caches, where the condition was broadcast along the axes that share a step or a byte."""
    small, axes = _spread.get(id(which), (which, range(jnp.ndim(which))))
    where = [axis for axis, size in zip(axes, jnp.shape(small), strict=True) if size > 1]
    structures = {jax.tree.structure(leaf) for leaf in (first, second)}
    alike = len(structures) == 1 and first.scale.shape == second.scale.shape
    apart = where and (first.turned or first.input_scale is not None)
    if not alike or apart or any(axis in _whole(first) for axis in where):
        return NotImplemented
    laid = jnp.reshape(small, [first.shape[axis] if axis in where else 1 for axis in range(first.ndim)])
    return jax.tree.map(lambda one, other: jnp.where(laid, other, one), first, second)


def _own(w: Quantized) -> list[int]:
    """The axes along which each index has a step of its own."""
    return [axis for axis in range(w.ndim) if w.scale.shape[axis] == w.shape[axis] and w.shape[axis] != 1]


def _whole(w: Quantized) -> list[int]:
    """The axes along which no part can be written: they share a step, or a byte."""
    own = _own(w)
    return [axis for axis in range(w.ndim) if axis not in own or (w.length is not None and axis == w.ndim - 1)]


def _can_be_written(w: Quantized, update: Array) -> bool:
    return _is_plain(w) and w.values.dtype.itemsize == 1 and is_float(update)


def _is_plain(w: Quantized) -> bool:
    return w.group is None and w.levels is None and not w.turned and w.scale.dtype == jnp.float32


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
