"""Scales that make a network easier to round: SmoothQuant, and cross-layer equalisation."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.arrays import is_leaf
from jaxcompress.calibrate import InputObserver, Layout
from jaxcompress.calibrate._batches import check_batches
from jaxcompress.calibrate._watched import Watcher, measured
from jaxcompress.paths import named_leaves, with_leaves
from jaxcompress.quantize._scaling import (
    Pairs,
    by_channel,
    check_pairs,
    check_same,
    move_scale,
    shared_channels,
    with_fronts,
)


def smooth(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    pairs: Pairs,
    *,
    strength: float = 0.5,
    tolerance: float | None = None,
) -> Any:
    """Parameters of the same function, whose inputs have fewer outliers: for static or dynamic 8-bit inputs.

    SmoothQuant (Xiao et al. 2023, equation 4): channel `c` of a weight's inputs is divided by
    `s[c] = max|x[c]|**strength / max|w[c]|**(1 - strength)` in what stands in front, and multiplied by it in the
    weight.

        pairs = [(["LayerNorm_0/scale", "LayerNorm_0/bias"], ["query/kernel", "key/kernel", "value/kernel"])]
        smoothed = quantize.smooth(fn, params, batches, pairs)

    Args:
      fn: `fn(params, batch)`, the model.
      params: a tree of float arrays.
      batches: calibration data.
      pairs: what stands in front of which weights, as for `awq`.
      strength: how much of the inputs' outliers goes into the weights, from 0 to 1 (the paper's alpha).
      tolerance: how far, relative to its norm, the function's output on the first batch may be off after scaling: by
        default 1e-2, and where it computes in half precision four of its steps if that is more (0.03 of bfloat16).

    Raises:
      ValueError: as `awq`.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is from 0 to 1, got {strength}")
    check_batches(batches)
    batches = list(batches)
    if not batches:
        raise ValueError("there are no batches to measure inputs on: `batches` is empty")
    leaves, layouts = _laid(fn, params, batches[0], pairs)
    behind = list(dict.fromkeys(name for _, weights in pairs for name in weights))
    seen = measured(Watcher(fn, behind, "peaks"), params, batches)
    peaks = {name: jnp.max(jnp.stack([batch[name] for batch in seen]), axis=0) for name in behind}
    for front, weights in pairs:
        channels = shared_channels(front, weights, leaves, layouts)
        of_inputs = jnp.max(jnp.stack([by_channel(jnp.max, peaks[name][None], channels) for name in weights]), axis=0)
        of_weights = jnp.max(jnp.stack([_sizes(leaves[name], layouts[name], channels) for name in weights]), axis=0)
        silent = (of_inputs <= 0) | (of_weights <= 0)
        scale = jnp.where(silent, 1.0, of_inputs) ** strength / jnp.where(silent, 1.0, of_weights) ** (1 - strength)
        move_scale(leaves, front, {name: layouts[name] for name in weights}, jnp.clip(scale, 1e-5, 1e5))
    return _checked(fn, params, leaves, batches[0], tolerance)


def equalize(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    pairs: Pairs,
    *,
    rounds: int = 20,
    tolerance: float | None = None,
) -> Any:
    """Parameters of the same function, with channels of like size: for weights with one scale a tensor.

    Cross-layer equalisation (Nagel et al. 2019, equation 11): with `r1[c]` the largest weight that makes channel `c`,
    and `r2[c]` the largest that takes it, both become `sqrt(r1 r2)`. Pairs share weights with their neighbours, so all
    are gone through until nothing changes. Needs no data: the batch only shows which weights meet which inputs.

        pairs = [(["Conv_0/kernel", "Conv_0/bias"], ["Conv_1/kernel"])]  # with a rectifier between; `fold` norms first

    Args:
      fn: `fn(params, batch)`, the model.
      params: a tree of float arrays.
      batch: one, to trace the function and to see that it stays the same.
      pairs: as for `awq`; the first path in front is the kernel whose weights are measured.
      rounds: at most so many times through all pairs.
      tolerance: how far, relative to its norm, the function's output on the batch may be off after scaling: by
        default 1e-2, and where it computes in half precision four of its steps if that is more (0.03 of bfloat16).

    Raises:
      ValueError: as `awq`.
    """
    leaves, layouts = _laid(fn, params, batch, pairs)
    for _ in range(rounds):
        furthest = 0.0
        for front, weights in pairs:
            channels = shared_channels(front, weights, leaves, layouts)
            makes = jnp.max(jnp.abs(leaves[front[0]].astype(jnp.float32)).reshape(-1, channels), axis=0)
            takes = jnp.max(jnp.stack([_sizes(leaves[name], layouts[name], channels) for name in weights]), axis=0)
            silent = (makes <= 0) | (takes <= 0)
            scale = jnp.sqrt(jnp.where(silent, 1.0, makes) / jnp.where(silent, 1.0, takes))
            move_scale(leaves, front, {name: layouts[name] for name in weights}, scale)
            furthest = max(furthest, float(jnp.max(jnp.abs(scale - 1))))
        if furthest < 1e-4:
            break
    return _checked(fn, params, leaves, batch, tolerance)


def _laid(
    fn: Callable[[Any, Any], Any], params: Any, batch: Any, pairs: Pairs
) -> tuple[dict[str, Array], dict[str, Layout]]:
    """The leaves by name, and how weights meet their inputs."""
    leaves = dict(named_leaves(params, is_leaf))
    check_pairs(pairs, list(leaves))
    behind = [name for _, weights in pairs for name in weights]
    observer = InputObserver(fn, params, batch, {f"^{re.escape(name)}$": True for name in behind}, gram=False)
    return leaves, with_fronts(fn, params, batch, pairs, observer.layouts)


def _checked(fn: Callable[[Any, Any], Any], params: Any, leaves: Any, batch: Any, tolerance: float | None) -> Any:
    scaled = with_leaves(params, list(leaves.values()), is_leaf)
    check_same(fn, params, scaled, batch, tolerance, usual=1e-2)
    return scaled


def _sizes(weight: Array, layout: Layout, channels: int) -> Float[Array, " channels"]:
    """The largest weight of each channel of the inputs."""
    return by_channel(jnp.max, jnp.max(jnp.abs(layout.matrices(weight.astype(jnp.float32))), axis=2), channels)
