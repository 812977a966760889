"""Losses on a network's outputs beyond soft targets: matched logits, decoupled, standardised, correlated."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._divergences import generalized_jensen_shannon, kl_divergence, log_softmax
from jaxcompress.distill._inputs import (
    Number,
    at_label,
    blank,
    check_between,
    check_positive,
    check_rank,
    class_labels,
    count_of,
    keep,
    logit_pair,
    mask_of,
    masked_mean,
)
from jaxcompress.distill._safe import norm
from jaxcompress.distill._softmax import log_softmax_pair, soft_target_loss


def logit_matching_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    centred: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The mean over classes of `(z_student - z_teacher)^2`.

    Ba and Caruana, "Do deep nets really need to be deep?", 2014. With `centred`
    each row's mean is subtracted first, which the softmax does not see: half of it, `sum_i (z_i - v_i)^2 / (2 N)`, is
    what `soft_target_loss` tends to at a high temperature (Hinton et al. 2015, section 2.1).

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: the same shape; constant.
      centred: subtract each row's mean over classes from both.
      axis: the class axis.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    student, teacher = logit_pair(student_logits, teacher_logits, axis, where)
    if centred:
        student, teacher = (z - jnp.mean(z, axis=-1, keepdims=True) for z in (student, teacher))
    return keep(jnp.mean((student - teacher) ** 2, axis=-1), where)


def decoupled_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: Number = 1.0,
    beta: Number = 8.0,
    temperature: Number = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Decoupled distillation: the target class and the others apart, `T^2 (alpha TCKD + beta NCKD)`.

    Zhao et al., "Decoupled knowledge distillation", 2022, equation 7: TCKD is the divergence of the pairs (target,
    not target), NCKD that of the distributions over the other classes; soft targets weigh NCKD by the teacher's
    doubt, this loss by `beta`.

    Args:
      student_logits: `[..., classes]`, at least two classes.
      teacher_logits: the same shape; constant.
      labels: `[...]`, integer class indices.
      alpha: the weight of the target class's part.
      beta: the weight of the other classes' part. It and the temperature are by default the paper's for CIFAR-100.
      temperature: above 0.
      axis: the class axis.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    check_positive(temperature, "temperature")
    student, teacher = logit_pair(student_logits, teacher_logits, axis, where)
    classes = student.shape[-1]
    if classes < 2:
        raise ValueError("decoupled_loss needs at least 2 classes: there is no other class to compare")
    labels = class_labels(labels, student.shape[:-1], classes, where)
    pair_student, others_student = _decouple(student, labels, temperature)
    pair_teacher, others_teacher = _decouple(teacher, labels, temperature)
    target_part = kl_divergence(pair_teacher, pair_student)
    others_part = kl_divergence(others_teacher, others_student)
    return keep(temperature**2 * (alpha * target_part + beta * others_part), where)


def _decouple(z: jax.Array, labels: jax.Array, temperature: Number) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of (target, not target), and of the other classes among themselves (-inf on the target)."""
    target = jnp.arange(z.shape[-1]) == labels[..., None]
    log_p = log_softmax(z, temperature)
    log_not_target = jax.nn.logsumexp(jnp.where(target, -jnp.inf, log_p), axis=-1)
    # of the logits, not of log_p, in which a large target has rounded the others' differences away
    others = log_softmax(jnp.where(target, -jnp.inf, z), temperature)
    return jnp.stack([at_label(log_p, labels), log_not_target], axis=-1), others


def standardized_soft_target_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Number = 2.0,
    epsilon: float = 1e-7,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`soft_target_loss` on standardised logits: `(z - mean) / (epsilon + std)` over the classes, on both sides.

    Sun et al., "Logit standardization in knowledge distillation", 2024: the student need not reach the
    teacher's range of logits. The standard deviation divides by `classes - 1`, as the authors' code does. A row of
    equal logits gives uniform soft targets and no gradient.

    Args and result as in `soft_target_loss`; at least two classes. The temperature is by default the paper's, 2.
    """
    student, teacher = logit_pair(student_logits, teacher_logits, axis, where)
    if student.shape[-1] < 2:
        raise ValueError("standardized_soft_target_loss needs at least 2 classes: one has no standard deviation")
    student, teacher = _standardize(student, epsilon), _standardize(teacher, epsilon)
    return soft_target_loss(student, teacher, temperature=temperature, where=where)


def _standardize(z: jax.Array, epsilon: float) -> jax.Array:
    centred = z - jnp.mean(z, axis=-1, keepdims=True)
    scale = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(centred), axis=-1, keepdims=True), 1))
    centred = centred / scale  # squares of 1e30 overflow; the scale cancels below
    deviation = norm(centred, keepdims=True) / (z.shape[-1] - 1) ** 0.5
    return jnp.where(deviation > 0, centred / (epsilon / scale + jnp.where(deviation > 0, deviation, 1)), 0)


def reverse_kl_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`T^2 KL(p_student || p_teacher)`: the student gives up what it can't cover instead of spreading over it.

    Gu et al., "MiniLLM: knowledge distillation of large language models", 2024, the objective per token. Args and
    result as in `soft_target_loss`.
    """
    log_student, log_teacher = log_softmax_pair(student_logits, teacher_logits, temperature, axis, where)
    return keep(temperature**2 * kl_divergence(log_student, log_teacher), where)


