"""Sparse training from the start: the number of weights stands still, and which ones they are changes (RigL, SET)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax._src import base

from jaxcompress import paths
from jaxcompress.prune._fixed import choose
from jaxcompress.prune._masks import SparsifyState
from jaxcompress.prune._patterns import NM, Below, Pattern
from jaxcompress.prune._plan import Layer, flatten, masks_of, plan_for
from jaxcompress.prune._ranking import Ranking, lowest
from jaxcompress.prune._renew import scaled
from jaxcompress.prune._schedules import one_shot
from jaxcompress.prune._scores import Score, magnitude, random
from jaxcompress.prune._sparsify import held, needed
from jaxcompress.prune._stored import booleans, stored, stored_beside

Growth = Callable[[jax.Array, jax.Array], jax.Array]
"""Of a key and a weight's gradient, how much each of its entries is wanted: the highest come back."""


class RewireState(NamedTuple):
    """State of `rewire`."""

    pruning: SparsifyState
    key: jax.Array  # of the random numbers to come


def by_gradient(key: jax.Array, gradient: jax.Array) -> jax.Array:
    """The magnitude of the gradient (RigL, Evci et al. 2020)."""
    del key
    return jnp.abs(gradient)


def at_random(key: jax.Array, gradient: jax.Array) -> jax.Array:
    """Uniform numbers (SET, Mocanu et al. 2018): any pruned weight is as good as another."""
    return jax.random.uniform(key, gradient.shape)


def rewire(
    rules: paths.Rules[Pattern | float | None],
    *,
    key: jax.Array,
    end: int,
    begin: int = 0,
    every: int = 100,
    fraction: float = 0.3,
    grow: Growth = by_gradient,
    drop: Score = magnitude,
    packed: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network from the start: now and then the least weights go, and as many others come instead.

    Evci et al. 2020, "Rigging the Lottery" (`grow=by_gradient`, their equation 1 for the cosine decay), and Mocanu et
    al. 2018, sparse evolutionary training (`grow=at_random`). Masks begin at random. At the steps `begin, begin +
    every, ...` before `end`, of each layer's weights the part `fraction * (1 + cos(pi * step / end)) / 2` goes, lowest
    `drop` first, and as many weights that are not in use come in, highest `grow` first (those that just went may come
    back). Weights that come in are zero. It stands in `around`, which shows it the gradients:

        rules = prune.erk(params, {"kernel$": True}, sparsity=0.95)
        tx = prune.around(optax.sgd(0.1, momentum=0.9), prune.rewire(rules, key=key, end=20_000))

    Static sparse training is `fixed(choose(random(params, key), rules))`, which begins with the same masks.

    Args:
      rules: as for `sparsify`: single weights (each layer on its own) or blocks.
      key: of the first masks, and of `grow`.
      end: from this step on (the first update is step 0) the masks stand still; the paper ends at 3/4 of the training.
      begin: the first step at which they may change; not step 0, which sets pruned weights to zero.
      every: steps between two changes.
      fraction: of the weights in use, how many are replaced at first.
      grow: which weights come back.
      drop: which weights go.
      packed: as for `sparsify`.

    Returns:
      A transformation; errors are those of `sparsify`, and ValueError for numbers out of their range, for patterns
      without a free choice (`NM`, `Below`, a scope), and for an update without gradients.
    """
    if not 0 <= begin < end or every < 1:
        raise ValueError(f"want steps 0 <= begin < end and every >= 1, got begin={begin}, end={end}, every={every}")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is the part of the weights in use that is replaced, in (0, 1), got {fraction}")
    at_once = one_shot(0)

    def init_fn(params: Any) -> RewireState:
        for layer in plan_for(rules, params, at_once, False):
            if layer is not None and (isinstance(layer.pattern, NM | Below) or layer.scope is not None):
                raise ValueError(
                    f"{layer.name!r}: {layer.pattern} leaves no free choice to rewire in; want single weights or blocks"
                )
        chosen = choose(random(params, key), rules)
        leaves, treedef = flatten(params)
        kept = [
            None if mask is None else stored_beside(x, mask, packed)
            for x, mask in zip(leaves, treedef.flatten_up_to(chosen), strict=True)
        ]
        return RewireState(SparsifyState(jnp.zeros((), jnp.int32), treedef.unflatten(kept)), key)

    def update_fn(
        updates: Any, state: RewireState, params: Any = None, *, gradients: Any = None, **extra_args: Any
    ) -> tuple[Any, RewireState]:
        del extra_args
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        leaves, treedef = flatten(params)
        plan = plan_for(rules, params, at_once, False)
        masks = masks_of(params, state.pruning.masks, [layer is not None for layer in plan])
        flat = treedef.flatten_up_to(needed(gradients))
        chosen = {i: layer for i, layer in enumerate(plan) if layer is not None}
        step = state.pruning.step
        due = (step > 0) & (step >= begin) & (step < end) & ((step - begin) % every == 0)

        def renew() -> list[jax.Array]:
            share = fraction * (1 + jnp.cos(jnp.pi * step / end)) / 2
            keys = {i: jax.random.fold_in(jax.random.fold_in(state.key, step), i) for i in chosen}
            return [
                stored(_exchanged(layer, booleans(masks[i]), drop(leaves[i]), grow(keys[i], flat[i]), share), masks[i])
                for i, layer in chosen.items()
            ]

        fresh = lax.cond(due, renew, lambda: [masks[i] for i in chosen]) if chosen else []
        new_updates = treedef.flatten_up_to(updates)
        for i, mask in zip(chosen, fresh, strict=True):
            masks[i] = mask
            new_updates[i] = held(mask, new_updates[i], leaves[i])
        pruning = SparsifyState(optax.safe_increment(step), treedef.unflatten(masks))
        return treedef.unflatten(new_updates), RewireState(pruning, state.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _exchanged(layer: Layer, mask: jax.Array, worth: jax.Array, wanted: jax.Array, share: jax.Array) -> jax.Array:
    """The mask after the part `share` of the units in use has gone, and as many have come."""
    pattern = layer.pattern
    in_use = pattern.pool(mask.astype(jnp.float32)) > 0
    k = scaled(pattern.units(mask.shape) - layer.end, share)
    ((gone,),) = lowest([Ranking([jnp.where(in_use, pattern.pool(worth), jnp.nan)], k, pattern.stack)])
    stay = in_use & ~gone
    desire = jnp.nan_to_num(pattern.pool(wanted), nan=0.0)
    ((come,),) = lowest([Ranking([jnp.where(stay, jnp.nan, -desire)], k, pattern.stack)])
    return pattern.keep(~(stay | come), mask.shape)
