"""Maxima over windows, in the form that runs fastest on a CPU."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FEW_POINTS = 25
"""Larger windows are not written out."""


def pool(primitive: Any, x: jax.Array, params: dict[str, Any]) -> jax.Array:
    """`lax.reduce_window_max_p` or `_min_p` of `x` with these parameters.

    Where channels come last and have no window, a CPU gets the maximum of shifted slices: 2.5 to 3 times faster than
    XLA's windows. The derivative is that of the primitive: of equal values in a window, the first one counts.
    """
    window, strides = params["window_dimensions"], params["window_strides"]
    last = x.ndim > 1 and window[-1] == strides[-1] == 1 and tuple(params["padding"][-1]) == (0, 0)
    whole = all(d == 1 for d in (*params["base_dilation"], *params["window_dilation"]))

    def as_is(x: jax.Array) -> jax.Array:
        return primitive.bind(x, **params)

    if not (last and whole and jnp.issubdtype(x.dtype, jnp.floating) and 1 < math.prod(window) <= FEW_POINTS):
        return as_is(x)

    @jax.custom_jvp
    def pooled(x: jax.Array) -> jax.Array:
        return lax.platform_dependent(x, cpu=lambda x: _slices(primitive.name, x, params), default=as_is)

    @pooled.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(as_is, primals, tangents)

    return pooled(x)


def _slices(name: str, x: jax.Array, params: dict[str, Any]) -> jax.Array:
    window, strides = params["window_dimensions"], params["window_strides"]
    join, outside = (lax.max, -np.inf) if name == "reduce_window_max" else (lax.min, np.inf)
    x = lax.pad(x, x.dtype.type(outside), [(*ends, 0) for ends in params["padding"]])
    reach = [n - k + 1 for n, k in zip(x.shape, window, strict=True)]

    def seen(point: tuple[int, ...]) -> jax.Array:
        return lax.slice(x, point, [start + n for start, n in zip(point, reach, strict=True)], strides)

    return functools.reduce(join, map(seen, itertools.product(*map(range, window))))
