"""Work on arrays that an explicit mesh divides, laid out by XLA's partitioner as on an automatic one."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def explicit_sharding(x: Array) -> NamedSharding | None:
    """How `x` is divided, if its mesh has explicit axes: then shapes and sums must say how their results are."""
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes else None


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
