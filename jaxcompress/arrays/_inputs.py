"""Activations as integers: on a grid that is found as they come, or on one that a weight brings along."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress.arrays._products import Dims, free_axes


def input_limits(bits: int, asymmetric: bool) -> tuple[int, int]:
    """The smallest and the largest integer of an activation; a symmetric grid leaves out the smallest."""
    top = 2 ** (bits - 1) - 1
    return (-top - 1, top) if asymmetric else (-top, top)


def quantize_input(x: Array, bits: int, keep: Sequence[int]) -> tuple[Array, Array]:
    """Symmetric codes of an activation with a step of its own at each index of the `keep` axes.

    Returns:
      (int8 codes like `x`, int16 ones of more than 8 bits; float32 steps with size 1 along the other axes).
    """
    over = free_axes(x.ndim, keep)
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=over, keepdims=True)
    step = jnp.where(largest == 0, 1.0, largest) / (2 ** (bits - 1) - 1)  # of NaN it is NaN, which no integer could be
    return quantize_input_to(x, step, None, bits), step


def quantize_between(x: Array, bits: int, keep: Sequence[int]) -> tuple[Array, Array, Array]:
    """Codes on a grid from the smallest to the largest number (and zero) at each index of the `keep` axes.

    Returns:
      (codes and float32 steps as `quantize_input`; the integers that mean zero, as float32).
    """
    full, over = x.astype(jnp.float32), free_axes(x.ndim, keep)
    low = jnp.minimum(jnp.min(full, axis=over, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(full, axis=over, keepdims=True), 0.0)
    least, most = input_limits(bits, asymmetric=True)
    step = high / (most - least) - low / (most - least)  # apart, or a huge range overflows
    step = jnp.where(step < jnp.finfo(jnp.float32).tiny, 1.0, step)
    zero = whole(least - low / step, (least, most))
    return quantize_input_to(x, step, zero, bits), step, zero


def whole(zero_point: Array, limits: tuple[int, int]) -> Array:
    """A zero point as it is used: one of the integers."""
    return jnp.clip(jnp.round(zero_point), *limits)


def quantize_input_to(x: Array, step: Array, zero_point: Array | None, bits: int) -> Array:
    """Codes of an activation on a given grid, `[*x]`; what lies outside is clipped.

    Args:
      x: the activation.
      step: float32, broadcastable to `x`.
      zero_point: the integer that means zero, as float32; `None` for a symmetric grid.
      bits: at most 8 give int8, more int16.
    """
    codes = jnp.round(x.astype(jnp.float32) / step)
    if zero_point is not None:
        codes += zero_point
    low, high = input_limits(bits, zero_point is not None)
    return jnp.clip(codes, low, high).astype(jnp.int8 if bits <= 8 else jnp.int16)


def to_small_floats(x: Array, dtype: Any, keep: Sequence[int]) -> tuple[Array, Array]:
    """An activation in an 8-bit float type, over a scale of its own at each index of the `keep` axes.

    Returns:
      (`x / scale` as `dtype`, the largest of a row being the type's largest number; float32 scales with size 1 along
      the other axes).
    """
    full, largest = x.astype(jnp.float32), float(jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(full), axis=free_axes(x.ndim, keep), keepdims=True) / largest
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return jnp.clip(full / scale, -largest, largest).astype(dtype), scale


def along_input(per_layer: Array, dims: Dims, x_ndim: int) -> Array | None:
    """What a weight brings along for its inputs, laid along the input's axes.

    It is of the weight's rank and 1 along all axes but those of the product's batch; `None` if it isn't.
    """
    if per_layer.size == 1:
        return per_layer.reshape([1] * x_ndim)
    if any(size > 1 for axis, size in enumerate(per_layer.shape) if axis not in dims.w_batch):
        return None
    order = (*dims.x_batch, *free_axes(x_ndim, dims.x_batch))
    moved = jnp.transpose(per_layer, (*dims.w_batch, *free_axes(per_layer.ndim, dims.w_batch)))
    laid = moved.reshape([per_layer.shape[axis] for axis in dims.w_batch] + [1] * (x_ndim - len(dims.x_batch)))
    return jnp.transpose(laid, [order.index(axis) for axis in range(x_ndim)])


def reshaped_input(per_layer: Array, old: Sequence[int], new: Sequence[int]) -> Array | None:
    """What a weight brings along for its inputs, after the weight changes its shape; `None` where it can't follow."""
    if per_layer.size == 1:
        return per_layer.reshape([1] * len(new))
    lead = max(axis for axis, size in enumerate(per_layer.shape) if size > 1) + 1
    if tuple(old[:lead]) != tuple(new[:lead]):
        return None
    return per_layer.reshape(*per_layer.shape[:lead], *[1] * (len(new) - lead))
