"""A weight that names what it sees: statistics of its inputs and outputs, given out of any function by name.

A `Watched` leaf does what its weight does. Where it meets an input in a product, it also computes a small statistic
and names it; `features.capture` then hands the named values out, through `jit`, `scan`, `remat` and `cond`. Unlike the
sums of `_observed.py`, which come back as cotangents, these need no derivative and need not add up: a smallest and a
largest value, a histogram, the difference between two weights.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import primitives
from jaxtyping import Array, ArrayLike

from jaxcompress import features
from jaxcompress.arrays import Leaf, compressed, is_leaf, register
from jaxcompress.arrays._products import ON_THE_WAY, Dims, free_axes, is_float, register_product
from jaxcompress.calibrate._batches import check_batches
from jaxcompress.calibrate._meshes import replicated
from jaxcompress.paths import Rules, UnmatchedRuleError, match, named_leaves, with_leaves

_PREFIX = "jaxcompress.calibrate:"
_tokens = itertools.count(1)

Axes = Sequence[int]


class Watched(Leaf):
    """A weight and what is measured where it meets an input. Lives only inside a measurement."""

    inner: Any
    """The weight: an array, or a leaf of any kind."""
    beside: Any
    """Another one, for what stands in its place; or `None`."""
    bounds: Array | None
    """float32 `[*stack, 2]`, of histograms."""
    kind: str = eqx.field(static=True)
    number: int = eqx.field(static=True)
    """Of the weight, in the names."""
    whole: int = eqx.field(static=True)
    """How many axes the whole parameter has, of which `scan` may have sliced off leading ones."""
    token: int = eqx.field(static=True)
    """Another one for each measurement, so that nothing JAX or quax have cached serves it."""
    bins: int = eqx.field(static=True, default=0)

    def aval(self) -> ShapedArray:
        return ShapedArray(self.inner.shape, self.inner.dtype)

    def materialise(self) -> Array:
        return self.inner.materialise() if is_leaf(self.inner) else self.inner


def _noted(x: Array, w: Watched, run: Callable[[Array, Any], Array], own: Axes, inputs: Axes) -> Array:
    """`run(x, weight)`, with the statistic named.

    `own` are the output's axes that are the weight's; `inputs` the input's that are summed over (or its channels), in
    the order of the weight's.
    """
    out = run(x, w.inner)
    other = None if w.beside is None else run(x, w.beside)
    value = _STATISTICS[w.kind](w, x, out, other, own, inputs)
    sliced = w.whole - len(w.shape)
    checkpoint_name(value, f"{_PREFIX}{w.number}:{sliced}:{value.ndim}")
    return out


def _range(w: Watched, x: Array, out: Array, other: Any, own: Axes, inputs: Axes) -> Array:
    x = x.astype(jnp.float32)
    return jnp.stack([jnp.min(x, initial=jnp.inf), jnp.max(x, initial=-jnp.inf)])


def _counts(w: Watched, x: Array, out: Array, other: Any, own: Axes, inputs: Axes) -> Array:
    assert w.bounds is not None
    low, high = w.bounds[0], w.bounds[1]
    width = jnp.where(high > low, (high - low) / w.bins, 1.0)
    at = jnp.clip(jnp.floor((x.astype(jnp.float32) - low) / width), 0, w.bins - 1).astype(jnp.int32)
    return replicated(lambda at: jnp.bincount(at.reshape(-1), length=w.bins), at)


def _noise(w: Watched, x: Array, out: Array, other: Any, own: Axes, inputs: Axes) -> Array:
    signal, off = (jnp.sum(jnp.square(y.astype(jnp.float32))) for y in (out, out - other))
    return jnp.stack([signal, off])


def _shift(w: Watched, x: Array, out: Array, other: Any, own: Axes, inputs: Axes) -> Array:
    rest = tuple(axis for axis in range(out.ndim) if axis not in own)
    return jnp.mean((out - other).astype(jnp.float32), axis=rest)


def _peaks(w: Watched, x: Array, out: Array, other: Any, own: Axes, inputs: Axes) -> Array:
    laid = jnp.transpose(jnp.abs(x.astype(jnp.float32)), (*inputs, *free_axes(x.ndim, inputs)))
    return jnp.max(laid.reshape(math.prod(laid.shape[: len(inputs)]), -1), axis=1)


_STATISTICS: dict[str, Callable[..., Array]] = {
    "range": _range,
    "counts": _counts,
    "noise": _noise,
    "shift": _shift,
    "peaks": _peaks,
}
_JOIN: dict[str, Callable[..., Array]] = {
    "range": lambda x, axis: jnp.stack([jnp.min(x[..., 0], axis), jnp.max(x[..., 1], axis)], axis=-1),
    "counts": jnp.sum,
    "noise": jnp.sum,
    "shift": jnp.mean,
    "peaks": jnp.max,
}


@register_product(Watched)
def _dot(x: Array, w: Watched, dims: Dims, params: dict[str, Any]) -> Any:
    if not is_float(x):
        return NotImplemented

    def run(x: Array, weight: Any) -> Array:
        return _bound(lax.dot_general_p, params | {"dimension_numbers": dims.numbers})(x, weight)

    n_batch, n_x = len(dims.x_batch), len(dims.x_free(x.ndim))
    own = [
        axis for axis in range(n_batch + n_x + len(dims.w_free(len(w.shape)))) if not n_batch <= axis < n_batch + n_x
    ]
    return _noted(x, w, run, own, [axis for _, axis in sorted(zip(dims.w_contract, dims.x_contract, strict=True))])


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: Watched, **params: Any) -> Any:
    if not is_float(x):
        return NotImplemented
    run = _bound(lax.conv_general_dilated_p, params)
    numbers = params["dimension_numbers"]
    return _noted(jnp.asarray(x), w, run, [numbers.out_spec[1]], [numbers.lhs_spec[1]])


def _bound(primitive: Any, params: Mapping[str, Any]) -> Callable[..., Any]:
    return compressed(functools.partial(primitive.bind, **params))


def _still_a_weight(primitive: Any) -> None:
    """A weight that only changes its shape or its dtype on the way to a product is still a weight there."""

    @register(primitive)
    def _(w: Watched, **params: Any) -> Any:
        inner = _bound(primitive, params)(w.inner)
        if len(inner.shape) and inner.size != w.size:
            return NotImplemented
        beside = None if w.beside is None else _bound(primitive, params)(w.beside)
        whole = w.whole - len(w.shape) + len(inner.shape)
        return dataclasses.replace(w, inner=inner, beside=beside, whole=whole)


for _primitive in (*ON_THE_WAY, lax.broadcast_in_dim_p, primitives.copy_p):
    _still_a_weight(_primitive)


@register(lax.gather_p)
def _gather(w: Watched, indices: ArrayLike, **params: Any) -> Any:
    return _bound(lax.gather_p, params)(w.inner, indices)


class Watcher:
    """Measures one kind of statistic of the chosen weights, batch by batch, in one compiled function."""

    def __init__(self, fn: Callable[[Any, Any], Any], names: Sequence[str], kind: str, bins: int = 0) -> None:
        self._fn, self._names, self._kind, self._bins = fn, list(names), kind, bins
        self._step = jax.jit(self._measure)

    def measure(self, params: Any, batch: Any, beside: Any = None, bounds: Mapping[str, Array] | None = None) -> Any:
        """The statistic by name, `[*stack, *statistic]`, where `stack` are the leading axes that `scan` slices off."""
        return self._step(params, batch, beside, bounds)

    def _measure(self, params: Any, batch: Any, beside: Any, bounds: Mapping[str, Array] | None) -> Any:
        leaves = named_leaves(params, is_leaf)
        others = {} if beside is None else dict(named_leaves(beside, is_leaf))
        token = next(_tokens)

        def view(name: str, x: Any) -> Any:
            if name not in self._names:
                return x
            extra = others.get(name), None if bounds is None else bounds[name]
            return Watched(x, *extra, self._kind, self._names.index(name), len(x.shape), token, bins=self._bins)

        views = with_leaves(params, [view(name, x) for name, x in leaves], is_leaf)
        try:
            _, found = features.capture(compressed(self._fn), f"^{_PREFIX}")(views, batch)
        except UnmatchedRuleError:
            found = {}
        except ValueError as error:
            if "cannot capture" not in str(error):
                raise
            raise ValueError(
                "what meets a chosen weight can't be measured inside a while_loop, nor where only some branches of a "
                f"cond use it: leave the weight out of the rules, or use scan ({str(error)[:80]}...)"
            ) from error
        shapes = {name: x.shape for name, x in leaves}
        uses: dict[str, list[Array]] = {name: [] for name in self._names}
        for key, value in found.items():
            number, sliced, ndim = map(int, key.removeprefix(_PREFIX).split("/")[0].split(":"))
            name = self._names[number]
            uses[name].append(self._unstacked(name, value, shapes[name][:sliced], ndim))
        for name, values in uses.items():
            if not values:
                raise ValueError(
                    f"{name!r} meets no floating-point input in a product or convolution: leave it out of the rules, "
                    "or give it the rule None"
                )
            if len({value.shape for value in values}) > 1:
                raise ValueError(f"{name!r} is used in ways whose statistics do not fit together: leave it out")
        return {name: _JOIN[self._kind](jnp.stack(values), 0) for name, values in uses.items()}

    def _unstacked(self, name: str, value: Array, stack: tuple[int, ...], ndim: int) -> Array:
        """Over the steps of scans that do not slice the weight, one statistic."""
        lead = value.shape[: value.ndim - ndim]
        fits = [
            axes
            for axes in itertools.combinations(range(len(lead)), len(stack))
            if tuple(lead[axis] for axis in axes) == stack
        ]
        if len(fits) != 1 and len(lead) != len(stack):
            raise ValueError(f"{name!r}: it can't be told which of the nested scans of lengths {lead} slices it")
        own = fits[0] if len(fits) == 1 else tuple(range(len(lead)))
        for axis in sorted((axis for axis in range(len(lead)) if axis not in own), reverse=True):
            value = _JOIN[self._kind](value, axis)
        return value


def chosen_weights(params: Any, rules: Rules[Any]) -> list[str]:
    """The paths that rules choose: those with a value that is neither None nor False."""
    names = [name for name, _ in named_leaves(params, is_leaf)]
    values = match(rules, names, None)
    return [name for name, value in zip(names, values, strict=True) if value is not None and value is not False]


def measured(watcher: Watcher, params: Any, batches: Iterable[Any], **extra: Any) -> list[Any]:
    """The statistics of each batch; raises ValueError where there is none."""
    check_batches(batches)
    found = [jax.device_get(watcher.measure(params, batch, **extra)) for batch in batches]
    if not found:
        raise ValueError("there are no batches to measure inputs on: `batches` is empty")
    return found
