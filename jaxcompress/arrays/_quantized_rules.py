"""What `Quantized` weights do without becoming dense: multiply.

A product with a weight `scale * codes` is taken apart where the scale allows it:

* the scale is constant along the contracted axes (per tensor, per output channel): multiply with the integers, then
  scale the output;
* it varies along the contracted axes only (a tied embedding read backwards): scale the input, then multiply;
* it varies along both (groups): one product a group, scaled, and summed;
* else (groups along the outputs): a large weight is decoded and scaled tile by tile, a small one as a whole.

Where the weight asks for it, inputs become integers too: `x = step (codes - zero)`. Then the products of integers are
added up exactly, in int32; `zero` times the sum of a weight's codes is taken off (and a weight's own zero point times
the sum of the inputs' codes), and the rest is scaled. Derivatives pass straight through the rounding, as in training:
they are those of the product with floats.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxcompress.arrays._digits import (
    as_rows,
    by_digits,
    groups_by_codes,
    groups_by_digits,
    integer_codes,
    is_laid_for_integers,
    suits,
)
from jaxcompress.arrays._gpu import LEAST, row_twice
from jaxcompress.arrays._integers import Products, beats_bytes, exact, multiply_integers, one_by_one
from jaxcompress.arrays._lanes import LARGE
from jaxcompress.arrays._leaf import Otherwise
from jaxcompress.arrays._products import (
    Dims,
    along_contracted,
    along_output,
    by_columns,
    compute_dtype,
    derived_from,
    explicit_sharding,
    fitting,
    is_float,
    register_product,
    split_axis,
)
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._quantized_gpu import groups_at_once, is_plain, on_gpu, zero_points
from jaxcompress.arrays._quantized_inputs import input_codes, rounded_input
from jaxcompress.arrays._tiles import WORTH, is_tiled, part_by_part, tiled


def _left_to_dense(x: Array, w: Quantized, dims: Dims) -> Any:
    """What a rule returns that leaves a product to the dense weight: the input is rounded all the same."""
    if w.activation_bits is None or not is_float(x):
        return NotImplemented
    return Otherwise(rounded_input(x, w, dims))


@register_product(Quantized, _left_to_dense)
def _dot(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Any:
    """The product with the input on the left, where the scale can be taken out of it."""
    if not is_float(x):
        return NotImplemented
    if not all(isinstance(size, int) for size in w.shape):  # a cache under jax.export: the ways are chosen by sizes
        return _left_to_dense(x, w, dims)
    varies = [axis for axis in dims.w_contract if w.scale.shape[axis] > 1]
    in_groups = w.group and varies == [w.group[0] + w.ndim] and params.get("out_sharding") is None
    if not varies:
        way = _dot_scaled_outputs
    elif all(w.scale.shape[axis] == 1 for axis in dims.w_free(w.ndim)) and not (in_groups and w.as_integers):
        way = _dot_scaled_inputs
    elif in_groups:
        way = _dot_scaled_groups
    elif is_tiled(x, w, dims) and params.get("out_sharding") is None:
        return _dot_scaled_tiles(x, w, dims, params).astype(params["preferred_element_type"] or x.dtype)
    else:
        return _left_to_dense(x, w, dims)
    product = functools.partial(way, dims=dims, params=params)
    if w.size < LEAST or is_plain(w) or params.get("out_sharding") is not None:
        out = product(x, w)
    else:
        there = functools.partial(on_gpu, product, dims=dims)
        out = lax.platform_dependent(x, w, cuda=there, default=product)
    return out.astype(params["preferred_element_type"] or x.dtype)


def _dot_scaled_inputs(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    per_input, sharding = along_contracted(w.spread(w.steps), dims, x.ndim), explicit_sharding(x)
    if sharding is not None:  # a scaled input that is divided as the weight is would leave the product's sharding open
        per_input = jax.sharding.reshard(per_input, sharding.update(spec=fitting(sharding, per_input.shape)))
    return _dot_tiles(x, w, dims, params, per_input)


def _dot_scaled_outputs(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    as_integers = w.sums_as_integers(dims.depth(w.shape))

    def after() -> Array:
        spread = w.spread(w.steps)
        scale = along_output(spread, dims.w_contract, dims.w_batch, before=len(dims.x_free(x.ndim)), after=0)
        floats = functools.partial(_dot_tiles, dims=dims, params=params)
        if not as_integers:
            return floats(x, w) * scale
        return derived_from(floats, functools.partial(_dot_codes, dims=dims, params=params), x, w) * scale

    def before() -> Array:
        return _dot_columns_scaled(rounded_input(x, w, dims), w, dims, params)

    exact = as_integers or x.dtype != jnp.float32  # few digits hold integers, but not integers times a scale
    if exact or is_tiled(x, w, dims) or suits(x, w, dims) or jax.device_count() > 1:
        return after()
    # XLA:CPU writes a small weight out in any case, and does so faster if it scales it too
    return lax.platform_dependent(cpu=before, default=after)


def _dot_scaled_groups(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    def floats(x: Array, w: Quantized) -> Array:
        def decoded(x: Array, w: Quantized) -> Array:
            on_cpu = functools.partial(_dot_columns_scaled, dims=dims, params=params)
            wide, decode = x.astype(compute_dtype(x)), _decode(w, _scaled, dims.rows(x))
            return tiled(on_cpu, wide, w, dims, whole=lambda: _dot_groups_whole(x, w, dims, params), decode=decode)

        x = rounded_input(x, w, dims)
        product = functools.partial(groups_by_digits, decoded, x, dims=dims)
        apart = w.zero_point is not None and (w.bits == 8 or dims.rows(x) == 1)
        if not apart or w.size < WORTH or jax.device_count() > 1:
            return product(w=w)
        # one row of lanes has less to decode so, and codes of 8 bits without them are such as digits can meet
        without = dataclasses.replace(w, zero_point=None)
        return lax.platform_dependent(
            cpu=lambda: product(w=without) - zero_points(x, w, dims), default=lambda: product(w=w)
        )

    def integers(x: Array, w: Quantized) -> Array:
        codes, step, zero = input_codes(x, w, dims)  # of whole rows, whatever the groups and tiles

        def grouped(codes: Array, w: Quantized) -> Array:
            return by_columns(functools.partial(_dot_groups, dims=dims, params=params, zero=zero), codes, w, dims)

        def product(codes: Array) -> Array:
            def whole() -> Array:
                if w.group is None or jax.device_count() > 1 or groups_at_once(codes, w, dims):
                    return grouped(codes, w)
                # of many rows the groups' products take more memory than all else
                return part_by_part(grouped, codes, w, dims, w.group[0] + w.ndim, w.group[1])

            def tiles() -> Array:
                return tiled(grouped, codes, w, dims, whole=whole)

            return groups_by_codes(tiles, codes, zero, w, dims)

        return row_twice(product, codes, dims) * _along_weight(step, dims, w.ndim)

    assert w.group is not None
    axis, size = w.group
    in_a_group = dims.depth([*w.shape[:axis], size, *w.shape[axis + w.ndim + 1 :]])
    return derived_from(floats, integers, x, w) if w.sums_as_integers(in_a_group) else floats(x, w)


def _dot_groups_whole(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    """Of groups at once: a batch axis on a GPU while their products are fewer than the weights; else the weight scaled.

    Where it is no CPU XLA decodes a scaled weight inside the product, and rounds it as the input is.
    """

    def scaled(x: Array) -> Array:
        return _dot_columns_scaled(x, w, dims, params)

    def grouped(x: Array) -> Array:
        return by_columns(functools.partial(_dot_groups, dims=dims, params=params), x, w, dims)

    few = w.levels is None and groups_at_once(x, w, dims)
    return lax.platform_dependent(
        x, cpu=lambda x: scaled(x.astype(compute_dtype(x))), cuda=grouped if few else scaled, default=scaled
    )


def _dot_columns_scaled(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    return by_columns(functools.partial(_dot_scaled, dims=dims, params=params), x, w, dims)


def _dot_scaled_tiles(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    """Where no scale can be taken out (groups along the outputs, as of a table read backwards): scaled, by tiles."""
    x, scaled = rounded_input(x, w, dims), functools.partial(_dot_columns_scaled, dims=dims, params=params)
    decode = _decode(w, _scaled, dims.rows(x))
    return tiled(scaled, x.astype(compute_dtype(x)), w, dims, whole=lambda: scaled(x, w), decode=decode)


def _dot_tiles(x: Array, w: Quantized, dims: Dims, params: dict[str, Any], per_input: Array | None = None) -> Array:
    """The unscaled product of floats, decoded tile by tile where that is faster; inputs may be scaled first."""
    x = rounded_input(x, w, dims)
    x = x if per_input is None else x * per_input
    decode = _decode(w, _centred, dims.rows(x))
    product = functools.partial(_dot_floats, dims=dims, params=params)

    def floats(x: Array, w: Quantized) -> Array:
        return tiled(lambda x, w: by_columns(product, x, w, dims), x, w, dims, decode=decode)

    return by_digits(floats, x, w, dims) if suits(x, w, dims) else floats(x, w)


def _dot_codes(x: Array, w: Quantized, dims: Dims, params: dict[str, Any]) -> Array:
    """The product of integers, scaled by the inputs' steps."""
    middles = None if w.zero_point is None else w.spread(w.zero_point)
    centred, w = functools.partial(w.centred, jnp.int16), dataclasses.replace(w, zero_point=None)

    def integers(codes: Array, dims: Dims = dims) -> Array:
        some = functools.partial(anywhere, dims=dims)
        sums = some(codes) if w.bits == 8 else row_twice(some, codes, dims)
        if middles is None:
            return sums
        return sums - _middle(middles, dims, codes.ndim) * _row_sums(codes, dims, w.ndim)

    def anywhere(codes: Array, dims: Dims) -> Array:
        product = functools.partial(_dot_floats, dims=dims, params=params)

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

    def together(parts: list[Array], also: bool) -> tuple[list[Array], Any]:
        """As rows of one product, which reads the weight once; XLA:CPU would widen it whole to add it up."""
        rows, outer = [as_rows(part, dims) for part in parts], [x.shape[axis] for axis in dims.x_free(x.ndim)]
        ones = jnp.ones((int(also), rows[0].shape[1]), jnp.int8)
        out = integers(jnp.concatenate([*rows, ones]), Dims((1,), dims.w_contract, (), ()))
        sums, of_ones = jnp.split(out[: len(parts) * len(rows[0])], len(parts)), out[len(parts) * len(rows[0]) :]
        outputs = out.shape[1:]
        return [part.reshape(*outer, *outputs) for part in sums], of_ones.reshape(*[1] * len(outer), *outputs)

    codes, step, zero = input_codes(x, w, dims)
    of_codes = functools.partial(_exact, codes, zero, dims=dims, w_ndim=w.ndim)
    apart = one_by_one(integers, lambda: _weight_sums(centred(), dims, x.ndim))
    several = codes.dtype != jnp.int8 or zero is not None
    plain = len(dims.w_contract) == 1 and not dims.w_batch and params.get("out_sharding") is None
    if several and plain and jax.device_count() == 1 and isinstance(dims.rows(x), int):  # it may be a symbol
        sums = lax.platform_dependent(cpu=lambda: of_codes(together), default=lambda: of_codes(apart))
    else:
        sums = of_codes(apart)
    return sums * _along_weight(step, dims, w.ndim)


