"""Small integers and booleans, packed into bytes along the last axis: the first element in the lowest bits.

And 8-bit floats, by their bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int8, UInt8


def are_integers(x: Array, low: int, high: int) -> bool:
    """Whether all entries are integers from `low` to `high`; of traced ones nobody knows, and they pass."""
    if isinstance(x, jax.core.Tracer) or not x.size:
        return True
    with jax.ensure_compile_time_eval():  # constants of a function that is being traced
        return bool(_all_integers(x, low, high))


@functools.partial(jax.jit, static_argnums=(1, 2))  # so that no float of each is written down
def _all_integers(x: Array, low: int, high: int) -> Array:
    x = x.astype(jnp.float32)
    return jnp.all((x >= low) & (x <= high) & (x == jnp.round(x)))


def pack_bits(mask: Bool[Array, "*lead n"]) -> UInt8[Array, "*lead bytes"]:
    """Eight booleans a byte; the last byte is padded with zeros."""
    return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack_bits(packed: UInt8[Array, "*lead bytes"], length: int) -> Bool[Array, "*lead n"]:
    """The first `length` booleans of each packed row."""
    return jnp.unpackbits(packed, axis=-1, count=length, bitorder="little").astype(bool)


def pack_signed(codes: Int8[Array, "*lead n"], bits: int) -> Int8[Array, "*lead n"] | UInt8[Array, "*lead bytes"]:
    """Integers of `bits` bits in two's complement, packed as `pack_indices` packs; 8 bits stay int8."""
    return codes if bits == 8 else pack_indices(codes.astype(jnp.uint8) & (2**bits - 1), bits)


def unpack_signed(packed: Array, bits: int, length: int) -> Int8[Array, "*lead n"]:
    """The first `length` integers of each packed row."""
    up = 8 - bits  # so that the sign bit is the byte's, and down again arithmetically
    shifted = packed[..., None] << (up - _places(bits))
    return lax.collapse(shifted.astype(jnp.int8) >> up, packed.ndim - 1)[..., :length]


def signed_parts(packed: UInt8[Array, "*lead bytes"], bits: int) -> list[Int8[Array, "*lead bytes"]]:
    """The first integer of each byte, the second of each, ...: what `unpack_signed` would interleave."""
    return [signed_part(packed, bits, jnp.uint8(i * bits)) for i in range(8 // bits)]


def signed_part(packed: UInt8[Array, "*shape"], bits: int, first: UInt8[Array, ""]) -> Int8[Array, "*shape"]:
    """The integer that stands in each byte from the bit `first` on."""
    up = 8 - bits
    return (packed << (jnp.uint8(up) - first)).astype(jnp.int8) >> up


def pack_indices(indices: UInt8[Array, "*lead n"], bits: int) -> UInt8[Array, "*lead bytes"]:
    """Integers below `2 ** bits`, 1, 2, 4 or 8 bits each, the last byte of a row padded with zeros."""
    if bits == 8:
        return indices
    a_byte = 8 // bits
    padded = jnp.pad(indices, [(0, 0)] * (indices.ndim - 1) + [(0, -indices.shape[-1] % a_byte)])
    # not by indexing: on a mesh with explicit axes a strided index is a gather, whose sharding is open
    parts = [lax.slice_in_dim(padded, i, None, a_byte, axis=-1) << (i * bits) for i in range(a_byte)]
    return functools.reduce(jnp.bitwise_or, parts)


def unpack_indices(packed: UInt8[Array, "*lead bytes"], bits: int, length: int) -> UInt8[Array, "*lead n"]:
    """The first `length` integers of each packed row."""
    if bits == 8:
        return packed
    return lax.collapse((packed[..., None] >> _places(bits)) & (2**bits - 1), packed.ndim - 1)[..., :length]


def index_parts(packed: UInt8[Array, "*lead bytes"], bits: int) -> list[UInt8[Array, "*lead bytes"]]:
    """The first integer of each byte, the second of each, ...: what `unpack_indices` interleaves."""
    return [index_part(packed, bits, jnp.uint8(i * bits)) for i in range(8 // bits)]


def index_part(packed: UInt8[Array, "*shape"], bits: int, first: UInt8[Array, ""]) -> UInt8[Array, "*shape"]:
    """The index that stands in each byte from the bit `first` on."""
    return (packed >> first) & jnp.uint8(2**bits - 1)


def _places(bits: int) -> UInt8[Array, " a_byte"]:
    """The lowest bit of each of a byte's integers."""
    return jnp.arange(0, 8, bits, dtype=jnp.uint8)


def from_table(table: Array, indices: Array) -> Array:
    """`table[indices]` of a table with one axis; indices with explicit axes of a mesh in their type keep them."""
    sharding = jax.typeof(indices).sharding
    kept = sharding if any(entry is not None for entry in sharding.spec) else None
    return table.at[indices].get(mode="promise_in_bounds", out_sharding=kept)


@jax.jit
def chosen(values: Float[Array, "*blocks k"], indices: UInt8[Array, "*shape"]) -> Array:
    """`values[..., indices]` by selects, half of the values by each bit of an index."""
    among = [values[..., i] for i in range(values.shape[-1])]
    for bit in range((len(among) - 1).bit_length()):
        odd = (indices >> bit) & 1 == 1
        pairs = [among[i : i + 2] for i in range(0, len(among), 2)]
        among = [jnp.where(odd, pair[1], pair[0]) if len(pair) == 2 else pair[0] for pair in pairs]
    return jnp.broadcast_to(among[0], indices.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def widened(values: Float[Array, "*shape"], dtype: Any) -> Array:
    """`values.astype(dtype)`; of 8-bit floats on a CPU by way of half floats, in half the time that XLA takes."""
    if values.dtype not in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        return values.astype(dtype)
    return lax.platform_dependent(
        values, cpu=lambda values: _by_halves(values).astype(dtype), default=lambda values: values.astype(dtype)
    )


@widened.defjvp
def _widened_jvp(dtype: Any, at: tuple[Array], along: tuple[Array]) -> tuple[Array, Array]:
    return widened(*at, dtype), along[0].astype(dtype)


def _by_halves(values: Array) -> Float[Array, "*shape"]:
    bits = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
    if values.dtype == jnp.float8_e5m2:  # the upper byte of a half float
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(jnp.float32)
    sign, rest = bits & 0x80, bits & 0x7F  # as a half float with its four bits of exponent 2^8 times too small
    number = lax.bitcast_convert_type(sign << 8 | rest << 7, jnp.float16).astype(jnp.float32) * 256
    return jnp.where(rest == 0x7F, jnp.nan, number)


def repeated(x: Array, times: int, axis: int) -> Array:
    """`jnp.repeat`, which wants to be told a sharding where `x` has one in its type; this keeps it."""
    axis %= x.ndim
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*x.shape[: axis + 1], times, *x.shape[axis + 1 :]))
    return lax.collapse(wide, axis, axis + 2)
