"""Norms, unit vectors and pools whose values and gradients are finite everywhere.

A norm has no gradient at zero, and squares of large values overflow. Both are met the same way here: divide by the
largest magnitude, which is held constant (the result does not depend on it, so neither does the gradient), and give
an all-zero vector the norm 0 with the gradient 0.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_TINY = 1e-12  # below this magnitude a vector counts as zero


def scaled(x: jax.Array, axis: int | tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x` divided by its largest magnitude over `axis`; that magnitude (1 for a zero vector); where it is not zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))  # 0: of no example
    nonzero = largest > _TINY
    scale = jnp.where(nonzero, largest, 1)
    eighth = 1 / 8  # of both, exactly: XLA may multiply by the reciprocal, which of 3e38 is flushed to zero
    return jnp.where(nonzero, x, 0) * eighth / (scale * eighth), scale, nonzero


def norm(x: jax.Array, axis: int | tuple[int, ...] = -1, order: float = 2, keepdims: bool = False) -> jax.Array:
    """The `order`-norm (at least 1) over `axis`; 0 with gradient 0 for a zero vector."""
    y, scale, nonzero = scaled(x, axis)
    total = jnp.sum(jnp.abs(y) ** order, axis=axis, keepdims=True)  # at least 1 for a vector that is not zero
    result = jnp.where(nonzero, jnp.where(nonzero, total, 1) ** (1 / order), 0) * scale
    return result if keepdims else jnp.squeeze(result, axis)


def unit(x: jax.Array, axis: int | tuple[int, ...] = -1, order: float = 2) -> jax.Array:
    """`x` divided by its norm over `axis`; a zero vector stays zero, with gradient 0."""
    y, _, nonzero = scaled(x, axis)
    total = jnp.sum(jnp.abs(y) ** order, axis=axis, keepdims=True)
    return y / jnp.where(nonzero, total, 1) ** (1 / order)


def flat(x: jax.Array, last: int = 0) -> jax.Array:
    """`x` `[batch, ...]` with all axes between the first and the `last` ones as one: `[batch, values]`.

    Also of an empty batch, of which `reshape(len(x), -1)` can't tell the values.
    """
    end = x.ndim - last
    return x.reshape(len(x), math.prod(x.shape[1:end]), *x.shape[end:])


def mean_square(difference: jax.Array) -> jax.Array:
    """The mean of the squares over all axes but the first: one value an example."""
    return jnp.mean(difference**2, axis=tuple(range(1, difference.ndim)))


def adaptive_pool(x: jax.Array, size: tuple[int, int], reduce: Callable[..., jax.Array] = jnp.mean) -> jax.Array:
    """`x` `[batch, height, width, channels]` reduced to height and width `size`.

    Output row `i` covers the input rows from `floor(i H / h)` to `ceil((i + 1) H / h)`, which overlap where `h` does
    not divide `H` (the convention of adaptive pooling).
    """
    if np.shape(size) != (2,) or min(size) < 1:
        raise ValueError(f"size must be a height and a width from 1, got {size}")
    for axis, out in ((1, size[0]), (2, size[1])):
        if x.shape[axis] == out:
            continue
        if x.shape[axis] % out == 0:
            blocks = (*x.shape[:axis], out, x.shape[axis] // out, *x.shape[axis + 1 :])
            x = reduce(x.reshape(blocks), axis=axis + 1)
            continue
        starts = np.arange(out) * x.shape[axis] // out
        ends = -(-(np.arange(out) + 1) * x.shape[axis] // out)
        cells = [
            reduce(jax.lax.slice_in_dim(x, a, b, axis=axis), axis=axis)
            for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        x = jnp.stack(cells, axis=axis)
    return x


def pool_to_smaller(
    a: jax.Array, b: jax.Array, reduce: Callable[..., jax.Array] = jnp.mean
) -> tuple[jax.Array, jax.Array]:
    """Both maps at the smaller of their heights and the smaller of their widths."""
    size = (min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2]))
    return adaptive_pool(a, size, reduce), adaptive_pool(b, size, reduce)


def smooth_l1(difference: jax.Array) -> jax.Array:
    """Elementwise `x^2 / 2` up to 1, `|x| - 1/2` beyond (the Huber loss with delta 1)."""
    size = jnp.abs(difference)
    inner = jnp.minimum(size, 1)
    return inner * (size - inner / 2)
