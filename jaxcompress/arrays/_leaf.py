"""The base of every compressed leaf: how it is taken apart, what happens where no rule knows it, and who is told."""

import contextlib
import contextvars
import dataclasses
import functools
import json
from abc import ABCMeta
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import export, lax
from jax.extend.core import Primitive

Hit = tuple[str, str, str]
"""What met what: (leaf class, primitive, `"rule"` or `"dense"`)."""

_watching: contextvars.ContextVar[Counter[Hit] | None] = contextvars.ContextVar("watching", default=None)


class MadeDenseError(TypeError):
    """Under `strict`, a compressed weight met a primitive that has no rule for it and would have been made dense."""


def _names(cls: type, static: bool) -> list[str]:
    """The names of a leaf's children, or of its static fields, in the order in which the pytree has them."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("static", False) == static]


if TYPE_CHECKING:
    from quax._module import _FastModuleMeta as _ValueType
else:
    _ValueType = type(quax.ArrayValue)


@dataclass_transform(field_specifiers=(dataclasses.field, eqx.field))
class _LeafType(_ValueType):
    """The class of leaf classes: makes each a dataclass that JAX takes apart by itself.

    Leaves are quax's values, and those are modules of equinox, which are taken apart by functions in Python: that takes
    five times as long, for each leaf in each call of a compiled function.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> type:
        if "__init__" in namespace:
            raise TypeError(f"{name}: a leaf is made of its fields alone; give it a classmethod instead of an __init__")
        made: type = ABCMeta.__new__(cls, name, bases, namespace, **kwargs)
        dataclasses.dataclass(repr=False, eq=False)(made)
        return jax.tree_util.register_dataclass(made, _names(made, static=False), _names(made, static=True))

    __call__ = type.__call__


class Leaf(quax.ArrayValue, metaclass=_LeafType):
    """A compressed weight: a pytree that stands where an array stood.

    A subclass becomes a frozen dataclass by itself, with no `@dataclass` on top of it. Its array fields are the
    pytree's children; what describes them (bits, the true length of a padded axis) are static fields of JSON types,
    `bits: int = equinox.field(static=True)`. Two properties let a leaf pass through `scan`, `vmap` and `shard_map`,
    which slice the children without telling the leaf:

    * `shape` follows from the children's shapes; static fields count axes from the end;
    * every child carries the leading (stacked) axes in full; what all layers share (a scale of length 1 there) `scan`
      is given once for each, by `unshared`.

    To add a leaf: subclass, give `aval` and `materialise`, `register` the dispatch rules that beat the dense value
    (after `put_off_transposes` products are asked of `x @ w.T` too, after `take_parts` of `w[i]`), and it can be
    jitted, sharded, checkpointed, packed, exported, counted and reported. A whole one, of square blocks:

        class Blocks(Leaf):
            blocks: jax.Array  # [..., n, size, size] stands for [..., n * size, n * size]

            def aval(self):
                *lead, n, size, _ = self.blocks.shape
                return jax.core.ShapedArray((*lead, n * size, n * size), self.blocks.dtype)

            def materialise(self):
                eye = jnp.eye(self.blocks.shape[-3], dtype=self.blocks.dtype)
                return jnp.einsum("...nio,nm->...nimo", self.blocks, eye).reshape(self.shape)

        @register_product(Blocks)
        def _product(x, w, dims, params):
            if x.ndim != 2 or w.ndim != 2 or dims.x_contract != (1,) or dims.w_contract != (0,):
                return NotImplemented
            dtype, rows = params["preferred_element_type"], x.reshape(len(x), *w.blocks.shape[:2])
            return jnp.einsum("bni,nio->bno", rows, w.blocks, preferred_element_type=dtype).reshape(x.shape)
    """

    strict: bool = eqx.field(static=True, default=False, kw_only=True)

    registry: ClassVar[dict[str, type["Leaf"]]] = {}
    counted: ClassVar[bool] = True
    """Whether `watch` counts what it meets; what stands for another leaf for a while leaves that to it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        redefined = cls.__name__ in Leaf.registry  # a notebook's cell run again
        Leaf.registry[cls.__name__] = cls
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jaxcompress.{cls.__name__}" + (f"@{id(cls)}" if redefined else ""),
            serialize_auxdata=functools.partial(_serialize_static, cls),
            deserialize_auxdata=lambda data: json.loads(bytes(data)),
            from_children=functools.partial(_from_children, cls),
        )

    # What equinox does beside for modules that are built step by step, or whose methods are jitted, isn't needed.
    __getattribute__ = object.__getattribute__
    __hash__ = None  # type: ignore[assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or name not in type(self).__dataclass_fields__:
            raise dataclasses.FrozenInstanceError(f"cannot assign to {name!r}: see dataclasses.replace")
        object.__setattr__(self, name, value)

    @staticmethod
    def default(primitive: Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """Where no rule applies: the dense value, or an error if the leaf is strict."""
        done = [x.done(primitive) if is_leaf(x) else x for x in values]
        if any(x is not y for x, y in zip(done, values, strict=True)):  # there may be a rule for that
            return quax.quaxify(functools.partial(primitive.bind, **params))(*done)
        return _meet_dense(primitive, values, params)

    def done(self, primitive: Primitive) -> Any:
        """What `primitive`, which has no rule for the leaf, meets: what a leaf that puts something off stands for."""
        return self

    @property
    def is_stack(self) -> bool:
        """Whether each index of the first axis is a weight of its own, which each child has a part of, or all share."""
        return all(child.shape[:1] in ((1,), self.shape[:1]) for child in jax.tree.leaves(self))

    def unshared(self, length: int) -> Any:
        """What stands for the leaf where `scan` slices it in `length` steps: each gets a copy of what they share.

        A leaf that was not made as a stack has children that no step has a part of; its dense value is sliced.
        """
        if not self.is_stack:
            return self.unstacked()

        def spread(child: jax.Array) -> jax.Array:
            return jnp.broadcast_to(child, (length, *child.shape[1:])) if child.shape[:1] == (1,) else child

        return jax.tree.map(spread, self)

    def unstacked(self) -> Any:
        """The dense value, where `scan` would slice a leaf that is not made as a stack; an error if it is strict."""
        why = "slices its first axis: it was not made as a stack of layers (see `stacked` where it was made)"
        made_dense(lax.scan_p, [self], why)
        return self.materialise()

    def fields(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The leaf taken apart: (children by name, absent ones left out; static fields by name)."""
        children = {name: getattr(self, name) for name in _names(type(self), static=False)}
        static = {name: getattr(self, name) for name in _names(type(self), static=True) if name != "strict"}
        return {name: child for name, child in children.items() if child is not None}, static

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        # without it NumPy would make an object of the leaf, and JAX say that it wants a number
        raise TypeError(
            f"a {type(self).__name__} weight of shape {self.shape} is no array outside jaxcompress.compressed: run the "
            f"model as compressed(model.apply)(params, ...), or make arrays of its weights by jaxcompress.dense(params)"
        )

    __matmul__ = __rmatmul__ = __array__


