"""What `Quantized` weights do without becoming dense: multiply and convolve.

A product with a weight `scale * codes` is taken apart where the scale allows it:

* the scale is constant along the contracted axes (per tensor, per output channel): multiply with the integers, then
  scale the output;
* it varies along the contracted axes only (a tied embedding read backwards): scale the input, then multiply;
* it varies along both (groups): one product a group, scaled, and summed.

Where the weight asks for it, inputs become integers too: `x = step (codes - zero)`. Then the products of integers are
added up exactly, in int32; `zero` times the sum of a weight's codes is taken off, and the rest is scaled. Derivatives
pass straight through the rounding, as in training: they are those of the product with floats.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._digits import by_digits, integer_codes, is_laid_for_integers, suits
from jaxcompress.arrays._inputs import along_input, input_limits, quantize_input, quantize_input_to
from jaxcompress.arrays._integers import beats_bytes, multiply_integers
from jaxcompress.arrays._lanes import LARGE
from jaxcompress.arrays._leaf import Otherwise, register
from jaxcompress.arrays._products import (
    Dims,
    along_contracted,
    along_output,
    by_columns,
    compute_dtype,
    derived_from,
    is_float,
    register_product,
)
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._tiles import is_tiled, tiled, tiled_outputs


def _left_to_dense(x: Array, w: Quantized, dims: Dims) -> Any:
    """What a rule returns that leaves a product to the dense weight: the input is rounded all the same."""
    if w.activation_bits is None or not is_float(x):
        return NotImplemented
    return Otherwise(_rounded_input(x, w, dims))


@register_product(Quantized, _left_to_dense)
def _dot(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Any:
    """The product with the input on the left, where the scale can be taken out of it."""
    if not is_float(x):
        return NotImplemented
    out_dtype = params["preferred_element_type"] or x.dtype
    varies = [axis for axis in dims.w_contract if w.scale.shape[axis] > 1]
    w_free = dims.w_free(w.ndim)
    if not varies:
        product = _dot_scaled_outputs(x, w, dims, params)
    elif all(w.scale.shape[axis] == 1 for axis in w_free):
        per_input = along_contracted(w.spread(w.steps), dims, x.ndim)
        product = _dot_tiles(x, w, dims, params, per_input)
    elif varies == [w.group[0] + w.ndim] if w.group else False:
        if params.get("out_sharding") is not None:
            return _left_to_dense(x, w, dims)
        product = _dot_scaled_groups(x, w, dims, params)
    else:
        return _left_to_dense(x, w, dims)
    return product.astype(out_dtype)


def _dot_scaled_outputs(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    def after() -> Array:
        spread = w.spread(w.steps)
        scale = along_output(spread, dims.w_contract, dims.w_batch, before=len(dims.x_free(x.ndim)), after=0)
        floats = functools.partial(_dot_tiles, dims=dims, params=params)
        if not w.as_integers:
            return floats(x, w) * scale
        return derived_from(floats, functools.partial(_dot_codes, dims=dims, params=params), x, w) * scale

    def before() -> Array:
        scaled = functools.partial(_dot_scaled, dims=dims, params=params)
        return by_columns(scaled, _rounded_input(x, w, dims), w, dims)

    exact = w.as_integers or x.dtype != jnp.float32  # few digits hold integers, but not integers times a scale
    if exact or is_tiled(x, w, dims) or suits(x, w, dims) or jax.device_count() > 1:
        return after()
    # XLA:CPU writes a small weight out in any case, and does so faster if it scales it too
    return lax.platform_dependent(cpu=before, default=after)


def _dot_scaled_groups(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    def grouped(x: Array, w: Quantized, zero: Array | None = None) -> Array:
        return by_columns(functools.partial(_dot_groups, dims=dims, params=params, zero=zero), x, w, dims)

    def floats(x: Array, w: Quantized) -> Array:
        x, decode = _rounded_input(x, w, dims), _scaled if w.of_integers else None
        return tiled(grouped, x, w, dims, whole=lambda: _dot_groups_whole(x, w, dims, params), decode=decode)

    def integers(x: Array, w: Quantized) -> Array:
        codes, step, zero = _input_codes(x, w, dims)  # of whole rows, whatever the groups and tiles
        sums = tiled(functools.partial(grouped, zero=zero), codes, w, dims)
        return sums * _along_weight(step, dims, w.ndim)

    return derived_from(floats, integers, x, w) if w.as_integers else floats(x, w)


def _dot_groups_whole(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    """Of groups at once: a batch axis on a CPU; elsewhere XLA decodes a scaled weight inside one plain product."""

    def fused() -> Array:
        return by_columns(functools.partial(_dot_scaled, dims=dims, params=params), x, w, dims)

    def grouped() -> Array:
        return by_columns(functools.partial(_dot_groups, dims=dims, params=params), x, w, dims)

    return lax.platform_dependent(cpu=grouped, default=fused)


def _dot_tiles(x: Array, w: Quantized, dims: Dims, params: dict[str, Any], per_input: Array | None = None) -> Array:
    """The unscaled product of floats, decoded tile by tile where that is faster; inputs may be scaled first."""
    x = _rounded_input(x, w, dims)
    x = x if per_input is None else x * per_input
    decode = _centred if w.of_integers else None
    product = functools.partial(_dot_floats, dims=dims, params=params)

    def floats(x: Array, w: Quantized) -> Array:
        return tiled(lambda x, w: by_columns(product, x, w, dims), x, w, dims, decode=decode)

    return by_digits(floats, x, w, dims) if suits(x, w, dims) else floats(x, w)


def _dot_codes(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    """The product of integers, scaled by the inputs' steps."""
    product = functools.partial(_dot_floats, dims=dims, params=params)

    def integers(codes: Array) -> Array:
        def whole() -> Array:
            return by_columns(lambda x, w: _dot_integers(x, w.codes(), dims, params), codes, w, dims)

        in_pieces = not w.turned and beats_bytes(codes, w.shape, dims)
        if not in_pieces and is_laid_for_integers(codes, w, dims):
            return lax.platform_dependent(cpu=lambda: integer_codes(codes, w, dims), default=whole)
        by_lanes = w.size >= LARGE and dims.rows(codes) == 1
        if w.length is None and params.get("out_sharding") is None and not by_lanes:
            return multiply_integers(codes, w.codes(), dims)
        # packed codes are unpacked into floats in tiles, which add up 1,024 products of two int8 as exactly as integers
        return tiled(
            lambda x, w: by_columns(product, x, w, dims).astype(jnp.int32),
            codes.astype(jnp.float32),
            w,
            dims,
            whole=whole,
            rows=8,
            depth=1 << 10,
            decode=_centred,
        )

    codes, step, zero = _input_codes(x, w, dims)
    sums = _summed(codes, zero, integers, lambda: _weight_sums(w.codes(), dims, x.ndim), dims, w.ndim)
    return sums * _along_weight(step, dims, w.ndim)


