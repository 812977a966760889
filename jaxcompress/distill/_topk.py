"""Soft targets on few classes: the k largest, with the rest renormalised away or kept as one bucket."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._divergences import generalized_jensen_shannon
from jaxcompress.distill._inputs import Number, check_between, keep
from jaxcompress.distill._softmax import log_softmax_pair


def top_k_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    k: int | float,
    *,
    tail: bool = True,
    support: str = "teacher",
    beta: float = 0.0,
    temperature: Number = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Soft targets on the `k` most probable classes only, times `T^2`.

    With `tail` the other classes form one bucket, so no probability is lost; without it both sides are renormalised
    over the `k`. Tang et al., "Understanding and improving knowledge distillation", 2020 ("KD-topk", with
    25% and 50% of the classes: `k=0.25`).

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: the same shape; constant.
      k: how many classes, from 1; or, as a float in (0, 1), which share of them, at least one.
      tail: keep the rest as a bucket.
      support: whose `k` most probable classes, `"teacher"`'s or `"student"`'s.
      beta: 0 for the forward KL, 1 for the reverse, between them as in `jensen_shannon_loss`.
      temperature: above 0.
      axis: the class axis.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    check_between(beta, 0.0, 1.0, "beta")
    if support not in ("teacher", "student"):
        raise ValueError(f"support must be 'teacher' or 'student', got {support!r}")
    log_student, log_teacher = log_softmax_pair(student_logits, teacher_logits, temperature, axis, where)
    classes = log_student.shape[-1]
    k = count(k, classes)
    ranking = log_teacher if support == "teacher" else jax.lax.stop_gradient(log_student)
    _, indices = jax.lax.top_k(ranking, k)
    chosen = selected(indices, classes)
    few_student, few_teacher = (
        _restrict(log_p, indices, chosen, tail and k < classes) for log_p in (log_student, log_teacher)
    )
    return keep(temperature**2 * generalized_jensen_shannon(few_student, few_teacher, beta), where)


def count(k: int | float, classes: int) -> int:
    """`k` as a number of classes: itself, or the share of them that a float in (0, 1) means."""
    number = max(1, round(k * classes)) if isinstance(k, float) and 0 < k < 1 else k
    if int(number) != number or not 1 <= number <= classes:
        raise ValueError(f"k must be a whole number from 1 to {classes} (the classes) or a share in (0, 1), got {k}")
    return int(number)


def selected(indices: jax.Array, classes: int) -> jax.Array:
    """A mask `[..., classes]` of the classes that `indices` `[..., k]` name."""
    nothing = jnp.zeros((*indices.shape[:-1], classes), bool)
    return jnp.put_along_axis(nothing, indices, True, axis=-1, inplace=False)


def log_tail(log_p: jax.Array, chosen: jax.Array) -> jax.Array:
    """The logarithm of what the classes outside `chosen` weigh together, without cancellation."""
    return jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, log_p), axis=-1)


def _restrict(log_p: jax.Array, indices: jax.Array, chosen: jax.Array, tail: bool) -> jax.Array:
    few = jnp.take_along_axis(log_p, indices, axis=-1)
    if tail:
        return jnp.concatenate([few, log_tail(log_p, chosen)[..., None]], axis=-1)
    return jax.nn.log_softmax(few)
