"""Distillation at a language model's vocabulary without ever holding all logits.

Logits of `tokens x vocabulary` for student and teacher, and their gradients, are most of such a step's memory. Here a
few tokens at a time go through both heads, and the gradients are made on the way, while the chunk's logits are at hand:
memory falls to one chunk and one float32 gradient of the head, at no more matmuls than the plain loss.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import Number, check_between, check_positive, check_rank, varying_as
from jaxcompress.distill._logits import jensen_shannon_loss
from jaxcompress.distill._softmax import hard_label_loss


class _Tokens(NamedTuple):
    """What each token brings; in the scan, a chunk of them."""

    student: jax.Array  # [tokens, student features]
    teacher: jax.Array  # [tokens, teacher features]
    labels: jax.Array  # [tokens]
    where: jax.Array  # [tokens]


def fused_distillation_loss(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    alpha: Number = 1.0,
    beta: float = 0.0,
    temperature: Number = 1.0,
    where: ArrayLike | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """The mean of `distillation_loss` over tokens, from hidden states and output heads, chunk by chunk.

    `masked_mean(alpha * soft + (1 - alpha) * hard, where)` on the logits `hidden @ head`, with
    `soft = jensen_shannon_loss(beta)` (the forward KL of soft targets by default) and `hard = hard_label_loss`. The
    method of Hsu et al., "Liger kernel: efficient Triton kernels for LLM training", 2024, section 3.2. Sums over chunks
    are float32 whatever the head's dtype. Where no gradient is asked for none is computed.

    Unlike the losses on examples this returns the mean itself: the gradients are made before the cotangent is known, so
    there can be only one. Reverse-mode differentiation only, with respect to the student's two arrays.

    Args:
      student_hidden: `[tokens, student features]`, any leading axes flattened into tokens beforehand.
      student_head: `[student features, vocabulary]`; transpose a tied embedding.
      teacher_hidden: `[tokens, teacher features]`; constant.
      teacher_head: `[teacher features, vocabulary]`; constant.
      labels: `[tokens]`, integer; needed unless `alpha` is 1. Where `where` is False anything, such as -100.
      alpha: the weight of the soft targets, in [0, 1].
      beta: a Python number in [0, 1], see `jensen_shannon_loss`.
      temperature: above 0.
      where: `[tokens]`, which tokens count.
      chunk: tokens at a time; by default 128 on CPU and 2048 on accelerators.

    Returns:
      A scalar.
    """
    check_between(alpha, 0.0, 1.0, "alpha")
    check_between(beta, 0.0, 1.0, "beta")
    check_positive(temperature, "temperature")
    student, teacher = jnp.asarray(student_hidden), jax.lax.stop_gradient(jnp.asarray(teacher_hidden))
    heads = jnp.asarray(student_head), jax.lax.stop_gradient(jnp.asarray(teacher_head))
    _check_shapes(student, teacher, *heads)
    if labels is None and not (isinstance(alpha, int | float) and alpha == 1):
        raise ValueError("labels are needed unless alpha is 1 (soft targets alone)")
    count = student.shape[0]
    if where is not None:  # nothing that padding holds may reach the heads' gradient
        student, teacher = (jnp.where(jnp.asarray(where, bool)[:, None], x, 0) for x in (student, teacher))
    tokens = _Tokens(
        student,
        teacher,
        jnp.zeros(count, int) if labels is None else jnp.asarray(labels),
        jnp.ones(count, bool) if where is None else jnp.asarray(where, bool),
    )
    if tokens.labels.shape != (count,) or tokens.where.shape != (count,):
        raise ValueError(
            f"labels and where must be [tokens], [{count}]; got {tokens.labels.shape}, {tokens.where.shape}"
        )
    if chunk is None:
        chunk = 128 if jax.default_backend() == "cpu" else 2048
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    chunk = max(1, min(chunk, count))
    weights = jnp.asarray(alpha, jnp.float32), jnp.asarray(temperature, jnp.float32)
    tokens, heads, weights = varying_as((tokens, heads, weights), (tokens, heads, weights))
    return _mean_loss(beta, labels is not None, chunk, tokens, heads, weights)


def _check_shapes(student: jax.Array, teacher: jax.Array, student_head: jax.Array, teacher_head: jax.Array) -> None:
    names = ("student_hidden", "teacher_hidden", "student_head", "teacher_head")
    layouts = ("[tokens, features]", "[tokens, features]", "[features, vocabulary]", "[features, vocabulary]")
    for x, name, layout in zip((student, teacher, student_head, teacher_head), names, layouts, strict=True):
        check_rank(x, 2, name, layout)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating array, got {x.dtype}")
    fits = student.shape[0] == teacher.shape[0] and student_head.shape[1] == teacher_head.shape[1]
    if not fits or student.shape[1] != student_head.shape[0] or teacher.shape[1] != teacher_head.shape[0]:
        raise ValueError(
            "hidden [tokens, features] and head [features, vocabulary] must fit, with one number of tokens and one "
            f"vocabulary; got student {student.shape} @ {student_head.shape}, teacher {teacher.shape} @ "
            f"{teacher_head.shape}"
        )


_Heads = tuple[jax.Array, jax.Array]
_Weights = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mean_loss(beta: float, hard: bool, chunk: int, tokens: _Tokens, heads: _Heads, weights: _Weights) -> jax.Array:
    def step(total: jax.Array, part: _Tokens) -> tuple[jax.Array, None]:
        return total + _chunk_loss(_logits(part.student, heads[0]), part, heads[1], beta, hard, weights), None

    total, _ = jax.lax.scan(step, varying_as(jnp.zeros((), jnp.float32), tokens), _chunks(tokens, chunk))
    return total / _divisor(tokens)


def _forward(
    beta: float, hard: bool, chunk: int, tokens: _Tokens, heads: _Heads, weights: _Weights
) -> tuple[jax.Array, Any]:
    """The loss and, as residuals, its gradients for the student's hidden states and head."""
    divisor = _divisor(tokens)

    def step(carry: tuple[jax.Array, jax.Array], part: _Tokens) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, head_gradient = carry
        of_logits = functools.partial(
            _chunk_loss, part=part, teacher_head=heads[1], beta=beta, hard=hard, weights=weights
        )
        loss, gradient = jax.value_and_grad(of_logits)(_logits(part.student, heads[0]))
        gradient = (gradient / divisor).astype(heads[0].dtype)
        head_gradient += _dot(part.student, gradient, 0, 0)
        hidden_gradient = _dot(gradient, heads[0], 1, 1).astype(part.student.dtype)
        return (total + loss, head_gradient), hidden_gradient

    start = jnp.zeros((), jnp.float32), jnp.zeros(heads[0].shape, jnp.float32)
    start = varying_as(start, tokens)
    (total, head_gradient), hidden_gradient = jax.lax.scan(step, start, _chunks(tokens, chunk))
    hidden_gradient = hidden_gradient.reshape(-1, tokens.student.shape[1])[: tokens.student.shape[0]]
    return total / divisor, (hidden_gradient, head_gradient, heads[0][:0])


