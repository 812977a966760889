"""Affine quantization of weights: which integer grid a weight is rounded to, and the rounding."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress._numbers import integers, whole
from jaxcompress.arrays import Quantized
from jaxcompress.arrays._bits import repeated


@dataclasses.dataclass(frozen=True)
class Affine:
    """A grid of integers for a weight: `scale * (integer - zero_point)`, the scale from the weight's largest magnitude.

    Attributes:
      bits: levels of the weight, 2 to 8 bits. Stored in 2, 4 or 8 bits each.
      axes: the axes along which each index has a scale of its own; all others share. The default is per output channel
        for kernels whose last axis is the output's (Linen and NNX `Dense`, `Conv`); `()` is per tensor, `(0, -1)` per
        channel of weights stacked by `nn.scan`.
      group: (axis, size): along this axis, `size` neighbours share a scale. The last group may be shorter; one that is
        longer than the axis is the whole axis.
      symmetric: zero is the middle of the grid, and there is no zero point. Otherwise the grid spans [min, max], with
        zero on it.
      activation_bits: also quantize an input that meets the weight in a product or convolution: 2 to 8 bits, or 16.
        Symmetrically, with a scale of its own for each row (each example of a convolution), found as it comes; or on
        the grid of a calibrated range (`input_ranges`), or of a learned one (`learn`). `None` leaves inputs alone, and
        integers and complex numbers are never rounded.
    """

    bits: int = 8
    axes: tuple[int, ...] = (-1,)
    group: tuple[int, int] | None = None
    symmetric: bool = True
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9) or not hasattr(self.bits, "__index__"):
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        if self.activation_bits not in (None, *range(2, 9), 16) or isinstance(self.activation_bits, float):
            raise ValueError(f"activation_bits must be None, 2 to 8 or 16, got {self.activation_bits!r}")
        object.__setattr__(self, "bits", whole("bits", self.bits))
        if self.activation_bits is not None:
            object.__setattr__(self, "activation_bits", whole("activation_bits", self.activation_bits))
        object.__setattr__(self, "axes", integers("axes", self.axes))
        if self.group is not None:
            object.__setattr__(self, "group", integers("group", self.group))
            if len(self.group) != 2 or self.group[1] < 1:
                raise ValueError(f"group must be (axis, size) with a size of at least 1, got {self.group!r}")

    def convert(self, weight: Float[Array, "*shape"]) -> Quantized:
        """The weight on this grid, as `quantize` makes it."""
        return quantize(weight, self)

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer. A symmetric grid leaves out the smallest, to be the same both ways."""
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if self.symmetric else (-top - 1, top)


def quantize(weight: Float[Array, "*shape"], spec: Affine = Affine(), *, key: Array | None = None) -> Quantized:
    """The weight on `spec`'s grid, as a compressed leaf: round to nearest, ties to even.

    The dense value is within half a step of the weight (of one near its dtype's largest number, within a step on a grid
    with a zero point: all stays finite); a block of zeros becomes exact zeros, and so does one whose
    step would be below the smallest normal float32 (for 8 bits: of weights below 1.5e-36). With a
    random `key` the rounding is stochastic: up with the probability of the fraction, so that the mean is the weight. (A
    grid with a zero point then has a step to spare, or a weight at its end might have no integer on its other side.)

    Raises:
      TypeError: the weight isn't a real floating-point array.
      ValueError: non-finite weights (unless traced), or axes that the weight doesn't have.
    """
    weight = check_float(weight)
    scale, zero_point = _grid(weight, spec, spare=int(key is not None))
    group = None if spec.group is None else (_axis(spec.group[0], weight.ndim) - weight.ndim, spec.group[1])
    return Quantized.from_codes(
        _codes(weight, scale, zero_point, spec, key),
        scale,
        zero_point,
        bits=next(bits for bits in (2, 4, 8) if spec.bits <= bits),
        dtype=weight.dtype,
        group=group,
        activation_bits=spec.activation_bits,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_quantize(weight: Float[Array, "*shape"], spec: Affine) -> Float[Array, "*shape"]:
    """The weight rounded to `spec`'s grid, as floats; its gradient passes straight through (Bengio et al. 2013).

    Equal to `dense(quantize(weight, spec))`, bit for bit. The scale follows the weight's range, so no weight is clipped
    and the straight-through gradient is the identity.
    """
    scale, zero_point = _grid(weight, spec)
    codes = _codes(weight, scale, zero_point, spec)
    if zero_point is not None:
        codes -= _spread(zero_point, weight.shape, spec)
    return (codes * _spread(scale, weight.shape, spec)).astype(weight.dtype)


def _fake_fwd(weight: Array, spec: Affine) -> tuple[Array, None]:
    return fake_quantize(weight, spec), None


def _fake_bwd(spec: Affine, _: None, cotangent: Array) -> tuple[Array]:
    return (cotangent,)


fake_quantize.defvjp(_fake_fwd, _fake_bwd)


def check_float(weight: Any) -> Array:
    """The weight as an array; raises TypeError or ValueError for one that no grid fits."""
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"quantize takes a real floating-point weight, got {weight.dtype}{list(weight.shape)}")
    if not weight.shape:
        raise ValueError("a single number is no weight: there is nothing that could share a scale")
    check_entries(weight)
    if not isinstance(weight, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # a constant of a function that is being traced
            finite = bool(jnp.all(jnp.isfinite(weight)))
        if not finite:
            raise ValueError(f"weight of shape {weight.shape} has non-finite values; no scale fits them")
    return weight


def check_entries(weight: Any) -> None:
    """Raises ValueError for a weight with an axis of size zero, which has no largest entry."""
    if not jnp.size(weight):
        raise ValueError(f"a weight of shape {jnp.shape(weight)} has no entries: leave it out of the rules")


def _grid(weight: Array, spec: Affine, spare: int = 0) -> tuple[Array, Array | None]:
    """float32 scale and zero point (integers, as float32), one a block; with a `spare` step no weight is outside."""
    low, high = spec.limits
    weight = weight.astype(jnp.float32)
    if spec.symmetric:
        return _step(_over_blocks(jnp.max, jnp.abs(weight), spec) * np.float32(1 / high)), None
    smallest = jnp.minimum(_over_blocks(jnp.min, weight, spec), 0.0)
    largest = jnp.maximum(_over_blocks(jnp.max, weight, spec), 0.0)
    steps = high - low - spare
    # halves, or a huge range overflows; these are exact, so the step is the same inside jit, where operations are fused
    # and a constant divides by its reciprocal, and outside
    scale = _step((largest * 0.5 - smallest * 0.5) * np.float32(2 / steps))
    zero_point = (jnp.ceil if spare else jnp.round)(low - smallest / scale)
    return scale, jnp.clip(zero_point, low, high)


def _step(scale: Array) -> Array:
    # a step must be a normal number: subnormal ones flush to zero on most backends, and would divide by it
    return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)