def _exact(codes: Array, zero: Array | None, products: Products, dims: Dims, w_ndim: int) -> Array:
    """The product of `codes - zero` with the weight's integers, as floats."""
    return exact(codes, None if zero is None else _along_weight(zero, dims, w_ndim), products)


def _middle(zero_point: Array, dims: Dims, x_ndim: int) -> Array:
    """A weight's zero points, int32, along the output's axes."""
    numbers = zero_point.astype(jnp.int32)
    return along_output(numbers, dims.w_contract, dims.w_batch, before=len(dims.x_free(x_ndim)), after=0)


def _row_sums(codes: Array, dims: Dims, w_ndim: int) -> Array:
    """The sum of the inputs' codes over the contracted axes, int32, along the output's axes."""
    return _along_weight(jnp.sum(codes, axis=dims.x_contract, keepdims=True, dtype=jnp.int32), dims, w_ndim)


def _weight_sums(codes: Array, dims: Dims, x_ndim: int) -> Array:
    """The sum of the codes over the contracted axes, int32, along the output's axes."""
    sums = jnp.sum(codes, axis=dims.w_contract, keepdims=True, dtype=jnp.int32)
    return along_output(sums, dims.w_contract, dims.w_batch, before=len(dims.x_free(x_ndim)), after=0)


