"""Products with `Quantized` weights, in the forms that a GPU decodes as it multiplies (`_gpu.py`)."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxcompress.arrays._gpu import FEW, by_sums, has_rows, seen_as_integers
from jaxcompress.arrays._products import Dims, compute_dtype, split_axis
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._quantized_inputs import rounded_input


def is_plain(w: Quantized) -> bool:
    """Whether a GPU's kernels for products decode the values as they are stored."""
    stored = w.length is None and w.values.dtype != jnp.int2
    return stored and w.levels is None and w.zero_point is None and w.group is None


def groups_at_once(x: Array, w: Quantized, dims: Dims) -> bool:
    """Whether a product for each group, if there are groups, has fewer results in all than the weight has numbers."""
    return w.group is None or has_rows(x, w.group[1] // 2, dims)


def on_gpu(product: Callable[[Array, Quantized], Array], x: Array, w: Quantized, dims: Dims) -> Array:
    """`product(x, w)` in a form that a GPU decodes within the product, if there is one."""
    if w.length == (8 // w.bits) * w.values.shape[-1]:
        w = dataclasses.replace(w, values=seen_as_integers(w.values, w.bits), length=None)
    table = w.levels is not None or w.bits == 2
    if (table or not is_plain(w)) and not w.as_integers and has_rows(x, FEW if table else 2, dims):
        number = compute_dtype(x)

        def decode(w: Quantized) -> Array:
            return w.centred(number) * w.spread(w.steps)

        return by_sums(product, decode, x, w, dims, lambda x: rounded_input(x, w, dims))
    if w.values.dtype == jnp.int2 and w.levels is None:  # or they are written out as 8 bits
        w = dataclasses.replace(w, values=lax.optimization_barrier(w.values.astype(jnp.int4)))
    if w.zero_point is None or w.activation_bits is not None or not groups_at_once(x, w, dims):
        return product(x, w)
    # by itself: the codes less a zero point would be written out
    return product(x, dataclasses.replace(w, zero_point=None)) - zero_points(x, w, dims)


def zero_points(x: Array, w: Quantized, dims: Dims) -> Array:
    """The product with the weight's zero points alone, as if each weight were one: of the inputs' sums."""
    assert w.zero_point is not None
    sums, numbers = x.astype(compute_dtype(x)), w.zero_point.astype(jnp.float32) * w.steps
    in_groups = None if w.group is None else w.group[0] + w.ndim
    if in_groups not in dims.w_contract:
        numbers = w.spread(numbers)
    for x_axis, w_axis in zip(dims.x_contract, dims.w_contract, strict=True):
        if numbers.shape[w_axis] == 1:
            sums = jnp.sum(sums, axis=x_axis, keepdims=True)
        elif w.group is not None and w_axis == in_groups:
            sums = jnp.sum(split_axis(sums, x_axis, numbers.shape[w_axis], w.group[1]), axis=x_axis + 1)
    stacked = [w.shape[axis] if axis in dims.w_batch else size for axis, size in enumerate(numbers.shape)]
    return lax.dot_general(sums, jnp.broadcast_to(numbers, stacked), dims.numbers, precision=lax.Precision.HIGHEST)
