"""Index arithmetic of `dot_general` and `conv_general_dilated`, shared by the rules of every leaf."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._leaf import Leaf, Otherwise, register

Product = Callable[..., Any]

ON_THE_WAY = (
    lax.transpose_p,
    lax.reshape_p,
    lax.squeeze_p,
    lax.rev_p,
    lax.convert_element_type_p,
    primitives.sharding_constraint_p,
)
"""What a weight may meet before a product and still be that weight: another shape or dtype."""


class Dims(NamedTuple):
    """The dimension numbers of a product of an input `x` and a weight `w`, with the input on the left."""

    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    w_batch: tuple[int, ...]

    @classmethod
    def of(cls, dimension_numbers: Any, weight_first: bool = False) -> "Dims":
        """Read from `dot_general`'s parameter; `weight_first` where the weight is its left operand."""
        (left_contract, right_contract), (left_batch, right_batch) = dimension_numbers
        dims = left_contract, right_contract, left_batch, right_batch
        if weight_first:
            dims = right_contract, left_contract, right_batch, left_batch
        return cls(*(tuple(axes) for axes in dims))

    @property
    def numbers(self) -> Any:
        """As `dot_general` takes them, input on the left."""
        return (self.x_contract, self.w_contract), (self.x_batch, self.w_batch)

    def x_free(self, ndim: int) -> tuple[int, ...]:
        """The input's axes that stay."""
        return free_axes(ndim, self.x_contract, self.x_batch)

    def w_free(self, ndim: int) -> tuple[int, ...]:
        """The weight's axes that stay."""
        return free_axes(ndim, self.w_contract, self.w_batch)

    def depth(self, w_shape: Sequence[int]) -> int:
        """How many products a sum has."""
        return math.prod(w_shape[axis] for axis in self.w_contract)

    def outputs(self, w_shape: Sequence[int]) -> list[int]:
        """The weight's shape with 1 along what is contracted."""
        return [1 if axis in self.w_contract else size for axis, size in enumerate(w_shape)]

    def rows(self, x: Array) -> int:
        """How many rows of input meet the weight; under jax.export it may be a symbol."""
        return math.prod(x.shape[axis] for axis in self.x_free(x.ndim))


def register_product(
    leaf: type[Leaf], otherwise: Callable[[Array, Any, "Dims"], Any] | None = None
) -> Callable[[Product], Product]:
    """Registers `product(x, w, dims, params)`, the input on the left, as `leaf`'s `dot_general` rule in both orders.

    `params` are the primitive's. The result has the batch axes first, then the input's free axes, then the weight's.
    `NotImplemented` from the product leaves it to the dense value, `Otherwise(x)` too, with another input. Where this
    leaves it there itself, it asks `otherwise(x, w, dims)` which.
    """

    def decorate(product: Product) -> Product:
        def run(x: Array, w: Any, dims: Dims, params: dict[str, Any]) -> Any:
            if not is_float(x) or x.dtype.itemsize > 1:
                return product(x, w, dims, params)
            # JAX promotes an 8-bit float to nothing beside a scale: as float32, and what comes out is what it was
            wide = params | {"preferred_element_type": jnp.dtype(jnp.float32)}
            out = product(x.astype(jnp.float32), w, dims, wide)
            is_left = out is NotImplemented or isinstance(out, Otherwise)
            return out if is_left else out.astype(params["preferred_element_type"] or x.dtype)

        # rules are chosen by their annotations, of which one is a variable here: a type checker cannot follow
        @register(lax.dot_general_p)
        def _input_weight(x: ArrayLike, w: leaf, **params: Any) -> Any:  # type: ignore[valid-type]
            return run(_as_wide(x, w), w, Dims.of(params["dimension_numbers"]), params)

        @register(lax.dot_general_p)
        def _weight_input(w: leaf, x: ArrayLike, **params: Any) -> Any:  # type: ignore[valid-type]
            x, dims = _as_wide(x, w), Dims.of(params["dimension_numbers"], weight_first=True)
            if params.get("out_sharding") is not None:
                return NotImplemented if otherwise is None else otherwise(x, w, dims)
            out = run(x, w, dims, params)
            if out is NotImplemented or isinstance(out, Otherwise):
                return out
            return swap_free(out, len(dims.x_batch), len(dims.x_free(x.ndim)))

        return product

    return decorate


