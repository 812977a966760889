"""Convolutions of the smaller model, in the form that runs fastest; XLA's CPU runs some widths and kinds badly."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays import is_leaf

FEW_POINTS = 64
"""Kernels of more points are not written out, or compiling takes long."""

FEW_POSITIONS = 256
"""Outputs at so many positions, those of all images together, are one product on a CPU."""

_as_written = ContextVar("as_written", default=False)


@contextmanager
def as_written() -> Iterator[None]:
    """Within, convolutions are left as they are: a smaller model that is staged to be cut again shows its own."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def is_as_written() -> bool:
    """Whether the smaller model is to show what it was written as."""
    return _as_written.get()


def is_compressed(x: Any) -> bool:
    """Whether a value, under `compressed`, stands for a leaf, which has rules of its own."""
    return is_leaf(getattr(x, "value", None))


def convolve(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """`lax.conv_general_dilated_p` with these parameters.

    Four kinds are written otherwise where channels come last, all but the first on a CPU alone (`python -m benchmarks
    channels.speed` has networks with nothing cut, beside the same networks as XLA runs them):

    - A kernel of one point is a product of matrices: 1.5 to 2.5 times faster on a CPU, the same elsewhere.
    - One channel to one: the sum of the points' products. XLA's CPU runs these at a twentieth of that speed.
    - Few positions of float32 (7x7, 14x14): what each sees is put side by side, for one product: 1.1 to 2 times faster.
    - An odd number of inputs is filled up with zeros to a multiple of four: three inputs, before 17 to 32 outputs, run
      at a tenth of the speed of four. Three before any other number of outputs run faster as they are.
    """
    numbers, last = params["dimension_numbers"], x.ndim - 1
    in_order = numbers.lhs_spec == numbers.out_spec == (0, last, *range(1, last))
    whole = params["batch_group_count"] == 1 and all(d == 1 for d in params["lhs_dilation"])
    points = math.prod(kernel.shape[axis] for axis in numbers.rhs_spec[2:])
    if is_as_written() or is_compressed(kernel) or not in_order or not whole:
        return _as_is(x, kernel, params)
    if params["feature_group_count"] == 1:
        if points == 1 and not any(map(any, params["padding"])):
            return _product(x, kernel, params)
        outputs = kernel.shape[numbers.rhs_spec[0]]
        floats = x.dtype == kernel.dtype == jnp.float32
        if floats and 1 < points <= FEW_POINTS and _positions(x, kernel, params) <= FEW_POSITIONS:
            return _on_cpu(_side_by_side, x, kernel, params)
        if x.shape[last] % 2 and (x.shape[last] > 3 or (x.shape[last] == 3 and 16 < outputs <= 32)):
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


def _positions(x: jax.Array, kernel: jax.Array, params: Any) -> int:
    out = jax.eval_shape(lambda x, k: _as_is(x, k, params), x, kernel)
    return math.prod(out.shape[:-1])


def _side_by_side(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    k_out, k_in, *space = params["dimension_numbers"].rhs_spec
    taps = lax.transpose(kernel, (*space, k_in, k_out))
    seen = lax.concatenate([s for _, s in _seen(x, taps.shape[:-2], params)], x.ndim - 1)
    return lax.dot_general(
        seen,
        lax.reshape(taps, (seen.shape[-1], taps.shape[-1])),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


def _seen(x: jax.Array, points: Sequence[int], params: Any) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """Each point of a kernel, and what it meets at all positions."""
    strides, steps = params["window_strides"], params["rhs_dilation"]
    x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), *((*ends, 0) for ends in params["padding"]), (0, 0, 0)])
    reach = [n - (k - 1) * d for n, k, d in zip(x.shape[1:-1], points, steps, strict=True)]
    for point in itertools.product(*map(range, points)):
        starts = [i * d for i, d in zip(point, steps, strict=True)]
        ends = [start + n for start, n in zip(starts, reach, strict=True)]
        yield point, lax.slice(x, (0, *starts, 0), (x.shape[0], *ends, x.shape[-1]), (1, *strides, 1))


def _depthwise(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    k_out, k_in, *space = params["dimension_numbers"].rhs_spec
    taps = lax.squeeze(lax.transpose(kernel, (*space, k_in, k_out)), [len(space)])
    out = params["preferred_element_type"] or x.dtype
    wide = jnp.promote_types(out, jnp.float32) if jnp.issubdtype(out, jnp.floating) else out  # as products add up
    total, *terms = (seen.astype(wide) * taps[point].astype(wide) for point, seen in _seen(x, taps.shape[:-1], params))
    return sum(terms, start=total).astype(out)
