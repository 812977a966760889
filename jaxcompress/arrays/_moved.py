"""A weight whose axes are exchanged on the way to a product: `x @ w.T`, as tied embeddings have it.

To lay the stored codes out anew costs more than the product. So a transpose is only noted, and a product takes the
weight as it is stored, its dimension numbers read through the exchange. Whatever else meets the weight has it done.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jaxtyping import Array

from jaxcompress.arrays._compressed import compressed
from jaxcompress.arrays._leaf import Leaf, made_dense, register
from jaxcompress.arrays._products import Dims, register_product

AtOnce = Callable[[Any, tuple[int, ...]], Leaf]
"""`(leaf, permutation) -> leaf`, laid out anew."""

_at_once: dict[type[Leaf], AtOnce] = {}


class Moved(Leaf):
    """`jnp.transpose(weight, order)`, not done yet. It is made where a weight is transposed, never stored."""

    weight: Leaf
    order: tuple[int, ...] = eqx.field(static=True)
    """For each of the last axes that of the weight, counted from the end."""

    counted: ClassVar[bool] = False

    @property
    def permutation(self) -> tuple[int, ...]:
        """Of all axes, counted from the front."""
        ndim = self.weight.ndim
        return (*range(ndim - len(self.order)), *(axis + ndim for axis in self.order))

    def aval(self) -> ShapedArray:
        return ShapedArray(tuple(self.weight.shape[axis] for axis in self.permutation), self.weight.dtype)

    def materialise(self) -> Array:
        return jnp.transpose(self.weight.materialise(), self.permutation)

    def done(self, primitive: Primitive) -> Any:
        """The weight laid out anew, for which there may be a rule, or its dense value."""
        at_once = _at_once.get(type(self.weight))
        if at_once is not None:
            return at_once(self.weight, self.permutation)
        made_dense(primitive, [self.weight])
        return self.materialise()

    def unshared(self, length: int) -> Any:
        return self.done(lax.scan_p).unshared(length) if type(self.weight) in _at_once else self.unstacked()


def put_off_transposes(leaf: type[Leaf], at_once: AtOnce | None = None) -> None:
    """Lets transposes of a class of leaves wait until a product takes them in its dimension numbers.

    Args:
      leaf: the class.
      at_once: lays a leaf out anew where something else meets it; without, it becomes dense there.
    """
    if at_once is not None:
        _at_once[leaf] = at_once

    # rules are chosen by their annotations, of which this one is a variable: a type checker cannot follow
    @register(lax.transpose_p)
    def _transpose(w: leaf, *, permutation: tuple[int, ...]) -> Moved:  # type: ignore[valid-type]
        order = tuple(axis - len(permutation) for axis in permutation)
        return Moved(w, order, strict=w.strict)  # type: ignore[attr-defined]


@register(lax.transpose_p)
def _transpose(w: Moved, *, permutation: tuple[int, ...]) -> Leaf:
    order = tuple(w.permutation[axis] - w.ndim for axis in permutation)
    return w.weight if order == tuple(range(-w.ndim, 0)) else dataclasses.replace(w, order=order)


@register(lax.convert_element_type_p)
def _convert(w: Moved, **params: Any) -> Any:
    converted = compressed(functools.partial(lax.convert_element_type_p.bind, **params))(w.weight)
    if isinstance(converted, Leaf):
        return dataclasses.replace(w, weight=converted)
    return jnp.transpose(converted, w.permutation)


@register_product(Moved)
def _dot(x: Array, w: Moved, dims: Dims, params: dict[str, Any]) -> Any:
    there = w.permutation
    free = [there[axis] for axis in dims.w_free(w.ndim)]
    stored = dims._replace(
        w_contract=tuple(there[axis] for axis in dims.w_contract), w_batch=tuple(there[axis] for axis in dims.w_batch)
    )
    in_order = free == sorted(free)
    if params.get("out_sharding") is not None and not in_order:
        return NotImplemented
    dot = functools.partial(lax.dot_general_p.bind, **params | {"dimension_numbers": stored.numbers})
    out: jax.Array = compressed(dot)(x, w.weight)
    if in_order:
        return out
    before = out.ndim - len(free)
    return jnp.transpose(out, (*range(before), *(before + sorted(free).index(axis) for axis in free)))