def jensen_shannon_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    beta: float = 0.5,
    *,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The generalised Jensen-Shannon divergence of student and teacher, times `T^2`.

    `beta KL(t || m) + (1 - beta) KL(s || m)` with `m = beta t + (1 - beta) s`: Agarwal et al., "On-policy distillation
    of language models", 2024. By convention `beta = 0` is the forward KL (`soft_target_loss`) and
    `beta = 1` the reverse (`reverse_kl_loss`).

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: the same shape; constant.
      beta: a Python number in [0, 1].
      temperature: above 0.
      axis: the class axis.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    check_between(beta, 0.0, 1.0, "beta")
    log_student, log_teacher = log_softmax_pair(student_logits, teacher_logits, temperature, axis, where)
    return keep(temperature**2 * generalized_jensen_shannon(log_student, log_teacher, beta), where)


def dist_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: Number = 1.0,
    gamma: Number = 1.0,
    temperature: Number = 1.0,
    epsilon: float = 1e-8,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DIST: correlation instead of equality, within each example and within each class over the batch.

    `T^2 (beta (1 - mean_b r(s_b, t_b)) + gamma (1 - mean_c r(s_c, t_c)))`, `r` Pearson's correlation of probabilities
    at temperature `T`: Huang et al., "Knowledge distillation from a stronger teacher", 2022. A row
    or column without variance counts as uncorrelated and gets no gradient.

    Args:
      student_logits: `[batch, classes]`.
      teacher_logits: the same shape; constant.
      beta: the weight of the relation between classes, within an example.
      gamma: the weight of the relation between examples, within a class.
      temperature: above 0.
      epsilon: added to the product of norms in the correlation.
      where: `[batch]`, which examples count, in rows and in columns.

    Returns:
      A scalar: a class's column is the whole batch. 0 where no example counts.
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature, where)
    mask = mask_of(where, len(student))
    between_classes = masked_mean(_correlation(student, teacher, 1, epsilon, mask), mask)
    between_examples = jnp.mean(_correlation(student, teacher, 0, epsilon, mask))
    total = temperature**2 * (beta * (1 - between_classes) + gamma * (1 - between_examples))
    return jnp.where(jnp.any(mask), total, 0)


def _correlation(a: jax.Array, b: jax.Array, axis: int, epsilon: float, mask: jax.Array) -> jax.Array:
    count = a.shape[1] if axis == 1 else jnp.maximum(jnp.sum(mask), 1)
    a, b = (jnp.where(mask[:, None], x - jnp.sum(x, axis=axis, keepdims=True) / count, 0) for x in (a, b))
    flat = jnp.max(jnp.abs(a), axis=axis, keepdims=True, initial=0) < 1e-12
    a = jnp.where(flat, 0, a)  # otherwise the gradient there is b / epsilon
    return jnp.sum(a * b, axis=axis) / (norm(a, axis) * norm(b, axis) + epsilon)


def _probabilities(
    student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: Number, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Both sides' probabilities `[batch, classes]`, with rows of zeros for examples that do not count."""
    check_rank(jnp.asarray(student_logits), 2, "logits", "[batch, classes]")
    log_student, log_teacher = log_softmax_pair(student_logits, teacher_logits, temperature, -1, where)
    return blank(jnp.exp(log_student), where), blank(jnp.exp(log_teacher), where)


def batch_correlation_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: Number = 4.0, where: ArrayLike | None = None
) -> jax.Array:
    """The batch-level part of multi-level distillation: `||P_t P_t^T - P_s P_s^T||^2 / batch`, `P = softmax(z / T)`.

    Jin, Wang and Lin, "Multi-level logit distillation", 2023. No factor `T^2`: the matrices are compared
    as they are.

    Args:
      student_logits: `[batch, classes]`.
      teacher_logits: the same shape; constant.
      temperature: above 0; by default the middle one of the paper's five.
      where: `[batch]`, which examples count.

    Returns:
      A scalar.
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature, where)
    return jnp.sum((teacher @ teacher.T - student @ student.T) ** 2) / count_of(where, len(student))


def class_correlation_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: Number = 4.0, where: ArrayLike | None = None
) -> jax.Array:
    """The class-level part of multi-level distillation: `||P_t^T P_t - P_s^T P_s||^2 / classes`.

    Jin, Wang and Lin, "Multi-level logit distillation", 2023; otherwise as `batch_correlation_loss`.
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature, where)
    return jnp.sum((teacher.T @ teacher - student.T @ student) ** 2) / student.shape[1]


def multi_level_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Multi-level distillation: soft targets, batch and class correlations, summed over several temperatures.

    Jin, Wang and Lin, "Multi-level logit distillation", 2023, every part with weight 1.

    Args:
      student_logits: `[batch, classes]`.
      teacher_logits: the same shape; constant.
      temperatures: each above 0.
      where: `[batch]`, which examples count.

    Returns:
      A scalar.
    """
    if not temperatures:
        raise ValueError("multi_level_loss needs at least one temperature, got none")
    total = jnp.zeros((), jnp.float32)
    for temperature in temperatures:
        check_positive(temperature, "temperature")
        total += masked_mean(
            soft_target_loss(student_logits, teacher_logits, temperature=temperature, where=where), where
        )
        total += batch_correlation_loss(student_logits, teacher_logits, temperature=temperature, where=where)
        total += class_correlation_loss(student_logits, teacher_logits, temperature=temperature, where=where)
    return total