def _as_wide(x: ArrayLike, w: Leaf) -> Array:
    """An input of floats narrower than the weight's, in the weight's dtype, as `lax.dot_general` has it."""

    def width(dtype: Any) -> tuple[int, int]:
        return jnp.finfo(dtype).maxexp, jnp.finfo(dtype).nmant

    x = jnp.asarray(x)
    return x.astype(w.dtype) if is_float(x) and width(w.dtype) > width(x.dtype) else x


def derived_from(plain: Callable[[Array, Any], Array], fast: Callable[[Array, Any], Array], x: Array, w: Any) -> Array:
    """`fast(x, w)`, whose derivatives are those of `plain`, with the dtype of `plain`."""
    dtype = jax.eval_shape(plain, x, w).dtype
    multiply = jax.custom_jvp(lambda x, w: fast(x, w).astype(dtype))
    multiply.defjvp(lambda at, along: (multiply(*at), jax.jvp(plain, at, along)[1]))
    return multiply(x, w)


def free_axes(ndim: int, *taken: Sequence[int]) -> tuple[int, ...]:
    """The axes that are in none of `taken`."""
    return tuple(axis for axis in range(ndim) if not any(axis in axes for axes in taken))


def along_output(factor: Array, contract: Sequence[int], batch: Sequence[int], before: int, after: int) -> Array:
    """A factor on one operand of `dot_general`, laid along the output's axes.

    Args:
      factor: of the operand's rank, with size 1 along its contracted axes.
      contract: the operand's contracted axes.
      batch: the operand's batch axes.
      before: how many free axes of the other operand stand before this one's in the output.
      after: how many stand behind.
    """
    free = free_axes(factor.ndim, contract, batch)
    sizes = [factor.shape[axis] for axis in batch], [factor.shape[axis] for axis in free]
    moved = jnp.transpose(factor, (*batch, *free, *contract))
    return moved.reshape(*sizes[0], *[1] * before, *sizes[1], *[1] * after)


def along_contracted(factor: Array, dims: Dims, x_ndim: int) -> Array:
    """A factor on a weight that is 1 along its free axes, laid along the input's axes."""
    moved = jnp.transpose(factor, (*dims.w_batch, *dims.w_contract, *dims.w_free(factor.ndim)))
    order = (*dims.x_batch, *dims.x_contract)
    laid = moved.reshape([moved.shape[i] for i in range(len(order))] + [1] * (x_ndim - len(order)))
    return jnp.transpose(laid, [(*order, *free_axes(x_ndim, order)).index(axis) for axis in range(x_ndim)])


def swap_free(product: Array, n_batch: int, n_x_free: int) -> Array:
    """A product with the input's free axes first, turned to have the weight's first."""
    middle = n_batch + n_x_free
    return jnp.transpose(product, (*range(n_batch), *range(middle, product.ndim), *range(n_batch, middle)))


def split_axis(x: Array, axis: int, groups: int, size: int) -> Array:
    """Turns `axis` into (groups, size), padding with zeros."""
    padding = [(0, groups * size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding).reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])


def doubled(product: Callable[[Array], Array], x: Array, dims: Dims) -> Array:
    """`product(x)` of an input with a single row, computed twice: XLA runs a product of one row another way."""
    free = dims.x_free(x.ndim)
    last = len(dims.x_batch) + len(free)  # behind the input's free axes in the output
    if not free:
        return lax.index_in_dim(product(jnp.stack([x, x], axis=-1)), 0, axis=last, keepdims=False)
    return lax.slice_in_dim(product(jnp.concatenate([x, x], axis=free[-1])), 0, 1, axis=last - 1)


def by_columns(product: Callable[[Array, Any], Array], x: Array, w: Any, dims: Dims) -> Array:
    """`product(x, w)`, by the `w.columns()`: of packed codes the first of each byte, the second of each, ...

    To interleave the codes would cost more.
    """
    last = w.ndim - 1
    columns = [w] if last in dims.w_batch else w.columns()
    if len(columns) == 1:
        return product(x, w)
    if last in dims.w_contract:
        axis = dims.x_contract[dims.w_contract.index(last)]
        strided = [lax.slice_in_dim(x, i, None, len(columns), axis) for i in range(len(columns))]
        return functools.reduce(jnp.add, map(product, strided, columns))
    together = jnp.stack([product(x, column) for column in columns], axis=-1)
    return lax.collapse(together, together.ndim - 2)  # the weight's last axis is the output's


