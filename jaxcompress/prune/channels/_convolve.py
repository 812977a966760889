"""Convolutions of the smaller model, in the form that runs fastest; XLA's CPU runs some widths and kinds badly."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays import is_leaf

FEW_POINTS = 64
"""Kernels of more points are not written out, or compiling takes long."""

_as_written = ContextVar("as_written", default=False)


@contextmanager
def as_written() -> Iterator[None]:
    """Within, convolutions are left as they are: a smaller model that is staged to be cut again shows its own."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def convolve(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """`lax.conv_general_dilated_p` with these parameters.

    Three kinds are written otherwise where channels come last, the second and third on a CPU alone (`python -m
    benchmarks channels.speed` has networks with nothing cut, beside the same networks as XLA runs them):

    - A kernel of one point is a product of matrices: 1.5 to 2.5 times faster on a CPU, the same elsewhere.
    - One channel to one: the sum of the points' products. XLA's CPU runs these at a twentieth of that speed.
    - An odd number of inputs is filled up with zeros to a multiple of four: three inputs, before 17 to 32 outputs, run
      at a tenth of the speed of four.
    """
    numbers, last = params["dimension_numbers"], x.ndim - 1
    in_order = numbers.lhs_spec == numbers.out_spec == (0, last, *range(1, last))
    whole = params["batch_group_count"] == 1 and all(d == 1 for d in params["lhs_dilation"])
    points = math.prod(kernel.shape[axis] for axis in numbers.rhs_spec[2:])
    compressed = is_leaf(getattr(kernel, "value", None))  # and has a rule of its own
    if _as_written.get() or compressed or not in_order or not whole:
        return _as_is(x, kernel, params)
    if params["feature_group_count"] == 1:
        if points == 1 and not any(map(any, params["padding"])):
            return _product(x, kernel, params)
        if x.shape[last] % 2 and x.shape[last] > 1:
            return _on_cpu(_filled, x, kernel, params)
    elif params["feature_group_count"] == x.shape[last] == kernel.shape[numbers.rhs_spec[0]] and points <= FEW_POINTS:
        return _on_cpu(_depthwise, x, kernel, params)
    return _as_is(x, kernel, params)


def _as_is(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    return lax.conv_general_dilated_p.bind(x, kernel, **params)


def _on_cpu(way: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    return lax.platform_dependent(
        x, kernel, cpu=lambda x, k: way(x, k, params), default=lambda x, k: _as_is(x, k, params)
    )


def _product(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    k_out, k_in, *space = params["dimension_numbers"].rhs_spec
    seen = lax.slice(x, [0] * x.ndim, x.shape, (1, *params["window_strides"], 1))
    return lax.dot_general(
        seen,
        lax.squeeze(kernel, space),
        (((x.ndim - 1,), (int(k_in > k_out),)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


def _filled(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    def filled(a: jax.Array, axis: int) -> jax.Array:
        return lax.pad(a, a.dtype.type(0), [(0, -a.shape[d] % 4 if d == axis else 0, 0) for d in range(a.ndim)])

    return _as_is(filled(x, x.ndim - 1), filled(kernel, params["dimension_numbers"].rhs_spec[1]), params)


def _depthwise(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    k_out, k_in, *space = params["dimension_numbers"].rhs_spec
    taps = lax.squeeze(lax.transpose(kernel, (*space, k_in, k_out)), [len(space)])
    strides, steps = params["window_strides"], params["rhs_dilation"]
    out = params["preferred_element_type"] or x.dtype
    wide = jnp.promote_types(out, jnp.float32) if jnp.issubdtype(out, jnp.floating) else out  # as products add up
    x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), *((*ends, 0) for ends in params["padding"]), (0, 0, 0)])
    reach = [n - (k - 1) * d for n, k, d in zip(x.shape[1:-1], taps.shape, steps, strict=False)]

    def term(point: tuple[int, ...]) -> jax.Array:
        starts = [i * d for i, d in zip(point, steps, strict=True)]
        ends = [start + n for start, n in zip(starts, reach, strict=True)]
        seen = lax.slice(x, (0, *starts, 0), (x.shape[0], *ends, x.shape[-1]), (1, *strides, 1))
        return seen.astype(wide) * taps[point].astype(wide)

    total, *terms = map(term, itertools.product(*map(range, taps.shape[:-1])))
    return sum(terms, start=total).astype(out)
