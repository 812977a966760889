"""Conversion by a method that decides, weight by weight and from the inputs it meets, which integer each becomes."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress.arrays import Quantized, is_leaf
from jaxcompress.calibrate import InputObserver, InputStatistics, Layout
from jaxcompress.calibrate._statistics import observer_for
from jaxcompress.paths import Rules, match, named_leaves, with_leaves
from jaxcompress.quantize._affine import Affine, _grid, _spread, finite
from jaxcompress.quantize._convert import converted_leaf


def rounded_by(
    codes: Callable[[str, Array, InputStatistics, Affine], Array],
    fn: Callable[[Any, Any], Any] | InputObserver,
    params: Any,
    batches: Iterable[Any],
    rules: Rules[Affine | None],
) -> Any:
    """`convert`, on the grids that it gives, with the integers of `codes(name, weight, statistics, spec)`.

    Raises:
      UnmatchedRuleError, ValueError, TypeError: as `convert`; and for inputs that can't be measured.
    """
    leaves = named_leaves(params, is_leaf)
    matched = zip([name for name, _ in leaves], match(rules, [name for name, _ in leaves], None), strict=True)
    specs = {name: spec for name, spec in matched if spec is not None}
    # their scales, zero points and forms are those of the result
    nearest = {name: _nearest(name, x, specs[name]) for name, x in leaves if name in specs}
    observer, batches = observer_for(fn, params, batches, list(nearest), gram=True)
    statistics = observer.measure(params, batches, list(nearest) if len(nearest) < len(observer.layouts) else None)

    def converted(name: str, weight: Any) -> Any:
        if name not in nearest:
            return weight
        grid, found = nearest[name], codes(name, weight, statistics[name], specs[name])
        if grid.zero_point is not None:
            found = finite(found, grid.scale, grid.zero_point.astype(jnp.float32), weight.dtype, specs[name])
        return Quantized.from_codes(
            found,
            grid.scale,
            grid.zero_point,
            bits=grid.bits,
            dtype=weight.dtype,
            group=grid.group,
            activation_bits=grid.activation_bits,
        )

    return with_leaves(params, [converted(name, x) for name, x in leaves], is_leaf)


def matrix_grid(weight: Array, spec: Affine, layout: Layout) -> tuple[Array, Array]:
    """Of each weight its step and zero point (0 where the grid has none), as `layout.matrices`.

    One for each: so any grid fits any order of inputs.
    """
    scale, zero = _grid(weight, spec)
    zero = jnp.zeros_like(scale) if zero is None else zero
    wide = (jnp.broadcast_to(_spread(per_block, weight.shape, spec), weight.shape) for per_block in (scale, zero))
    steps, zeros = map(layout.matrices, wide)
    return steps, zeros


def _nearest(name: str, weight: Any, spec: Any) -> Quantized:
    """The weight as `convert` rounds it; raises, naming the weight, what that would."""
    if not isinstance(spec, Affine):
        raise TypeError(f"{name!r}: weights are rounded here to an Affine grid, got the rule {spec!r}")
    leaf = converted_leaf(name, weight, spec)
    assert isinstance(leaf, Quantized)
    return leaf
