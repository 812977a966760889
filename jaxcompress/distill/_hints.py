"""Losses that ask the student for the teacher's features themselves, after a learned map where the shapes differ."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import as_float, feature_pair, keep
from jaxcompress.distill._safe import flat, mean_square, pool_to_smaller


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
    return keep(mean_square(flat(guided - hint)), where)


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
