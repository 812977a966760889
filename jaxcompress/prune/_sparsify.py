"""The pruning transformation: the last of an `optax.chain`, whose updates leave pruned weights at exactly zero."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax._src import base  # its message for a missing `params`, as every transformation raises it

from jaxcompress import paths
from jaxcompress.prune._masks import SparsifyState, check_finite
from jaxcompress.prune._patterns import Pattern, Unstructured
from jaxcompress.prune._ranking import Ranking, lowest
from jaxcompress.prune._schedules import Schedule
from jaxcompress.prune._scores import Score, magnitude


def sparsify(
    rules: paths.Rules[Pattern | float | None],
    schedule: Schedule,
    *,
    score: Score = magnitude,
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
    gradients count in a global norm, and their moments move.

    Masks follow the weights before this step's update: the lowest scores are pruned, of equal scores the first in the
    weight's row-major order, so that the number pruned is the number asked and does not depend on the sharding. A
    weight whose score is NaN ranks highest: it is kept, so that the failure stays visible.

    Args:
      rules: by path, what is pruned how: a pattern, a number (`Unstructured` of that sparsity), or `None` (kept dense).
        The first match wins; parameters that no rule matches are kept dense.
      schedule: when the masks change; see `polynomial` and `one_shot`.
      score: of a weight, how much each of its entries matters.
      allow_empty: whether a pattern may prune every weight of a layer (a rounded 0.99 of 10 weights does).

    Returns:
      A transformation whose `init` and `update` raise ValueError for rules that don't fit the parameters (a rule that
      matches nothing, a pattern that doesn't divide a shape, a layer that would be empty), for non-finite weights at a
      concrete `init`, for masks of other parameters (a restored state), and for an `update` without parameters. Its
      updates have the dtype of the parameters wherever a rule matched.
    """

    def init_fn(params: Any) -> SparsifyState:
        leaves, treedef = flatten(params)
        plan = plan_for(rules, params, schedule, allow_empty)
        check_finite({layer.name: x for layer, x in zip(plan, leaves, strict=True) if layer})
        masks = [ones_like(x) if layer else None for layer, x in zip(plan, leaves, strict=True)]
        return SparsifyState(jnp.zeros((), jnp.int32), treedef.unflatten(masks))

    def update_fn(
        updates: Any, state: SparsifyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SparsifyState]:
        del extra_args
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        leaves, treedef = flatten(params)
        plan = plan_for(rules, params, schedule, allow_empty)
        masks = masks_of(params, state.masks, [layer is not None for layer in plan])
        new_updates = treedef.flatten_up_to(updates)
        chosen = {i: layer for i, layer in enumerate(plan) if layer is not None}
        fresh = scheduled_masks(
            state.step,
            [masks[i] for i in chosen],
            [leaves[i] for i in chosen],
            layers=tuple(chosen.values()),
            schedule=schedule,
            score=score,
        )
        for i, mask in zip(chosen, fresh, strict=True):
            masks[i] = mask
            new_updates[i] = held(mask, new_updates[i], leaves[i])
        new_state = SparsifyState(optax.safe_increment(state.step), treedef.unflatten(masks))
        return treedef.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def held(mask: jax.Array, update: jax.Array, weight: jax.Array) -> jax.Array:
    """The update that leaves pruned weights at exactly zero: `p + (-p)` is, in the parameter's dtype."""
    return jnp.where(mask, update.astype(weight.dtype), -weight)


class Layer(NamedTuple):
    """A parameter that a rule chose, and what is asked of it."""

    name: str
    pattern: Pattern
    start: int  # units pruned at progress 0
    end: int  # units pruned at progress 1


def plan_for(rules: paths.Rules[Any], params: Any, schedule: Schedule, allow_empty: bool) -> list[Layer | None]:
    """What happens to each leaf of `params`, in tree order; raises ValueError where a rule does not fit."""
    named = paths.named_leaves(params)
    values = paths.match(rules, [name for name, _ in named], None)
    return [_layer(name, x, value, schedule, allow_empty) for (name, x), value in zip(named, values, strict=True)]


