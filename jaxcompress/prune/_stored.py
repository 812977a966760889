"""How masks are kept in a state: a bit a weight where the last axis is made of whole bytes, else a boolean a weight.

What a stored mask is, its dtype says: uint8 is eight weights a byte along the last axis, bool is a weight each. So a
state needs no flag, orbax saves it as it is, and a packed mask is divided among devices as its weight is.
"""

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from jaxcompress.arrays._bits import pack_bits, unpack_bits
from jaxcompress.arrays._products import explicit_sharding, mesh_axes


def all_kept(weight: jax.Array, packed: bool) -> jax.Array:
    """A stored mask that keeps every weight, made of `weight` so that it is sharded like it, also under jit."""
    kept = ~(jnp.isnan(weight) & jnp.isinf(weight))
    return pack_bits(kept) if packed and _packs(weight) else kept


def stored_beside(weight: jax.Array, mask: jax.Array, packed: bool) -> jax.Array:
    """A boolean mask, stored as `all_kept` of its weight is, and sharded so."""
    like = all_kept(weight, packed)
    return like & stored(jnp.asarray(mask), like)


def stored(mask: jax.Array, like: jax.Array) -> jax.Array:
    """A boolean mask, stored as `like` is, and sharded so: on explicit axes one spread from its blocks is not."""
    kept, sharding = mask if like.dtype == bool else pack_bits(mask), explicit_sharding(like)
    return kept if sharding is None else jax.sharding.reshard(kept, sharding)


def booleans(kept: jax.Array) -> jax.Array:
    """The boolean mask, shaped like its weight."""
    return kept if kept.dtype == bool else unpack_bits(kept, 8 * kept.shape[-1])


def mask_shape(kept: jax.Array) -> tuple[int, ...]:
    """The shape of the weight that a stored mask is for."""
    return kept.shape if kept.dtype == bool else (*kept.shape[:-1], 8 * kept.shape[-1])


def _packs(weight: jax.Array) -> bool:
    """Whether every device's part of the last axis is made of whole bytes, as far as the sharding is known."""
    if not weight.ndim or weight.shape[-1] % 8:
        return False
    known = jax.typeof(weight) if isinstance(weight, Tracer) else weight  # of a tracer: on an explicit mesh
    sharding = getattr(known, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) < weight.ndim:
        return True
    shards = math.prod(sharding.mesh.shape[name] for name in mesh_axes(sharding.spec[-1]))
    return weight.shape[-1] % (8 * shards) == 0
