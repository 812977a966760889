"""Soft targets with a temperature: the loss of Hinton et al. (2015), and its totals with hard labels."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._divergences import kl_divergence, log_softmax
from jaxcompress.distill._inputs import (
    Number,
    as_float,
    at_label,
    blank,
    check_between,
    check_positive,
    check_same_shape,
    class_labels,
    constant,
    keep,
    logit_pair,
    logits,
)


def temperature_softmax(logits: ArrayLike, temperature: Number = 1.0, axis: int = -1) -> jax.Array:
    """Soft targets: the class probabilities at a temperature.

    `q_i = exp(z_i / T) / sum_j exp(z_j / T)`, equation 1 of Hinton, Vinyals and Dean, "Distilling the knowledge in a
    neural network", 2015. At `T = 1` the model's own probabilities; a higher temperature shows how the model ranks
    the wrong classes.

    Args:
      logits: floating, with classes along `axis`; float16 and bfloat16 are computed in float32.
      temperature: above 0.
      axis: the class axis.

    Returns:
      Probabilities in the shape of `logits`, float32 or wider.
    """
    return jnp.exp(temperature_log_softmax(logits, temperature, axis))


def temperature_log_softmax(logits: ArrayLike, temperature: Number = 1.0, axis: int = -1) -> jax.Array:
    """The logarithms of `temperature_softmax`, computed without leaving the log domain."""
    check_positive(temperature, "temperature")
    z = jnp.moveaxis(as_float(logits, "logits"), axis, -1)
    return jnp.moveaxis(log_softmax(z, temperature), -1, axis)


def soft_target_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """How far the student's soft predictions are from the teacher's soft targets.

    `T^2 KL(p_teacher || p_student)`, both at temperature `T`: section 2 of Hinton, Vinyals and Dean, "Distilling the
    knowledge in a neural network", 2015. The factor `T^2` keeps the size of the gradient when `T` changes. The
    gradient is that of `soft_cross_entropy_loss`; this form is zero where the two agree.

    In float32 the value is off by some `1e-8 T^2` (a difference of logarithms, times `T^2`), which only shows far above
    `T = 100`; the gradient by some `1e-8 T`.

    Args:
      student_logits: `[..., classes]`, any finite values.
      teacher_logits: the same shape; constant (no gradient).
      temperature: above 0, the same for both.
      axis: the class axis.
      where: which examples count, in the shape of the result. The others give 0 and no gradient, whatever they hold.

    Returns:
      One value an example, `[...]`: average them, with `masked_mean(losses, where)` under padding.
    """
    log_student, log_teacher = log_softmax_pair(student_logits, teacher_logits, temperature, axis, where)
    return keep(temperature**2 * kl_divergence(log_teacher, log_student), where)


def soft_cross_entropy_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`soft_target_loss` as a cross-entropy: `-T^2 sum_i p_teacher,i log p_student,i`.

    The same gradient; larger than the divergence by `T^2` times the entropy of the soft targets. Arguments and result
    as in `soft_target_loss`.
    """
    log_student, log_teacher = log_softmax_pair(student_logits, teacher_logits, temperature, axis, where)
    return keep(-(temperature**2) * jnp.sum(jnp.exp(log_teacher) * log_student, axis=-1), where)


def hard_label_loss(
    student_logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Cross-entropy with integer labels at temperature 1, the other half of a distillation's total.

    Args:
      student_logits: `[..., classes]`.
      labels: `[...]`, class indices; where `where` is False anything, such as -100. Elsewhere a label that is no class
        (-1 too) gives NaN.
      axis: the class axis.
      where: which examples count, as in `soft_target_loss`.

    Returns:
      One value an example, `[...]`.
    """
    student = logits(student_logits, "student_logits", axis, where)
    labels = class_labels(labels, student.shape[:-1], student.shape[-1], where)
    return keep(-at_label(jax.nn.log_softmax(student), labels), where)


def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: Number = 0.9,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The total with hard labels: `alpha * soft_target_loss + (1 - alpha) * hard_label_loss`.

    Section 2 of Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015: hard labels at
    temperature 1, with the considerably lower weight.

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: the same shape; constant.
      labels: `[...]`, integer class indices.
      alpha: the weight of the soft targets, in [0, 1]; a number, or an array that broadcasts to the result.
      temperature: above 0.
      axis: the class axis.
      where: which examples count, as in `soft_target_loss`.

    Returns:
      One value an example, `[...]`.
    """
    check_between(alpha, 0.0, 1.0, "alpha")
    soft = soft_target_loss(student_logits, teacher_logits, temperature=temperature, axis=axis, where=where)
    hard = hard_label_loss(student_logits, labels, axis=axis, where=where)
    return alpha * soft + (1 - alpha) * hard


def weighted_distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    hard_weight: Number = 0.1,
    soft_weight: Number = 0.9,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The total with two free weights, `hard_weight` and `soft_weight`.

    `hard_weight * H(labels, p_student) + soft_weight * T^2 H(p_teacher, p_student)`, where `H` is the cross-entropy;
    hard labels at temperature 1, soft targets at `T`. The weights need not sum to 1. Its gradient with
    `hard_weight = 1 - a, soft_weight = a` is that of `distillation_loss(alpha=a)`. Shapes as there.
    """
    soft = soft_cross_entropy_loss(student_logits, teacher_logits, temperature=temperature, axis=axis, where=where)
    hard = hard_label_loss(student_logits, labels, axis=axis, where=where)
    return hard_weight * hard + soft_weight * soft


def soft_label_loss(
    student_logits: ArrayLike,
    targets: ArrayLike,
    *,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`soft_target_loss` against targets that are already probabilities, whatever made them.

    `T^2 KL(targets || p_student)` with the student at temperature `T`; the targets are taken as they are, so bring
    them to the same temperature first. For ensembles, refined and smoothed labels, and synthetic teachers.

    Args:
      student_logits: `[..., classes]`.
      targets: the same shape; not negative, summing to 1 over classes (not checked); constant.
      temperature: above 0, of the student.
      axis: the class axis.
      where: which examples count, as in `soft_target_loss`.

    Returns:
      One value an example, `[...]`.
    """
    check_positive(temperature, "temperature")
    student = logits(student_logits, "student_logits", axis, where)
    target = blank(jnp.moveaxis(constant(targets, "targets"), axis, -1), where)
    check_same_shape(student, target, "logits and targets")
    log_student = log_softmax(student, temperature)
    entropy_terms = jax.scipy.special.xlogy(target, target)
    return keep(temperature**2 * jnp.sum(entropy_terms - target * log_student, axis=-1), where)


def log_softmax_pair(
    student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: Number, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Both sides' log-probabilities at a temperature, class axis last, the teacher's constant."""
    check_positive(temperature, "temperature")
    student, teacher = logit_pair(student_logits, teacher_logits, axis, where)
    return log_softmax(student, temperature), log_softmax(teacher, temperature)
