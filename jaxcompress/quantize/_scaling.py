"""Scales moved from what stands in front of weights into the weights: what AWQ, SmoothQuant and equalisation share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.arrays import is_leaf
from jaxcompress.calibrate import Layout
from jaxcompress.calibrate._statistics import layouts_where_one
from jaxcompress.features import _bodies
from jaxcompress.paths import named_leaves

Pairs = Sequence[tuple[Sequence[str], Sequence[str]]]
"""`(in front, behind)`: paths of parameters that scale the inputs of weights, and paths of these weights."""


def check_pairs(pairs: Pairs, names: Sequence[str]) -> None:
    """Raises ValueError for paths that aren't there, TypeError for one in place of a list."""
    for front, weights in pairs:
        if isinstance(front, str) or isinstance(weights, str):
            raise TypeError(f"a pair is two lists of paths, got {(front, weights)}")
        if not front or not weights:
            raise ValueError(f"a pair names parameters in front and weights behind, got {front} and {weights}")
        for name in (*front, *weights):
            if name not in names:
                raise ValueError(f"{name!r} of the pairs is not there")


def move_scale(
    leaves: dict[str, Array], front: Sequence[str], behind: Mapping[str, Layout], scale: Float[Array, " channels"]
) -> None:
    """Divides, in place, what is in front by the scale along its last axis (or axes), and multiplies what is behind."""
    for name in front:
        x = leaves[name]
        lead = x.shape[: x.ndim - _depth(x.shape, scale.size)]
        leaves[name] = (x.reshape(*lead, scale.size) / scale).reshape(x.shape).astype(x.dtype)
    for name, layout in behind.items():
        leaves[name] = multiplied(leaves[name], scale, layout)


def with_fronts(
    fn: Callable[[Any, Any], Any], params: Any, batch: Any, pairs: Pairs, layouts: Mapping[str, Layout]
) -> dict[str, Layout]:
    """The weights' layouts, and those of what is in front where its shape leaves open which of its axes are channels.

    A kernel `[4, 8]` in front of 32 inputs may make 32 channels (heads of 8) or 8 that are met at 4 places: the trace
    knows.
    """
    leaves = dict(named_leaves(params, is_leaf))
    fewest = [(front, min(_inputs(layouts[name]) for name in behind)) for front, behind in pairs]
    open_ = [name for front, inputs in fewest for name in front if _depth(leaves[name].shape, inputs) > 1]
    found = layouts_where_one(fn, params, batch, open_) if open_ else {}
    return {**found, **layouts}


def shared_channels(
    front: Sequence[str], weights: Sequence[str], leaves: Mapping[str, Array], layouts: Mapping[str, Layout]
) -> int:
    """How many scales the weights share with what is in front; raises ValueError where that has no answer."""
    inputs = [_inputs(layouts[name]) for name in weights]
    for name in weights:
        if layouts[name].matrix_shape[0] != layouts[name].groups:
            raise ValueError(f"{name!r} is {layouts[name].matrix_shape[0]} matrices (stacked): scale it alone")
    for channels in (min(inputs), leaves[front[0]].shape[-1]):
        makes_them = all(_makes(leaves[name].shape, channels, layouts.get(name)) for name in front)
        if makes_them and not any(_inputs(layouts[w]) % channels or channels % layouts[w].groups for w in weights):
            return channels
    shapes = {name: leaves[name].shape for name in (*front, *weights)}
    raise ValueError(f"what is in front does not end with the channels of what is behind: {shapes}")


def _makes(shape: tuple[int, ...], channels: int, layout: Layout | None) -> bool:
    """Whether the last axes are so many channels; of a kernel, its outputs only."""
    depth = _depth(shape, channels)
    if layout is None or not depth:
        return bool(depth)
    outputs = layout.own_axes(layout.outputs)
    return all(axis in outputs for axis in range(len(shape) - depth, len(shape)))


def _depth(shape: tuple[int, ...], channels: int) -> int:
    """How many of the last axes have as many places together as there are channels; 0 if that never happens."""
    return next((n for n in range(1, len(shape) + 1) if math.prod(shape[-n:]) == channels), 0)


def multiplied(weight: Array, scale: Float[Array, " channels"], layout: Layout) -> Array:
    """The weight with each of its inputs' channels multiplied."""
    matrices = layout.matrices(weight)
    own = scale.reshape(layout.groups, -1)  # the channels that each group of a convolution reads
    along = jnp.tile(own, matrices.shape[1] // own.shape[1])
    return layout.weight((matrices * along[:, :, None]).astype(weight.dtype))


def by_channel(
    reduce: Callable[..., Array], per_input: Float[Array, "groups inputs"], channels: int
) -> Float[Array, " channels"]:
    """`reduce` over the places (under a kernel, of an image) at which each channel of the inputs is met."""
    groups = per_input.shape[0]
    return reduce(per_input.reshape(groups, -1, channels // groups), axis=1).reshape(channels)


def _inputs(layout: Layout) -> int:
    return layout.groups * layout.matrix_shape[1]


def check_same(
    fn: Callable[[Any, Any], Any], params: Any, scaled: Any, batch: Any, tolerance: float | None, usual: float
) -> None:
    """Raises ValueError if the function is another one after scaling; the `usual` tolerance is that of float32."""
    run = jax.jit(fn)
    if tolerance is None:
        stored = [_half_step(jnp.result_type(x)) for x in jax.tree.leaves(params)]
        tolerance = max(usual, 4 * max([_half_step_inside(jax.make_jaxpr(fn)(params, batch).jaxpr), *stored]))
    for before, after in zip(*(jax.tree.leaves(run(tree, batch)) for tree in (params, scaled)), strict=True):
        if jnp.issubdtype(before.dtype, jnp.floating):
            off = float(jnp.linalg.norm((after - before).astype(jnp.float32).ravel()))
            norm = float(jnp.linalg.norm(before.astype(jnp.float32).ravel()))
            if not off <= tolerance * norm:
                raise ValueError(
                    f"scaling changes the function ({off:.3g} of {norm:.3g} on the first batch): what the pairs have "
                    f"in front must reach the weights behind only, through what commutes with positive scales (a "
                    f"rectifier, pooling, attention's weighted sums; not gelu or tanh), with its bias, and "
                    f"not a gain that is stored less one (see `pairs`). A model of "
                    f"many layers in half precision may be off by its rounding: then pass more than {tolerance=:g}"
                )


def _half_step_inside(jaxpr: Any) -> float:
    """The relative step of the coarsest 16-bit floats that a trace computes, 0 if there are none."""
    own = [_half_step(x.aval.dtype) for eqn in jaxpr.eqns for x in eqn.outvars if hasattr(x.aval, "dtype")]
    return max([0.0, *own, *(_half_step_inside(body) for eqn in jaxpr.eqns for body in _bodies(eqn))])


def _half_step(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2 else 0.0