def _layer(name: str, x: Any, value: Any, schedule: Schedule, allow_empty: bool) -> Layer | None:
    if value is None:
        return None
    pattern = Unstructured(value) if isinstance(value, int | float) else value
    if not isinstance(pattern, Pattern):
        raise ValueError(f"the rule for {name!r} gives {value!r}: want a pattern, a sparsity in [0, 1), or None")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name!r} is {x.dtype}: only floating-point weights can be pruned; give it the rule None")
    try:
        pattern.check(x.shape)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    units, end = pattern.units(x.shape), pattern.budget(x.shape)
    start = round(schedule.initial * units)
    if end >= units > 0 and not allow_empty:
        raise ValueError(
            f"{name!r} of shape {x.shape} would lose all its weights to {pattern}: lower the sparsity, give it the "
            f"rule None, or pass allow_empty=True"
        )
    if start > end:
        raise ValueError(f"{name!r}: the schedule starts at sparsity {schedule.initial}, above what {pattern} prunes")
    return Layer(name, pattern, start, end)


def flatten(tree: Any) -> tuple[list[jax.Array], Any]:
    leaves, treedef = jax.tree.flatten(tree)
    return leaves, treedef


def ones_like(x: jax.Array) -> jax.Array:
    """True everywhere, made of `x` so that it is sharded like `x`, also under jit, where no sharding is known yet."""
    return ~(jnp.isnan(x) & jnp.isinf(x))


def masks_of(params: Any, masks: Any, chosen: Sequence[bool]) -> list[Any]:
    """The masks leaf by leaf of `params`; raises ValueError if they are not of the parameters that are `chosen`."""
    named = paths.named_leaves(params)
    try:
        flat = flatten(params)[1].flatten_up_to(masks)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the pruning state is of other parameters: its masks are for {[n for n, _ in paths.named_leaves(masks)]}, "
            f"wanted are {[name for (name, _), c in zip(named, chosen, strict=True) if c]}; init the optimizer anew, "
            f"or restore the state of this model"
        ) from error
    for (name, x), is_chosen, mask in zip(named, chosen, flat, strict=True):
        want = x.shape if is_chosen else None
        have = None if mask is None else mask.shape
        if want != have:
            raise ValueError(
                f"the pruning state is of other parameters or rules: the mask of {name!r} has shape {have}, "
                f"want {want}; init the optimizer anew, or restore the state of this model"
            )
    return flat


@functools.partial(jax.jit, static_argnames=("layers", "schedule", "score"))  # an eager loop compiles it once
def scheduled_masks(
    step: jax.Array,
    masks: list[jax.Array],
    weights: list[jax.Array],
    layers: tuple[Layer, ...],
    schedule: Schedule,
    score: Score,
) -> list[jax.Array]:
    """The masks after step `step`: new ones if the schedule says so, else the old ones at no cost."""

    def renew() -> list[jax.Array]:
        progress, fresh = schedule.progress(step), list(masks)
        for batch in _batches([x.size for x in weights]):
            rankings = [_ranking(layers[i], weights[i], score, progress) for i in batch]
            for i, (pruned,) in zip(batch, lowest(rankings), strict=True):
                fresh[i] = layers[i].pattern.keep(pruned, weights[i].shape)
        return fresh

    return lax.cond(schedule.due(step), renew, lambda: masks) if layers else []


def _ranking(layer: Layer, weight: jax.Array, score: Score, progress: jax.Array) -> Ranking:
    k = layer.start + scaled(layer.end - layer.start, progress)
    if score is magnitude and isinstance(layer.pattern, Unstructured):
        return Ranking([weight], k, layer.pattern.stack, score)  # cheaper to work out in each pass than to store
    return Ranking([layer.pattern.pool(score(weight))], k, layer.pattern.stack)


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Indices in batches, each no larger together than the largest alone: what is searched, and held, at a time."""
    batches: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = next((b for b, room in enumerate(left) if room >= sizes[i]), None)
        if fits is None:
            batches.append([i])
            left.append(max(sizes) - sizes[i])
        else:
            batches[fits].append(i)
            left[fits] -= sizes[i]
    return batches


def scaled(number: int, share: jax.Array) -> jax.Array:
    """`number * share` for a share in [0, 1], to within one, as uint32 [].

    In float32 the product of a large number would be off by more: so the share's 24 bits are multiplied in two halves.
    """
    if number >= 1 << 31:
        raise ValueError(f"{number} weights of one layer are pruned together: at most {(1 << 31) - 1} can be")
    bits = jnp.round(jnp.clip(share, 0, 1).astype(jnp.float32) * (1 << 24)).astype(jnp.uint32)
    high, low = bits >> 12, bits & 0xFFF  # the share is (high + low / 2**12) / 2**12
    top, rest = jnp.uint32(number >> 12), jnp.uint32(number & 0xFFF)  # the number is top * 2**12 + rest
    units = top * high  # below 2**32, in units of 1
    parts = top * low + rest * high + ((rest * low) >> 12)  # in units of 2**-12: below 2**31 + 2**24 + 2**12
    return units + (parts >> 12)
