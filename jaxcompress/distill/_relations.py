"""Losses on the relations between the examples of a batch: distances, angles, similarities. Each gives a scalar.

With `where`, `[batch]`, the loss and its gradient are those of the batch of the examples that count alone; 0 where none
does.

Anything of size `[batch, batch, features]` or `[batch, batch, batch]` is made a few rows at a time and made again for
the gradient, so that memory grows with the square of the batch, not with its cube.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import (
    as_float,
    check_positive,
    check_rank,
    count_of,
    feature_pair,
    mask_of,
    masked_mean,
)
from jaxcompress.distill._safe import flat, scaled, smooth_l1, unit

_CHUNK_VALUES = 2**18  # of an intermediate made a few rows at a time: 1 MiB in float32


def _rows(student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    a, b = feature_pair(student, teacher, where, layout="[batch, ...]")
    return flat(a), flat(b)


def _by_rows(of_row: Callable[[jax.Array], jax.Array], count: int, values_a_row: int) -> jax.Array:
    """`of_row(i)` for each row, stacked; intermediates live for one chunk of rows only."""
    chunk = max(1, min(count, _CHUNK_VALUES // max(values_a_row, 1)))
    return jax.lax.map(jax.checkpoint(of_row), jnp.arange(count), batch_size=chunk)


def _distances(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Pairwise Euclidean distances by differences (so exact for duplicates), at least 1e-6; 0 to itself and to others
    that do not count."""

    def of_row(i: jax.Array) -> jax.Array:
        squares = jnp.sum((x - x[i]) ** 2, axis=-1)
        is_pair = mask & mask[i] & (jnp.arange(len(x)) != i)
        return jnp.where(is_pair, jnp.sqrt(jnp.maximum(squares, 1e-12)), 0)

    return _by_rows(of_row, len(x), x.size)


def distance_relation_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """RKD-D: the pairwise distances of a batch, each side's divided by its mean, compared by a smooth L1.

    Park et al., "Relational knowledge distillation", 2019: the mean over all `batch^2` pairs. The
    mean distance is part of the gradient. Duplicates count as 1e-6 apart.

    Args:
      student: `[batch, ...]`.
      teacher: `[batch, ...]`, any features; constant.
      where: `[batch]`, which examples count.

    Returns:
      A scalar; 0 for a batch of one.
    """
    a, b = _rows(student, teacher, where)
    if not len(a):
        return jnp.zeros((), a.dtype)
    mask, n = mask_of(where, len(a)), count_of(where, len(a))
    pairs = jnp.maximum(n * (n - 1), 1)

    def relative(distances: jax.Array) -> jax.Array:
        total = jnp.sum(distances)
        return distances * pairs / jnp.where(total > 0, total, 1)  # no pair: all are 0

    ours, theirs = (relative(_distances(_within(x, 1e4), mask)) for x in (a, b))
    return jnp.sum(smooth_l1(ours - theirs)) / n**2


