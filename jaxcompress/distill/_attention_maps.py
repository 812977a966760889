"""Attention transfer: where a convolutional layer looks, as one number a pixel."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import as_float, feature_pair, keep
from jaxcompress.distill._safe import flat, mean_square, norm, pool_to_smaller, scaled, unit


def attention_map(features: ArrayLike, kind: str = "power_sum", power: float = 2) -> jax.Array:
    """Where a layer looks: one number a pixel, from the channels' magnitudes, scaled to an example's unit norm.

    Zagoruyko and Komodakis, "Paying more attention to attention", 2017, section 3.1.

    Args:
      features: `[batch, height, width, channels]`.
      kind: `"sum"` (`sum_c |a|`), `"power_sum"` (`sum_c |a|^p`) or `"power_max"` (`max_c |a|^p`).
      power: `p`, 1 or more.

    Returns:
      `[batch, height * width]`; zeros for an example of zeros.
    """
    if power < 1:
        raise ValueError(f"power must be at least 1, got {power}")
    magnitude = jnp.abs(scaled(as_float(features, "features"), (1, 2, 3))[0])  # the unit norm undoes the scale
    if kind == "sum":
        attention = jnp.sum(magnitude, axis=-1)
    elif kind == "power_sum":
        attention = jnp.sum(magnitude**power, axis=-1)
    elif kind == "power_max":
        attention = jnp.max(magnitude, axis=-1) ** power
    else:
        raise ValueError(f"kind must be 'sum', 'power_sum' or 'power_max', got {kind!r}")
    return unit(flat(attention))


def attention_transfer_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    kind: str = "power_sum",
    power: float = 2,
    norm_order: float | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """How far the student looks elsewhere than the teacher: a norm of the difference of their `attention_map`s.

    Zagoruyko and Komodakis, "Paying more attention to attention", 2017, equation 2. Channels may differ in number;
    maps of different size are both average-pooled to the smaller first.

    Args:
      student: `[batch, height, width, channels]`.
      teacher: `[batch, height, width, channels]`; constant.
      kind: see `attention_map`.
      power: see `attention_map`.
      norm_order: the norm of the difference, 1 or more, 2 in the equation; by default (None) its mean square over
        pixels, as the authors' code has it.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`; sum over the layers compared.
    """
    a, b = pool_to_smaller(*feature_pair(student, teacher, where))
    difference = attention_map(a, kind, power) - attention_map(b, kind, power)
    if norm_order is None:
        return keep(mean_square(difference), where)
    if norm_order < 1:
        raise ValueError(f"norm_order must be at least 1, got {norm_order}")
    return keep(norm(difference, order=norm_order), where)
