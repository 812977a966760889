"""Quantized weights: small integers or floats, a scale, and perhaps a zero point."""

import dataclasses
import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array, Float, Int4, Int8, UInt8

from jaxcompress.arrays._bits import (
    are_integers,
    chosen,
    from_table,
    pack_signed,
    repeated,
    signed_parts,
    unpack_signed,
    widened,
)
from jaxcompress.arrays._byte_products import moved
from jaxcompress.arrays._leaf import Leaf
from jaxcompress.arrays._products import explicit_sharding, like_part


class Quantized(Leaf):
    """`scale * (values - zero_point)`: integers of 8 bits, or of 4 or 2 bits packed into bytes, for floats.

    The scale (and the zero point) has the rank of the weight. Along each axis its size is 1 (shared), the axis's own (a
    scale an index: "per channel"), or, along the grouped axis, one a group of `group_size` neighbours.

    The values may also be floats of 8 or 16 bits (`scale * values`), or stand for the numbers of a table that all
    groups share (nf4): `scale * levels[values]`.

    `jaxcompress.quantize` makes these; `Quantized.from_codes` builds one from integers and scales you have.
    """

    values: Int8[Array, "*shape"] | Int4[Array, "*shape"] | UInt8[Array, "*packed"] | Float[Array, "*shape"]
    """int8 codes, or `8 // bits` codes a byte along the last axis, the first in the lowest bits; int4 or int2 codes
    (see `as_int4`); or small floats."""
    scale: Float[Array, "*blocks"]
    """The step of the integers' grid: float32, or float8_e8m0fnu (powers of two, of the mx formats)."""
    zero_point: Int8[Array, "*blocks"] | None
    """The code that means zero; `None` for symmetric quantization, where it is 0."""
    bits: int = eqx.field(static=True)
    """8, 4 or 2: how the codes are stored. Fewer levels than `2 ** bits` may be in use. 8 where values are floats."""
    length: int | None = eqx.field(static=True)
    """The true length of the packed (last) axis; `None` where nothing is packed."""
    compute_dtype: str = eqx.field(static=True)
    """The dtype of the array that this stands for."""
    group: tuple[int, int] | None = eqx.field(static=True, default=None)
    """(axis, counted from the end; group size) where scales are per group."""
    activation_bits: int | None = eqx.field(static=True, default=None)
    """Bits to which an input that meets this weight is quantized, so that both multiply as integers; `None`: float."""
    input_scale: Float[Array, "*stack"] | None = None
    """float32, the step of the inputs' grid (of the weight's rank, 1 along all but stacked axes); `None`: each row of
    inputs gets the step that fits it, as it comes."""
    input_zero_point: Float[Array, "*stack"] | None = None
    """The integer of the inputs that means zero, as float32; `None` for a symmetric grid."""
    levels: tuple[float, ...] | None = eqx.field(static=True, default=None)
    """What the codes stand for, `2 ** bits` numbers, the code's lowest bits their index; `None`: they are numbers."""

    turned: bool = eqx.field(static=True, default=False)
    """Whether the values are stored with their last two axes exchanged, as bytes that stand for 128 less than they are:
    see `outputs_first`."""

    @classmethod
    def from_codes(
        cls,
        codes: Array,
        scale: Array,
        zero_point: Array | None = None,
        *,
        bits: int = 8,
        dtype: Any = jnp.float32,
        group: tuple[int, int] | None = None,
        activation_bits: int | None = None,
        input_scale: Array | None = None,
        input_zero_point: Array | None = None,
        levels: tuple[float, ...] | None = None,
    ) -> "Quantized":
        """A leaf from its integer codes, `[*shape]`, and its scales, broadcastable to them but for a grouped axis.

        Raises:
          ValueError: other bits than 8, 4 or 2; scales or zero points whose shape is neither shared, per index nor per
            group; codes that are no integers of so many bits, or zero points of 8, unless traced.
        """
        if bits not in (2, 4, 8):
            raise ValueError(
                f"Quantized stores 8, 4 or 2 bits, got bits={bits}; fewer levels fit into the next of these"
            )
        for what, blocks in (("scale", scale), ("zero point", scale if zero_point is None else zero_point)):
            for axis in range(-codes.ndim, 0):
                size, steps = codes.shape[axis], blocks.shape[axis] if blocks.ndim == codes.ndim else -1
                per_group = group is not None and group[0] == axis and steps == -(-size // group[1])
                if steps not in (1, size) and not per_group:
                    raise ValueError(
                        f"{what} of shape {blocks.shape} does not fit codes of shape {codes.shape}, group={group}"
                    )
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1 if levels is None else bits) - 1
        if not are_integers(codes, low, high):
            raise ValueError(f"codes of {bits} bits are integers from {low} to {high}; these are not")
        if zero_point is not None and not are_integers(zero_point, -128, 127):
            raise ValueError("a zero point is an integer from -128 to 127; these are not")
        codes = codes.astype(jnp.int8)
        return cls(
            values=pack_signed(codes, bits),
            scale=scale if scale.dtype == jnp.float8_e8m0fnu else scale.astype(jnp.float32),
            zero_point=None if zero_point is None else zero_point.astype(jnp.int8),
            bits=bits,
            length=None if bits == 8 else codes.shape[-1],
            compute_dtype=jnp.dtype(dtype).name,
            group=group,
            activation_bits=activation_bits,
            input_scale=None if input_scale is None else input_scale.astype(jnp.float32),
            input_zero_point=None if input_zero_point is None else input_zero_point.astype(jnp.float32),
            levels=levels,
        )

    def aval(self) -> ShapedArray:
        stored = self.values.shape if self.length is None else (*self.values.shape[:-1], self.length)
        axes = self._stored_axes
        return like_part(tuple(stored[axis] for axis in axes), self.compute_dtype, self.values, axes)

    def materialise(self) -> Array:
        return (self.centred(jnp.float32) * self.spread(self.steps)).astype(self.compute_dtype)

    @property
    def steps(self) -> Float[Array, "*blocks"]:
        """The scale in float32."""
        return self.scale.astype(jnp.float32)

    def codes(self) -> Int8[Array, "*shape"]:
        """The values as they were quantized, unpacked."""
        if self.turned:
            signed = self.values.dtype == jnp.int8  # as files of the first weeks have them
            return jnp.swapaxes(self.values if signed else moved(self.values), -1, -2)
        if self.values.dtype in (jnp.int4, jnp.int2):
            return self.values.astype(jnp.int8)
        return self.values if self.length is None else unpack_signed(self.values, self.bits, self.length)

    def outputs_first(self) -> "Quantized":
        """The same weight with its codes stored `[..., outputs, inputs]` and 128 larger, as unsigned bytes.

        So a CPU that multiplies unsigned bytes by signed ones reads each output's codes from one place, as they are.
        The shape and every number stay.

        Raises:
          ValueError: values that aren't int8, or packed; fewer than two axes.
        """
        if not self.of_integers or self.bits != 8 or self.ndim < 2:
            raise ValueError(
                f"codes of 8 bits with at least two axes can be stored outputs first, got {self.bits} bits "
                f"{list(self.shape)} as {self.values.dtype}"
            )
        if self.turned:
            return self
        return dataclasses.replace(self, values=moved(jnp.swapaxes(self.values, -1, -2)), turned=True)

    def as_int4(self) -> "Quantized":
        """The same weight with its 4-bit codes as an array of JAX's int4, not as bytes of two; of 2 bits, int2.

        So XLA itself takes them apart, which on a TPU it does inside the product. Every number stays.

        Raises:
          ValueError: codes of 8 bits, or no codes.
        """
        if self.bits == 8:
            raise ValueError(f"codes of 4 or 2 bits can be stored as int4 or int2, got 8 bits as {self.values.dtype}")
        if self.length is None:
            return self
        return dataclasses.replace(
            self, values=self.codes().astype(jnp.int4 if self.bits == 4 else jnp.int2), length=None
        )

    @property
    def _stored_axes(self) -> list[int]:
        """Where in `values` each axis lies."""
        axes = list(range(len(self.values.shape)))
        if self.turned:
            axes[-2:] = axes[-1], axes[-2]
        return axes

    def numbers(self, codes: Array, dtype: Any) -> Array:
        """What codes stand for, before the zero point and the scale."""
        if self.levels is None:
            return codes.astype(dtype) if self.of_codes else widened(codes, dtype)
        table, indices = jnp.asarray(self.levels, dtype), codes.astype(jnp.uint8) & (len(self.levels) - 1)
        if explicit_sharding(codes) is not None:  # a lookup must say how it is divided, which a `vmap` outside knows
            return chosen(table, indices)
        return lax.platform_dependent(table, indices, cpu=chosen, default=from_table)

    def centred(self, dtype: Any) -> Array:
        """The codes less their zero point: integers of at most 255 in magnitude, exact in bfloat16 too."""
        if self.zero_point is None:
            return self.numbers(self.codes(), dtype)
        return (self.codes().astype(jnp.int16) - self.spread(self.zero_point).astype(jnp.int16)).astype(dtype)

    def spread(self, per_block: Array) -> Array:
        """A scale-shaped array with each group's entry repeated over its members."""
        if self.group is None or per_block.shape[self.group[0]] == 1:
            return per_block
        axis, size = self.group
        spread = repeated(per_block, size, axis)
        return jax.lax.slice_in_dim(spread, 0, self.shape[axis], axis=axis)

    @property
    def as_integers(self) -> bool:
        """Whether inputs and weights multiply as integers."""
        return self.activation_bits is not None and self.of_integers

    def sums_as_integers(self, count: int) -> bool:
        """Whether they do, and int32 holds the sum of `count` products, whatever they are."""
        if not self.as_integers:
            return False
        assert self.activation_bits is not None
        wide = self.activation_bits > 8 or self.input_zero_point is not None  # 16 bits are two times 8
        of_input = 255 if wide else 2 ** (self.activation_bits - 1)
        of_weight = 2 ** (self.bits - 1) if self.zero_point is None else 2**self.bits - 1
        return count * of_input * of_weight < 2**31

    @property
    def of_codes(self) -> bool:
        """Whether the values are integers, be it numbers or places in a table."""
        return jnp.issubdtype(self.values.dtype, jnp.integer)

    @property
    def of_integers(self) -> bool:
        """Whether the values are integers that stand for themselves."""
        return self.of_codes and self.levels is None

    @property
    def is_stack(self) -> bool:
        packed, grouped = self.length is not None and self.ndim == 1, self.group and self.group[0] == -self.ndim
        return not (packed or grouped or (self.turned and self.ndim == 2)) and super().is_stack

    def unit(self, axis: int) -> int:
        """A part along `axis` begins at a multiple of this (a byte's codes, a group's weights), and its size is one.

        The last part's may be another.
        """
        axis -= len(self.shape)
        unit = 8 // self.bits if self.length is not None and axis == -1 else 1
        return math.lcm(unit, self.group[1]) if self.group is not None and axis == self.group[0] else unit

    def tile(self, axis: int, start: Array | int, size: int) -> "Quantized":
        """The part `start : start + size` along `axis`, cut out of the stored codes; or one that lies in one group."""
        if size == self.shape[axis]:
            return self
        a_group = self.group[1] if self.group is not None and axis == self.group[0] + len(self.shape) else 1
        packed = self.length is not None and axis == len(self.shape) - 1
        a_byte = 8 // self.bits if packed else 1
        stored = self._stored_axes[axis]
        values = _part(self.values, start // a_byte, -(-size // a_byte), stored)

        def steps(per_block: Array) -> Array:
            if per_block.shape[axis] == 1:
                return per_block
            return _part(per_block, start // a_group, -(-size // a_group), axis)

        zero_point = None if self.zero_point is None else steps(self.zero_point)
        return dataclasses.replace(
            self,
            values=values,
            scale=steps(self.scale),
            zero_point=zero_point,
            length=size if packed else self.length,
        )

    def columns(self) -> list["Quantized"]:
        """Of packed codes the first of each byte, the second of each, ..., each unpacked: nothing is interleaved.

        The weight alone where nothing is packed, or where bytes are cut off or lie across groups.
        """
        a_byte = 8 // self.bits
        if self.length is None or self.length % a_byte or (self.group is not None and self.group[0] == -1):
            return [self]

        def column(codes: Array, first: int) -> Quantized:
            def own(per_block: Array) -> Array:
                return per_block if per_block.shape[-1] == 1 else per_block[..., first::a_byte]

            zero_point = None if self.zero_point is None else own(self.zero_point)
            return dataclasses.replace(
                self, values=codes, scale=own(self.scale), zero_point=zero_point, bits=8, length=None
            )

        return [column(codes, i) for i, codes in enumerate(signed_parts(self.values, self.bits))]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _part(values: Array, start: Array, size: int, axis: int) -> Array:
    """`dynamic_slice_in_dim`; of small floats by their bits, or XLA:CPU widens all of them before a loop over parts."""
    if not jnp.issubdtype(values.dtype, jnp.floating) or values.dtype.itemsize > 2:
        return jax.lax.dynamic_slice_in_dim(values, start, size, axis)
    # a barrier, or the bits become an array of their own before the loop
    values, start = jax.lax.optimization_barrier((values, start))
    bits = jax.lax.bitcast_convert_type(values, jnp.uint8 if values.dtype.itemsize == 1 else jnp.uint16)
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(bits, start, size, axis), values.dtype)


@_part.defjvp
def _part_jvp(size: int, axis: int, at: tuple[Array, Array], along: tuple[Array, Any]) -> tuple[Array, Array]:
    values, start = at
    plain = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=axis)
    return _part(values, start, size, axis), jax.jvp(plain, (values,), along[:1])[1]
