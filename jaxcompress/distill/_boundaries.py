"""Losses on features before the activation: on which side of zero, or of a margin, a neuron falls."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import check_positive, constant, feature_pair, keep
from jaxcompress.distill._safe import flat


def activation_boundary_loss(
    student: ArrayLike, teacher: ArrayLike, *, margin: float = 1.0, where: ArrayLike | None = None
) -> jax.Array:
    """Moves the student's neurons to the teacher's side of zero, by a margin: a squared hinge, summed over neurons.

    `(s + m)^2` where the teacher is off (`t <= 0`) and `s > -m`, `(s - m)^2` where it is on and `s <= m`: Heo et al.,
    "Knowledge transfer via distillation of activation boundaries formed by hidden neurons", 2019.

    Args:
      student: `[batch, ...]`, *before* the activation, projected to the teacher's shape.
      teacher: the same shape, before the activation; constant.
      margin: above 0.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`: the sum over its neurons.
    """
    check_positive(margin, "margin")
    s, t = feature_pair(student, teacher, where, layout="[batch, ...]", same_shape=True)
    short = jax.nn.relu(jnp.where(t > 0, margin - s, s + margin))
    return keep(jnp.sum(flat(short**2), axis=-1), where)


def margin_relu_loss(
    student: ArrayLike, teacher: ArrayLike, margin: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The partial L2 distance to the teacher's margin ReLU, summed over neurons.

    `(s - max(t, m))^2`, but 0 where the target is not positive and the student is below it: Heo et al., "A
    comprehensive overhaul of feature distillation", 2019.

    Args:
      student: `[batch, height, width, channels]`, before the activation, projected to the teacher's channels.
      teacher: the same shape, before the activation; constant.
      margin: `[channels]`, negative: `expected_margin` of the teacher's normalisation.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`: the sum over its neurons.
    """
    s, t = feature_pair(student, teacher, where, layout="[batch, ...]", same_shape=True)
    target = jnp.maximum(t, constant(margin, "margin"))
    counts = (s > target) | (target > 0)
    return keep(jnp.sum(flat(jnp.where(counts, s - target, 0) ** 2), axis=-1), where)


def expected_margin(scale: ArrayLike, bias: ArrayLike) -> jax.Array:
    """The margin of each channel: the mean of its negative values, `E[x | x < 0]` for `x ~ N(bias, scale^2)`.

    What batch normalisation with this scale and bias puts out; Heo et al., "A comprehensive overhaul of feature
    distillation", 2019, section 3.1. Where a channel is negative with a probability below 0.001: `-3 |scale|`.

    Args:
      scale: `[channels]`.
      bias: `[channels]`.

    Returns:
      `[channels]`, not above 0.
    """
    deviation = jnp.maximum(jnp.abs(constant(scale, "scale")), 1e-12)
    ratio = -constant(bias, "bias") / deviation
    log_below = jax.scipy.stats.norm.logcdf(ratio)
    margin = -deviation * (jnp.exp(jax.scipy.stats.norm.logpdf(ratio) - log_below) + ratio)
    return jnp.where(jnp.exp(log_below) > 1e-3, margin, -3 * deviation)
