"""What `LowRank` weights do without becoming dense: two thin products or convolutions, lookups, changes of shape."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._compressed import compressed
from jaxcompress.arrays._leaf import is_leaf, register
from jaxcompress.arrays._low_rank import LowRank, Side
from jaxcompress.arrays._products import Dims, block_map, is_float, mesh_axes, register_product
from jaxcompress.arrays._stacks import take_parts

_HIGHEST = lax.Precision.HIGHEST


def _run(w: LowRank, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn` of arrays and factors, of which some may be compressed leaves."""
    return (compressed(fn, strict=w.strict) if any(map(is_leaf, args)) else fn)(*args)


@register_product(LowRank)
def _dot(x: Array, w: LowRank, dims: Dims, params: dict[str, Any]) -> Any:
    """Two thin products where the input meets all rows, or all columns, and nothing else of the weight."""
    stack = range(w.stacked)
    met = {*dims.w_contract, *dims.w_batch}
    first, second = sorted(w.sides, key=lambda side: {*stack, *side.axes} != met)
    if {*stack, *first.axes} != met or not is_float(x) or params.get("out_sharding") is not None:
        return NotImplemented
    precision, n_batch, n_free = params["precision"], len(dims.w_batch), len(dims.x_free(x.ndim))
    last = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=params["preferred_element_type"]
    )
    if n_batch == w.stacked and _cheaper_whole(w, math.prod(x.shape[axis] for axis in dims.x_free(x.ndim))):
        return last(x, w.materialise(), dims.numbers)
    places = [tuple(first.place[axis] for axis in axes) for axes in (dims.w_contract, dims.w_batch)]
    stacked = [i for i, axis in enumerate(dims.w_batch) if axis in stack]  # of the thin product's axes

    def products(x: Array, one: Array, other: Array) -> Array:
        thin = lax.dot_general(x, one, ((dims.x_contract, places[0]), (dims.x_batch, places[1])), precision=precision)
        batch = stacked, [dims.w_batch[i] for i in stacked]
        return last(thin.astype(x.dtype), other, (((thin.ndim - 1,), (second.rank,)), batch))

    out = _run(w, products, x, first.factor, second.factor)
    before = n_batch + n_free
    went = [*stacked, *(axis for axis in range(before) if axis not in stacked)]  # where the thin product's axes are
    columns = (before + second.axes.index(axis) for axis in sorted(second.axes))
    return jnp.transpose(out, [*(went.index(axis) for axis in range(before)), *columns])


def _cheaper_whole(w: LowRank, rows: Any) -> bool:
    """Whether so many rows of input pay for multiplying the factors first, as they may where the rank saves nothing."""
    size = math.prod(w.shape[w.stacked :])
    more = w.rank * sum(math.prod(w.shape[axis] for axis in side.axes) for side in w.sides) - size
    return more > 0 and isinstance(rows, int) and rows * more > size * w.rank  # no int: the rows of an exported program


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: LowRank, **params: Any) -> Any:
    """Two convolutions, to `rank` channels and from there on, each along the spatial axes of its factor.

    Rows of all axes but the output's are the channel decomposition of Zhang et al. 2016 (a convolution and a 1x1 one);
    rows (height, in) and columns (width, out) the separable one of Jaderberg et al. 2014.
    """
    (out_axis, in_axis, *_), numbers = params["dimension_numbers"].rhs_spec, params["dimension_numbers"]
    first, second = sorted(w.sides, key=lambda side: in_axis not in side.axes)
    plain = params["feature_group_count"] == 1 and params["batch_group_count"] == 1
    if not plain or w.stacked or out_axis in first.axes or not is_float(x):
        return NotImplemented

    def kernel(side: Side, factor: Array, rank_is: int) -> Any:
        """The factor in the weight's layout, its rank as input or output channels, 1 along the other's axes."""
        own = (*side.axes, rank_is)
        places = {**side.place, rank_is: side.rank}
        laid = lax.transpose(factor, [places[axis] for axis in sorted(own)])
        return lax.reshape(laid, [laid.shape[sorted(own).index(axis)] if axis in own else 1 for axis in range(w.ndim)])

    def along(side: Side) -> dict[str, Any]:
        """The parameters of a convolution that leaves the other factor's spatial axes alone."""
        alone = {"window_strides": 1, "padding": (0, 0), "lhs_dilation": 1, "rhs_dilation": 1}
        own = [axis in side.axes for axis in numbers.rhs_spec[2:]]
        return params | {
            name: tuple(value if mine else idle for value, mine in zip(params[name], own, strict=True))
            for name, idle in alone.items()
        }

    def convolutions(x: Array, one: Array, other: Array) -> Array:
        between = numbers._replace(out_spec=numbers.lhs_spec)  # what the second one reads
        given = along(first) | {"dimension_numbers": between}
        thin = lax.conv_general_dilated_p.bind(x, kernel(first, one, out_axis), **given)
        return lax.conv_general_dilated_p.bind(thin.astype(x.dtype), kernel(second, other, in_axis), **along(second))

    return _run(w, convolutions, jnp.asarray(x), first.factor, second.factor)


