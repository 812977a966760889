"""AWQ: scales moved from a weight's inputs into the weight, so that the inputs that matter are rounded more finely."""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.arrays import is_leaf
from jaxcompress.calibrate import InputObserver, Layout
from jaxcompress.calibrate._batches import check_batches
from jaxcompress.paths import Rules, match, named_leaves, with_leaves
from jaxcompress.quantize._affine import Affine, fake_quantize
from jaxcompress.quantize._scaling import (
    Pairs,
    by_channel,
    check_pairs,
    check_same,
    move_scale,
    multiplied,
    shared_channels,
    with_fronts,
)


def awq(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules[Affine | None],
    pairs: Pairs,
    *,
    points: int = 20,
    tolerance: float | None = None,
) -> Any:
    """Parameters of the same function, whose weights lose less when they are rounded: for `convert`, or `gptq`.

    Activation-aware weight quantization (Lin et al. 2024, section 3.2). Each input `c` of a weight is multiplied by
    `s[c]` in the weight and divided by it in what stands in front. `s = rms(x)**a`, normalised so that the product of
    its extremes is 1, with the `a` of `points + 1` evenly spaced in [0, 1] for which the rounded weights change their
    outputs least over the batches; `a = 0` is rounding to nearest, so no layer gets worse. (The paper takes the mean of
    `|x|`; the root mean square is what is measured here.)

        pairs = [(["LayerNorm_0/scale", "LayerNorm_0/bias"], ["query/kernel", "key/kernel", "value/kernel"]),
                 (["Dense_0/kernel", "Dense_0/bias"], ["Dense_1/kernel"])]  # with a rectifier between: s > 0 passes it
        scaled = quantize.awq(fn, params, batches, rules, pairs)
        small = quantize.convert(scaled, rules)

    Args:
      fn: `fn(params, batch)`, the model.
      params: a tree of float arrays.
      batches: calibration data, which can be read again.
      rules: by path, the grid that each weight is going to be rounded to.
      pairs: what stands in front of which weights. What is in front has the channels along its last axis (or its last
        axes: heads and their size); the weights behind it share its scales, and have the channels as their inputs, or
        as the last of the axes that make up their inputs (convolutions, flattened images).
      points: of the search.
      tolerance: how far, relative to its norm, the function's output on the first batch may be off after scaling: by
        default 1e-2, and where it computes in half precision four of its steps if that is more (0.03 of bfloat16).

    Returns:
      `params` in float, scaled.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError: a path that isn't there, a weight behind that no rule chooses or that has several matrices (stacked
        layers), sizes that don't fit, inputs that can't be measured, a function that scaling changes.
    """
    names = [name for name, _ in named_leaves(params, is_leaf)]
    specs = dict(zip(names, match(rules, names, None), strict=True))
    check_batches(batches)
    if iter(batches) is batches:
        raise ValueError("awq reads the batches twice: hand in a list of them, not an iterator")
    first = next(iter(batches), None)
    if first is None or points < 1:
        raise ValueError(f"want at least one batch and one point, got {points} points and {batches!r:.40}")
    behind = [name for _, weights in pairs for name in weights]
    check_pairs(pairs, names)
    for name in behind:
        if specs[name] is None:
            raise ValueError(f"{name!r} of the pairs is not chosen by any rule")
        if not isinstance(specs[name], Affine):
            raise TypeError(f"{name!r}: awq searches scales for an Affine grid, got the rule {specs[name]!r}")
    observer = InputObserver(fn, params, first, {f"^{re.escape(name)}$": True for name in behind})
    statistics = observer.measure(params, batches)
    leaves = dict(named_leaves(params, is_leaf))
    layouts = with_fronts(fn, params, first, pairs, observer.layouts)
    for front, weights in pairs:
        seen = [statistics[name] for name in weights]
        channels = shared_channels(front, weights, leaves, layouts)
        energy = sum(by_channel(jnp.mean, s.squares / s.rows[:, None], channels) for s in seen)
        scale = _searched(
            [leaves[name] for name in weights],
            [s.gram for s in seen if s.gram is not None],
            jnp.sqrt(energy),
            layouts=tuple(s.layout for s in seen),
            specs=tuple(specs[name] for name in weights),
            points=points,
        )
        move_scale(leaves, front, {name: s.layout for name, s in zip(weights, seen, strict=True)}, scale)
    scaled = with_leaves(params, list(leaves.values()), is_leaf)
    check_same(fn, params, scaled, first, tolerance, usual=1e-2)
    return scaled


@functools.partial(jax.jit, static_argnames=("layouts", "specs", "points"))
def _searched(
    weights: list[Array],
    grams: list[Float[Array, "groups inputs inputs"]],
    rms: Float[Array, " channels"],
    *,
    layouts: tuple[Layout, ...],
    specs: tuple[Affine, ...],
    points: int,
) -> Float[Array, " channels"]:
    """The scales under which the weights' outputs change least, all together."""
    heard = rms > 0  # a channel that is always zero is left alone
    logs = jnp.log(jnp.where(heard, rms, 1.0))
    middle = (jnp.max(logs, where=heard, initial=-jnp.inf) + jnp.min(logs, where=heard, initial=jnp.inf)) / 2
    logs = jnp.where(heard, logs - middle, 0.0)

    def scale_at(power: Array) -> Array:
        return jnp.exp(jnp.clip(power * logs, -9.0, 9.0))

    def loss(power: Array) -> Array:
        total = jnp.float32(0)
        for weight, gram, layout, spec in zip(weights, grams, layouts, specs, strict=True):
            scale = scale_at(power)
            rounded = multiplied(fake_quantize(multiplied(weight, scale, layout), spec), 1 / scale, layout)
            error = layout.matrices((rounded - weight).astype(jnp.float32))
            total += jnp.sum(error * jnp.matmul(gram, error, precision=jax.lax.Precision.HIGHEST))
        return total

    powers = jnp.linspace(0.0, 1.0, points + 1)
    return scale_at(powers[jnp.argmin(jax.lax.map(loss, powers))])
