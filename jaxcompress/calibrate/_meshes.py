"""Work on arrays that an explicit mesh divides, laid out by XLA's partitioner as on an automatic one."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxcompress.arrays._products import explicit_sharding


def replicated(fn: Callable[..., Any], x: Array, *args: Any) -> Any:
    """`fn(x, *args)`, whose results are the same on all devices."""
    return _automatic(fn, x, PartitionSpec(), *args)


def in_place(fn: Callable[..., Any], weight: Array, *args: Any) -> Any:
    """`fn(weight, *args)`, whose results are all of the weight's shape and divided as it is."""
    sharding = explicit_sharding(weight)
    return _automatic(fn, weight, sharding.spec if sharding else None, *args)


def _automatic(fn: Callable[..., Any], x: Array, out: PartitionSpec | None, *args: Any) -> Any:
    sharding = explicit_sharding(x)
    if sharding is None:
        return fn(x, *args)
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return jax.sharding.auto_axes(fn, out_sharding=out)(x, *args)