def _input_codes(x: Array, w: Quantized, dims: Dims) -> tuple[Array, Array, Array | None]:
    """The input as integers, and its steps and zero points along the input's axes."""
    assert w.activation_bits is not None
    if w.input_scale is None:
        return *quantize_input(x, w.activation_bits, keep=(*dims.x_batch, *dims.x_free(x.ndim))), None
    step = along_input(w.input_scale, dims, x.ndim)
    zero = None if w.input_zero_point is None else along_input(w.input_zero_point, dims, x.ndim)
    if step is None:
        raise ValueError(f"the inputs' steps {w.input_scale.shape} of a stacked weight meet inputs {x.shape} at once")
    return quantize_input_to(x, step, zero, w.activation_bits), step, zero


def _summed(codes: Array, zero: Array | None, product: Any, weight_sums: Any, dims: Dims, w_ndim: int) -> Array:
    """The product of `codes - zero` with the weight's integers, as floats."""
    return _exact(codes, None if zero is None else _along_weight(zero, dims, w_ndim), product, weight_sums)


def _exact(codes: Array, zero: Array | None, product: Any, weight_sums: Any) -> Array:
    """`product(codes) - zero * weight_sums()`, in float32, from exact sums of products of int8.

    Args:
      codes: int8 or int16.
      zero: the inputs' zero point, along the output.
      product: of int8 codes with the weight's, int32.
      weight_sums: the product of ones.
    """
    zero = None if zero is None else zero.astype(jnp.int32)
    if codes.dtype == jnp.int8:
        sums = product(codes) if zero is None else product(codes) - zero * weight_sums()
        return sums.astype(jnp.float32)
    # 16 bits are two times 8, the lower ones moved to where they are signed; the zero point likewise, or its product
    # with the weights' sum would leave int32
    high, low = (codes >> 8).astype(jnp.int8), ((codes & 255) - 128).astype(jnp.int8)
    of_ones = weight_sums()
    if zero is None:
        upper, lower = product(high), product(low) + 128 * of_ones
    else:
        upper, lower = product(high) - (zero >> 8) * of_ones, product(low) + (128 - (zero & 255)) * of_ones
    return upper.astype(jnp.float32) * 256 + lower.astype(jnp.float32)


def _weight_sums(codes: Array, dims: Dims, x_ndim: int) -> Array:
    """The sum of the codes over the contracted axes, int32, along the output's axes."""
    sums = jnp.sum(codes, axis=dims.w_contract, keepdims=True, dtype=jnp.int32)
    return along_output(sums, dims.w_contract, dims.w_batch, before=len(dims.x_free(x_ndim)), after=0)


def _centred(w: Quantized, dtype: Any) -> list[Array]:
    return [column.centred(dtype) for column in w.columns()]


def _scaled(w: Quantized, dtype: Any) -> list[Array]:
    return [column.centred(dtype) * column.steps.astype(dtype) for column in w.columns()]


def _dot_floats(x: Array, w: Quantized, dims: Dims, params: dict[str, Any], codes: Any = None) -> Array:
    """The unscaled product of `x` with the centred codes, or with `codes(dtype)`, in floats."""
    codes = w.centred if codes is None else codes
    kwargs = {"precision": params["precision"], "out_sharding": params.get("out_sharding")}
    return lax.dot_general(x, codes(x.dtype), dims.numbers, preferred_element_type=compute_dtype(x), **kwargs)


