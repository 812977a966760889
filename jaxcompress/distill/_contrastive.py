"""Contrastive distillation: tell the teacher's view of the same example from its views of others."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import (
    Number,
    as_float,
    check_positive,
    check_rank,
    check_same_shape,
    constant,
    keep,
    mask_of,
)
from jaxcompress.distill._projectors import Projector, dense_projector
from jaxcompress.distill._safe import unit


def contrastive_heads(student_features: int, teacher_features: int, dimensions: int = 128) -> Projector:
    """The two learned embeddings of CRD: a linear map to `dimensions` and unit norm, for each side.

    Tian, Krishnan and Isola, "Contrastive representation distillation", 2020, section 3. Both heads learn; no gradient
    reaches the teacher's features behind its head.

    Args:
      student_features: the last axis of the student's features.
      teacher_features: of the teacher's.
      dimensions: of the embeddings.

    Returns:
      A `Projector`: `init(key)` gives `{"student": ..., "teacher": ...}`, `apply(params, (student, teacher))` the
      two embeddings `[batch, dimensions]`.
    """
    heads = {
        "student": dense_projector(student_features, dimensions),
        "teacher": dense_projector(teacher_features, dimensions),
    }

    def init(key: jax.Array) -> Any:
        return {name: head.init(k) for (name, head), k in zip(heads.items(), jax.random.split(key), strict=True)}

    def apply(params: Any, features: Any) -> Any:
        student, teacher = features
        return (
            unit(heads["student"].apply(params["student"], as_float(student, "student"))),
            unit(heads["teacher"].apply(params["teacher"], constant(teacher, "teacher"))),
        )

    return Projector(init, apply)


class ContrastMemory(NamedTuple):
    """CRD's state: every example's last embeddings, and the logarithms of the constants that normalise the scores.

    Attributes:
      student: `[examples, dimensions]`, float32, unit rows once visited.
      teacher: `[examples, dimensions]`, likewise.
      student_log_constant: scalar, -inf until the first call sets it.
      teacher_log_constant: scalar, likewise.
    """

    student: jax.Array
    teacher: jax.Array
    student_log_constant: jax.Array
    teacher_log_constant: jax.Array


def contrast_memory(key: jax.Array, examples: int, dimensions: int = 128) -> ContrastMemory:
    """A fresh memory for a training set of `examples`: small uniform noise, constants not yet set."""
    bound = 1 / math.sqrt(dimensions / 3)
    student, teacher = (
        jax.random.uniform(k, (examples, dimensions), minval=-bound, maxval=bound) for k in jax.random.split(key)
    )
    return ContrastMemory(student, teacher, jnp.full((), -jnp.inf), jnp.full((), -jnp.inf))


def contrast_loss(scores: ArrayLike, examples: int, *, epsilon: float = 1e-7) -> jax.Array:
    """Noise-contrastive loss: was this pair drawn together (the first column) or apart (the others)?

    With `x = exp(score)` and `c = K / examples` for `K` negatives: `-log(x_0 / (x_0 + c + epsilon)) - sum_k log(c /
    (x_k + c + epsilon))`, Tian, Krishnan and Isola, "Contrastive representation distillation", 2020.

    Args:
      scores: `[batch, 1 + K]`, logarithms of unnormalised ratios, the positive pair first.
      examples: in the training set, from which negatives are drawn.
      epsilon: above 0.

    Returns:
      One value an example, `[batch]`.
    """
    scores = as_float(scores, "scores")
    check_rank(scores, 2, "scores", "[batch, 1 + negatives]")
    negatives = scores.shape[1] - 1
    if negatives < 1:
        raise ValueError("contrast_loss needs at least one negative: scores must be [batch, 1 + negatives]")
    check_positive(examples, "examples")
    noise = negatives / examples
    log_together = jnp.logaddexp(scores, math.log(noise + epsilon))
    positive = scores[:, 0] - log_together[:, 0]
    return -positive - jnp.sum(math.log(noise) - log_together[:, 1:], axis=1)


def contrastive_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    memory: ContrastMemory,
    indices: ArrayLike,
    contrast_indices: ArrayLike,
    *,
    temperature: float = 0.07,
    momentum: float = 0.5,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, ContrastMemory]:
    """CRD: each side's embedding against the other side's memory of the same example and of `K` others.

    Tian, Krishnan and Isola, "Contrastive representation distillation", 2020. The first call sets
    the normalising constants from its own scores; they then stay. The memory is plain state: give it in, take it out,
    keep it with the training state.

    Args:
      student: `[batch, dimensions]`, of unit norm, from `contrastive_heads`.
      teacher: the same shape. Unlike elsewhere gradients flow here, to the teacher's head.
      memory: a `ContrastMemory`.
      indices: `[batch]`, the examples' places in the training set.
      contrast_indices: `[batch, 1 + K]`, each row the example's own place and then the negatives'.
      temperature: above 0.
      momentum: how much of an old memory row stays.
      where: `[batch]`, which examples count; the others give 0, and the memory does not learn of them.

    Returns:
      One value an example, `[batch]`, and the memory after this batch.
    """
    check_positive(temperature, "temperature")
    student, teacher = as_float(student, "student"), as_float(teacher, "teacher")
    check_same_shape(student, teacher, "embeddings")
    examples, mask = memory.student.shape[0], mask_of(where, len(student))
    student, teacher = (jnp.where(mask[:, None], x, 0) for x in (student, teacher))
    indices, contrast_indices = jnp.where(mask, indices, examples), jnp.where(mask[:, None], contrast_indices, 0)
    memory = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, memory))
    student_scores, student_constant = _scores(
        student, memory.teacher[contrast_indices], memory.student_log_constant, temperature, examples, mask
    )
    teacher_scores, teacher_constant = _scores(
        teacher, memory.student[contrast_indices], memory.teacher_log_constant, temperature, examples, mask
    )
    losses = contrast_loss(student_scores, examples) + contrast_loss(teacher_scores, examples)
    after = ContrastMemory(
        _updated(memory.student, indices, student, momentum),
        _updated(memory.teacher, indices, teacher, momentum),
        student_constant,
        teacher_constant,
    )
    return keep(losses, where), after


def _scores(
    embedding: jax.Array,
    others: jax.Array,
    log_constant: jax.Array,
    temperature: float,
    examples: int,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    scores = jnp.einsum("bkd,bd->bk", others, embedding) / temperature
    counted = jnp.where(mask[:, None], jax.lax.stop_gradient(scores), -jnp.inf)
    share = jnp.maximum(jnp.sum(mask), 1) * scores.shape[1] / examples
    first = jax.nn.logsumexp(counted) - jnp.log(share)  # -inf where no example counts: a later call sets it
    log_constant = jnp.where(log_constant > -jnp.inf, log_constant, first)
    return scores - jnp.where(log_constant > -jnp.inf, log_constant, 0), log_constant


def _updated(memory: jax.Array, indices: ArrayLike, embedding: jax.Array, momentum: float) -> jax.Array:
    embedding = jax.lax.stop_gradient(embedding)
    moved = unit(momentum * memory.at[indices].get(mode="fill", fill_value=0) + (1 - momentum) * embedding)
    return memory.at[indices].set(moved, mode="drop")  # a masked example's index lies behind the memory's end


def in_batch_contrastive_loss(
    student: ArrayLike, teacher: ArrayLike, *, temperature: Number = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    """Contrastive distillation without a memory: the batch's other examples are the negatives.

    `-log softmax_j(cos(s_i, t_j) / T)` at `j = i`, the InfoNCE bound of van den Oord et al. (2018) between student and
    teacher. At least `log(batch)` minus the information that the two share.

    Args:
      student: `[batch, dimensions]`, projected to the teacher's dimensions; any norm.
      teacher: the same shape; constant.
      temperature: above 0.
      where: `[batch]`, which examples count, as an example and as a negative.

    Returns:
      One value an example, `[batch]`; 0 for a batch of one.
    """
    check_positive(temperature, "temperature")
    student, teacher = as_float(student, "student"), constant(teacher, "teacher")
    check_rank(student, 2, "student", "[batch, dimensions]")
    check_same_shape(student, teacher, "embeddings")
    mask = mask_of(where, len(student))
    student, teacher = (jnp.where(mask[:, None], x, 0) for x in (student, teacher))
    scores = unit(student) @ unit(teacher).T / temperature
    scores = jnp.where(mask | jnp.eye(len(scores), dtype=bool), scores, -jnp.inf)
    return keep(-jnp.diagonal(jax.nn.log_softmax(scores)), where)
