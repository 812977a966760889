"""Distilling transformers layer by layer: TinyBERT's losses, its layer maps and its two phases.

Jiao et al., "TinyBERT: distilling BERT for natural language understanding", 2020. The embedding's output is layer 0
of the hidden states; the prediction layer's loss (equation 10) is `soft_cross_entropy_loss` on the logits.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import as_float, check_rank, check_same_shape, constant


def hidden_state_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The mean square of the difference of two layers' hidden states.

    Jiao et al., "TinyBERT", 2020, equations 8 (hidden) and 9 (embeddings). Project a narrower student first,
    with one learned `dense_projector` (312 to 768) for all layers.

    Args:
      student: `[batch, tokens, features]`, projected.
      teacher: the same shape; constant.
      where: `[batch, tokens]`, the tokens that are not padding.

    Returns:
      One value an example, `[batch]`: the mean over its tokens that count.
    """
    s, t = as_float(student, "student"), constant(teacher, "teacher")
    check_rank(s, 3, "student", "[batch, tokens, features]")
    check_same_shape(s, t, "hidden states")
    return _masked_mean_square(s, t, None if where is None else jnp.asarray(where, bool)[:, :, None])


def attention_matrix_loss(
    student: ArrayLike, teacher: ArrayLike, *, masked_below: float = -1e2, where: ArrayLike | None = None
) -> jax.Array:
    """The mean square of the difference of two layers' attention scores, before the softmax.

    Jiao et al., "TinyBERT", 2020, equation 7.

    Args:
      student: `[batch, heads, tokens, tokens]`.
      teacher: the same shape; constant.
      masked_below: scores up to this mark masked positions and count as 0 on either side, as in the authors' code.
      where: `[batch, tokens]`, the tokens that are not padding; a pair counts where both do.

    Returns:
      One value an example, `[batch]`.
    """
    s, t = as_float(student, "student"), constant(teacher, "teacher")
    check_rank(s, 4, "student", "[batch, heads, tokens, tokens]")
    check_same_shape(s, t, "attention scores")
    s, t = (jnp.where(x <= masked_below, 0, x) for x in (s, t))
    if where is None:
        return _masked_mean_square(s, t, None)
    where = jnp.asarray(where, bool)
    return _masked_mean_square(s, t, (where[:, :, None] & where[:, None, :])[:, None])


def _masked_mean_square(s: jax.Array, t: jax.Array, where: jax.Array | None) -> jax.Array:
    axes = tuple(range(1, s.ndim))
    if where is None:
        return jnp.mean((s - t) ** 2, axis=axes)
    where = jnp.broadcast_to(where, s.shape)
    difference = jnp.where(where, s, 0) - jnp.where(where, t, 0)
    return jnp.sum(difference**2, axis=axes) / jnp.maximum(jnp.sum(where, axis=axes), 1)


def uniform_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Which teacher layer each student layer learns from, evenly: `g(m) = m * teacher_layers / student_layers`.

    Section 4.1. Layer 0 is the embedding, so the map has `student_layers + 1` entries: `(0, 3, 6, 9, 12)` for 4 of 12.

    Raises:
      ValueError: the student's layers don't divide the teacher's; give a map of your own.
    """
    if student_layers < 1 or teacher_layers % student_layers:
        raise ValueError(
            f"a uniform map needs the student's layers to divide the teacher's, got {student_layers} and "
            f"{teacher_layers}; give a layer map such as (0, 2, 5, 8)"
        )
    return tuple(range(0, teacher_layers + 1, teacher_layers // student_layers))


class LayerOutputs(NamedTuple):
    """What an encoder's layers put out.

    Attributes:
      hidden: `layers + 1` of `[batch, tokens, features]`, the embedding's first.
      attention: `layers` of `[batch, heads, tokens, tokens]`, scores before the softmax.
    """

    hidden: Sequence[ArrayLike]
    attention: Sequence[ArrayLike]


def intermediate_loss(
    student: LayerOutputs,
    teacher: LayerOutputs,
    *,
    project: Callable[[jax.Array], jax.Array] = lambda x: x,
    layer_map: Sequence[int] | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The first phase's total: hidden states of the embedding and of every layer, and every layer's attention.

    The sum over the student's layers of equation 11's terms (Jiao et al., "TinyBERT", 2020), with weights 1.

    Args:
      student: its `LayerOutputs`.
      teacher: its `LayerOutputs`; constant.
      project: from the student's hidden states to the teacher's width, shared by all layers:
        `functools.partial(projector.apply, params)`.
      layer_map: the teacher's layer for each entry of `student.hidden`, rising; uniform by default.
      where: `[batch, tokens]`, the tokens that are not padding.

    Returns:
      One value an example, `[batch]`.
    """
    layer_map = _checked_map(layer_map, len(student.attention), len(teacher.attention))
    for side, outputs in (("student", student), ("teacher", teacher)):
        if len(outputs.hidden) != len(outputs.attention) + 1:
            raise ValueError(
                f"{side} must have one hidden state more than attention matrices (the embedding's, first), got "
                f"{len(outputs.hidden)} and {len(outputs.attention)}"
            )
    total = jnp.zeros((), jnp.float32)
    for m, g in enumerate(layer_map):
        ours = project(as_float(student.hidden[m], "student"))
        total += hidden_state_loss(ours, teacher.hidden[g], where=where)
        if m > 0:
            total += attention_matrix_loss(student.attention[m - 1], teacher.attention[g - 1], where=where)
    return total


def _checked_map(layer_map: Sequence[int] | None, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    if layer_map is None:
        return uniform_layer_map(student_layers, teacher_layers)
    given = tuple(layer_map)
    rising = all(a < b for a, b in itertools.pairwise(given))
    if len(given) != student_layers + 1 or given[0] != 0 or not rising or given[-1] > teacher_layers:
        raise ValueError(
            f"layer_map must start with 0 (the embedding) and rise through {student_layers} layers up to at most "
            f"{teacher_layers}, got {given}"
        )
    return given


class Phase(NamedTuple):
    """One stretch of a transformer's distillation: on which text, under which teacher, with which losses."""

    name: str
    text: str  # "general" or "task"
    teacher: str  # "pretrained" or "fine-tuned"
    intermediate_weight: float
    prediction_weight: float


TINYBERT_PHASES = (
    Phase("general", "general", "pretrained", 1.0, 0.0),
    Phase("task, intermediate layers", "task", "fine-tuned", 1.0, 0.0),
    Phase("task, prediction layer", "task", "fine-tuned", 0.0, 1.0),
)
"""The recipe of section 3.2: general distillation, then task-specific, intermediate layers first, prediction after."""


def phase_loss(phase: Phase, intermediate: Callable[[], jax.Array], prediction: Callable[[], jax.Array]) -> jax.Array:
    """The phase's weighted total; a part of weight 0 is not computed at all.

    Args:
      phase: one of `TINYBERT_PHASES`, or your own.
      intermediate: gives `intermediate_loss(...)`.
      prediction: gives `soft_cross_entropy_loss(...)`.

    Returns:
      One value an example, `[batch]`.
    """
    parts = ((phase.intermediate_weight, intermediate), (phase.prediction_weight, prediction))
    used = [weight * part() for weight, part in parts if weight]
    if not used:
        raise ValueError(f"phase {phase.name!r} has no loss: both its weights are 0")
    return sum(used[1:], used[0])
