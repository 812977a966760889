"""The inputs that `Quantized` weights ask for: on a grid of integers, their own or one that the weight brings along."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress.arrays._inputs import along_input, input_limits, quantize_input, quantize_input_to
from jaxcompress.arrays._products import Dims
from jaxcompress.arrays._quantized import Quantized


def input_codes(x: Array, w: Quantized, dims: Dims) -> tuple[Array, Array, Array | None]:
    """The input as integers, and its steps and zero points along the input's axes."""
    assert w.activation_bits is not None
    if w.input_scale is None:
        return *quantize_input(x, w.activation_bits, keep=(*dims.x_batch, *dims.x_free(x.ndim))), None
    step = along_input(w.input_scale, dims, x.ndim)
    zero = None if w.input_zero_point is None else along_input(w.input_zero_point, dims, x.ndim)
    if step is None:
        raise ValueError(f"the inputs' steps {w.input_scale.shape} of a stacked weight meet inputs {x.shape} at once")
    return quantize_input_to(x, step, zero, w.activation_bits), step, zero


def rounded_input(x: Array, w: Quantized, dims: Dims) -> Array:
    """The input on the grid that the weight asks for, as floats; straight through but for what is clipped."""
    if w.activation_bits is None:
        return x
    return _on_grid(x, *input_codes(x, w, dims), w.activation_bits, w.input_scale is not None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _on_grid(x: Array, codes: Array, step: Array, zero: Array | None, bits: int, clips: bool) -> Array:
    """What training rounds inputs to, from codes that are there, and in forward mode too."""
    return ((codes if zero is None else codes - zero) * step).astype(x.dtype)


@_on_grid.defjvp
def _on_grid_jvp(bits: int, clips: bool, at: Any, along: Any) -> tuple[Array, Array]:
    x, _, step, zero = at
    if not clips:
        return _on_grid(*at, bits, clips), along[0]
    low, high = input_limits(bits, zero is not None)
    place = x.astype(jnp.float32) / step + (0.0 if zero is None else zero)
    return _on_grid(*at, bits, clips), jnp.where((place >= low) & (place <= high), along[0], 0)
