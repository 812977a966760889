"""Losses on products of features within an example: between two layers, between channels, between neurons."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import as_float, check_rank, check_same_shape, feature_pair, keep
from jaxcompress.distill._safe import flat, mean_square, norm, pool_to_smaller, scaled, unit

MapPair = tuple[ArrayLike, ArrayLike]


def flow_matrix(first: ArrayLike, second: ArrayLike, *, pool: str = "mean") -> jax.Array:
    """How one layer's channels become a later one's: their products, averaged over pixels (the FSP matrix).

    `G_ij = sum_hw a_hwi b_hwj / (H W)`: Yim et al., "A gift from knowledge distillation: fast optimization, network
    minimization and transfer learning", 2017, equation 1. Maps of different size are pooled to the smaller.

    Args:
      first: `[batch, height, width, channels]`.
      second: the later layer's, the same batch.
      pool: `"mean"` or `"max"`.

    Returns:
      `[batch, channels of first, channels of second]`.
    """
    if pool not in ("mean", "max"):
        raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")
    a, b = as_float(first, "first"), as_float(second, "second")
    for x, name in ((a, "first"), (b, "second")):
        check_rank(x, 4, name, "[batch, height, width, channels]")
    a, b = pool_to_smaller(a, b, jnp.mean if pool == "mean" else jnp.max)
    return jnp.einsum("nhwi,nhwj->nij", a, b) / (a.shape[1] * a.shape[2])


def flow_loss(
    student: MapPair,
    teacher: MapPair,
    *,
    pool: str = "mean",
    by_column: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The mean square of the difference between student's and teacher's `flow_matrix`.

    Yim et al., "A gift from knowledge distillation", 2017, equation 2 (there the sum of squares). Channels of the two
    sides must agree; sum over pairs of layers.

    Args:
      student: two maps `[batch, height, width, channels]`, the earlier layer's first.
      teacher: likewise; constant.
      pool: how a larger map meets the smaller, `"mean"` or `"max"`.
      by_column: instead, the sum over the later layer's channels of the norm over the earlier one's.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`.
    """
    pairs = [feature_pair(s, t, where) for s, t in zip(student, teacher, strict=True)]
    if len(pairs) != 2:
        raise ValueError(f"student and teacher must be pairs of maps, got {len(pairs)} maps; sum over pairs of layers")
    (first_student, first_teacher), (second_student, second_teacher) = pairs
    ours = flow_matrix(first_student, second_student, pool=pool)
    theirs = flow_matrix(first_teacher, second_teacher, pool=pool)
    check_same_shape(ours, theirs, "flow matrices")
    difference = ours - theirs
    return keep(jnp.sum(norm(difference, axis=1), axis=-1) if by_column else mean_square(difference), where)


def inter_channel_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """How differently channels correlate: `||G_s - G_t||^2 / channels`, `G` the channels' products, rows of unit norm.

    Liu et al., "Exploring inter-channel correlation for diversity-preserved knowledge distillation", 2021. The size of
    the maps may differ, the number of channels may not.

    Args:
      student: `[batch, height, width, channels]`.
      teacher: the same batch and channels; constant.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`.
    """
    pair = feature_pair(student, teacher, where)
    # The rows' unit norm undoes the scale, which keeps the squares of squares finite.
    pixels = (flat(scaled(x, (1, 2, 3))[0], last=1) for x in pair)
    ours, theirs = (unit(jnp.einsum("npi,npj->nij", x, x)) for x in pixels)
    check_same_shape(ours, theirs, "channel matrices")
    return keep(jnp.sum((ours - theirs) ** 2, axis=(1, 2)) / ours.shape[1], where)


def neuron_selectivity_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """How differently channels choose regions: the squared maximum mean discrepancy of their activation patterns.

    `mean k(t, t') + mean k(s, s') - 2 mean k(s, t)` over channels, each of unit norm over pixels, with the polynomial
    kernel `k(a, b) = <a, b>^2`: Huang and Wang, "Like what you like: knowledge distill via neuron selectivity
    transfer", 2017, with the kernel that they recommend. Maps of different size are average-pooled to the smaller.

    Args:
      student: `[batch, height, width, channels]`.
      teacher: the same batch; its channels may differ in number; constant.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`.
    """
    pair = pool_to_smaller(*feature_pair(student, teacher, where))
    s, t = (unit(flat(x, last=1), axis=1) for x in pair)
    return keep(_mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t), where)


def _mean_kernel(a: jax.Array, b: jax.Array) -> jax.Array:
    return mean_square(jnp.einsum("npi,npj->nij", a, b))
