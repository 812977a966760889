"""Several networks as one teacher, or as each other's: ensembles, mutual learning, born-again generations."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcompress.distill._divergences import log_softmax
from jaxcompress.distill._inputs import Number, check_positive, constant
from jaxcompress.distill._softmax import hard_label_loss, soft_target_loss


def ensemble_targets(
    teacher_logits: ArrayLike,
    *,
    temperature: Number = 1.0,
    mean: str = "probabilities",
    weights: ArrayLike | None = None,
    axis: int = -1,
) -> jax.Array:
    """The soft targets of several teachers together, for `soft_label_loss`.

    A weighted mean of their probabilities (the arithmetic ensemble), or of their logits, or of their log-probabilities
    (the geometric ensemble): Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, sections 2
    and 5. The last two are the same distribution, since logits and log-probabilities differ by a constant a row; both
    names are kept because both are looked for.

    Args:
      teacher_logits: `[teachers, ..., classes]`; constant.
      temperature: above 0.
      mean: `"probabilities"`, `"logits"` or `"log_probabilities"`.
      weights: `[teachers]`, not negative; scaled to sum 1. Equal by default.
      axis: the class axis, counted from the end.

    Returns:
      Probabilities, `[..., classes]`.
    """
    check_positive(temperature, "temperature")
    _check_from_the_end(axis)
    stacked = constant(teacher_logits, "teacher_logits")
    if stacked.ndim < 2:
        raise ValueError(f"teacher_logits must be [teachers, ..., classes], got shape {stacked.shape}")
    shares, stacked = _shares(weights, stacked.shape[0]), jnp.moveaxis(stacked, axis, -1)
    if mean == "probabilities":
        targets = jnp.tensordot(shares, jnp.exp(log_softmax(stacked, temperature)), axes=1)
    elif mean == "logits":
        targets = jnp.exp(
            log_softmax(jax.lax.optimization_barrier(jnp.tensordot(shares, stacked, axes=1)), temperature)
        )
    elif mean == "log_probabilities":
        mixed = jnp.tensordot(shares, log_softmax(stacked, temperature), axes=1)
        targets = jnp.exp(log_softmax(jax.lax.optimization_barrier(mixed), 1.0))
    else:
        raise ValueError(f"mean must be 'probabilities', 'logits' or 'log_probabilities', got {mean!r}")
    return jnp.moveaxis(targets, -1, axis)


def _check_from_the_end(axis: int) -> None:
    if axis >= 0:
        raise ValueError(f"axis must be counted from the end (negative), since teachers have an axis more; got {axis}")


def _shares(weights: ArrayLike | None, teachers: int) -> jax.Array:
    if weights is None:
        return jnp.full(teachers, 1 / teachers)
    traced = any(isinstance(w, jax.core.Tracer) for w in jax.tree.leaves(weights))
    if not traced and not (np.min(weights, initial=0) >= 0 and np.sum(weights) > 0):
        raise ValueError(f"weights must not be negative, nor all 0, got {weights}")
    shares = constant(jnp.asarray(weights, float), "weights")
    if shares.shape != (teachers,):
        raise ValueError(f"weights must have shape ({teachers},), one a teacher, got {shares.shape}")
    return shares / jnp.sum(shares)


def several_teachers_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Number = 1.0,
    weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The weighted mean of `soft_target_loss` against each of several teachers at once.

    Its gradient is that of `soft_label_loss` against the mean of their probabilities; its value is larger by the
    teachers' disagreement (their generalised Jensen-Shannon divergence), so the teachers' distance stays in sight.

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: `[teachers, ..., classes]`; constant.
      temperature: above 0.
      weights: `[teachers]`, as in `ensemble_targets`.
      axis: the class axis, counted from the end.
      where: which examples count, in the shape of the result.

    Returns:
      One value an example, `[...]`.
    """
    _check_from_the_end(axis)
    losses = [
        soft_target_loss(student_logits, t, temperature=temperature, axis=axis, where=where)
        for t in jnp.asarray(teacher_logits)
    ]
    return jnp.tensordot(_shares(weights, len(losses)), jnp.stack(losses), axes=1)


def mutual_learning_loss(
    logits: Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    weight: Number = 1.0,
    temperature: Number = 1.0,
    learner: int | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Deep mutual learning of `n` networks: hard labels, and each other's soft targets.

    Network `k` has `H(labels, p_k) + weight * mean over l != k of T^2 KL(p_l || p_k)`: Zhang et al., "Deep mutual
    learning", 2018, equation 7. Peers are constant in each other's terms. The simultaneous update takes the gradient
    of the sum over networks; the alternating one updates network `learner` alone and computes the logits anew for
    the next.

    Args:
      logits: one `[..., classes]` a network, two networks or more.
      labels: `[...]`, integer class indices.
      weight: of the divergence from the peers.
      temperature: above 0; 1 in the paper.
      learner: the network to teach, for alternating updates; by default all.
      where: which examples count, in the shape of a loss.

    Returns:
      `[networks, ...]`, one value a network and example; `[...]` with `learner`.
    """
    if len(logits) < 2:
        raise ValueError(f"mutual learning needs two networks or more, got {len(logits)}")
    if learner is not None and not 0 <= learner < len(logits):
        raise ValueError(f"learner must be from 0 to {len(logits) - 1}, got {learner}")

    def of_network(k: int) -> jax.Array:
        peers = [
            soft_target_loss(logits[k], z, temperature=temperature, where=where) for j, z in enumerate(logits) if j != k
        ]
        return hard_label_loss(logits[k], labels, where=where) + weight * sum(peers[1:], peers[0]) / len(peers)

    if learner is not None:
        return of_network(learner)
    return jnp.stack([of_network(k) for k in range(len(logits))])