@register(lax.gather_p)
def _gather(w: LowRank, indices: ArrayLike, **params: Any) -> Any:
    """A lookup along leading axes (`Embed`) takes the rows it wants of one factor, and multiplies those."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    front, back = sorted(w.sides, key=lambda side: side.axes)
    looked_up = {*numbers.start_index_map, *numbers.operand_batching_dims, *numbers.collapsed_slice_dims}
    in_order = front.axes + back.axes == tuple(range(w.ndim))
    whole = all(sizes[axis] == w.shape[axis] for axis in back.axes)
    fill = params["fill_value"]
    stays = fill is None or fill == 0 or fill != fill  # in the product with the other factor: zero, and NaN
    if not (in_order and whole and looked_up <= set(front.axes) and stays):
        return NotImplemented
    kept, gained = numbers.offset_dims[: -len(back.axes)], numbers.offset_dims[-len(back.axes) :]
    of_rows = {
        "dimension_numbers": numbers._replace(offset_dims=(*kept, gained[0])),
        "slice_sizes": (*sizes[: len(front.axes)], w.rank),
    }

    def look_up(front_factor: Array, back_factor: Array) -> Array:
        table = lax.transpose(front_factor, [*(front.place[axis] for axis in front.axes), front.rank])
        rows = lax.gather_p.bind(table, indices, **params | of_rows)
        out = lax.dot_general(rows, back_factor, (((gained[0],), (back.rank,)), ((), ())), precision=_HIGHEST)
        return jnp.moveaxis(out, range(out.ndim - len(gained), out.ndim), gained)

    return _run(w, look_up, front.factor, back.factor)


@register(lax.transpose_p)
def _transpose(w: LowRank, *, permutation: tuple[int, ...]) -> Any:
    if tuple(permutation[: w.stacked]) != tuple(range(w.stacked)):
        return NotImplemented
    left, right = (
        tuple(tuple(permutation).index(axis + w.ndim) - w.ndim for axis in axes) for axes in (w.left_axes, w.right_axes)
    )
    return dataclasses.replace(w, left_axes=left, right_axes=right)


@register(lax.rev_p)
def _rev(w: LowRank, *, dimensions: tuple[int, ...]) -> LowRank:
    def turned(side: Side) -> Any:
        own = [side.place[axis] for axis in dimensions if axis in side.place]
        return _run(w, functools.partial(lax.rev, dimensions=own), side.factor) if own else side.factor

    left, right = map(turned, w.sides)
    return dataclasses.replace(w, left=left, right=right)


@register(lax.reshape_p)
def _reshape(w: LowRank, **params: Any) -> Any:
    return NotImplemented if params.get("dimensions") is not None else _reshaped(w, tuple(params["new_sizes"]))


take_parts(LowRank)


def _reshaped(w: LowRank, shape: tuple[int, ...]) -> Any:
    """The leaf in another shape, where stack, rows and columns keep to themselves."""
    blocks = block_map(w.shape, shape)
    if blocks is None:
        return NotImplemented
    owner = [0] * w.stacked + [1 + (axis in w.sides[1].axes) for axis in range(w.stacked, w.ndim)]
    new_axes: tuple[list[int], ...] = ([], [], [])  # of the stack, the rows and the columns
    at = owner[0]
    for old, new in blocks:
        owners = {owner[axis] for axis in old if w.shape[axis] > 1} or {owner[old[0]] if old else at}
        if len(owners) > 1:
            return NotImplemented
        (at,) = owners
        new_axes[at].extend(new)
    if not (new_axes[1] and new_axes[2]):
        return NotImplemented
    stack, rows, columns = ([shape[axis] for axis in axes] for axes in new_axes)

    def laid(side: Side, sizes: Sequence[int]) -> Any:
        order = [*range(w.stacked), *(side.place[axis] for axis in sorted(side.axes))]
        order.insert(side.rank, side.rank)

        def lay(factor: Array) -> Any:
            turned = factor if order == sorted(order) else lax.transpose(factor, order)
            return lax.reshape(turned, sizes)

        return _run(w, lay, side.factor)

    left, right = w.sides
    return dataclasses.replace(
        w,
        left=laid(left, [*stack, *rows, w.rank]),
        right=laid(right, [*stack, w.rank, *columns]),
        left_axes=tuple(axis - len(shape) for axis in new_axes[1]),
        right_axes=tuple(axis - len(shape) for axis in new_axes[2]),
    )


@register(lax.convert_element_type_p)
def _convert(w: LowRank, **params: Any) -> Any:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return NotImplemented
    convert = functools.partial(lax.convert_element_type, new_dtype=params["new_dtype"])
    return dataclasses.replace(w, left=_run(w, convert, w.left), right=_run(w, convert, w.right))


@register(primitives.sharding_constraint_p)
def _sharding_constraint(w: LowRank, **params: Any) -> LowRank:
    """Each factor as its axes of the weight are to be; the rank stays whole."""
    sharding = params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return w
    spec = (*sharding.spec, *[None] * (w.ndim - len(sharding.spec)))

    def constrained(side: Side) -> Any:
        entries: list[Any] = [None] * side.factor.ndim
        for axis, place in side.place.items():
            parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(spec[axis]))
            entries[place] = spec[axis] if w.shape[axis] % parts == 0 else None
        own = NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)
        return _run(w, functools.partial(lax.with_sharding_constraint, shardings=own), side.factor)

    left, right = map(constrained, w.sides)
    return dataclasses.replace(w, left=left, right=right)
