"""What `Sparse` weights do without becoming dense: multiply and convolve tile by tile, look up rows, change shape.

A tile is a few columns (places along the stored last axis). A product that keeps the columns makes a piece of its
output from each; one that contracts them adds the pieces up.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._bits import pack_bits, unpack_bits
from jaxcompress.arrays._leaf import register
from jaxcompress.arrays._moved import put_off_transposes
from jaxcompress.arrays._products import Dims, block_map, constrain_like, filled, is_float, register_product
from jaxcompress.arrays._sparse import Sparse, is_divided, scan_tiles
from jaxcompress.arrays._stacks import take_parts

TILE = 1 << 18
"""How many elements a tile decodes at once; a weight that is no larger is one tile."""


def _columns(w: Sparse) -> int:
    rows = math.prod(w.mask.shape[:-1])
    return max(8, min(TILE // max(rows, 1), 8 * w.mask.shape[-1]) // 8 * 8)


@register_product(Sparse)
def _dot(x: Array, w: Sparse, dims: Dims, params: dict[str, Any]) -> Any:
    """The product with the input on the left."""
    last = w.ndim - 1
    if not is_float(x) or params.get("out_sharding") is not None or last in dims.w_batch or is_divided(w.mask, last):
        return NotImplemented
    out_dtype = params["preferred_element_type"] or x.dtype
    columns, wide = _columns(w), jnp.promote_types(out_dtype, jnp.float32)

    def multiply(x: Array, tile: Array, dtype: Any) -> Array:
        return lax.dot_general(
            x, tile.astype(x.dtype), dims.numbers, precision=params["precision"], preferred_element_type=dtype
        )

    if last in dims.w_contract:
        x_axis = dims.x_contract[dims.w_contract.index(last)]
        n_tiles = -(-w.length // columns)
        padded = jnp.pad(x, [(0, n_tiles * columns - w.length if axis == x_axis else 0) for axis in range(x.ndim)])
        xs = jnp.moveaxis(padded.reshape(*x.shape[:x_axis], n_tiles, columns, *x.shape[x_axis + 1 :]), x_axis, 0)
        start = jax.eval_shape(lambda x: multiply(x, w.materialise(), wide), x)
        divided = start.sharding is not None and any(start.sharding.spec)  # over explicit axes of a mesh
        total, _ = scan_tiles(
            w,
            columns,
            lambda total, tile: (total + multiply(tile[1], tile[0], wide), None),
            jnp.zeros(start.shape, wide, device=start.sharding if divided else None),
            xs,
        )
        return total.astype(out_dtype)
    _, pieces = scan_tiles(w, columns, lambda carry, tile: (carry, multiply(x, tile[0], out_dtype)), ())
    return _join(pieces, pieces.ndim - 2, w.length)  # the last axis is the last free one


def _join(pieces: Array, axis: int, length: int) -> Array:
    """Pieces stacked along axis 0, laid side by side along `axis` of each, and cut to `length`."""
    laid = jnp.moveaxis(pieces, 0, axis)
    return lax.slice_in_dim(lax.collapse(laid, axis, axis + 2), 0, length, axis=axis)


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: Sparse, **params: Any) -> Any:
    x, numbers = jnp.asarray(x), params["dimension_numbers"]
    plain = params["feature_group_count"] == 1 and params["batch_group_count"] == 1
    columns = _columns(w)
    if not is_float(x) or w.values.ndim > 1:
        return NotImplemented
    if not (plain and numbers.rhs_spec[0] == w.ndim - 1):  # groups couple the output channels: only as one tile
        if columns < w.length:
            return NotImplemented
        return lax.conv_general_dilated_p.bind(x, w.materialise().astype(x.dtype), **params)

    def body(carry: tuple[()], tile: Any) -> Any:
        return carry, lax.conv_general_dilated_p.bind(x, tile[0].astype(x.dtype), **params)

    _, pieces = scan_tiles(w, columns, body, ())
    return _join(pieces, numbers.out_spec[1], w.length)


@register(lax.gather_p)
def _gather(w: Sparse, indices: ArrayLike, **params: Any) -> Any:
    """A lookup of whole rows decodes those rows only."""
    numbers, sizes, last = params["dimension_numbers"], params["slice_sizes"], w.ndim - 1
    looked_up = (*numbers.start_index_map, *numbers.operand_batching_dims)
    whole_rows = last not in looked_up and sizes[last] == w.length
    if not whole_rows:
        return NotImplemented
    bits = lax.gather_p.bind(
        w.mask, indices, **params | {"slice_sizes": (*sizes[:-1], w.mask.shape[-1]), "fill_value": 0}
    )
    starts = lax.gather_p.bind(
        w.row_starts()[..., None], indices, **params | {"slice_sizes": (*sizes[:-1], 1), "fill_value": 0}
    )
    axis = numbers.offset_dims[-1]
    rows, _ = w.decode(unpack_bits(jnp.moveaxis(bits, axis, -1), w.length), jnp.moveaxis(starts, axis, -1)[..., 0])
    return filled(jnp.moveaxis(rows, -1, axis), w.shape, indices, params)


put_off_transposes(Sparse)


@register(lax.reshape_p)
def _reshape(w: Sparse, **params: Any) -> Any:
    return NotImplemented if params.get("dimensions") is not None else _reshaped(w, tuple(params["new_sizes"]))


take_parts(Sparse)


def _reshaped(w: Sparse, shape: tuple[int, ...]) -> Any:
    """Row-major order stays, so the values do; only the bits are packed anew where the last axis changes."""
    blocks = block_map(w.shape, shape)
    if w.values.ndim > 1 or not shape or blocks is None:
        return NotImplemented
    if shape[-1] == w.length:
        return dataclasses.replace(w, mask=w.mask.reshape(*shape[:-1], w.mask.shape[-1]))
    return dataclasses.replace(w, mask=pack_bits(unpack_bits(w.mask, w.length).reshape(shape)), length=shape[-1])


@register(lax.convert_element_type_p)
def _convert(w: Sparse, **params: Any) -> Any:
    if not jax.dtypes.issubdtype(params["new_dtype"], jnp.floating):
        return NotImplemented
    return dataclasses.replace(w, values=w.values.astype(params["new_dtype"]))


@register(primitives.sharding_constraint_p)
def _sharding_constraint(w: Sparse, **params: Any) -> Any:
    return dataclasses.replace(w, mask=constrain_like(w.mask, params))