def _codes(weight: Array, scale: Array, zero_point: Array | None, spec: Affine, key: Array | None = None) -> Array:
    dtype, weight, step = weight.dtype, weight.astype(jnp.float32), scale
    if spec.bits <= 3:  # XLA divides by multiplying with the reciprocal, and that of a huge step is no normal number
        down = jnp.where(scale > 1e30, 2.0**-64, 1.0)
        weight, scale = weight * _spread(down, weight.shape, spec), scale * down
    exact = weight / _spread(scale, weight.shape, spec)
    codes = jnp.round(exact) if key is None else jnp.floor(exact + jax.random.uniform(key, exact.shape))
    if zero_point is not None:
        codes = finite(codes + _spread(zero_point, weight.shape, spec), step, zero_point, dtype, spec)
    return jnp.clip(codes, *spec.limits)


def finite(codes: Array, step: Array, zero_point: Array, dtype: Any, spec: Affine) -> Array:
    """Integers that stand for numbers of the dtype: a rounded zero point moves the last ones of a huge range beyond."""
    largest = float(min(jnp.finfo(dtype).max, jnp.finfo(jnp.float32).max))
    most = jnp.floor(largest * 2.0**-64 / (step * 2.0**-64))
    most = jnp.where(step * 256 > largest, most, jnp.inf)
    low, high = (_spread(end, codes.shape, spec) for end in (zero_point - most, zero_point + most))
    return jnp.clip(codes, low, high)


def _over_blocks(reduce: Any, weight: Array, spec: Affine) -> Array:
    """`reduce` over each block, with one entry a block left along every axis."""
    kept = {_axis(axis, weight.ndim) for axis in spec.axes}
    over = [axis for axis in range(weight.ndim) if axis not in kept]
    if spec.group is None:
        return reduce(weight, axis=tuple(over), keepdims=True)
    axis, size = _axis(spec.group[0], weight.ndim), spec.group[1]
    shortage = -weight.shape[axis] % size
    padding = [(0, shortage if i == axis else 0) for i in range(weight.ndim)]
    # a repeated weight changes neither minimum nor maximum; no padding of nothing, which explicit axes would not divide
    padded = jnp.pad(weight, padding, mode="edge") if shortage else weight
    split = padded.reshape(*weight.shape[:axis], -1, size, *weight.shape[axis + 1 :])
    inner = [axis + 1] + [i + (i > axis) for i in over if i != axis]
    return jnp.squeeze(reduce(split, axis=tuple(inner), keepdims=True), axis + 1)


def _spread(per_block: Array, shape: Sequence[int], spec: Affine) -> Array:
    if spec.group is None:
        return per_block
    axis = _axis(spec.group[0], len(shape))
    return jax.lax.slice_in_dim(repeated(per_block, spec.group[1], axis), 0, shape[axis], axis=axis)


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} of the quantization spec does not exist in a weight of {ndim} axes")
    return axis % ndim