def _dot_scaled(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    number = compute_dtype(x)  # the product of a code and a scale is rounded once
    return _dot_floats(x, w, dims, params, lambda dtype: (w.centred(number) * w.spread(w.steps)).astype(dtype))


def _dot_integers(x_codes: Array, w_codes: Array, dims: Dims, params: dict[str, Any]) -> Array:
    kwargs = {"precision": params["precision"], "out_sharding": params.get("out_sharding")}
    return lax.dot_general(x_codes, w_codes, dims.numbers, preferred_element_type=jnp.int32, **kwargs)


def _along_weight(per_row: Array, dims: Dims, w_ndim: int) -> Array:
    """The inputs' steps or zero points, laid along the output."""
    return along_output(per_row, dims.x_contract, dims.x_batch, before=0, after=len(dims.w_free(w_ndim)))


def _rounded_input(x: Array, w: Quantized, dims: Dims) -> Array:
    """The input on the grid that the weight asks for, as floats; straight through but for what is clipped."""
    if w.activation_bits is None:
        return x
    return _on_grid(x, *_input_codes(x, w, dims), w.activation_bits, w.input_scale is not None)


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


def _dot_groups(x: Array, w: Quantized, dims: Dims, params: dict[str, Any], zero: Array | None = None) -> Array:
    """Groups along a contracted axis become a batch axis; their scaled products are summed. `x` may be integers."""
    assert w.group is not None
    w_axis, size = w.group[0] + w.ndim, w.group[1]
    x_axis = dims.x_contract[dims.w_contract.index(w_axis)]
    groups = w.scale.shape[w_axis]
    grouped = Dims(
        x_contract=tuple(_after_split(axis, x_axis, 1) for axis in dims.x_contract),
        w_contract=tuple(_after_split(axis, w_axis, 1) for axis in dims.w_contract),
        x_batch=(*(_after_split(axis, x_axis, 0) for axis in dims.x_batch), x_axis),
        w_batch=(*(_after_split(axis, w_axis, 0) for axis in dims.w_batch), w_axis),
    )
    scale = jnp.expand_dims(w.steps, w_axis + 1)
    laid = along_output(scale, grouped.w_contract, grouped.w_batch, before=len(dims.x_free(x.ndim)), after=0)
    x = _split(x, x_axis, groups, size)

    def of_weight(dtype: Any) -> Array:
        return _split(w.centred(dtype), w_axis, groups, size)

    if is_float(x):
        product = _dot_floats(x, w, grouped, params, of_weight)
    else:
        codes = of_weight(jnp.int8)
        zero = None if zero is None else jnp.expand_dims(zero, x_axis)
        product = _summed(
            x,
            zero,
            lambda x: _dot_integers(x, codes, grouped, params),
            lambda: _weight_sums(codes, grouped, x.ndim),
            grouped,
            codes.ndim,
        )
    return jnp.sum(product * laid, axis=len(dims.w_batch))


def _split(x: Array, axis: int, groups: int, size: int) -> Array:
    """Turns `axis` into (groups, size), padding with zeros."""
    padding = [(0, groups * size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding).reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])


def _after_split(axis: int, split: int, inner: int) -> int:
    return axis + 1 if axis > split else axis + (inner if axis == split else 0)


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
        return Otherwise(_rounded_input(x, w, dims))
    out_dtype = params["preferred_element_type"] or x.dtype
    scale = _along(w.steps.reshape(-1), x.ndim, numbers.out_spec[1])

    def floats(x: Array, w: Quantized) -> Array:
        x = _rounded_input(x, w, dims)
        as_floats = params | {"preferred_element_type": compute_dtype(x)}

        def convolve(w: Quantized) -> Array:
            return lax.conv_general_dilated_p.bind(x, w.centred(x.dtype), **as_floats)

        if params["feature_group_count"] == 1:
            return tiled_outputs(convolve, w, out_axis, numbers.out_spec[1])
        return convolve(w)

    integers = functools.partial(_conv_codes, dims=dims, params=params)
    product = derived_from(floats, integers, x, w) if w.as_integers else floats(x, w)
    return (product * scale).astype(out_dtype)


def _conv_codes(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    """The convolution of integers, scaled by the inputs' steps."""
    numbers, (codes, step, zero) = params["dimension_numbers"], _input_codes(x, w, dims)
    params = params | {"preferred_element_type": jnp.dtype("int32")}
    w_codes = w.codes()

    def integers(codes: Array) -> Array:
        return lax.conv_general_dilated_p.bind(codes, w_codes, **params)

    def weight_sums() -> Array:  # where the kernel is over the padding, only what is inside counts
        one = [1 if axis == numbers.lhs_spec[0] else size for axis, size in enumerate(x.shape)]
        return integers(jnp.ones(one, jnp.int8))

    zero = None if zero is None else zero.reshape([1] * x.ndim)
    sums = _exact(codes, zero, integers, weight_sums)
    return sums * _along(step.reshape(-1), x.ndim, numbers.out_spec[0])


def _along(vector: Array, ndim: int, axis: int) -> Array:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])
