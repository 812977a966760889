"""Teacher targets small enough to store: the k largest probabilities with the rest as one number, or a few samples.

Targets belong to one temperature: the tail at another cannot be had from them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._divergences import kl_divergence, log_softmax
from jaxcompress.distill._inputs import Number, check_positive, keep, logits
from jaxcompress.distill._topk import count, log_tail, selected


class TopKTargets(NamedTuple):
    """A teacher's `k` largest probabilities at one temperature; both floats may be stored in half precision.

    Attributes:
      indices: `[..., k]`, integer.
      log_probabilities: `[..., k]`, falling.
      log_tail: `[...]`, the logarithm of what all other classes weigh; -inf where there are none.
    """

    indices: jax.Array
    log_probabilities: jax.Array
    log_tail: jax.Array


class SampledTargets(NamedTuple):
    """Classes drawn from a teacher at one temperature, with the weights that make their loss unbiased.

    Attributes:
      indices: `[..., samples]`, integer, repeats included.
      weights: `[..., samples]`, summing to 1 in expectation.
    """

    indices: jax.Array
    weights: jax.Array


def _check_kind(targets: object, kind: type, makers: str) -> None:
    if not isinstance(targets, kind):
        raise TypeError(f"targets must be {kind.__name__}, as {makers} makes them; got {type(targets).__name__}")


def top_k_targets(teacher_logits: ArrayLike, k: int | float, *, temperature: Number = 1.0) -> TopKTargets:
    """The teacher's `k` most probable classes, to be stored.

    Args:
      teacher_logits: `[..., classes]`.
      k: how many classes; or, as a float in (0, 1), which share of them.
      temperature: above 0; the loss on them must use the same.

    Returns:
      `TopKTargets`.
    """
    check_positive(temperature, "temperature")
    log_p = jax.lax.stop_gradient(log_softmax(logits(teacher_logits, "teacher_logits"), temperature))
    few, indices = jax.lax.top_k(log_p, count(k, log_p.shape[-1]))
    return TopKTargets(indices, few, log_tail(log_p, selected(indices, log_p.shape[-1])))


def top_k_target_loss(
    student_logits: ArrayLike,
    targets: TopKTargets,
    *,
    temperature: Number = 1.0,
    tail: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`soft_target_loss` from stored top-k targets: `T^2 KL` over the `k` classes and, as one bucket, the rest.

    The bucket keeps the student's total on the `k` right and is the form with the smallest gradient error; without it
    (`tail=False`) both sides are renormalised over the `k`, which is biased. Equal to `top_k_loss(support="teacher")`
    on the full logits.

    Args:
      student_logits: `[..., classes]`.
      targets: `top_k_targets` of the teacher at this temperature; constant.
      temperature: above 0.
      tail: keep the rest as a bucket.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    check_positive(temperature, "temperature")
    _check_kind(targets, TopKTargets, "top_k_targets or a cache's top_k")
    log_student = log_softmax(logits(student_logits, "student_logits", where=where), temperature)
    if targets.indices.shape[:-1] != log_student.shape[:-1]:
        raise ValueError(
            f"targets must be [..., k] for student_logits {log_student.shape}, got indices {targets.indices.shape}"
        )
    few_student = jnp.take_along_axis(log_student, targets.indices, axis=-1)
    few_teacher = jax.lax.stop_gradient(targets.log_probabilities).astype(few_student.dtype)
    if tail and targets.indices.shape[-1] < log_student.shape[-1]:
        rest = log_tail(log_student, selected(targets.indices, log_student.shape[-1]))
        teacher_rest = jax.lax.stop_gradient(targets.log_tail).astype(few_student.dtype)
        few_student = jnp.concatenate([few_student, rest[..., None]], axis=-1)
        few_teacher = jnp.concatenate([few_teacher, teacher_rest[..., None]], axis=-1)
    elif not tail:
        few_student, few_teacher = jax.nn.log_softmax(few_student), jax.nn.log_softmax(few_teacher)
    return keep(temperature**2 * kl_divergence(few_teacher, few_student), where)


def sampled_targets(
    key: jax.Array,
    teacher_logits: ArrayLike,
    samples: int,
    *,
    temperature: Number = 1.0,
    proposal_temperature: Number | None = None,
) -> SampledTargets:
    """A few classes drawn from the teacher, such that the loss on them is right on average.

    Classes are drawn with replacement from the teacher at `proposal_temperature` and weighted by the ratio of its
    probabilities: Anshumann et al., "Sparse logit sampling: accelerating knowledge distillation in LLMs", 2025. Unlike
    top-k targets, whose lost tail biases the student, the expectation of `sampled_target_loss` and of its gradient is
    `soft_cross_entropy_loss`.

    Args:
      key: a random key.
      teacher_logits: `[..., classes]`.
      samples: how many draws, from 1; about 12 to 64 for language models.
      temperature: above 0, of the targets; the loss on them must use the same.
      proposal_temperature: above 0, of the distribution drawn from; by default `temperature`, all weights equal.

    Returns:
      `SampledTargets`.
    """
    check_positive(temperature, "temperature")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    teacher = jax.lax.stop_gradient(logits(teacher_logits, "teacher_logits"))
    log_p = log_softmax(teacher, temperature)
    if proposal_temperature is None:
        log_q = log_p
    else:
        check_positive(proposal_temperature, "proposal_temperature")
        log_q = log_softmax(teacher, proposal_temperature)
    draws = jax.random.categorical(key, log_q, shape=(samples, *log_q.shape[:-1]))
    indices = jnp.moveaxis(draws, 0, -1)
    log_ratio = jnp.take_along_axis(log_p - log_q, indices, axis=-1)
    return SampledTargets(indices, jnp.exp(log_ratio) / samples)


def sampled_target_loss(
    student_logits: ArrayLike,
    targets: SampledTargets,
    *,
    temperature: Number = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The cross-entropy of stored samples: `-T^2 sum_j w_j log p_student(i_j)`; on average `soft_cross_entropy_loss`.

    Args:
      student_logits: `[..., classes]`.
      targets: `sampled_targets` of the teacher at this temperature; constant.
      temperature: above 0.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    check_positive(temperature, "temperature")
    _check_kind(targets, SampledTargets, "sampled_targets")
    log_student = log_softmax(logits(student_logits, "student_logits", where=where), temperature)
    if targets.indices.shape[:-1] != log_student.shape[:-1]:
        raise ValueError(
            f"targets must be [..., samples] for student_logits {log_student.shape}, got {targets.indices.shape}"
        )
    weights = jax.lax.stop_gradient(targets.weights).astype(log_student.dtype)
    drawn = jnp.take_along_axis(log_student, targets.indices, axis=-1)
    return keep(-(temperature**2) * jnp.sum(weights * drawn, axis=-1), where)