def _decode(w: Quantized, decoded: Any, rows: int) -> Any:
    """`decoded`, for a product by lanes, which decodes for each row anew: tables and 8-bit floats take long."""
    quick = w.scale.dtype == jnp.float32 and (w.of_integers or w.values.dtype.itemsize > 1)
    return decoded if quick or rows == 1 else None


def _centred(w: Quantized, dtype: Any) -> list[Array]:
    return [column.centred(dtype) for column in w.columns()]


def _scaled(w: Quantized, dtype: Any) -> list[Array]:
    return [column.centred(dtype) * column.spread(column.steps).astype(dtype) for column in w.columns()]


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


def _dot_groups(x: Array, w: Quantized, dims: Dims, params: dict[str, Any], zero: Array | None = None) -> Array:
    """Groups along a contracted axis become a batch axis; their scaled products are summed. `x` may be integers."""
    assert w.group is not None
    w_axis, size = w.group[0] + w.ndim, w.group[1]
    x_axis = dims.x_contract[dims.w_contract.index(w_axis)]
    groups = w.scale.shape[w_axis]
    grouped = Dims(
        x_contract=tuple(_aftersplit_axis(axis, x_axis, 1) for axis in dims.x_contract),
        w_contract=tuple(_aftersplit_axis(axis, w_axis, 1) for axis in dims.w_contract),
        x_batch=(*(_aftersplit_axis(axis, x_axis, 0) for axis in dims.x_batch), x_axis),
        w_batch=(*(_aftersplit_axis(axis, w_axis, 0) for axis in dims.w_batch), w_axis),
    )
    scale = jnp.expand_dims(w.steps, w_axis + 1)
    laid = along_output(scale, grouped.w_contract, grouped.w_batch, before=len(dims.x_free(x.ndim)), after=0)
    x = split_axis(x, x_axis, groups, size)

    def of_weight(dtype: Any) -> Array:
        return split_axis(w.centred(dtype), w_axis, groups, size)

    if is_float(x):
        product = _dot_floats(x, w, grouped, params, of_weight)
    else:
        codes = split_axis(w.codes(), w_axis, groups, size)
        middle = None if w.zero_point is None else _middle(jnp.expand_dims(w.zero_point, w_axis + 1), grouped, x.ndim)
        zero = None if zero is None else jnp.expand_dims(zero, x_axis)

        def integers(x: Array) -> Array:
            sums = _dot_integers(x, codes, grouped, params)
            return sums if middle is None else sums - middle * _row_sums(x, grouped, codes.ndim)

        products = one_by_one(integers, lambda: _weight_sums(of_weight(jnp.int16), grouped, x.ndim))
        product = _exact(x, zero, products, grouped, codes.ndim)
    return jnp.sum(product * laid, axis=len(dims.w_batch))


def _aftersplit_axis(axis: int, split: int, inner: int) -> int:
    return axis + 1 if axis > split else axis + (inner if axis == split else 0)