def compute_dtype(x: Array) -> Any:
    """What to accumulate in: at least float32, so that the scale multiplies an unrounded sum."""
    return jnp.promote_types(x.dtype, jnp.float32) if x.dtype.itemsize > 1 else jnp.dtype(jnp.float32)


def block_map(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The coarsest common blocks of two shapes: axes of `old` that turn into axes of `new`, in order.

    `(6, 4) -> (2, 3, 4)` is `[([0], [0, 1]), ([1], [2])]`. `None` where a shape has a zero.
    """
    if math.prod(old) == 0:
        return None
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i][: len(old) - i], [j][: len(new) - j]
        while math.prod(old[a] for a in left) != math.prod(new[a] for a in right):
            short_left = math.prod(old[a] for a in left) < math.prod(new[a] for a in right)
            (left if short_left else right).append((i + len(left)) if short_left else (j + len(right)))
        blocks.append((left, right))
        i, j = i + len(left), j + len(right)
    return blocks


def looked_up_axes(shape: Sequence[int], params: dict[str, Any]) -> tuple[int, ...]:
    """The axes of an array of this `shape` of which a gather with `params` takes parts: of the others it takes all."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    parts = [axis for axis in numbers.start_index_map if sizes[axis] < shape[axis]]
    return (*parts, *numbers.operand_batching_dims)


def filled(found: Array, shape: Sequence[int], indices: ArrayLike, params: dict[str, Any]) -> Array:
    """What a gather with `params` found in an array of this `shape`, and out of range what it is to give there."""
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return found
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    looked_up = (*numbers.start_index_map, *numbers.operand_batching_dims)
    there = jnp.ones([size if axis in looked_up else 1 for axis, size in enumerate(shape)], bool)
    one = tuple(size if axis in looked_up else 1 for axis, size in enumerate(sizes))
    inside = lax.gather_p.bind(there, indices, **params | {"slice_sizes": one, "fill_value": False})
    return jnp.where(inside, found, jnp.nan if params["fill_value"] is None else params["fill_value"])


def constrain_like(child: Array, params: dict[str, Any]) -> Array:
    """`sharding_constraint` of a leaf, on a child of its rank: axes that don't divide stay whole."""
    sharding = params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return child
    kept = fitting(sharding, child.shape)
    sharding = NamedSharding(sharding.mesh, kept, memory_kind=sharding.memory_kind)
    return primitives.sharding_constraint_p.bind(child, **params | {"sharding": sharding})


def fitting(sharding: NamedSharding, shape: Sequence[int]) -> PartitionSpec:
    """The sharding's spec for an array of another shape of the same rank: axes that don't divide stay whole."""
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    sizes = [math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry)) for entry in spec]
    return PartitionSpec(*[entry if size % n == 0 else None for entry, size, n in zip(spec, shape, sizes, strict=True)])


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return (
        ()
        if entry is None or entry is PartitionSpec.UNCONSTRAINED
        else (entry if isinstance(entry, tuple) else (entry,))
    )


def explicit_sharding(x: Array) -> NamedSharding | None:
    """How `x` is divided, if its mesh has explicit axes: then shapes and sums must say how their results are."""
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes else None


def like_part(shape: tuple[int, ...], dtype: Any, part: Any, axes: Sequence[int] | None = None) -> ShapedArray:
    """The type of a leaf, which along explicit axes of a mesh is divided as `part` is.

    `axes` are the part's that are the leaf's first ones, in its order; by default all.
    """
    sharding = explicit_sharding(part) if isinstance(part, jax.Array) else None
    if sharding is None:
        return ShapedArray(shape, jnp.dtype(dtype))
    entries = (*sharding.spec, *[None] * (len(part.shape) - len(sharding.spec)))
    own = [entries[axis] for axis in (range(len(part.shape)) if axes is None else axes)]
    divided = sharding.update(spec=PartitionSpec(*own))
    return ShapedArray(shape, jnp.dtype(dtype), sharding=divided.update(spec=fitting(divided, shape)))


def is_float(x: Any) -> bool:
    """Whether `x` is a real floating-point array, of which products with integers can be taken apart."""
    return jax.dtypes.issubdtype(jnp.asarray(x).dtype, jnp.floating)