def _backward(beta: float, hard: bool, chunk: int, residuals: Any, cotangent: jax.Array) -> tuple[Any, Any, None]:
    hidden_gradient, head_gradient, like_head = residuals
    hidden_gradient = (cotangent * hidden_gradient).astype(hidden_gradient.dtype)
    head_gradient = (cotangent * head_gradient).astype(like_head.dtype)
    # None: nothing flows there, which the fields' types, those of the tokens themselves, do not say
    return _Tokens(hidden_gradient, None, None, None), (head_gradient, None), None  # type: ignore[arg-type]


_mean_loss.defvjp(_forward, _backward)


def _chunks(tokens: _Tokens, chunk: int) -> _Tokens:
    """Each field as `[chunks, chunk, ...]`; the last chunk is filled up with tokens that don't count."""
    padding = -tokens.where.shape[0] % chunk

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, chunk, *x.shape[1:])

    return jax.tree.map(split, tokens)


def _chunk_loss(
    student_logits: jax.Array, part: _Tokens, teacher_head: jax.Array, beta: float, hard: bool, weights: _Weights
) -> jax.Array:
    alpha, temperature = weights
    teacher_logits = _logits(part.teacher, teacher_head)
    losses = alpha * jensen_shannon_loss(
        student_logits, teacher_logits, beta, temperature=temperature, where=part.where
    )
    if hard:
        losses += (1 - alpha) * hard_label_loss(student_logits, part.labels, where=part.where)
    return jnp.sum(losses)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return _dot(hidden, head, 1, 0)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """A matmul over the given axes, summed in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _divisor(tokens: _Tokens) -> jax.Array:
    return jnp.maximum(jnp.sum(tokens.where), 1).astype(jnp.float32)
