"""Pruning around an optimizer: it sees the gradients, keeps those of pruned weights from it, and clears its memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src import base

from jaxcompress import paths
from jaxcompress.prune._masks import apply_masks, masks


class AroundState(NamedTuple):
    """State of `around`."""

    inner: Any  # the optimizer's
    pruning: Any  # the pruning transformation's


def around(
    inner: optax.GradientTransformation, pruning: optax.GradientTransformation, *, mask_gradients: bool = True
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain(inner, pruning)`, in which pruning also sees the gradients and the optimizer forgets pruned weights.

        rules = prune.erk(params, {"kernel$": True}, 0.9)
        tx = prune.around(optax.adamw(1e-3), prune.rewire(rules, end=30_000, key=key))

    Three things that a place in a chain cannot do:

    * scores and rewiring that need gradients get them (those of all weights, pruned ones too);
    * the optimizer gets zeros for the gradients of pruned weights: they don't count in its clipping and its moments;
    * where a weight comes back, everything that the optimizer keeps for it starts from zero. What is kept for a weight
      is found by structure: arrays of its shape, at a path that ends with its own. Factored moments (adafactor's rows
      and columns) are not of one weight and stay.

    A weight that comes back starts from zero, and moves from the next step on.

    Args:
      inner: any optimizer, or chain.
      pruning: `sparsify`, `rewire` or `fixed`, or what contains them (`optax.masked`, `optax.multi_transform`).
      mask_gradients: False hands the optimizer all gradients, for `sparsify(..., hold=False)`.

    Returns:
      A transformation for the place where the optimizer stood.
    """
    inner, pruning = optax.with_extra_args_support(inner), optax.with_extra_args_support(pruning)

    def init_fn(params: Any) -> AroundState:
        return AroundState(inner.init(params), pruning.init(params))

    def update_fn(updates: Any, state: AroundState, params: Any = None, **extra_args: Any) -> tuple[Any, AroundState]:
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        before = masks(state.pruning)
        seen = apply_masks(updates, state.pruning) if mask_gradients else updates
        new, inner_state = inner.update(seen, state.inner, params, **extra_args)
        new = apply_masks(new, state.pruning) if mask_gradients else new
        new, pruning_state = pruning.update(new, state.pruning, params, gradients=updates, **extra_args)
        after = masks(pruning_state)
        returned = {name: after[name] & ~mask for name, mask in before.items()}
        names = {name for name, _ in paths.named_leaves(params)}
        return new, AroundState(_cleared(inner_state, returned, names), pruning_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cleared(state: Any, where: dict[str, jax.Array], names: set[str]) -> Any:
    """`state` with zeros `where` a weight comes back, in every array that is kept for each of the weights.

    `names` are those of all parameters, with and without a mask.
    """

    def clear(name: str, x: Any) -> Any:
        mask = where.get(paths.owner(name, names) or "")
        if mask is None or jnp.shape(x) != mask.shape or not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return x
        return jnp.where(mask, jnp.zeros_like(x), x)

    leaves = [clear(name, x) for name, x in paths.named_leaves(state)]
    return paths.with_leaves(state, leaves)
