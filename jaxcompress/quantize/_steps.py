"""Rounding to steps that have a gradient of their own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.arrays._inputs import to_small_floats, whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def to_steps(
    x: Float[Array, "*shape"],
    step: Array,
    zero_point: Array | None,
    limits: tuple[int, int],
    rule: str | None,
    count: int,
) -> Float[Array, "*shape"]:
    """`(clip(round(x / step) + zero_point) - zero_point) * step`, as floats, with what is outside the limits clipped.

    The gradient to `x` passes straight through inside the limits, and is zero outside. That to the step is

    * "lsq" (Esser et al. 2020, equation 3): `round(x / step) - x / step` inside and the limit outside, summed, times
      `1 / sqrt(count * largest)`;
    * "pact" (Choi et al. 2018, equation 3): the limit outside, and nothing inside;
    * `None`: zero.

    Where x is clipped the result moves with the grid, and so the zero point has a gradient there, `-step`, under the
    same rules; that of its rounding is straight through. With `zero_point = smallest - low / step` the gradients to
    `step` and `low` are those of LSQ+ (Bhalgat et al. 2020, equations 3 to 6).

    Args:
      x: weights or activations.
      step: positive, float32, broadcastable to `x`.
      zero_point: the integer that means zero, as float32 that is rounded here, broadcastable to `x`; `None` for 0.
      limits: the smallest and the largest integer.
      rule: of the step's gradient.
      count: how many numbers share a step, for the gradient's scale.
    """
    _, codes, zero = _positions(x, step, zero_point, limits)
    return ((codes if zero is None else codes - zero) * step).astype(x.dtype)


def _positions(
    x: Array, step: Array, zero_point: Array | None, limits: tuple[int, int]
) -> tuple[Array, Array, Array | None]:
    """Where `x` lies among the integers, its integer, and the one that means zero."""
    at = x.astype(jnp.float32) / step
    if zero_point is None:
        return at, jnp.clip(jnp.round(at), *limits), None
    zero = whole(zero_point, limits)
    return at + zero, jnp.clip(jnp.round(at) + zero, *limits), zero


def _forward(
    x: Array, step: Array, zero_point: Array | None, limits: tuple[int, int], rule: str | None, count: int
) -> tuple[Array, Any]:
    return to_steps(x, step, zero_point, limits, rule, count), (x, step, zero_point)


def _backward(limits: tuple[int, int], rule: str | None, count: int, kept: Any, cotangent: Array) -> Any:
    x, step, zero_point = kept
    at, codes, whole_zero = _positions(x, step, zero_point, limits)
    low, high = limits
    inside = (at >= low) & (at <= high)
    to_x = jnp.where(inside, cotangent, 0).astype(x.dtype)
    if rule is None:
        return to_x, jnp.zeros_like(step), None if zero_point is None else jnp.zeros_like(zero_point)
    zero = jnp.float32(0) if whole_zero is None else whole_zero
    largest = jnp.float32(high) if whole_zero is None else jnp.maximum(high - zero, zero - low)
    scale = 1 / jnp.sqrt(count * largest) if rule == "lsq" else jnp.float32(1)
    upstream, over = cotangent.astype(jnp.float32), tuple(axis for axis in range(x.ndim) if step.shape[axis] == 1)

    def gathered(slope: Array) -> Array:
        return (scale * jnp.sum(upstream * slope, axis=over, keepdims=True)).astype(step.dtype)

    outside = jnp.where(at > high, high - zero, low - zero)
    to_step = gathered(jnp.where(inside, codes - at if rule == "lsq" else 0.0, outside))
    return to_x, to_step, None if zero_point is None else gathered(jnp.where(inside, 0.0, -step))


to_steps.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fake_small_floats(x: Array, dtype: str, keep: tuple[int, ...]) -> Array:
    """What `to_small_floats` makes of an activation, as numbers; straight through."""
    codes, scale = to_small_floats(x, dtype, keep)
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)


fake_small_floats.defvjp(
    lambda x, dtype, keep: (fake_small_floats(x, dtype, keep), None), lambda dtype, keep, _, cotangent: (cotangent,)
)