@dataclasses.dataclass(frozen=True)
class Otherwise:
    """What a rule returns that can't serve a case, where the dense value is to meet another input."""

    x: Any


def register(primitive: Primitive) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a dispatch rule, by its positional type annotations, and lets `watch` count its hits.

    A decorator like `quax.register`: the rule gets the primitive's operands by position, compressed or not, and its
    parameters by keyword. A rule that can't serve a case after all returns `NotImplemented`, and the dense value does.

        @arrays.register(jax.lax.neg_p)
        def _negative(w: Blocks, **params):  # of this leaf alone; of two operands `(w: Blocks, x: jax.Array, **params)`
            return Blocks(-w.blocks)
    """

    def decorate(rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)
        def counted(*args: Any, **params: Any) -> Any:
            out = rule(*args, **params)
            if isinstance(out, Otherwise):
                return _meet_dense(primitive, [x if is_leaf(x) else out.x for x in args], params)
            if out is NotImplemented:
                return _meet_dense(primitive, args, params)
            _record(primitive, args, "rule")
            return out

        return quax.register(primitive)(counted)

    return decorate


def _meet_dense(primitive: Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
    made_dense(primitive, values)
    return primitive.bind(*[x.materialise() if isinstance(x, quax.Value) else x for x in values], **params)


_NO_RULE = "has no rule for it here; register one (jaxcompress.arrays.register), or call compressed without strict=True"


def made_dense(primitive: Primitive, values: Sequence[Any], why: str = _NO_RULE) -> None:
    """Counts the leaves that a primitive meets as dense values; under `strict` that is an error."""
    for x in values:
        if is_leaf(x) and x.strict:
            raise MadeDenseError(
                f"a {type(x).__name__} weight of shape {x.shape} would be made dense by `{primitive}`, which {why}"
            )
    _record(primitive, values, "dense")


@contextlib.contextmanager
def watch() -> Iterator[Counter[Hit]]:
    """Counts what compressed leaves meet while functions are traced inside this context.

    The counter's keys are `(leaf class, primitive, "rule" or "dense")`: `("Quantized", "dot_general", "rule")`. What is
    already traced (a jitted function called before) does not count again.
    """
    hits: Counter[Hit] = Counter()
    token = _watching.set(hits)
    try:
        yield hits
    finally:
        _watching.reset(token)


@contextlib.contextmanager
def overheard() -> Iterator[Counter[Hit]]:
    """As `watch`, while who watches outside of it goes on to count."""
    with watch() as hits:
        yield hits
    outer = _watching.get()
    if outer is not None:
        outer.update(hits)


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


_PART_OF_A_BYTE = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}  # JAX stores several a byte


def _array_nbytes(x: Any) -> int:
    if not hasattr(x, "dtype"):
        x = jnp.asarray(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _array_nbytes(jax.eval_shape(jax.random.key_data, x))
    bits = _PART_OF_A_BYTE.get(x.dtype.name, 8 * x.dtype.itemsize)
    return (x.size * bits + 7) // 8


def _record(primitive: Primitive, values: Sequence[Any], how: str) -> None:
    hits = _watching.get()
    if hits is not None:
        hits.update((type(x).__name__, primitive.name, how) for x in values if is_leaf(x) and x.counted)


def _serialize_static(cls: type[Leaf], auxdata: Any) -> bytes:
    return json.dumps(dict(zip(_names(cls, static=True), auxdata, strict=True))).encode()


def _from_children(cls: type[Leaf], static: dict[str, Any], children: Sequence[Any]) -> Leaf:
    """A leaf put together without its `__init__`: JAX asks only for its structure."""
    leaf = object.__new__(cls)
    for name, value in [*zip(_names(cls, static=False), children, strict=True), *static.items()]:
        object.__setattr__(leaf, name, _as_tuple(value))
    return leaf


def _as_tuple(x: Any) -> Any:
    return tuple(_as_tuple(item) for item in x) if isinstance(x, list) else x
