"""The base of every compressed leaf, and the functions that see a tree of them from outside."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import quax


class Leaf(quax.ArrayValue):
    """A compressed weight: a pytree that stands where an array stood.

    A subclass is a frozen dataclass. Its array fields are the pytree's children; what describes them (bits, the true
    length of a padded axis) are static fields of JSON types. Two properties let a leaf pass through `scan`, `vmap` and
    `shard_map`, which slice the children without telling the leaf:

    * `shape` follows from the children's shapes; static fields count axes from the end;
    * every child carries the leading (stacked) axes in full.

    To add a leaf: subclass, give `aval` and `materialise`, register the dispatch rules that beat the dense value
    (`arrays/_rules.py`), and it can be saved, packed, counted and reported.
    """

    registry: ClassVar[dict[str, type["Leaf"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Leaf.registry[cls.__name__] = cls

    def fields(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The leaf taken apart: (children by name, absent ones left out; static fields by name)."""
        children, static = {}, {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("static", False):
                static[field.name] = value
            elif value is not None:
                children[field.name] = value
        return children, static


def is_leaf(x: Any) -> bool:
    """Whether `x` is a compressed leaf: the `is_leaf=` to walk a tree of them with `jax.tree.map`."""
    return isinstance(x, Leaf)


def dense(tree: Any) -> Any:
    """`tree` with every compressed leaf replaced by the array it stands for; other leaves are untouched."""
    return jax.tree.map(lambda x: x.materialise() if is_leaf(x) else x, tree, is_leaf=is_leaf)


def nbytes(tree: Any) -> int:
    """The bytes that `tree` stores in memory: of compressed leaves what they hold, not what they stand for.

    Works on arrays, on `jax.ShapeDtypeStruct`s and on Python scalars (as the array JAX would make of them). A sharded
    array counts once, by its global shape.
    """
    return sum(_array_nbytes(x) for x in jax.tree.leaves(tree))


def _array_nbytes(x: Any) -> int:
    if not hasattr(x, "dtype"):
        x = jnp.asarray(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _array_nbytes(jax.eval_shape(jax.random.key_data, x))
    if x.dtype in (jnp.int4, jnp.uint4):  # JAX stores two values a byte
        return (x.size + 1) // 2
    return x.size * x.dtype.itemsize
