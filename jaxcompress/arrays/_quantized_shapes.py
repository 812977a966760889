"""What `Quantized` weights do without becoming dense: look up, change shape and dtype, and be laid on devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._inputs import reshaped_input
from jaxcompress.arrays._leaf import register
from jaxcompress.arrays._moved import put_off_transposes
from jaxcompress.arrays._products import block_map, constrain_like, filled, looked_up_axes
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._quantized_updates import reordered
from jaxcompress.arrays._stacks import take_parts


@register(lax.gather_p)
def _gather(w: Quantized, indices: ArrayLike, **params: Any) -> Any:
    """A lookup (`Embed`) takes the integers and the scales of the rows it wants, and leaves the table alone.

    A cache in another order stays one.
    """
    cache = reordered(w, indices, params)
    if cache is not None:
        return cache
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    looked_up = looked_up_axes(w.shape, params)
    rest = [axis for axis in range(w.ndim) if axis not in looked_up]
    shared = all(w.scale.shape[axis] == 1 for axis in looked_up)
    own = all(w.scale.shape[axis] == w.shape[axis] for axis in looked_up)
    whole = all(sizes[axis] == w.shape[axis] for axis in rest)
    if not (whole and (shared or own)):
        return NotImplemented

    def look_up(per_block: Array) -> Array:
        spread = w.spread(per_block)
        block_sizes = tuple(sizes[axis] if axis in looked_up else spread.shape[axis] for axis in range(w.ndim))
        if own:
            return lax.gather_p.bind(spread, indices, **params | {"slice_sizes": block_sizes, "fill_value": 0})
        kept = [
            axis
            for axis in range(w.ndim)
            if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        ]
        out_ndim = len(numbers.offset_dims) + jnp.ndim(indices) - 1
        laid = [1] * out_ndim
        for out_axis, axis in zip(numbers.offset_dims, kept, strict=True):
            laid[out_axis] = spread.shape[axis]
        return spread.reshape(laid)

    codes = lax.gather_p.bind(w.codes(), indices, **params | {"fill_value": 0})
    found = w.numbers(codes, jnp.float32)
    if w.zero_point is not None:
        found -= look_up(w.zero_point).astype(jnp.float32)
    return filled((found * look_up(w.steps)).astype(w.dtype), w.shape, indices, params)


def _transposed(w: Quantized, permutation: tuple[int, ...]) -> Quantized:
    group = w.group and (permutation.index(w.group[0] + w.ndim) - w.ndim, w.group[1])
    return _rearranged(w, lambda x: jnp.transpose(x, permutation), group)


put_off_transposes(Quantized, _transposed)


@register(lax.rev_p)
def _rev(w: Quantized, *, dimensions: tuple[int, ...]) -> Quantized:
    if w.group is not None:
        return NotImplemented
    return _rearranged(w, lambda x: lax.rev(x, dimensions), None)


@register(lax.reshape_p)
def _reshape(w: Quantized, **params: Any) -> Any:
    return NotImplemented if params.get("dimensions") is not None else _reshaped(w, tuple(params["new_sizes"]))


take_parts(Quantized)


def _reshaped(w: Quantized, shape: tuple[int, ...]) -> Any:
    """The leaf in another shape, where its scales can follow."""
    blocks = block_map(w.shape, shape)
    if blocks is None:
        return NotImplemented
    scale_shape, group = [1] * len(shape), None
    for old, new in blocks:
        wide = [axis for axis in old if w.shape[axis] > 1]
        steps = math.prod(w.scale.shape[axis] for axis in old)
        if steps == 1:
            continue
        if steps == math.prod(w.shape[axis] for axis in old):
            for axis in new:
                scale_shape[axis] = shape[axis]
        elif len(wide) == 1 and (target := [axis for axis in new if shape[axis] == w.shape[wide[0]]]):
            scale_shape[target[0]] = steps
        else:
            return NotImplemented
        if w.group and w.group[0] + w.ndim in old and steps != math.prod(w.shape[axis] for axis in old):
            group = (next(axis for axis in new if scale_shape[axis] == steps) - len(shape), w.group[1])
    inputs = [None if x is None else reshaped_input(x, w.shape, shape) for x in (w.input_scale, w.input_zero_point)]
    if w.input_scale is not None and inputs[0] is None:
        return NotImplemented
    return _with_children(w, w.codes().reshape(shape), lambda x: x.reshape(scale_shape), group, inputs)


def _rearranged(w: Quantized, move: Any, group: tuple[int, int] | None) -> Quantized:
    inputs = [None if x is None else move(x) for x in (w.input_scale, w.input_zero_point)]
    return _with_children(w, move(w.codes()), move, group, inputs)


def _with_children(
    w: Quantized, codes: Array, move: Any, group: tuple[int, int] | None, inputs: Sequence[Array | None]
) -> Quantized:
    """A temporary leaf on unpacked codes."""
    return dataclasses.replace(
        w,
        values=codes,
        scale=move(w.scale),
        zero_point=None if w.zero_point is None else move(w.zero_point),
        bits=8,
        length=None,
        turned=False,
        group=group,
        input_scale=inputs[0],
        input_zero_point=inputs[1],
    )


@register(lax.convert_element_type_p)
def _convert(w: Quantized, **params: Any) -> Any:
    if not jax.dtypes.issubdtype(params["new_dtype"], jnp.floating):
        return NotImplemented
    return dataclasses.replace(w, compute_dtype=jnp.dtype(params["new_dtype"]).name)


@register(primitives.sharding_constraint_p)
def _sharding_constraint(w: Quantized, **params: Any) -> Quantized:
    if w.turned:
        values = jnp.swapaxes(constrain_like(jnp.swapaxes(w.values, -1, -2), params), -1, -2)
    else:
        values = constrain_like(w.values, params)
    scale = constrain_like(w.scale, params)
    zero_point = None if w.zero_point is None else constrain_like(w.zero_point, params)
    return dataclasses.replace(w, values=values, scale=scale, zero_point=zero_point)
