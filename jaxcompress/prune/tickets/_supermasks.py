"""Supermasks: networks whose weights are never trained, only which of them are there."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import paths
from jaxcompress.prune._fixed import choose
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune.tickets._trees import beside, like


def edge_popup(
    fn: Callable[..., Any], rules: paths.Rules[Pattern | float | None], *, rescale: bool = False
) -> Callable[..., Any]:
    """`fn(weights, ...)` as `popped(weights, scores, ...)`, which uses only the weights of the highest scores.

    Ramanujan et al. 2020, "What's Hidden in a Randomly Weighted Neural Network?": forward, the weights whose `|score|`
    is among a layer's highest are kept and all others are zero; backward, the mask counts as the identity of `|score|`
    (straight through), so that `dL/dscore = sign(score) * weight * dL/d(masked weight)` for every weight, kept or not.

    Args:
      fn: a function whose first argument is a tree of weights.
      rules: by path, what part is pruned, as for `prune.choose`.
      rescale: multiply a layer's kept weights by the number of its weights over the number kept.

    Returns:
      `popped(weights, scores, *args, **kwargs)`: differentiate it by `scores` (`argnums=1`) and leave the weights be.
      It raises ValueError where a rule meets a weight without scores, or scores have no weight of their path and shape.
    """

    def popped(weights: Any, scores: Any, *args: Any, **kwargs: Any) -> Any:
        hard = beside(weights, popup_masks(weights, scores, rules), "mask")
        soft = [None if s is None else jnp.abs(s) for s in beside(weights, scores, "scores")]
        return fn(_through(weights, hard, soft, rescale), *args, **kwargs)

    return popped


def popup_scores(weights: Any, rules: paths.Rules[Any], key: jax.Array) -> Any:
    """Scores to begin `edge_popup` with: uniform within `1 / sqrt(fan in)`; `None` where no rule (or `None`) matches.

    The fan in is the product of all axes but the last, as of Flax kernels.
    """

    def drawn(x: jax.Array, key: jax.Array) -> jax.Array:
        bound = 1 / math.sqrt(max(1, math.prod(x.shape[:-1])))
        return jax.random.uniform(key, x.shape, x.dtype, -bound, bound)

    named = paths.named_leaves(weights)
    wanted = paths.match(rules, [name for name, _ in named], None)
    return like(
        weights,
        [
            None if rule is None else drawn(x, jax.random.fold_in(key, i))
            for i, ((_, x), rule) in enumerate(zip(named, wanted, strict=True))
        ],
    )


def popup_masks(weights: Any, scores: Any, rules: paths.Rules[Pattern | float | None]) -> Any:
    """The masks that `edge_popup` uses: of each layer the highest `|score|`; `None` where a weight has no scores."""
    named = paths.named_leaves(weights)
    found = beside(weights, scores, "scores")
    for (name, _), rule, s in zip(named, paths.match(rules, [name for name, _ in named], None), found, strict=True):
        if (rule is None) != (s is None):
            raise ValueError(
                f"{name!r} has the rule {rule!r} and {'no scores' if s is None else 'scores'}: make the scores by "
                f"popup_scores(weights, rules, key) with the same rules"
            )
    absolute = [
        x if s is None else lax.stop_gradient(jnp.abs(s)) for (_, x), s in zip(named, found, strict=True)
    ]  # a leaf without scores is one without a rule, which `choose` does not look at
    return choose(like(weights, absolute), rules)


def bernoulli(fn: Callable[..., Any], *, rescale: bool = False) -> Callable[..., Any]:
    """`fn(weights, ...)` as `drawn(weights, logits, key, ...)`, which keeps each weight with a learned probability.

    Zhou et al. 2019: forward, `m ~ Bernoulli(sigmoid(logit))`, and the weight is `m * w`; backward, the draw counts as
    the identity of its probability (straight through).

    Args:
      fn: a function whose first argument is a tree of weights.
      rescale: their dynamic weight rescaling: multiply a layer's kept weights by the number of its weights over the
        number kept.

    Returns:
      `drawn(weights, logits, key, *args, **kwargs)`: differentiate it by `logits` (`argnums=1`), with a new key a step.
    """

    def drawn(weights: Any, logits: Any, key: jax.Array, *args: Any, **kwargs: Any) -> Any:
        hard = beside(weights, bernoulli_masks(logits, key), "mask")
        soft = [None if x is None else jax.nn.sigmoid(x) for x in beside(weights, logits, "logits")]
        return fn(_through(weights, hard, soft, rescale), *args, **kwargs)

    return drawn


def bernoulli_logits(weights: Any, rules: paths.Rules[float | None]) -> Any:
    """Logits to begin `bernoulli` with: by path, the probability in (0, 1) that a weight is kept; else `None`."""
    named = paths.named_leaves(weights)
    wanted = paths.match(rules, [name for name, _ in named], None)
    if bad := [p for p in wanted if p is not None and not 0 < p < 1]:
        raise ValueError(f"a probability to begin with is in (0, 1), got {bad[0]}")
    return like(
        weights,
        [
            None if p is None else jnp.full_like(x, math.log(p / (1 - p)))
            for (_, x), p in zip(named, wanted, strict=True)
        ],
    )


def bernoulli_masks(logits: Any, key: jax.Array | None = None) -> Any:
    """Masks of learned probabilities: a draw, or without a key the most probable (probability 1/2 or more is kept)."""
    leaves = jax.tree.leaves(logits)
    if key is None:
        return like(logits, [x >= 0 for x in leaves])
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return like(logits, [jax.random.bernoulli(k, jax.nn.sigmoid(x)) for k, x in zip(keys, leaves, strict=True)])


def masked(weights: Any, masks: Any, *, rescale: bool = False) -> Any:
    """`weights` with zeros where a mask prunes, rescaled as by `edge_popup`: to evaluate a supermask."""
    return _through(weights, beside(weights, masks, "mask"), None, rescale)


def _through(weights: Any, hard: list[Any], soft: list[Any] | None, rescale: bool) -> Any:
    """Masked weights whose gradient passes straight through to `soft`."""
    leaves = []
    for i, (x, mask) in enumerate(zip(jax.tree.leaves(weights), hard, strict=True)):
        if mask is None:
            leaves.append(x)
            continue
        kept = mask.astype(x.dtype)
        if soft is not None:
            kept += (soft[i] - lax.stop_gradient(soft[i])).astype(x.dtype)  # zero, with the gradient of `soft`
        if rescale:
            kept *= x.size / jnp.maximum(1, jnp.sum(mask, dtype=jnp.float32)).astype(x.dtype)
        leaves.append(x * kept)
    return like(weights, leaves)
