"""Masks that are chosen once, from any scores, and then held."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax._src import base  # its message for a missing `params`, as every transformation raises it

from jaxcompress import paths
from jaxcompress.prune._masks import SparsifyState, check_finite
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune._plan import flatten, masks_of, plan_for
from jaxcompress.prune._renew import scheduled_masks
from jaxcompress.prune._schedules import one_shot
from jaxcompress.prune._sparsify import held
from jaxcompress.prune._stored import stored_beside

_ONCE = one_shot(0)


def _as_it_is(score: jax.Array) -> jax.Array:
    return score


def choose(scores: Any, rules: paths.Rules[Pattern | float | None], *, allow_empty: bool = False) -> Any:
    """Masks from scores, once: what `sparsify` does at the end of its schedule, for scores of any origin.

        scores = jax.tree.map(prune.saliency, params, grads)
        tx = optax.chain(optax.sgd(0.1), prune.fixed(prune.choose(scores, {"kernel$": 0.9})))

    Args:
      scores: a tree of the parameters' paths and shapes, floating point; the lowest are pruned. Only leaves that a rule
        matches are looked at.
      rules: as for `sparsify`.
      allow_empty: as for `sparsify`.

    Returns:
      A tree of `scores`' structure: bool masks, True is kept; `None` where no rule matched.

    Raises:
      ValueError: as `sparsify`; and for concrete scores that are not finite.
    """
    leaves, treedef = flatten(scores)
    plan = plan_for(rules, scores, _ONCE, allow_empty)
    check_finite({layer.name: x for layer, x in zip(plan, leaves, strict=True) if layer}, "scores")
    chosen = {i: layer for i, layer in enumerate(plan) if layer is not None}
    pruned = [jnp.ones_like(leaves[i], dtype=bool) for i in chosen]
    masks = scheduled_masks(
        jnp.int32(0),
        pruned,
        [leaves[i] for i in chosen],
        [None] * len(chosen),
        layers=tuple(chosen.values()),
        schedule=_ONCE,
        score=_as_it_is,
        allow_empty=allow_empty,
    )
    by_leaf = dict(zip(chosen, masks, strict=True))
    return treedef.unflatten([by_leaf.get(i) for i in range(len(leaves))])


def fixed(masks: Any, *, packed: bool = True) -> optax.GradientTransformationExtraArgs:
    """Holds pruned weights at zero with masks that never change: for lottery tickets and static sparse training.

    It stands where `sparsify` stands, and has the same state. Its first update sets the pruned weights to zero.

    Args:
      masks: a tree of the parameters' paths: bool, shaped like them, True is kept; `None` (or no leaf) for others.
      packed: as for `sparsify`.

    Returns:
      A transformation; its `init` raises ValueError if a mask is not bool, or finds no parameter of its path and shape.
    """
    given = {name: mask for name, mask in paths.named_leaves(masks) if mask is not None}

    def init_fn(params: Any) -> SparsifyState:
        _, treedef = flatten(params)
        named = paths.named_leaves(params)
        missing = sorted(given.keys() - {name for name, _ in named})
        if missing:
            raise ValueError(f"no parameter for the mask of {missing[0]!r} ({len(missing)} such)")
        for name, x in named:
            if name in given and given[name].shape != x.shape:
                raise ValueError(f"the mask of {name!r} has shape {given[name].shape}, but the parameter has {x.shape}")
            if name in given and given[name].dtype != bool:
                raise ValueError(
                    f"the mask of {name!r} is {given[name].dtype}: want bool, True for a weight that stays"
                )
        own = [stored_beside(x, given[name], packed) if name in given else None for name, x in named]
        return SparsifyState(jnp.zeros((), jnp.int32), treedef.unflatten(own))

    def update_fn(
        updates: Any, state: SparsifyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SparsifyState]:
        del extra_args
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        leaves, treedef = flatten(params)
        own = masks_of(params, state.masks, [name in given for name, _ in paths.named_leaves(params)])
        new = treedef.flatten_up_to(updates)
        new = [u if m is None else held(m, u, x) for m, u, x in zip(own, new, leaves, strict=True)]
        return treedef.unflatten(new), SparsifyState(optax.safe_increment(state.step), state.masks)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
