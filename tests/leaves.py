"""Compressed leaves of every kind, for the tests."""

import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import Quantized, Sparse


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


KINDS = {
    "int8": lambda shape, **kw: quantized(shape, **kw),
    "int4": lambda shape, **kw: quantized(shape, bits=4, **kw),
    "asymmetric": lambda shape, **kw: quantized(shape, asymmetric=True, **kw),
    "per tensor": lambda shape, **kw: quantized(shape, axes=(), **kw),
    "sparse": lambda shape, **kw: sparse(shape, **kw),
}
