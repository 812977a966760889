"""Small integers and booleans, packed into bytes along the last axis: the first element in the lowest bits."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int8, UInt8


def pack_bits(mask: Bool[Array, "*lead n"]) -> UInt8[Array, "*lead bytes"]:
    """Eight booleans a byte; the last byte is padded with zeros."""
    return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack_bits(packed: UInt8[Array, "*lead bytes"], length: int) -> Bool[Array, "*lead n"]:
    """The first `length` booleans of each packed row."""
    return jnp.unpackbits(packed, axis=-1, count=length, bitorder="little").astype(bool)


def pack_nibbles(codes: Int8[Array, "*lead n"]) -> UInt8[Array, "*lead bytes"]:
    """Two integers of [-8, 7] a byte, in two's complement; an odd row is padded with a zero."""
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    low, high = codes[..., 0::2].astype(jnp.uint8) & 0xF, codes[..., 1::2].astype(jnp.uint8) & 0xF
    return low | (high << 4)


def unpack_halves(packed: UInt8[Array, "*lead bytes"]) -> tuple[Int8[Array, "*lead bytes"], Int8[Array, "*lead bytes"]]:
    """The integers in the low and in the high half of each byte."""
    return (packed << 4).astype(jnp.int8) >> 4, packed.astype(jnp.int8) >> 4  # arithmetic shifts keep the sign


def unpack_nibbles(packed: UInt8[Array, "*lead bytes"], length: int) -> Int8[Array, "*lead n"]:
    """The first `length` integers of each packed row."""
    both = jnp.stack(unpack_halves(packed), axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :length]


def pack_indices(indices: UInt8[Array, "*lead n"], bits: int) -> UInt8[Array, "*lead bytes"]:
    """Integers below `2 ** bits`, 1, 2, 4 or 8 bits each, the last byte of a row padded with zeros."""
    if bits == 8:
        return indices
    a_byte = 8 // bits
    padded = jnp.pad(indices, [(0, 0)] * (indices.ndim - 1) + [(0, -indices.shape[-1] % a_byte)])
    parts = [padded[..., i::a_byte] << (i * bits) for i in range(a_byte)]
    return functools.reduce(jnp.bitwise_or, parts)


def unpack_indices(packed: UInt8[Array, "*lead bytes"], bits: int, length: int) -> UInt8[Array, "*lead n"]:
    """The first `length` integers of each packed row."""
    if bits == 8:
        return packed
    parts = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return jnp.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)[..., :length]
