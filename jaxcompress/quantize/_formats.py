"""Formats of few bits whose numbers are not evenly spaced: small floats, nf4, and the microscaling (mx) formats."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress._numbers import integers, whole
from jaxcompress.arrays import Quantized
from jaxcompress.arrays._bits import from_table
from jaxcompress.quantize._affine import Affine, _axis, _over_blocks, _spread, check_float
from jaxcompress.quantize._float_products import FloatProduct

_DTYPES = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16")

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Of Dettmers et al. 2023 (QLoRA), appendix E: quantiles of the normal distribution, with an exact zero."""

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_LEVELS = (*_FP4, *(-x for x in _FP4))
"""float4_e2m1, by its bits."""


@dataclasses.dataclass(frozen=True)
class Floats:
    """A weight in a smaller float type: a cast, after scaling where 8 bits don't have the range.

    Attributes:
      dtype: "float8_e4m3fn", "float8_e5m2", "bfloat16" or "float16".
      axes: the axes along which each index has a scale of its own, for 8 bits; 16-bit types are cast as they are, and
        what is too large for float16 is an error.
      inputs: of 8-bit weights, also round an input that meets the weight in a product or convolution, to
        "float8_e4m3fn" or "float8_e5m2", with a scale of its own for each row (each example of a convolution). Products
        are then of 8-bit floats where the backend has them. `None` leaves inputs alone.
    """

    dtype: str = "float8_e4m3fn"
    axes: tuple[int, ...] = (-1,)
    inputs: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", integers("axes", self.axes))
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.inputs is not None and not (self.inputs in _DTYPES[:2] and self.dtype in _DTYPES[:2]):
            raise ValueError(
                f"inputs is None or one of {', '.join(_DTYPES[:2])}, with weights in one of these; got {self.inputs!r} "
                f"for weights in {self.dtype}"
            )

    def convert(self, weight: Array) -> Quantized | FloatProduct:
        """The nearest float of the type to each weight over its scale; the largest weight becomes the largest float."""
        weight = check_float(weight)
        full, largest = weight.astype(jnp.float32), float(jnp.finfo(self.dtype).max)
        if self.dtype.startswith("float8"):
            scale = _unit(_over_blocks(jnp.max, jnp.abs(full), Affine(8, axes=self.axes)) / largest)
            values = _saturated(full / scale, self.dtype)
            if self.inputs is not None:
                return FloatProduct(values, scale, jnp.dtype(weight.dtype).name, self.inputs)
            return _of_floats(values, scale, weight.dtype, None)
        values = full.astype(self.dtype)
        if not isinstance(values, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(values))):
            raise ValueError(f"the weight has values beyond {largest:g}, the largest of {self.dtype}")
        overflows = jnp.isinf(values.astype(weight.dtype))  # the largest float16 rounds up in bfloat16
        values = jnp.where(overflows, jnp.nextafter(values, jnp.zeros_like(values)), values)
        return _of_floats(values, jnp.ones([1] * weight.ndim, jnp.float32), weight.dtype, None)


@dataclasses.dataclass(frozen=True)
class NF4:
    """Four bits at the quantiles of a normal distribution, with a float32 scale a group (Dettmers et al. 2023).

    Attributes:
      group: (axis, size), as in `Affine`; the default is the inputs of a kernel whose last axis is the output's.
    """

    group: tuple[int, int] = (-2, 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", Affine(4, group=self.group).group)
        if self.group is None:
            raise TypeError("group must be (axis, size), got None")

    def convert(self, weight: Array) -> Quantized:
        """The nearest level to each weight over its group's largest magnitude."""
        weight = check_float(weight)
        blocks = Affine(4, axes=_others(self.group[0], weight.ndim), group=self.group)
        scale = _unit(_over_blocks(jnp.max, jnp.abs(weight.astype(jnp.float32)), blocks))
        return _of_levels(weight, scale, blocks, NF4_LEVELS)


@dataclasses.dataclass(frozen=True)
class MX:
    """A microscaling format (OCP 2023): small floats, or int8, in groups of 32 that share a power of two.

    Attributes:
      element: "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn" or "int8" (which is read as multiples of 1/64).
      axis: along which groups lie; the default is the inputs of a kernel whose last axis is the output's.
    """

    element: str = "float8_e4m3fn"
    axis: int = -2

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", whole("axis", self.axis))
        if self.element not in list(_LARGEST):
            raise ValueError(f"element is one of {', '.join(_LARGEST)}, got {self.element!r}")

    def convert(self, weight: Array) -> Quantized:
        """Each group's scale is the power of two of its largest weight over that of the largest element."""
        weight = check_float(weight)
        full = weight.astype(jnp.float32)
        blocks = Affine(8, axes=_others(self.axis, weight.ndim), group=(self.axis, 32))
        largest = _over_blocks(jnp.max, jnp.abs(full), blocks)
        _, exponent = jnp.frexp(largest)  # the largest weight is in [2**(exponent - 1), 2**exponent)
        power = jnp.clip(exponent - 1 - _LARGEST[self.element], -120, 127)  # what is smaller would be subnormal
        scale = jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), power), 1.0).astype(jnp.float8_e8m0fnu)
        if self.element == "float4_e2m1fn":
            return _of_levels(weight, scale, blocks, FP4_LEVELS)
        unit = _spread(scale.astype(jnp.float32), weight.shape, blocks)
        group = (_axis(self.axis, weight.ndim) - weight.ndim, 32)
        if self.element == "int8":
            small = (scale.astype(jnp.float32) / 64).astype(jnp.float8_e8m0fnu)
            codes = jnp.clip(jnp.round(full / unit * 64), -127, 127)
            return Quantized.from_codes(codes, small, bits=8, dtype=weight.dtype, group=group)
        return _of_floats(_saturated(full / unit, self.element), scale, weight.dtype, group)


_LARGEST = {"float8_e4m3fn": 8, "float8_e5m2": 15, "float4_e2m1fn": 2, "int8": 0}
"""The exponent of each element's largest number."""


def _others(axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i != _axis(axis, ndim))


def _unit(scale: Array) -> Array:
    return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)


def _saturated(x: Array, dtype: str) -> Array:
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def _of_floats(values: Array, scale: Array, dtype: Any, group: tuple[int, int] | None) -> Quantized:
    return Quantized(
        values=values,
        scale=scale,
        zero_point=None,
        bits=8,
        length=None,
        compute_dtype=jnp.dtype(dtype).name,
        group=group,
    )


def _of_levels(weight: Float[Array, "*shape"], scale: Array, blocks: Affine, levels: tuple[float, ...]) -> Quantized:
    """Each weight's nearest level (of two as near, the smaller one), in four bits."""
    assert blocks.group is not None
    relative = weight.astype(jnp.float32) / _spread(scale.astype(jnp.float32), weight.shape, blocks)
    order = sorted(set(levels))
    edges = (np.asarray(order[1:]) + np.asarray(order[:-1])) / 2
    nearest = jnp.searchsorted(jnp.asarray(edges, jnp.float32), relative, method="compare_all")
    index = jnp.asarray([levels.index(level) for level in order], jnp.int32)  # of zeros, the positive one
    return Quantized.from_codes(
        from_table(index, nearest),
        scale,
        bits=4,
        dtype=weight.dtype,
        group=(_axis(blocks.group[0], weight.ndim) - weight.ndim, blocks.group[1]),
        levels=levels,
    )