def _within(x: jax.Array, limit: float) -> jax.Array:
    """`x` divided by a constant where its values exceed `limit`: relative distances keep, and squares stay finite."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    return x / jnp.maximum(1, largest / limit)


def angle_relation_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """RKD-A: the cosines of the angles that the examples of a batch form, compared by a smooth L1.

    `cos(x_i x_j x_k) = <e_ij, e_ik>` with `e_ij` the unit vector from `x_i` to `x_j`: Park et al., "Relational
    knowledge distillation", 2019: the mean over all `batch^3` triplets. Duplicates form no angle:
    their cosine is 0, without gradient.

    Args:
      student: `[batch, ...]`.
      teacher: `[batch, ...]`, any features; constant.
      where: `[batch]`, which examples count.

    Returns:
      A scalar; 0 for a batch of one.
    """
    a, b = _rows(student, teacher, where)
    if not len(a):
        return jnp.zeros((), a.dtype)
    batch, mask = len(a), mask_of(where, len(a))
    a, b = (_within(x, 1e30) for x in (a, b))  # so that differences are finite

    def of_row(i: jax.Array) -> jax.Array:
        sees = (mask & mask[i])[:, None]  # who does not count is like a duplicate
        ours, theirs = (unit(jnp.where(sees, x - x[i], 0)) for x in (a, b))
        return jnp.sum(smooth_l1(ours @ ours.T - theirs @ theirs.T))

    total = jnp.sum(_by_rows(of_row, batch, max(a.size, b.size, batch * batch)))
    return total / count_of(where, batch) ** 3


def relational_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """RKD-DA: `distance_weight * distance_relation_loss + angle_weight * angle_relation_loss`.

    Park et al., "Relational knowledge distillation", 2019, section 3.2, with the weights that the authors use for
    metric learning and reimplementations for classification. Shapes and `where` as there; a scalar.
    """
    total = jnp.zeros((), jnp.float32)
    if distance_weight:
        total += distance_weight * distance_relation_loss(student, teacher, where=where)
    if angle_weight:
        total += angle_weight * angle_relation_loss(student, teacher, where=where)
    return total


def similarity_preserving_loss(
    student: ArrayLike, teacher: ArrayLike, *, norm_order: float = 2, where: ArrayLike | None = None
) -> jax.Array:
    """SP: the examples' inner products, rows scaled to unit norm, compared: `||G_s - G_t||^2 / batch^2`.

    Tung and Mori, "Similarity-preserving knowledge distillation", 2019. An example of zeros is like
    nothing: its row is 0, without gradient.

    Args:
      student: `[batch, ...]`.
      teacher: `[batch, ...]`, any features; constant.
      norm_order: of the rows' norm; 2 in the paper.
      where: `[batch]`, which examples count.

    Returns:
      A scalar.
    """
    check_positive(norm_order, "norm_order")
    # Rows of unit norm do not depend on a common scale, which keeps the products finite.
    pair = (scaled(x, (0, 1))[0] for x in _rows(student, teacher, where))
    ours, theirs = (unit(x @ x.T, order=norm_order) for x in pair)
    return jnp.sum((ours - theirs) ** 2) / count_of(where, len(ours)) ** 2


def correlation_matrix(features: ArrayLike, *, gamma: float = 0.4, order: int = 2, normalize: bool = True) -> jax.Array:
    """A batch's correlations by the Gaussian kernel's Taylor series.

    `sum_{p=0..P} exp(-2 gamma) (2 gamma)^p / p! <x_i, x_j>^p`, the kernel `exp(-gamma |x_i - x_j|^2)` for rows of unit
    norm: Peng et al., "Correlation congruence for knowledge distillation", 2019.

    Args:
      features: `[batch, features]`.
      gamma: the kernel's width, above 0.
      order: `P`, where the series stops.
      normalize: scale the rows to unit norm first, as the series assumes.

    Returns:
      `[batch, batch]`.
    """
    rows = as_float(features, "features")
    check_rank(rows, 2, "features", "[batch, features]")
    rows = unit(rows) if normalize else rows
    similarity = rows @ rows.T
    terms = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * similarity**p for p in range(order + 1)]
    return sum(terms, jnp.zeros_like(similarity))


def correlation_congruence_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """CC: the mean square of the difference of student's and teacher's correlations between examples.

    Peng et al., "Correlation congruence for knowledge distillation", 2019, with the Gaussian kernel's
    series (`correlation_matrix`) or the bilinear kernel `<x_i, x_j>`.

    Args:
      student: `[batch, ...]`, embeddings.
      teacher: `[batch, ...]`; constant.
      kernel: `"gaussian"` or `"bilinear"`.
      gamma: see `correlation_matrix`.
      order: see `correlation_matrix`.
      normalize: rows to unit norm first. Without it the values grow as the features' `4 * order`-th power.
      where: `[batch]`, which examples count.

    Returns:
      A scalar.
    """
    if kernel == "gaussian":
        ours, theirs = (
            correlation_matrix(x, gamma=gamma, order=order, normalize=normalize) for x in _rows(student, teacher, where)
        )
    elif kernel == "bilinear":
        rows = (unit(x) if normalize else x for x in _rows(student, teacher, where))
        ours, theirs = (x @ x.T for x in rows)
    else:
        raise ValueError(f"kernel must be 'gaussian' or 'bilinear', got {kernel!r}")
    return jnp.sum((ours - theirs) ** 2) / count_of(where, len(ours)) ** 2


def consecutive_correlation_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """CC as a widespread implementation has it: the product of consecutive examples' errors.

    `mean_i sum_d |s - t|_id |s - t|_(i+1)d` over consecutive pairs, on embeddings of one size. For comparison with
    published tables; `correlation_congruence_loss` is the paper's.

    Args:
      student: `[batch, features]`.
      teacher: the same shape; constant.
      where: `[batch]`, which examples count; pairs are of neighbours that both do.

    Returns:
      A scalar; 0 for a batch of one.
    """
    a, b = feature_pair(student, teacher, where, layout="[batch, features]", same_shape=True)
    if len(a) < 2:
        return jnp.zeros((), a.dtype)
    error, mask = jnp.abs(a - b), mask_of(where, len(a))
    return masked_mean(jnp.sum(error[:-1] * error[1:], axis=-1), mask[:-1] & mask[1:])


def probabilistic_transfer_loss(
    student: ArrayLike, teacher: ArrayLike, *, epsilon: float = 1e-7, where: ArrayLike | None = None
) -> jax.Array:
    """PKT: each example's similarities as a distribution over the batch, compared by the KL divergence.

    `mean_ij p_ij log((p_ij + epsilon) / (q_ij + epsilon))`, `p` the teacher's and `q` the student's cosine similarities
    moved to [0, 1] and scaled to rows of sum 1: Passalis and Tefas, "Learning deep representations with probabilistic
    knowledge transfer", 2018. The mean over all pairs, hence the usual weight of 30000.

    Args:
      student: `[batch, ...]`.
      teacher: `[batch, ...]`, any features; constant.
      epsilon: above 0.
      where: `[batch]`, which examples count.

    Returns:
      A scalar.
    """
    pair = _rows(student, teacher, where)
    mask = mask_of(where, len(pair[0]))
    q, p = (_similarity_distribution(x, mask) for x in pair)
    return jnp.sum(p * (jnp.log(p + epsilon) - jnp.log(q + epsilon))) / count_of(where, len(mask)) ** 2


def _similarity_distribution(x: jax.Array, mask: jax.Array) -> jax.Array:
    rows = unit(x)
    similarity = jnp.maximum((rows @ rows.T + 1) / 2, 0)  # rounding can take a cosine below -1
    similarity = jnp.where(mask[:, None] & mask, similarity, 0)
    return similarity / jnp.where(mask[:, None], jnp.sum(similarity, axis=-1, keepdims=True), 1)
