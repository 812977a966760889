"""New masks from scores: at the steps that a schedule names, and never at others."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.prune._patterns import Below, Unstructured
from jaxcompress.prune._plan import Layer
from jaxcompress.prune._ranking import Ranking, common_dtype, lowest
from jaxcompress.prune._schedules import Schedule
from jaxcompress.prune._scores import Accumulated, Score, magnitude
from jaxcompress.prune._stored import stored


@functools.partial(jax.jit, static_argnames=("layers", "schedule", "score", "allow_empty"))
def scheduled_masks(  # jitted, so that an eager loop compiles it once
    step: jax.Array,
    masks: list[jax.Array],
    weights: list[jax.Array],
    statistics: list[Any],
    layers: tuple[Layer, ...],
    schedule: Schedule,
    score: Score | Accumulated,
    allow_empty: bool = False,
) -> list[jax.Array]:
    """The stored masks after step `step`: new ones if the schedule says so, else the old ones at no cost."""

    def scores(i: int) -> jax.Array:
        found = score.score(weights[i], statistics[i]) if isinstance(score, Accumulated) else score(weights[i])
        if jnp.shape(found) != weights[i].shape or not jnp.issubdtype(jnp.result_type(found), jnp.floating):
            raise ValueError(
                f"a score gives each weight of {layers[i].name!r} a floating-point number, so an array of shape "
                f"{weights[i].shape}; got shape {jnp.shape(found)} of {jnp.result_type(found)}"
            )
        return found

    def ranking(scope: Sequence[int], progress: jax.Array) -> Ranking:
        pattern = layers[scope[0]].pattern
        start, end = sum(layers[i].start for i in scope), sum(layers[i].end for i in scope)
        k = start + scaled(end - start, progress)
        if score is magnitude and isinstance(pattern, Unstructured):  # cheaper to work out in each pass than to store
            dtype = common_dtype([weights[i] for i in scope])
            return Ranking([weights[i] for i in scope], k, pattern.stack, lambda x: magnitude(x).astype(dtype))
        pooled = [layers[i].pattern.pool(scores(i)) for i in scope]
        dtype = common_dtype(pooled)
        return Ranking([x.astype(dtype) for x in pooled], k, pattern.stack)

    def renew() -> list[jax.Array]:
        progress, fresh = schedule.progress(step), list(masks)

        def settle(i: int, pruned: jax.Array) -> None:
            if not allow_empty and (isinstance(layers[i].pattern, Below) or layers[i].scope is not None):
                pruned = spare_best(pruned, lambda: scores(i))
            fresh[i] = stored(layers[i].pattern.keep(pruned, weights[i].shape), masks[i])

        for i, layer in enumerate(layers):
            if isinstance(layer.pattern, Below):
                share = schedule.initial + (1 - schedule.initial) * progress
                settle(i, scores(i) < layer.pattern.level(weights[i]) * share)
        for together in _batches(_scopes(layers), [x.size for x in weights]):
            for scope, marked in zip(together, lowest([ranking(s, progress) for s in together]), strict=True):
                for i, pruned in zip(scope, marked, strict=True):
                    settle(i, pruned)
        return fresh

    return lax.cond(schedule.due(step), renew, lambda: masks) if layers else []


def spare_best(pruned: jax.Array, scored: Callable[[], jax.Array]) -> jax.Array:
    """`pruned`, but for the first of the highest scores if otherwise nothing were left."""

    def spared() -> jax.Array:  # scores are worked out here: they are hardly ever needed
        scores = scored()
        strides = [math.prod(scores.shape[axis + 1 :]) for axis in range(scores.ndim)]
        lines = [lax.broadcasted_iota(jnp.uint32, scores.shape, axis) for axis in range(scores.ndim)]
        index = sum(
            (i * jnp.uint32(n) for i, n in zip(lines, strides, strict=True)), jnp.zeros(scores.shape, jnp.uint32)
        )
        best = jnp.min(jnp.where(scores == jnp.max(scores), index, jnp.uint32(0xFFFFFFFF)))
        return pruned & (index != best)  # all are pruned here: for the sharding, which `index` has not

    return lax.cond(jnp.all(pruned), spared, lambda: pruned)


def _scopes(layers: Sequence[Layer]) -> list[list[int]]:
    """Indices of the layers that are ranked together; a layer without a scope is ranked alone."""
    scopes: dict[object, list[int]] = {}
    for i, layer in enumerate(layers):
        if not isinstance(layer.pattern, Below):
            scopes.setdefault(layer.scope if layer.scope is not None else i, []).append(i)
    return list(scopes.values())


def _batches(scopes: Sequence[list[int]], sizes: Sequence[int]) -> list[list[list[int]]]:
    """Scopes in batches, each no larger together than the largest alone: what is searched, and held, at a time."""
    total = {i: sum(sizes[j] for j in scope) for i, scope in enumerate(scopes)}
    batches: list[list[list[int]]] = []
    left: list[int] = []
    for i in sorted(total, key=lambda i: -total[i]):
        fits = next((b for b, room in enumerate(left) if room >= total[i]), None)
        if fits is None:
            batches.append([scopes[i]])
            left.append(max(total.values()) - total[i])
        else:
            batches[fits].append(scopes[i])
            left[fits] -= total[i]
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
