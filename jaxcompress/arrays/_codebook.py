"""Weights that share a few values: small integers that index a codebook of centroids."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array, Float, UInt8

from jaxcompress.arrays._bits import are_integers, chosen, from_table, index_parts, pack_indices, unpack_indices
from jaxcompress.arrays._leaf import Leaf
from jaxcompress.arrays._products import like_part

FUSED = 128  # centroids; of twice as many XLA for a TPU wrote the selects to memory, 25 GB of them
IN_REGISTERS = 16  # centroids that a CPU holds there


class Codebook(Leaf):
    """`centroids[indices]`: each weight is one of at most 256 values, per layer or per channel.

    The centroids are the leaf's only floats. Trained with the others (`equinox.partition(tree, eqx.is_inexact_array)`),
    each gets the sum of the gradients of the weights in its cluster: trained quantization (Han et al. 2016, "Deep
    Compression", section 3.3). Binary and ternary weights are codebooks of two and three centroids.

    `jaxcompress.quantize` makes these; `Codebook.from_indices` builds one from indices and centroids you have.
    """

    indices: UInt8[Array, "*packed"]
    """`8 // bits` indices a byte along the last axis, the first in the lowest bits."""
    centroids: Float[Array, "*blocks k"]
    """The weight's axes and one more. Of those axes each is 1 (shared) or the weight's (a codebook an index)."""
    bits: int = eqx.field(static=True)
    """1, 2, 4 or 8: how an index is stored."""
    length: int = eqx.field(static=True)
    """Of the last axis."""
    keep_zeros: bool = eqx.field(static=True, default=False)
    """Whether index 0 means exactly zero, whatever its centroid: pruned weights stay pruned while centroids learn."""

    @classmethod
    def from_indices(cls, indices: Array, centroids: Array, *, keep_zeros: bool = False) -> "Codebook":
        """A leaf from its indices, `[*shape]`, and its centroids, `[*blocks, k]`.

        Raises:
          ValueError: more than 256 centroids, blocks that are neither 1 nor the weight's along an axis, or indices of
            no centroid, unless traced.
        """
        k = centroids.shape[-1]
        fits = centroids.ndim == indices.ndim + 1 and all(
            block in (1, size) for block, size in zip(centroids.shape, indices.shape, strict=False)
        )
        if not fits or not 1 <= k <= 256:
            raise ValueError(
                f"want centroids of shape [*blocks, k] with k from 1 to 256 and blocks of 1 or the weight's size along "
                f"each axis, got {centroids.shape} for indices of shape {indices.shape}"
            )
        if not are_integers(indices, 0, k - 1):
            raise ValueError(f"indices of {k} centroids are integers from 0 to {k - 1}; these are not")
        bits = next(bits for bits in (1, 2, 4, 8) if 2**bits >= k)
        return cls(
            indices=pack_indices(indices.astype(jnp.uint8), bits),
            centroids=centroids,
            bits=bits,
            length=indices.shape[-1],
            keep_zeros=keep_zeros,
        )

    def aval(self) -> ShapedArray:
        return like_part((*self.indices.shape[:-1], self.length), self.centroids.dtype, self.indices)

    def materialise(self) -> Array:
        return look_up(self.centroids, self.codes(), self.keep_zeros)

    def chosen(self) -> Array:
        """The dense value by selects, half of the centroids by each bit of an index.

        A TPU looks up slowly and writes down what it finds; selects among at most `FUSED` it fuses into a product. A
        CPU looks up one number at a time, and selects many, among as many as its registers hold.
        """
        return chosen(values_of(self.centroids, self.keep_zeros), self.codes())

    def found(self) -> Array:
        """The dense value by one lookup in all codebooks, end to end, which XLA for a GPU fuses into sums."""
        codes, values = self.codes(), values_of(self.centroids, self.keep_zeros)
        own = [axis for axis, size in enumerate(values.shape[:-1]) if size > 1]
        at = jnp.zeros(codes.shape, jnp.int32)
        for axis in own:
            at = at * codes.shape[axis] + lax.broadcasted_iota(jnp.int32, codes.shape, axis)
        return from_table(values.reshape(-1), at * values.shape[-1] + codes.astype(jnp.int32))

    def columns(self) -> list["Codebook"]:
        """Of packed indices the first of each byte, the second of each, ..., each unpacked; or the weight alone."""
        a_byte = 8 // self.bits
        if a_byte == 1 or self.length % a_byte:
            return [self]
        shared = self.centroids.shape[-2] == 1
        return [
            dataclasses.replace(
                self,
                indices=part,
                centroids=self.centroids if shared else self.centroids[..., first::a_byte, :],
                bits=8,
                length=part.shape[-1],
            )
            for first, part in enumerate(index_parts(self.indices, self.bits))
        ]

    def codes(self) -> UInt8[Array, "*shape"]:
        """The indices, unpacked."""
        return unpack_indices(self.indices, self.bits, self.length)

    @property
    def is_stack(self) -> bool:
        return self.ndim > 1 and super().is_stack

    def unit(self, axis: int) -> int:
        """A part along `axis` begins at a multiple of this (the indices of a byte), and its size is one.

        The last part's may be another.
        """
        return 8 // self.bits if axis == len(self.shape) - 1 else 1

    def tile(self, axis: int, start: Array | int, size: int) -> "Codebook":
        """The part `start : start + size` along `axis`, cut out of the stored indices."""
        if size == self.shape[axis]:
            return self
        last = axis == len(self.shape) - 1
        a_byte = 8 // self.bits if last else 1
        return Codebook(
            indices=jax.lax.dynamic_slice_in_dim(self.indices, start // a_byte, -(-size // a_byte), axis),
            centroids=self.centroids
            if self.centroids.shape[axis] == 1
            else jax.lax.dynamic_slice_in_dim(self.centroids, start, size, axis),
            bits=self.bits,
            length=size if last else self.length,
            keep_zeros=self.keep_zeros,
            strict=self.strict,
        )


def look_up(centroids: Float[Array, "*blocks k"], indices: UInt8[Array, "*shape"], keep_zeros: bool) -> Any:
    """Each index's centroid, from its block's codebook."""
    centroids = values_of(centroids, keep_zeros)
    if all(size == 1 for size in centroids.shape[:-1]):
        return from_table(centroids.reshape(-1), indices)

    def own(centroids: Array, indices: Array) -> Array:
        wide = jnp.take_along_axis(centroids, indices[..., None].astype(jnp.int32), axis=-1, mode="promise_in_bounds")
        return jnp.squeeze(wide, -1)

    sharding = jax.typeof(indices).sharding
    if any(entry is not None for entry in sharding.spec):  # along explicit axes JAX asks how the result is divided
        own = jax.sharding.auto_axes(own, out_sharding=sharding)
    return own(centroids, indices)


def values_of(centroids: Array, keep_zeros: bool) -> Array:
    """What the indices stand for."""
    # not a centroid that happens to be zero: it would learn
    return centroids.at[..., 0].set(0) if keep_zeros else centroids
