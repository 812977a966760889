"""Distilling models of sequences: per token, on the teacher's own outputs, and on the student's.

Per token (word-level), every loss on examples serves as it is: `soft_target_loss(student, teacher, where=mask)` on
logits `[batch, tokens, vocabulary]` gives `[batch, tokens]`, and `masked_mean(losses, mask)` its mean over real tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import Number, as_float, check_between, check_positive, varying_as
from jaxcompress.distill._logits import jensen_shannon_loss
from jaxcompress.distill._softmax import hard_label_loss


class Sequences(NamedTuple):
    """Continuations of prompts: sampled by `sample_sequences`, or fixed data.

    Attributes:
      tokens: `[batch, length]`, integer: the prompt, then the sample.
      where: `[batch, length]`, True on sampled tokens up to and including the first end token: those that count.
    """

    tokens: jax.Array
    where: jax.Array


def sample_sequences(
    key: jax.Array,
    logits_fn: Callable[[jax.Array], jax.Array],
    prompts: ArrayLike,
    length: int,
    *,
    temperature: float = 1.0,
    end_token: int | None = None,
) -> Sequences:
    """Continues prompts token by token, each drawn from the model's distribution.

    Args:
      key: a random key.
      logits_fn: from tokens `[batch, length]` to next-token logits `[batch, length, vocabulary]`; causal, since what
        is not yet sampled stands as zeros. The teacher's for `sequence_level_loss`, the student's for
        `on_policy_loss`.
      prompts: `[batch, prompt]`, integer, at least one token.
      length: of the result, prompt included.
      temperature: 0 for the most probable token (greedy).
      end_token: ends a sequence; what follows is filled with it and doesn't count.

    Returns:
      `Sequences`.
    """
    prompts = jnp.asarray(prompts)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise TypeError(f"prompts must be integers [batch, prompt], got {prompts.dtype}{list(prompts.shape)}")
    batch, start = prompts.shape
    if not 1 <= start < length:
        raise ValueError(f"length must exceed the prompt's, and a prompt have a token; got {length} and {start}")
    if temperature < 0:
        raise ValueError(f"temperature must not be below 0, got {temperature}")
    tokens = jnp.zeros((batch, length), prompts.dtype).at[:, :start].set(prompts)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens, where, ended = carry
        logits = as_float(jax.lax.dynamic_index_in_dim(logits_fn(tokens), i - 1, 1, keepdims=False), "logits")
        if temperature == 0:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        drawn = drawn.astype(tokens.dtype)
        if end_token is not None:
            drawn = jnp.where(ended, end_token, drawn)
        tokens, where = tokens.at[:, i].set(drawn), where.at[:, i].set(~ended)
        return tokens, where, ended | (drawn == end_token) if end_token is not None else ended

    carry = varying_as((tokens, jnp.zeros((batch, length), bool), jnp.zeros(batch, bool)), (key, prompts))
    tokens, where, _ = jax.lax.fori_loop(start, length, step, carry)
    return Sequences(jax.lax.stop_gradient(tokens), where)


def sequence_level_loss(student_logits: ArrayLike, sequences: Sequences) -> jax.Array:
    """Training on what the teacher writes: the student's cross-entropy of the teacher's sequences.

    Kim and Rush, "Sequence-level knowledge distillation", 2016, with the teacher's mode or
    a sample in the place of its whole distribution.

    Args:
      student_logits: `[batch, length, vocabulary]`, on `sequences.tokens`: position `i` predicts token `i + 1`.
      sequences: the teacher's.

    Returns:
      One value a token, `[batch, length - 1]`, 0 where `sequences.where[:, 1:]` is False.
    """
    return hard_label_loss(
        as_float(student_logits, "student_logits")[:, :-1], sequences.tokens[:, 1:], where=sequences.where[:, 1:]
    )


def on_policy_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    sequences: Sequences,
    *,
    beta: float = 0.5,
    temperature: Number = 1.0,
) -> jax.Array:
    """Generalised distillation: the teacher scores sequences, the student's own among them, token by token.

    Agarwal et al., "On-policy distillation of language models: learning from self-generated mistakes", 2024: the
    divergence `jensen_shannon_loss(beta)` on sequences that the student sampled; no gradient passes through the
    sampling. `mix_sequences` gives the share of them that the paper calls lambda.

    Args:
      student_logits: `[batch, length, vocabulary]`, on `sequences.tokens`: position `i` predicts token `i + 1`.
      teacher_logits: the same, of the teacher on the same tokens; constant.
      sequences: whose tokens to score.
      beta: see `jensen_shannon_loss`.
      temperature: above 0.

    Returns:
      One value a token, `[batch, length - 1]`, 0 where `sequences.where[:, 1:]` is False.
    """
    check_positive(temperature, "temperature")
    student, teacher = (as_float(x, "logits")[:, :-1] for x in (student_logits, teacher_logits))
    return jensen_shannon_loss(student, teacher, beta, temperature=temperature, where=sequences.where[:, 1:])


def mix_sequences(key: jax.Array, on_policy: Sequences, fixed: Sequences, student_share: Number) -> Sequences:
    """Each batch row from the student's samples with probability `student_share`, else from the fixed data.

    The share lambda of Agarwal et al. (2024), drawn a row at a time.
    """
    check_between(student_share, 0.0, 1.0, "student_share")
    if on_policy.tokens.shape != fixed.tokens.shape:
        raise ValueError(
            f"both must have one shape [batch, length], got {on_policy.tokens.shape} and {fixed.tokens.shape}"
        )
    mine = jax.random.bernoulli(key, student_share, (on_policy.tokens.shape[0], 1))
    return Sequences(*(jnp.where(mine, a, b) for a, b in zip(on_policy, fixed, strict=True)))
