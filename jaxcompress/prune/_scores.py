"""Scores: how much each weight matters. The lowest are pruned first.

Functions on arrays, to be mapped over trees with `jax.tree.map`. `magnitude` needs the weights alone and serves
`sparsify` at every mask update; an `Accumulated` score is gathered from the gradients of the training itself, inside
`around`; the others need something measured (gradients, activations, a second checkpoint) and serve `choose`, which
makes masks once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._numbers import real

Score = Callable[[jax.Array], jax.Array]
"""Of a weight, its scores: same shape, floating point, the lowest are pruned first."""


def magnitude(weight: jax.Array) -> jax.Array:
    """The absolute value of each weight (Han et al. 2015, "Learning both Weights and Connections")."""
    return jnp.abs(weight)


@dataclass(frozen=True)
class Accumulated:
    """A score from a statistic that is kept for every weight and renewed at every step, before any mask update.

    Attributes:
      observe: `(statistic, weight, gradient) -> statistic`; all of the weight's shape, the first all zeros.
      score: `(weight, statistic) -> scores`.
    """

    observe: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]


def movement() -> Accumulated:
    """`sum of -w g` over the steps: weights that training moves towards zero go (Sanh et al. 2020, their equation 4).

    A weight that is held at zero moves no more, and its sum stands still. The paper's weights go on moving while they
    are pruned: `sparsify(..., hold=False)` with `straight_through`, under `around(..., mask_gradients=False)`.
    """
    return Accumulated(lambda total, weight, gradient: total - weight * gradient, lambda weight, total: total)


def taylor(decay: float = 0.99) -> Accumulated:
    """The running mean of `|w g|`: `saliency` over the batches of the last `1 / (1 - decay)` steps."""
    return Accumulated(_running(decay, saliency), lambda weight, mean: mean)


def empirical_fisher(decay: float = 0.99) -> Accumulated:
    """`fisher` with the running mean of the squared gradient of the batch's loss."""
    return Accumulated(_running(decay, lambda weight, gradient: gradient**2), fisher)


def _running(
    decay: float, value: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    if not 0 <= real("decay", decay) < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    return lambda mean, weight, gradient: decay * mean + (1 - decay) * value(weight, gradient)


def check_score(score: Any) -> None:
    """Raises TypeError for what `sparsify` can't rank weights by."""
    if any(score is made for made in (movement, taylor, empirical_fisher)):
        raise TypeError(f"call it, score={score.__name__}(): that makes the score, which is gathered from gradients")
    if not isinstance(score, Accumulated) and not callable(score):
        raise TypeError(f"a score is a function of a weight, or an Accumulated such as taylor(), got {score!r}")


def random(tree: Any, key: jax.Array) -> Any:
    """Uniform scores in [0, 1) for each leaf of `tree`: its shape, float32, another key a leaf."""
    leaves = jax.tree.leaves(tree)
    scores = [jax.random.uniform(jax.random.fold_in(key, i), jnp.shape(x)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(jax.tree.structure(tree), scores)


def batch_norm_scale(weight: jax.Array, scale: jax.Array) -> jax.Array:
    """The magnitude of the batch-norm scale behind a layer, for each of its weights (Liu et al. 2017); for `filters`.

    Args:
      weight: [..., outputs].
      scale: [outputs], of the normalisation that the layer's outputs go through.
    """
    if scale.shape != weight.shape[-1:]:
        raise ValueError(f"want one scale an output: {weight.shape[-1:]} for weights {weight.shape}, got {scale.shape}")
    return jnp.broadcast_to(jnp.abs(scale), weight.shape)


def saliency(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """`|w g|`: to first order, how much the loss changes if the weight goes.

    With the gradient of the loss at initialisation it is SNIP (Lee et al. 2019, without the normalisation, which does
    not change the order); of a trained network, the first-order Taylor criterion (Molchanov et al. 2019, there squared:
    the same order).

    Args:
      weight: weights of any shape.
      gradient: of the loss, mean over a batch; same shape.
    """
    return jnp.abs(weight * gradient)


def fisher(weight: jax.Array, squared_gradient: jax.Array) -> jax.Array:
    """`w**2 F / 2`: to second order, with a diagonal Fisher information (Theis et al. 2018; LeCun et al. 1990).

    Args:
      weight: weights of any shape.
      squared_gradient: mean over examples of the squared gradient of each example's loss; same shape.
    """
    return weight**2 * squared_gradient / 2


def wanda(weight: jax.Array, input_norm: jax.Array, axis: int = -2) -> jax.Array:
    """`|w| * norm(x)`: the weight times the L2 norm of its input over a calibration set (Sun et al. 2024).

    The paper ranks the weights of one output among themselves: transpose the scores so that the outputs lead, and use
    the pattern `Unstructured(sparsity, stack=1)`; or use `NM` along the inputs.

    Args:
      weight: [..., inputs, outputs], or with the inputs along another axis.
      input_norm: [inputs], not negative.
      axis: of the inputs in `weight`.

    Raises:
      ValueError: `input_norm` is not one number an input.
    """
    if input_norm.shape != (weight.shape[axis],):
        raise ValueError(
            f"want one norm for each of the {weight.shape[axis]} inputs (axis {axis} of {weight.shape}), "
            f"got shape {input_norm.shape}"
        )
    return jnp.abs(weight) * jnp.expand_dims(input_norm, [a for a in range(weight.ndim) if a != axis % weight.ndim])


def geometric_median(weight: jax.Array, axis: int = -1) -> jax.Array:
    """How far a filter is from all others, sum of L2 distances (FPGM, He et al. 2019): the same for its weights.

    The filters nearest to the geometric median of all filters can be replaced by the others; use it with `filters`.

    Args:
      weight: [..., outputs], or with the filters along another axis.
      axis: that indexes filters.
    """
    rows = jnp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(jnp.float32)
    distances = jax.lax.map(lambda row: jnp.sum(jnp.linalg.norm(rows - row, axis=1)), rows)
    return jnp.broadcast_to(
        jnp.expand_dims(distances, [a for a in range(weight.ndim) if a != axis % weight.ndim]), weight.shape
    )


def active(activations: jax.Array) -> jax.Array:
    """The part of a channel's activations that are not zero: `1 - APoZ` (Hu et al. 2016).

    Args:
      activations: after the rectifier, [..., channels]; all axes but the last are averaged over.

    Returns:
      [channels], in [0, 1]; broadcast it over a kernel [..., channels] to use it with `filters`.
    """
    return jnp.mean(activations != 0, axis=tuple(range(activations.ndim - 1)), dtype=jnp.float32)


def _large_init_large_final(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.abs(initial), jnp.abs(final))


def _small_init_small_final(initial: jax.Array, final: jax.Array) -> jax.Array:
    return -jnp.maximum(jnp.abs(initial), jnp.abs(final))


CRITERIA: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "large_final": lambda initial, final: jnp.abs(final),
    "small_final": lambda initial, final: -jnp.abs(final),
    "large_init": lambda initial, final: jnp.abs(initial),
    "small_init": lambda initial, final: -jnp.abs(initial),
    "large_init_large_final": _large_init_large_final,
    "small_init_small_final": _small_init_small_final,
    "magnitude_increase": lambda initial, final: jnp.abs(final) - jnp.abs(initial),
    "movement": lambda initial, final: jnp.abs(final - initial),
}
"""Scores from two checkpoints, `(initial, final) -> scores`: the mask criteria of Zhou et al. 2019 (with alpha 1)."""
