"""Compressed leaves of every kind, for the tests."""

import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import LowRank, Quantized, Sparse


def quantized(
    shape, *, axes=(-1,), bits=8, asymmetric=False, group=None, activation_bits=None, dtype="float32", seed=0
) -> Quantized:
    """Random codes and scales; not from weights, so that nothing about rounding is assumed."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-7, 8, shape)
    sizes = [n if i - len(shape) in axes else 1 for i, n in enumerate(shape)]
    if group is not None:
        sizes[group[0]] = -(-shape[group[0]] // group[1])
    scale = jnp.asarray(rng.uniform(0.5, 1.5, sizes), jnp.float32)
    zero = jnp.asarray(rng.integers(-3, 4, sizes)) if asymmetric else None
    return Quantized.from_codes(
        jnp.asarray(codes), scale, zero, bits=bits, group=group, activation_bits=activation_bits, dtype=dtype
    )


def sparse(shape, *, keep=0.3, stacked=0, dtype="float32", seed=0) -> Sparse:
    rng = np.random.default_rng(seed)
    array = rng.normal(size=shape) * (rng.random(shape) < keep)
    return Sparse.from_dense(jnp.asarray(array, dtype), stacked=stacked)


def low_rank(shape, *, rows=None, rank=3, stacked=0, dtype="float32", seed=0) -> LowRank:
    """Random factors; `rows` are the left one's axes, by default all but the last one."""
    rng = np.random.default_rng(seed)
    stack, rows = list(shape[:stacked]), tuple(range(stacked, len(shape) - 1)) if rows is None else rows
    columns = [axis for axis in range(stacked, len(shape)) if axis not in rows]
    left, right = [*stack, *(shape[axis] for axis in rows), rank], [*stack, rank, *(shape[axis] for axis in columns)]
    factors = [jnp.asarray(rng.normal(size=sizes), dtype) for sizes in (left, right)]
    return LowRank.from_factors(*factors, left_axes=rows, stacked=stacked)


KINDS = {
    "int8": lambda shape, **kw: quantized(shape, **kw),
    "int4": lambda shape, **kw: quantized(shape, bits=4, **kw),
    "as int4": lambda shape, **kw: quantized(shape, bits=4, **kw).as_int4(),
    "asymmetric": lambda shape, **kw: quantized(shape, asymmetric=True, **kw),
    "per tensor": lambda shape, **kw: quantized(shape, axes=(), **kw),
    "sparse": lambda shape, **kw: sparse(shape, **kw),
    "low rank": lambda shape, **kw: low_rank(shape, **kw),
}
