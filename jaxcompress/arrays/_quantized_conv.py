"""Convolutions with `Quantized` kernels: as products with them, the scale taken out."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._integers import exact, one_by_one
from jaxcompress.arrays._leaf import Otherwise, register
from jaxcompress.arrays._products import Dims, compute_dtype, derived_from, is_float
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._quantized_inputs import input_codes, rounded_input
from jaxcompress.arrays._tiles import tiled_outputs


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: Quantized, **params: Any) -> Any:
    x, numbers = jnp.asarray(x), params["dimension_numbers"]
    out_axis = numbers.rhs_spec[0]
    shared = all(size == 1 for axis, size in enumerate(w.scale.shape) if axis != out_axis)
    if not is_float(x):
        return NotImplemented
    dims = Dims(  # each image has a step of its own, and nothing is stacked
        x_contract=tuple(axis for axis in range(x.ndim) if axis != numbers.lhs_spec[0]),
        w_contract=(),
        x_batch=(),
        w_batch=(),
    )
    if not (shared and w.group is None and params["batch_group_count"] == 1):
        x = rounded_input(x, w, dims)
        if max(params["batch_group_count"], params["feature_group_count"]) > 1:
            return Otherwise(x)
        whole = functools.partial(lax.conv_general_dilated_p.bind, x, **params)
        return tiled_outputs(lambda w: whole(w.materialise().astype(x.dtype)), w, out_axis, numbers.out_spec[1])
    out_dtype = params["preferred_element_type"] or x.dtype
    scale = _along(w.steps.reshape(-1), x.ndim, numbers.out_spec[1])

    def scaled_before(x: Array, w: Quantized) -> Array:
        kernel = w.materialise().astype(x.dtype)
        return lax.conv_general_dilated_p.bind(rounded_input(x, w, dims), kernel, **params).astype(out_dtype)

    def floats(x: Array, w: Quantized) -> Array:
        x = rounded_input(x, w, dims)
        as_floats = params | {"preferred_element_type": compute_dtype(x)}

        def convolve(w: Quantized) -> Array:
            return lax.conv_general_dilated_p.bind(x, w.centred(x.dtype), **as_floats)

        if params["feature_group_count"] == 1:
            return tiled_outputs(convolve, w, out_axis, numbers.out_spec[1])
        return convolve(w)

    if not w.sums_as_integers(math.prod(w.shape) // w.shape[out_axis]):
        # a GPU's kernels take a weight as an array, and what is scaled behind them is written a second time
        return lax.platform_dependent(
            x, w, cuda=scaled_before, default=lambda x, w: (floats(x, w) * scale).astype(out_dtype)
        )
    integers = functools.partial(_conv_codes, dims=dims, params=params)
    return (derived_from(floats, integers, x, w) * scale).astype(out_dtype)


def _conv_codes(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    """The convolution of integers, scaled by the inputs' steps."""
    numbers, (codes, step, zero) = params["dimension_numbers"], input_codes(x, w, dims)
    as_integers = params | {"preferred_element_type": jnp.dtype("int32")}
    w_codes, out_axis, groups = w.codes(), numbers.rhs_spec[0], params["feature_group_count"]
    convolve = functools.partial(lax.conv_general_dilated_p.bind, **as_integers)

    def integers(codes: Array) -> Array:
        sums = convolve(codes, w_codes)
        if w.zero_point is None:
            return sums
        ones = jnp.ones([groups if axis == out_axis else size for axis, size in enumerate(w.shape)], jnp.int8)
        windows = jnp.repeat(convolve(codes, ones), w.shape[out_axis] // groups, axis=numbers.out_spec[1])
        return sums - windows * _along(w.zero_point.astype(jnp.int32).reshape(-1), x.ndim, numbers.out_spec[1])

    def weight_sums() -> Array:  # where the kernel is over the padding, only what is inside counts
        one = [1 if axis == numbers.lhs_spec[0] else size for axis, size in enumerate(x.shape)]
        return integers(jnp.ones(one, jnp.int8))

    zero = None if zero is None else zero.reshape([1] * x.ndim)

    def as_floats() -> Array:  # of integers, added up in float32
        number, whole = jnp.float32, {"precision": (lax.Precision.HIGHEST,) * 2, "preferred_element_type": jnp.float32}
        centred = codes.astype(number) if zero is None else codes.astype(number) - zero
        return lax.conv_general_dilated_p.bind(centred, w.centred(number), **params | whole)

    sums_of = functools.partial(exact, codes, zero, one_by_one(integers, weight_sums))
    if zero is None and w.zero_point is None and codes.dtype == jnp.int8:
        sums = sums_of()
    else:  # a GPU's kernels for integers give nothing but the product of two int8
        sums = lax.platform_dependent(cuda=as_floats, default=sums_of)
    return sums * _along(step.reshape(-1), x.ndim, numbers.out_spec[0])


def _along(vector: Array, ndim: int, axis: int) -> Array:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])
