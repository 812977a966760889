"""Products with a compressed weight in the forms that XLA makes one kernel of on a GPU.

Its kernels for products decode int8, int4 and small floats as they read them, and nothing else: a weight that meets a
table, a zero point, the scales of groups or shifts is first written out whole, which for few rows of input takes longer
than the product. So here bytes of two codes are seen as int4, and what few rows need of other decoding is written as
arithmetic, of which XLA makes one kernel that reads the codes as they are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, UInt8

from jaxcompress.arrays._products import Dims, compute_dtype, derived_from, doubled

W = TypeVar("W")

LEAST = 1 << 16  # smaller weights are not worth another way
FEW = 8  # rows for codes of 4 bits: each two read the codes anew, and a decoded weight is written and read once
PIECES = 32  # of a sum


def has_rows(x: Array, most: int, dims: Dims) -> bool:
    """Whether `x` is known to have at most `most` rows, and none of them is divided by an explicit mesh."""
    rows = dims.rows(x)  # under jax.export it may be a symbol
    return isinstance(rows, int) and 0 < rows <= most and not jax.typeof(x).sharding.mesh.explicit_axes


def row_twice(product: Callable[[Array], Array], x: Array, dims: Dims) -> Array:
    """`product(x)`, on a GPU of a single row given twice.

    Of one row XLA makes sums itself, writes out what it adds up and, where codes are int4 that meet integers, fails.
    """
    if not has_rows(x, 1, dims):
        return product(x)
    return lax.platform_dependent(x, cuda=functools.partial(doubled, product, dims=dims), default=product)


def by_sums(
    product: Callable[[Array, W], Array],
    decode: Callable[[W], Array],
    x: Array,
    w: W,
    dims: Dims,
    prepare: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """`product(x, w)` of few rows as arithmetic, which XLA fuses with the decoding: added up in at least float32.

    Derivatives are those of the product; where weights are stacked, and where vmap hands in many rows or weights, it is
    the product itself.

    Args:
      product: of an input and a weight with the dimension numbers `dims`.
      decode: to the weight's value, `[*w.shape]`.
      x: the input.
      w: the weight.
      dims: which axes meet.
      prepare: what becomes of the input before it meets the weight, in `product` too.
    """
    if dims.w_batch:
        return row_twice(lambda x: product(x, w), x, dims)
    structure = jax.tree.structure(w)

    @custom_vmap
    def fast(x: Array, *children: Array) -> Array:
        return _sums(decode, prepare(x), jax.tree.unflatten(structure, children), dims)

    @fast.def_vmap
    def _batched(size: int, batched: Sequence[bool], *args: Array) -> tuple[Array, bool]:
        def one(x: Array, *children: Array) -> Array:
            return product(x, jax.tree.unflatten(structure, children))

        return jax.vmap(one, [0 if has else None for has in batched])(*args), True

    return derived_from(product, lambda x, w: fast(x, *jax.tree.leaves(w)), x, w)


def _sums(decode: Callable[[W], Array], x: Array, w: W, dims: Dims) -> Array:
    number, shape = compute_dtype(x), jax.eval_shape(decode, w).shape
    outer, meets = dims.x_free(x.ndim), dict(zip(dims.w_contract, dims.x_contract, strict=True))
    laid = jnp.transpose(x, (*outer, *(meets[axis] for axis in sorted(meets)))).astype(number)
    rows = laid.reshape(-1, *(size if axis in meets else 1 for axis, size in enumerate(shape)))
    sums: list[Array] = []
    for i, row in enumerate(rows):
        if i % 2 == 0:  # each two decode for themselves: what all had in common would be written out
            w = lax.optimization_barrier(w) if i else w
            decoded = decode(w).astype(number)
        sums.append(_sum(row * decoded, dims.w_contract))
    return jnp.stack(sums).reshape(*(x.shape[axis] for axis in outer), *(shape[a] for a in dims.w_free(len(shape))))


def _sum(products: Array, over: Sequence[int]) -> Array:
    """The sum over some axes; where the last is not among them in two steps, or XLA may write the products out."""
    if not over or products.ndim - 1 in over:
        return jnp.sum(products, axis=over)
    along = max(over, key=lambda axis: products.shape[axis])
    pieces = max(size for size in range(1, PIECES + 1) if products.shape[along] % size == 0)
    split = products.reshape(*products.shape[:along], pieces, -1, *products.shape[along + 1 :])
    inner = tuple(axis + (axis >= along) for axis in over)
    parts = lax.optimization_barrier(jnp.sum(split, axis=inner))  # or XLA makes one step of the two
    return jnp.sum(parts, axis=along - sum(axis < along for axis in over))


def seen_as_integers(packed: UInt8[Array, "*lead bytes"], bits: int) -> Array:
    """Bytes of two or four codes, the first in the lowest bits, as an array of int4 or int2: on a GPU nothing moves."""
    codes = lax.bitcast_convert_type(packed, {4: jnp.int4, 2: jnp.int2}[bits])
    # XLA fails where the bits are seen anew within a product
    return lax.optimization_barrier(lax.collapse(codes, packed.ndim - 1))
