"""Losses that ask the student for the teacher's features themselves, after a learned map where the shapes differ."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import as_float, feature_pair, keep
from jaxcompress.distill._safe import adaptive_pool, mean_square, pool_to_smaller, scaled, unit


def hint_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The mean of `(student - teacher)^2` over an example's features.

    Romero et al., "FitNets: hints for thin deep nets", 2015, equation 3 (there half the sum). Where the shapes differ,
    project the student's features first: `hint_loss(projector.apply(params, student), teacher)` with
    `dense_projector` or `conv_projector`.

    Args:
      student: `[batch, ...]`, the guided layer's output.
      teacher: the same shape, the hint; constant.
      where: `[batch]`, which examples count; the others give 0 and no gradient.

    Returns:
      One value an example, `[batch]`.
    """
    guided, hint = feature_pair(student, teacher, where, layout="[batch, ...]", same_shape=True)
    return keep(mean_square((guided - hint).reshape(len(guided), -1)), where)


def variational_information_loss(
    student_mean: ArrayLike,
    teacher: ArrayLike,
    log_scale: ArrayLike,
    *,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
) -> jax.Array:
    """A bound on the information that student and teacher share: minus a Gaussian's log-likelihood of the teacher.

    The mean over an example's features of `((mu - t)^2 / v + log v) / 2`, with a learned variance a channel,
    `v = softplus(log_scale) + epsilon`: Ahn et al., "Variational information distillation for knowledge transfer",
    2019, section 3. Maps of different size are both average-pooled to the smaller.

    Args:
      student_mean: `[batch, height, width, channels]`, `variational_projector(...).apply(params, student)`.
      teacher: the same channels; constant.
      log_scale: `[channels]`, `params["log_scale"]` of the same projector.
      epsilon: the least variance.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`; it can be negative.
    """
    mean, teacher = feature_pair(student_mean, teacher, where)
    mean, teacher = pool_to_smaller(mean, teacher)
    variance = jax.nn.softplus(as_float(log_scale, "log_scale")) + epsilon
    nats = ((mean - teacher) ** 2 / variance + jnp.log(variance)) / 2
    return keep(jnp.mean(nats, axis=(1, 2, 3)), where)


def factor_transfer_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    order: float = 1,
    collapse_channels: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The mean of `|f_s / ||f_s|| - f_t / ||f_t|| |^order` over an example's factors.

    Kim, Park and Kwak, "Paraphrasing complex network: network compression via factor transfer", 2018: the
    teacher's factors come from its paraphraser, the student's from its translator. The paper flattens the whole
    factor; with `collapse_channels` the mean of squares over channels comes first, as one implementation has it.

    Args:
      student: `[batch, height, width, channels]`, the translator's output.
      teacher: the same shape, the paraphraser's; constant.
      order: 1 or more.
      collapse_channels: compare maps instead of whole factors.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`.
    """
    pair = feature_pair(student, teacher, where, same_shape=True)
    if collapse_channels:
        a, b = (jnp.mean(scaled(x, (1, 2, 3))[0] ** 2, axis=-1) for x in pair)
    else:
        a, b = pair
    difference = jnp.abs(unit(a.reshape(len(a), -1)) - unit(b.reshape(len(b), -1)))
    return keep(jnp.mean(difference**order, axis=-1), where)


def review_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """ReviewKD's hierarchical context loss: mean squares of the maps and of their pools, weighted 1, 1/2, 1/4, ...

    Chen et al., "Distilling knowledge via knowledge review", 2021, section 3.3: pools to 4x4, 2x2 and 1x1 where that
    is smaller than the map, and the weighted mean of all. Sum over the stages compared.

    Args:
      student: `[batch, height, width, channels]`, a fused stage.
      teacher: the same shape; constant.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`.
    """
    ours, theirs = feature_pair(student, teacher, where, same_shape=True)
    difference = ours - theirs  # pooling is linear
    total, weight, weights = mean_square(difference), 1.0, 1.0
    for size in (4, 2, 1):
        if size < difference.shape[1]:
            weight /= 2
            pooled = adaptive_pool(difference, (size, min(size, difference.shape[2])))
            total += weight * mean_square(pooled)
            weights += weight
    return keep(total / weights, where)
