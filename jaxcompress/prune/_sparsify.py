"""The pruning transformation: the last of an `optax.chain`, whose updates leave pruned weights at exactly zero."""

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
from jaxcompress.prune._schedules import Schedule
from jaxcompress.prune._scores import Accumulated, Score, check_score, magnitude
from jaxcompress.prune._stored import all_kept, booleans


def sparsify(
    rules: paths.Rules[Pattern | float | None],
    schedule: Schedule,
    *,
    score: Score | Accumulated = magnitude,
    hold: bool = True,
    packed: bool = True,
    allow_empty: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes weights while an optimizer trains the others; needs no call in the training loop.

    It stands last in `optax.chain`: the update of a pruned weight is minus the weight, so the parameters that
    `optax.apply_updates` returns are exactly zero there (`p + (-p)` is), whatever the optimizer wanted.

        tx = optax.chain(
            optax.adam(1e-3),
            prune.sparsify({"kernel$": prune.Unstructured(0.9)}, prune.polynomial(begin=1000, end=5000, every=100)),
        )

    It works inside `optax.MultiSteps`, `inject_hyperparams`, `apply_if_finite`, `masked` and `multi_transform`, and in
    an `nnx.Optimizer`. What rescales or averages updates or parameters *after* it would undo the zeros: put it outside
    `optax.contrib.schedule_free` and `optax.lookahead`, and send averaged parameters (an EMA,
    `schedule_free_eval_params`) through `apply_masks`. The optimizer in front goes on working on pruned weights: their
    gradients count in a global norm, and their moments move. `around` keeps them from it.

    Masks follow the weights before this step's update: the lowest scores are pruned, of equal scores the first in the
    weight's row-major order, so that the number pruned is the number asked and does not depend on the sharding. A
    weight whose score is NaN ranks highest: it is kept, so that the failure stays visible.

    Args:
      rules: by path, what is pruned how: a pattern, a number (`Unstructured` of that sparsity), or `None` (kept dense).
        The first match wins; parameters that no rule matches are kept dense.
      schedule: when the masks change; see `polynomial` and `one_shot`.
      score: of a weight, how much each of its entries matters. One that is accumulated from gradients (`movement`,
        `taylor`, `empirical_fisher`) needs `around`.
      hold: False leaves the updates alone, so that pruned weights go on moving: for `straight_through`.
      packed: store masks as a bit a weight where the last axis is made of whole bytes (of each device's part, if the
        sharding is known); False stores a boolean a weight. A checkpoint holds masks as they are stored: to resume on
        another mesh, create the state before it is sharded, or take False.
      allow_empty: whether every weight of a layer may go. Otherwise a sparsity that would (a rounded 0.99 of 10
        weights) is refused, and thresholds and common rankings leave each layer its best weight.

    Returns:
      A transformation whose `init` and `update` raise ValueError for rules that don't fit the parameters (a rule that
      matches nothing, a pattern that doesn't divide a shape, a layer that would be empty), for non-finite weights at a
      concrete `init`, for masks of other parameters (a restored state), and for an `update` without parameters. Its
      updates have the dtype of the parameters wherever a rule matched.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is a Schedule, such as polynomial(begin, end) or one_shot(), got {schedule!r}")
    check_score(score)
    accumulated = isinstance(score, Accumulated)

    def init_fn(params: Any) -> SparsifyState:
        leaves, treedef = flatten(params)
        plan = plan_for(rules, params, schedule, allow_empty)
        check_finite({layer.name: x for layer, x in zip(plan, leaves, strict=True) if layer})
        masks = [all_kept(x, packed) if layer else None for layer, x in zip(plan, leaves, strict=True)]
        statistics = None
        if accumulated:
            starts = [_start(x) if layer else None for layer, x in zip(plan, leaves, strict=True)]
            statistics = treedef.unflatten(starts)
        return SparsifyState(jnp.zeros((), jnp.int32), treedef.unflatten(masks), statistics)

    def update_fn(
        updates: Any, state: SparsifyState, params: Any = None, *, gradients: Any = None, **extra_args: Any
    ) -> tuple[Any, SparsifyState]:
        del extra_args
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        leaves, treedef = flatten(params)
        plan = plan_for(rules, params, schedule, allow_empty)
        chosen = {i: layer for i, layer in enumerate(plan) if layer is not None}
        masks = masks_of(params, state.masks, [layer is not None for layer in plan])
        statistics: list[Any] = [None] * len(leaves)
        if isinstance(score, Accumulated):
            flat = treedef.flatten_up_to(needed(gradients))
            statistics = treedef.flatten_up_to(state.statistics)
            for i in chosen:
                statistics[i] = score.observe(statistics[i], leaves[i], flat[i].astype(statistics[i].dtype))
        fresh = scheduled_masks(
            state.step,
            [masks[i] for i in chosen],
            [leaves[i] for i in chosen],
            [statistics[i] for i in chosen],
            layers=tuple(chosen.values()),
            schedule=schedule,
            score=score,
            allow_empty=allow_empty,
        )
        new_updates = treedef.flatten_up_to(updates)
        for i, mask in zip(chosen, fresh, strict=True):
            masks[i] = mask
            new_updates[i] = held(mask, new_updates[i], leaves[i]) if hold else new_updates[i]
        new_state = SparsifyState(
            optax.safe_increment(state.step),
            treedef.unflatten(masks),
            treedef.unflatten(statistics) if accumulated else None,
        )
        return treedef.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def held(mask: jax.Array, update: jax.Array, weight: jax.Array) -> jax.Array:
    """The update that leaves pruned weights at exactly zero: `p + (-p)` is, in the parameter's dtype."""
    return jnp.where(booleans(mask), update.astype(weight.dtype), -weight)


def needed(gradients: Any) -> Any:
    """The gradients that `around` hands on; raises ValueError if nobody did."""
    if gradients is None:
        raise ValueError(
            "this pruning needs the gradients, which a place in optax.chain does not show: write "
            "prune.around(optimizer, pruning) instead of optax.chain(optimizer, pruning)"
        )
    return gradients


def _start(weight: jax.Array) -> jax.Array:
    """Zeros in float32 (or wider), sharded like the weight."""
    return jnp.zeros_like(weight, dtype=jnp.promote_types(weight.dtype, jnp.float32))
