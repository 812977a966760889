"""Rounding to steps that have a gradient of their own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.arrays._inputs import to_small_floats


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

    Args:
      x: weights or activations.
      step: positive, float32, broadcastable to `x`.
      zero_point: an integer as float32, broadcastable to `x`; `None` for 0.
      limits: the smallest and the largest integer.
      rule: of the step's gradient.
      count: how many numbers share a step, for the gradient's scale.
    """
    _, codes = _positions(x, step, zero_point, limits)
    codes = codes if zero_point is None else codes - zero_point
    return (codes * step).astype(x.dtype)


def _positions(x: Array, step: Array, zero_point: Array | None, limits: tuple[int, int]) -> tuple[Array, Array]:
    """Where `x` lies among the integers, and its integer."""
    at = x.astype(jnp.float32) / step
    codes = jnp.round(at) if zero_point is None else jnp.round(at) + zero_point
    return at if zero_point is None else at + zero_point, jnp.clip(codes, *limits)


def _forward(
    x: Array, step: Array, zero_point: Array | None, limits: tuple[int, int], rule: str | None, count: int
) -> tuple[Array, Any]:
    return to_steps(x, step, zero_point, limits, rule, count), (x, step, zero_point)


def _backward(limits: tuple[int, int], rule: str | None, count: int, kept: Any, cotangent: Array) -> Any:
    x, step, zero_point = kept
    at, codes = _positions(x, step, zero_point, limits)
    low, high = limits
    inside = (at >= low) & (at <= high)
    to_x = jnp.where(inside, cotangent, 0).astype(x.dtype)
    if rule is None:
        return to_x, jnp.zeros_like(step), None
    zero = jnp.float32(0) if zero_point is None else zero_point
    outside = jnp.where(at > high, high - zero, low - zero)
    slope = jnp.where(inside, codes - at if rule == "lsq" else 0.0, outside)
    product = cotangent.astype(jnp.float32) * slope
    over = tuple(axis for axis in range(x.ndim) if step.shape[axis] == 1)
    to_step = jnp.sum(product, axis=over, keepdims=True)
    if rule == "lsq":
        to_step = to_step / jnp.sqrt(count * (high - zero))
    return to_x, to_step.astype(step.dtype), None


to_steps.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fake_small_floats(x: Array, dtype: str, keep: tuple[int, ...]) -> Array:
    """What `to_small_floats` makes of an activation, as numbers; straight through."""
    codes, scale = to_small_floats(x, dtype, keep)
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)


fake_small_floats.defvjp(
    lambda x, dtype, keep: (fake_small_floats(x, dtype, keep), None), lambda dtype, keep, _, cotangent: (cotangent,)
)
