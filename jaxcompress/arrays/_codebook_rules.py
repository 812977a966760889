"""What `Codebook` weights do without becoming dense: multiply and convolve tile by tile, look up, and change shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._codebook import FUSED, IN_REGISTERS, Codebook, look_up
from jaxcompress.arrays._gpu import FEW, LEAST, by_sums, has_rows
from jaxcompress.arrays._leaf import register
from jaxcompress.arrays._moved import put_off_transposes
from jaxcompress.arrays._products import (
    Dims,
    by_columns,
    compute_dtype,
    constrain_like,
    derived_from,
    filled,
    is_float,
    looked_up_axes,
    register_product,
)
from jaxcompress.arrays._signs import by_signs, suits
from jaxcompress.arrays._stacks import take_parts
from jaxcompress.arrays._tiles import tiled, tiled_outputs

SELECTED_TWICE = 4  # centroids; to choose among more of them twice takes longer than to write down what is chosen


@register_product(Codebook)
def _dot(x: Array, w: Codebook, dims: Dims, params: dict[str, Any]) -> Any:
    if not is_float(x):
        return NotImplemented
    kwargs = {"precision": params["precision"], "out_sharding": params.get("out_sharding")}

    def product(x: Array, w: Codebook, decode: Callable[[Codebook], Array] = Codebook.materialise) -> Array:
        return lax.dot_general(x, decode(w), dims.numbers, preferred_element_type=compute_dtype(x), **kwargs)

    def by_selects(x: Array, w: Codebook) -> Array:
        return by_columns(functools.partial(product, decode=Codebook.chosen), x, w, dims)

    def whole(x: Array, w: Codebook, on_cpu: Callable[[Array, Codebook], Array]) -> Array:
        if kwargs["out_sharding"] is not None:
            return product(x, w)
        ways = {"cpu": on_cpu}
        if w.centroids.shape[-1] <= FUSED:
            ways["tpu"] = by_selects
        if w.size >= LEAST and has_rows(x, min(FEW * 4 // w.bits, 2 * FEW), dims):
            ways["cuda"] = functools.partial(by_sums, product, Codebook.found, dims=dims)
        return lax.platform_dependent(x, w, default=product, **ways)

    def tiles(x: Array, w: Codebook, on_cpu: Any, decode: Any = None) -> Array:
        return tiled(on_cpu, x, w, dims, whole=lambda: whole(x, w, on_cpu), decode=decode)

    def fast(x: Array, w: Codebook) -> Array:
        # lanes choose for each row anew
        by_lanes = w.centroids.shape[-1] <= SELECTED_TWICE or dims.rows(x) == 1
        selected = functools.partial(tiles, on_cpu=by_selects, decode=_columns_chosen if by_lanes else None)
        if not suits(x, w, dims) or kwargs["out_sharding"] is not None:
            return selected(x, w)
        return lax.platform_dependent(x, w, cpu=functools.partial(by_signs, dims=dims), default=selected)

    looked_up = functools.partial(tiles, on_cpu=product)
    # a gradient adds up what belongs to a centroid, and is slow as the transpose of selects
    few = w.centroids.shape[-1] <= IN_REGISTERS
    out = derived_from(looked_up, fast, x, w) if few else looked_up(x, w)
    return out.astype(params["preferred_element_type"] or x.dtype)


def _columns_chosen(w: Codebook, dtype: Any) -> list[Array]:
    return [column.chosen().astype(dtype) for column in w.columns()]


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: Codebook, **params: Any) -> Array:
    numbers = params["dimension_numbers"]
    if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return NotImplemented

    def convolve(w: Codebook) -> Array:
        def with_kernel(kernel: Array) -> Array:
            return lax.conv_general_dilated_p.bind(x, kernel, **params)

        if w.centroids.shape[-1] > FUSED:
            return with_kernel(w.materialise())
        return lax.platform_dependent(tpu=lambda: with_kernel(w.chosen()), default=lambda: with_kernel(w.materialise()))

    return tiled_outputs(convolve, w, numbers.rhs_spec[0], numbers.out_spec[1])


@register(lax.gather_p)
def _gather(w: Codebook, indices: ArrayLike, **params: Any) -> Any:
    """A lookup (`Embed`) takes the indices of the rows it wants, and the centroids of those that have their own."""
    looked_up = looked_up_axes(w.shape, params)
    sizes, blocks = params["slice_sizes"], w.centroids.shape[:-1]
    if any(blocks[axis] > 1 and sizes[axis] < w.shape[axis] for axis in range(w.ndim) if axis not in looked_up):
        return NotImplemented
    rows = lax.gather_p.bind(w.codes(), indices, **params | {"fill_value": 0})
    found = look_up(_looked_up(w, indices, looked_up, params), rows, w.keep_zeros)
    return filled(found, w.shape, indices, params)


def _looked_up(w: Codebook, indices: ArrayLike, looked_up: tuple[int, ...], params: dict[str, Any]) -> Array:
    """The centroids of what a gather takes parts of along the axes `looked_up`, laid out as it lays out those."""
    numbers, (*blocks, k) = params["dimension_numbers"], w.centroids.shape
    out_ndim = len(numbers.offset_dims) + jnp.ndim(indices) - 1
    if all(blocks[axis] == 1 for axis in looked_up):  # all parts share them
        kept = [
            axis
            for axis in range(w.ndim)
            if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        ]
        laid = dict(zip(numbers.offset_dims, (blocks[axis] for axis in kept), strict=True))
        return w.centroids.reshape(*(laid.get(axis, 1) for axis in range(out_ndim)), k)
    own = [w.shape[axis] if axis in looked_up else blocks[axis] for axis in range(w.ndim)]
    sizes = [params["slice_sizes"][axis] if axis in looked_up else blocks[axis] for axis in range(w.ndim)]
    with_all = numbers._replace(offset_dims=(*numbers.offset_dims, out_ndim))
    how = {"dimension_numbers": with_all, "slice_sizes": (*sizes, k), "fill_value": 0}
    return lax.gather_p.bind(jnp.broadcast_to(w.centroids, (*own, k)), indices, **params | how)


def _is_shared(w: Codebook) -> bool:
    return all(size == 1 for size in w.centroids.shape[:-1])


def _transposed(w: Codebook, permutation: tuple[int, ...]) -> Codebook:
    return _unpacked(w, jnp.transpose(w.codes(), permutation), jnp.transpose(w.centroids, (*permutation, w.ndim)))


put_off_transposes(Codebook, _transposed)


@register(lax.reshape_p)
def _reshape(w: Codebook, **params: Any) -> Any:
    return NotImplemented if params.get("dimensions") is not None else _reshaped(w, tuple(params["new_sizes"]))


take_parts(Codebook)


def _reshaped(w: Codebook, shape: tuple[int, ...]) -> Any:
    if not shape or not _is_shared(w):
        return NotImplemented
    return _unpacked(w, w.codes().reshape(shape), w.centroids.reshape([1] * len(shape) + [-1]))


def _unpacked(w: Codebook, indices: Array, centroids: Array) -> Codebook:
    """A temporary leaf on a byte an index."""
    return Codebook(indices, centroids, bits=8, length=indices.shape[-1], keep_zeros=w.keep_zeros, strict=w.strict)


@register(lax.convert_element_type_p)
def _convert(w: Codebook, **params: Any) -> Any:
    if not jax.dtypes.issubdtype(params["new_dtype"], jnp.floating):
        return NotImplemented
    return dataclasses.replace(w, centroids=w.centroids.astype(params["new_dtype"]))


@register(primitives.sharding_constraint_p)
def _sharding_constraint(w: Codebook, **params: Any) -> Codebook:
    return dataclasses.replace(w, indices=constrain_like(w.indices, params))
