"""Distillation without a trained teacher: smoothed labels, a virtual teacher, and teachers that isolate one effect."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import (
    Number,
    as_float,
    at_label,
    check_between,
    check_positive,
    check_rank,
    check_same_shape,
    class_labels,
    constant,
    keep,
    logits,
    one_hot,
)
from jaxcompress.distill._safe import unit
from jaxcompress.distill._softmax import hard_label_loss, log_softmax_pair, soft_label_loss


def smooth_labels(
    labels: ArrayLike, classes: int, epsilon: Number = 0.1, *, onto_wrong_only: bool = False
) -> jax.Array:
    """One-hot labels with `epsilon` of their mass spread evenly.

    Szegedy et al., "Rethinking the Inception architecture", 2016, section 7: over all classes, so the label keeps
    `1 - epsilon + epsilon / classes`. With `onto_wrong_only` the mass goes to the other classes and the label keeps
    `1 - epsilon`, as Yuan et al. (2020) write it.

    Args:
      labels: `[...]`, integer class indices; one that is no class gives NaN.
      classes: their number, at least 2.
      epsilon: in [0, 1].
      onto_wrong_only: which of the two conventions.

    Returns:
      Probabilities, `[..., classes]`, float32.
    """
    check_between(epsilon, 0.0, 1.0, "epsilon")
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    hard = one_hot(class_labels(labels, jnp.shape(labels), classes), classes)
    if onto_wrong_only:
        return (1 - epsilon) * hard + epsilon / (classes - 1) * (1 - hard)
    return (1 - epsilon) * hard + epsilon / classes


def label_smoothing_loss(
    student_logits: ArrayLike,
    labels: ArrayLike,
    epsilon: Number = 0.1,
    *,
    onto_wrong_only: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with smoothed labels, `-sum_i u_i log p_student,i`, `u = smooth_labels(labels, epsilon)`.

    Args:
      student_logits: `[..., classes]`.
      labels: `[...]`, integer class indices.
      epsilon: the mass that leaves the label, in [0, 1].
      onto_wrong_only: see `smooth_labels`.
      axis: the class axis.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    student = logits(student_logits, "student_logits", axis, where)
    labels = class_labels(labels, student.shape[:-1], student.shape[-1], where)
    target = smooth_labels(labels, student.shape[-1], epsilon, onto_wrong_only=onto_wrong_only)
    return keep(-jnp.sum(target * jax.nn.log_softmax(student), axis=-1), where)


def virtual_teacher(
    labels: ArrayLike, classes: int, correct_probability: Number = 0.99, *, temperature: Number = 20.0
) -> jax.Array:
    """The soft targets of a teacher that is designed, not trained, and never wrong.

    `correct_probability` on the label, the rest even over the others, then softened: Yuan et al., "Revisiting
    knowledge distillation via label smoothing regularization", 2020, equation 8. As there, the softmax at the
    temperature acts on these probabilities, not on their logarithms.

    Args:
      labels: `[...]`, integer class indices.
      classes: their number, at least 2.
      correct_probability: in [0, 1]; the paper has 0.9 and above.
      temperature: above 0.

    Returns:
      Probabilities, `[..., classes]`.
    """
    check_between(correct_probability, 0.0, 1.0, "correct_probability")
    check_positive(temperature, "temperature")
    sharp = smooth_labels(labels, classes, 1 - correct_probability, onto_wrong_only=True)
    return jax.nn.softmax(sharp / temperature)


def teacher_free_loss(
    student_logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: Number = 0.1,
    temperature: Number = 20.0,
    correct_probability: Number = 0.99,
    student_temperature: Number | None = None,
    multiplier: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Teacher-free distillation by regularisation: a virtual teacher in a trained one's place.

    `(1 - alpha) H(labels, p) + alpha * multiplier * KL(virtual_teacher || p_student)`: Yuan et al., "Revisiting
    knowledge distillation via label smoothing regularization", 2020, equation 9, student and teacher at one
    temperature. As in the paper there is *no* factor `T^2` here. The authors' code has the student at temperature 1
    (`student_temperature=1`) and a multiplier. (The paper's other form, self-training, is `distillation_loss` with a
    trained copy of the student as the teacher.)

    Args:
      student_logits: `[..., classes]`.
      labels: `[...]`, integer class indices.
      alpha: the weight of the virtual teacher, in [0, 1].
      temperature: above 0, of the virtual teacher.
      correct_probability: see `virtual_teacher`.
      student_temperature: above 0; by default `temperature`.
      multiplier: a further factor on the divergence.
      axis: the class axis.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    check_between(alpha, 0.0, 1.0, "alpha")
    student_temperature = temperature if student_temperature is None else student_temperature
    check_positive(student_temperature, "student_temperature")
    student = logits(student_logits, "student_logits", axis, where)
    labels = class_labels(labels, student.shape[:-1], student.shape[-1], where)
    target = virtual_teacher(labels, student.shape[-1], correct_probability, temperature=temperature)
    divergence = soft_label_loss(student, target, temperature=student_temperature, where=where) / student_temperature**2
    return (1 - alpha) * hard_label_loss(student, labels, where=where) + alpha * multiplier * divergence


def reweighting_teacher(teacher_probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """A synthetic teacher that keeps only how sure the teacher is of the right class.

    The teacher's probability of the label, the rest even over the other classes: what is left is the re-weighting of
    examples, with no similarity of classes in it ("KD-pt" in Tang et al., "Understanding and improving knowledge
    distillation", 2020).

    Args:
      teacher_probabilities: `[..., classes]`, for example `temperature_softmax(teacher_logits, T)`.
      labels: `[...]`, integer class indices.

    Returns:
      Probabilities, `[..., classes]`, for `soft_label_loss`.
    """
    p = constant(teacher_probabilities, "teacher_probabilities")
    labels = class_labels(labels, p.shape[:-1], p.shape[-1])
    correct = at_label(p, labels)[..., None]
    hard = one_hot(labels, p.shape[-1], p.dtype)
    return correct * hard + (1 - correct) / max(p.shape[-1] - 1, 1) * (1 - hard)


def class_similarity_teacher(
    class_weights: ArrayLike, labels: ArrayLike, *, sharpness: Number = 1.0, confidence: Number | None = None
) -> jax.Array:
    """A synthetic teacher that keeps only which classes the teacher finds alike.

    For an example of class `c` the soft target is `softmax(sharpness * cos(w_c, w_i))` over classes `i`, with `w_i`
    the teacher's last-layer weights of class `i`: the same for all examples of a class, so nothing about the single
    example is left ("KD-sim" in Tang et al., "Understanding and improving knowledge distillation", 2020).
    `sharpness` is one over a temperature, which is the same as a power of the softmax. With `confidence` the label's
    probability is set to it and the others share the rest in proportion.

    Args:
      class_weights: `[features, classes]`, the kernel of the teacher's output layer.
      labels: `[...]`, integer class indices.
      sharpness: above 0.
      confidence: in [0, 1], or None.

    Returns:
      Probabilities, `[..., classes]`, for `soft_label_loss`.
    """
    check_positive(sharpness, "sharpness")
    weights = constant(class_weights, "class_weights")
    check_rank(weights, 2, "class_weights", "[features, classes]")
    classes = weights.shape[1]
    labels = class_labels(labels, jnp.shape(labels), classes)
    directions = unit(weights, axis=0)
    scores = sharpness * (directions.T @ directions)
    hard = jnp.eye(classes, dtype=scores.dtype)
    if confidence is None:
        targets = jax.nn.softmax(scores)
    else:
        check_between(confidence, 0.0, 1.0, "confidence")
        others = jax.nn.softmax(jnp.where(hard, -jnp.inf, scores))  # of the scores: the shares themselves underflow
        targets = confidence * hard + (1 - confidence) * others
    return jnp.take(targets, labels, axis=0, mode="fill", fill_value=jnp.nan)


def gradient_rescaling_factor(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: Number = 0.9,
    temperature: Number = 1.0,
) -> jax.Array:
    """By how much distillation rescales an example's gradient, against hard labels alone: a diagnostic.

    The ratio of the two gradients on the label's own logit, `(1 - alpha) + alpha T (q_T - p_T) / (q - 1)`, where `q`
    is the student's probability of the label at temperature 1, `q_T` and `p_T` the student's and the teacher's at `T`:
    Tang et al., "Understanding and improving knowledge distillation", 2020, for the total
    `distillation_loss`. Where the student has no doubt left (`q = 1` in floating point) both gradients vanish, and
    the factor is given as `1 - alpha`.

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: the same shape.
      labels: `[...]`, integer class indices.
      alpha: the weight of the soft targets.
      temperature: above 0.

    Returns:
      One factor an example, `[...]`; below 1 the teacher calms the example, above 1 it stresses it.
    """
    soft = log_softmax_pair(student_logits, teacher_logits, temperature, -1, None)
    student = jax.nn.softmax(as_float(student_logits, "student_logits"))
    check_same_shape(student, soft[0], "logits")
    labels = class_labels(labels, student.shape[:-1], student.shape[-1])
    hard = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)
    doubt = jnp.sum(jnp.where(hard, 0, student), axis=-1)  # 1 - q without cancellation
    soft_gradient = temperature * (at_label(jnp.exp(soft[1]), labels) - at_label(jnp.exp(soft[0]), labels))
    return (1 - alpha) + alpha * jnp.where(doubt > 0, soft_gradient / jnp.where(doubt > 0, doubt, 1), 0)
