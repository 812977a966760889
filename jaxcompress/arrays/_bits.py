"""Small integers and booleans, packed into bytes along the last axis: the first element in the lowest bits."""

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


def unpack_nibbles(packed: UInt8[Array, "*lead bytes"], length: int) -> Int8[Array, "*lead n"]:
    """The first `length` integers of each packed row."""
    low, high = (packed << 4).astype(jnp.int8) >> 4, packed.astype(jnp.int8) >> 4  # arithmetic shifts keep the sign
    both = jnp.stack([low, high], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :length]
