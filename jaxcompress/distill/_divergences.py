"""Divergences between two distributions given as log-probabilities, over the last axis.

All stay in the log domain, so that probabilities that underflow to zero cost nothing but their own term.
"""

import math

import jax
import jax.numpy as jnp

from jaxcompress.distill._inputs import Number


def log_softmax(logits: jax.Array, temperature: Number) -> jax.Array:
    """`jax.nn.log_softmax(logits / temperature)`, safe for huge logits.

    The largest logit is subtracted before the division: the other way round XLA may fuse `z / T - max` into a single
    rounding where the maximum itself has two, and a difference of 1e22 instead of 0 overflows the exponential.
    """
    return jax.nn.log_softmax((logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))) / temperature)


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`KL(p || q)`; a class of `p = 0` adds 0 even where `log q = -inf`."""
    p = jnp.exp(log_p)
    possible = p > 0
    difference = jnp.where(possible, log_p, 0) - jnp.where(possible, log_q, 0)
    return jnp.sum(p * difference, axis=-1)


def generalized_jensen_shannon(log_student: jax.Array, log_teacher: jax.Array, beta: float) -> jax.Array:
    """`beta KL(t || m) + (1 - beta) KL(s || m)`, `m = beta t + (1 - beta) s`; forward and reverse KL at 0 and 1.

    At the ends this is not the limit of the formula, which is 0, but the limit of the formula divided by
    `beta (1 - beta)`: the convention of Agarwal et al. (2024) and of every implementation of it.
    """
    if beta == 0:
        return kl_divergence(log_teacher, log_student)
    if beta == 1:
        return kl_divergence(log_student, log_teacher)
    log_mixture = jnp.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    return beta * kl_divergence(log_teacher, log_mixture) + (1 - beta) * kl_divergence(log_student, log_mixture)
