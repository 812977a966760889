"""Products with a compressed weight in the forms that XLA makes one kernel of on a GPU.

Its kernels for products decode int8, int4 and small floats as they read them, and nothing else: a weight that meets a
table, a zero point, the scales of groups or shifts is first written out whole, which for few rows of input takes longer
than the product. So here bytes of two codes are seen as int4, and what few rows need of other decoding is written as
arithmetic, of which XLA makes one kernel that reads the codes as they are.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, UInt8

from jaxcompress.arrays._products import Dims, compute_dtype, derived_from

W = TypeVar("W")

LEAST = 1 << 16  # smaller weights are not worth another way
FEW = 8  # rows for codes of 4 bits: each two read the codes anew, and a decoded weight is written and read once
PIECES = 32  # of a sum


def has_rows(x: Array, most: int, dims: Dims) -> bool:
    """Whether `x` is known to have at most `most` rows, and none of them is divided by an explicit mesh."""
    rows = dims.rows(x)  # under jax.export it may be a symbol
    return isinstance(rows, int) and 0 < rows <= most and not jax.typeof(x).sharding.mesh.explicit_axes


def for_few_rows(product: Callable[[Array, W], Array], sums: Callable[[Array, W], Array], x: Array, w: W) -> Array:
    """`sums(x, w)`, which is `product(x, w)` by `by_sums`, with the derivatives of `product`.

    Where vmap hands in many rows for one weight it is the product itself.
    """
    structure = jax.tree.structure(w)

    @custom_vmap
    def fast(x: Array, *children: Array) -> Array:
        return sums(x, jax.tree.unflatten(structure, children))

    @fast.def_vmap
    def _batched(size: int, batched: Sequence[bool], x: Array, *children: Array) -> tuple[Array, bool]:
        way = sums if any(batched[1:]) else product
        axes = [0 if has else None for has in batched]
        return jax.vmap(lambda x, *children: way(x, jax.tree.unflatten(structure, children)), axes)(x, *children), True

    return derived_from(product, lambda x, w: fast(x, *jax.tree.leaves(w)), x, w)


def by_sums(decode: Callable[[W], Array], x: Array, w: W, dims: Dims) -> Array:
    """The product of few rows and `decode(w)`, `[*w.shape]`, as arithmetic, which XLA fuses with the decoding.

    In at least float32, or int32 of integers.
    """
    value = jax.eval_shape(decode, w)
    number = jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else compute_dtype(x)
    outer, meets = dims.x_free(x.ndim), dict(zip(dims.w_contract, dims.x_contract, strict=True))
    meets |= dict(zip(dims.w_batch, dims.x_batch, strict=True))
    laid = jnp.transpose(x, (*outer, *(meets[axis] for axis in sorted(meets)))).astype(number)
    rows = laid.reshape(-1, *(size if axis in meets else 1 for axis, size in enumerate(value.shape)))
    sums: list[Array] = []
    for i, row in enumerate(rows):
        if i % 2 == 0:  # each two decode for themselves: what all had in common would be written out
            w = lax.optimization_barrier(w) if i else w
            decoded = decode(w).astype(number)
        sums.append(_sum(row * decoded, dims.w_contract))
    left = [axis for axis in range(value.ndim) if axis not in dims.w_contract]
    batch, free = ([1 + left.index(axis) for axis in axes] for axes in (dims.w_batch, dims.w_free(value.ndim)))
    product = jnp.transpose(jnp.stack(sums), (*batch, 0, *free))
    sizes = product.shape[: len(batch)], product.shape[len(batch) + 1 :]
    return product.reshape(*sizes[0], *(x.shape[axis] for axis in outer), *sizes[1])


def _sum(products: Array, over: Sequence[int]) -> Array:
    """The sum over some axes; where the last is not among them in two steps, or XLA may write the products out."""
    along = max(over, key=lambda axis: products.shape[axis])
    n = products.shape[along]
    pieces = max(size for size in range(1, PIECES + 1) if n % size == 0)
    if pieces == 1 or products.ndim - 1 in over:
        return jnp.sum(products, axis=over)
    split = products.reshape(*products.shape[:along], pieces, -1, *products.shape[along + 1 :])
    inner = tuple(axis + (axis >= along) for axis in over)
    parts = lax.optimization_barrier(jnp.sum(split, axis=inner))  # or XLA makes one step of the two
    return jnp.sum(parts, axis=along - sum(axis < along for axis in over))


def seen_as_integers(packed: UInt8[Array, "*lead bytes"], bits: int) -> Array:
    """Bytes of two or four codes, the first in the lowest bits, as an array of int4 or int2: on a GPU nothing moves."""
    codes = lax.bitcast_convert_type(packed, {4: jnp.int4, 2: jnp.int2}[bits])
    # XLA fails where the bits are seen anew within a product
    return lax.optimization_barrier(lax.collapse(codes, packed.ndim - 1))
