"""Distilling two-stage detectors.

Chen et al., "Learning efficient object detection models with knowledge distillation", 2017.
The same losses serve the proposal network (over anchors) and the classification head (over regions); pass the total
of each through `masked_mean` with the mask of its sampled anchors or regions. Hints between the two backbones are
`hint_loss` after a `conv_projector`, the paper's adaptation layer.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import (
    Number,
    as_float,
    check_between,
    check_not_negative,
    check_same_shape,
    constant,
    keep,
)
from jaxcompress.distill._safe import smooth_l1
from jaxcompress.distill._softmax import hard_label_loss, log_softmax_pair


def class_weighted_soft_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    class_weights: ArrayLike,
    *,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Soft cross-entropy with a weight a class: `-T^2 sum_c w_c p_teacher,c log p_student,c`.

    Chen et al. 2017, equation 3, against the imbalance of background and objects: the background's weight is larger
    (1.5 there), the others' 1.

    Args:
      student_logits: `[..., classes]`, of anchors or regions.
      teacher_logits: the same shape; constant.
      class_weights: `[classes]`, not negative.
      temperature: above 0; 1 in the paper.
      axis: the class axis.
      where: which anchors or regions count, in the shape of the result.

    Returns:
      One value an anchor or region, `[...]`.
    """
    log_student, log_teacher = log_softmax_pair(student_logits, teacher_logits, temperature, axis, where)
    check_not_negative(class_weights, "class_weights")
    weights = constant(class_weights, "class_weights")
    if weights.shape != log_student.shape[-1:]:
        raise ValueError(f"class_weights must have shape {log_student.shape[-1:]}, got {weights.shape}")
    return keep(-(temperature**2) * jnp.sum(weights * jnp.exp(log_teacher) * log_student, axis=-1), where)


def detection_class_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    hard_weight: Number = 0.5,
    background_weight: float = 1.5,
    background: int = 0,
    temperature: Number = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """A head's classification total: `mu * hard + (1 - mu) * class_weighted_soft_loss`: Chen et al. 2017, equation 2.

    Args:
      student_logits: `[..., classes]`, of anchors or regions.
      teacher_logits: the same shape; constant.
      labels: `[...]`, integer class indices.
      hard_weight: `mu`, in [0, 1].
      background_weight: the background's weight in the soft part, not negative; every other class has 1.
      background: its class index.
      temperature: above 0, of the soft part.
      where: which anchors or regions count, in the shape of the result.

    Returns:
      One value an anchor or region, `[...]`.
    """
    check_between(hard_weight, 0.0, 1.0, "hard_weight")
    check_not_negative(background_weight, "background_weight")
    classes = jnp.shape(student_logits)[-1]
    if not 0 <= background < classes:
        raise ValueError(f"background must be a class index from 0 to {classes - 1}, got {background}")
    weights = jnp.ones(classes).at[background].set(background_weight)
    soft = class_weighted_soft_loss(student_logits, teacher_logits, weights, temperature=temperature, where=where)
    return hard_weight * hard_label_loss(student_logits, labels, where=where) + (1 - hard_weight) * soft


def teacher_bounded_loss(
    student_boxes: ArrayLike,
    teacher_boxes: ArrayLike,
    targets: ArrayLike,
    *,
    margin: float = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The student's squared error, only where it isn't better than the teacher's by a margin.

    `|s - y|^2` if `|s - y|^2 + margin > |t - y|^2`, else 0: Chen et al. 2017, equation 4. The teacher's box is a bound
    to reach, not a target, since a regression's outputs may be wrong without limit.

    Args:
      student_boxes: `[..., 4]`, encoded box offsets.
      teacher_boxes: the same shape; constant.
      targets: the same shape, the true offsets; constant.
      margin: not below 0.
      where: which anchors or regions count (those matched to an object), in the shape of the result.

    Returns:
      One value an anchor or region, `[...]`.
    """
    if margin < 0:
        raise ValueError(f"margin must not be below 0, got {margin}")
    s, t, y = _boxes(student_boxes, teacher_boxes, targets, where)
    student_error, teacher_error = jnp.sum((s - y) ** 2, axis=-1), jnp.sum((t - y) ** 2, axis=-1)
    return keep(jnp.where(student_error + margin > teacher_error, student_error, 0), where)


def detection_box_loss(
    student_boxes: ArrayLike,
    teacher_boxes: ArrayLike,
    targets: ArrayLike,
    *,
    bound_weight: Number = 0.5,
    margin: float = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """A head's regression total: `smooth L1(s - y) + nu * teacher_bounded_loss`: Chen et al. 2017, equation 4.

    Args and result as in `teacher_bounded_loss`; `bound_weight` is `nu`, 0.5 in the paper. The smooth L1 sums over the
    four offsets.
    """
    s, _, y = _boxes(student_boxes, teacher_boxes, targets, where)
    bounded = teacher_bounded_loss(student_boxes, teacher_boxes, targets, margin=margin, where=where)
    return keep(jnp.sum(smooth_l1(s - y), axis=-1), where) + bound_weight * bounded


def _boxes(
    student: ArrayLike, teacher: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    s, t, y = as_float(student, "student_boxes"), constant(teacher, "teacher_boxes"), constant(targets, "targets")
    check_same_shape(s, t, "boxes")
    check_same_shape(s, y, "boxes and targets")
    if where is None:
        return s, t, y
    counts = jnp.asarray(where, bool)[..., None]
    return jnp.where(counts, s, 0), jnp.where(counts, t, 0), jnp.where(counts, y, 0)
