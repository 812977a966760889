"""A tree as a flat JSON object that people can read, and back.

Its keys are paths, its values what stands there:

    {"Dense_0/kernel": {"Quantized": {"values": "int8[64,32] ans8:1790 1b2c3d4e", "scale": ..., "bits": 8, ...}},
     "Dense_0/bias": "float32[32] raw:128 5e6f7a8b",
     "step": 1000, "mean": null, "layers/[0]": ..., "pair/(1)": ...}

The steps of a path are a dict's string keys (with `~` and `/` in them written `~0` and `~1`, as in RFC 6901; what is
empty or begins like another kind of step has `~2` in front), its integer keys `#7`, and places in lists `[0]` and
tuples `(0)`. Values are lines about arrays (`_arrays.py`), numbers, booleans, null, compressed leaves by their class
and fields (what they mean is told where the class is defined, under `jaxcompress/arrays`; a field that is left out has
its default, or stands for nothing), and `{"key": [impl, line]}` for typed PRNG keys. `{}`, `[]` and `{"tuple": []}` are
empty containers; numbers that JSON lacks are `{"float": "nan"}` and `{"complex": ["1.0", "2.0"]}`.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import Leaf, is_leaf
from jaxcompress.pack._arrays import DTYPES
from jaxcompress.pack._error import PackError

Put = Callable[[np.ndarray], str]
Get = Callable[[str], np.ndarray]

_RESERVED = ("key", "float", "complex", "tuple")


def flatten(tree: Any, put: Put) -> dict[str, Any]:
    """The JSON object of `tree`; `put(array)` stores an array and returns its line.

    Raises:
      TypeError: something in the tree is no plain container, array, number or compressed leaf.
      ValueError: nested beyond Python's recursion limit, or a container that holds itself.
    """
    entries: dict[str, Any] = {}

    def walk(x: Any, path: str) -> None:
        for step, child in _steps(x, path):
            walk(child, f"{path}/{step}" if path else step)
        if not _is_container(x):
            entries[path] = _describe(x, path, put)
        elif not x:
            entries[path] = {"tuple": []} if type(x) is tuple else type(x)()

    try:
        walk(tree, "")
    except RecursionError:
        raise ValueError("the tree is nested too deeply to be saved, or holds itself") from None
    return entries


def unflatten(entries: dict[str, Any], get: Get) -> Any:
    """The tree of a JSON object; `get(line)` reads the next array.

    Raises:
      PackError: the object describes no tree; the message has the path.
    """
    root: dict[str, Any] = {}
    for path, description in entries.items():
        try:
            value = _restore(description, get)
        except Exception as error:  # a leaf's own checks may raise anything
            raise PackError(f"{path or 'the tree'} can't be read: {error}") from error
        if not path:
            if len(entries) > 1:
                raise PackError("a tree that is a single leaf has other leaves beside it")
            return value
        *parents, last = path.split("/")
        node = root
        for step in parents:
            child = node.setdefault(step, _Node())
            if not isinstance(child, _Node):
                raise PackError(f"{path} lies within another leaf")
            node = child
        if last in node:
            raise PackError(f"{path} stands there twice")
        node[last] = value
    if not root:
        raise PackError("the header describes no tree")
    return _container(root)


class _Node(dict[str, Any]):
    """A container under construction, its children by their steps; not to be taken for a dict of the tree."""


def _is_container(x: Any) -> bool:
    return type(x) in (dict, list, tuple)


def _steps(x: Any, path: str) -> list[tuple[str, Any]]:
    if type(x) is list:
        return [(f"[{i}]", child) for i, child in enumerate(x)]
    if type(x) is tuple:
        return [(f"({i})", child) for i, child in enumerate(x)]
    return [(_step(key, path), child) for key, child in x.items()] if type(x) is dict else []


def _step(key: Any, path: str) -> str:
    if type(key) is int:
        return f"#{key}"
    if type(key) is not str:
        raise TypeError(f"{_at(path)} has the key {key!r}, a {type(key).__name__}: dict keys must be strings or ints")
    step = key.replace("~", "~0").replace("/", "~1")
    return "~2" + step if step == "" or step[0] in "[(#" else step


def _key(step: str) -> str | int:
    if step.startswith("#"):
        return int(step[1:])
    return step.replace("~2", "").replace("~1", "/").replace("~0", "~")


def _container(node: dict[str, Any]) -> Any:
    children = [_container(child) if isinstance(child, _Node) else child for child in node.values()]
    for opening, closing, kind in (("[", "]", list), ("(", ")", tuple)):
        if next(iter(node)).startswith(opening):
            if list(node) != [f"{opening}{i}{closing}" for i in range(len(node))]:
                raise PackError(f"a {kind.__name__} with the places {', '.join(list(node)[:8])}")
            return kind(children)
    if any(step[:1] in ("[", "(", "") for step in node):
        raise PackError(f"a dict with the keys {', '.join(list(node)[:8])}")
    return dict(zip(map(_key, node), children, strict=True))


def _at(path: str) -> str:
    return f"the tree at {path!r}" if path else "the tree"


def _describe(x: Any, path: str, put: Put) -> Any:
    if x is None or type(x) in (bool, int):
        return x
    if type(x) is float:
        return x if math.isfinite(x) else {"float": repr(x)}
    if type(x) is complex:
        return {"complex": [repr(x.real), repr(x.imag)]}
    if is_leaf(x):
        return _describe_leaf(x, path, put)
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{_at(path)} is being traced: call pack.save outside of jit, grad and vmap")
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return _describe_array(x, path, put)
    raise TypeError(
        f"{_at(path)} holds a {type(x).__module__}.{type(x).__name__}; pack.save takes dicts, lists, tuples, None, "
        "arrays, numbers and compressed leaves. Make a plain tree of it first: `flax.core.unfreeze` for a FrozenDict, "
        "`nnx.to_pure_dict` for an nnx.State, `nn.unbox` for boxed parameters, `._asdict()` for a namedtuple; texts "
        "belong into `metadata`"
    )


def _describe_array(x: Any, path: str, put: Put) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"{_at(path)} is an array with parts in other processes: gather it first "
            "(jax.experimental.multihost_utils.process_allgather) and save in one process"
        )
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return {"key": [str(jax.random.key_impl(x)), put(np.asarray(jax.random.key_data(x)))]}
    if x.dtype.name not in DTYPES:
        raise TypeError(f"{_at(path)} is an array of dtype {x.dtype}; pack.save takes {', '.join(DTYPES)}")
    return put(np.asarray(jax.device_get(x)))


def _describe_leaf(leaf: Leaf, path: str, put: Put) -> Any:
    name = type(leaf).__name__
    if Leaf.registry.get(name) is not type(leaf) or name in _RESERVED:
        raise ValueError(f"{_at(path)}: load could not find the leaf class {name} by its name; give it another one")
    children, static = leaf.fields()
    fields: dict[str, Any] = {}
    for field, child in children.items():
        if not is_leaf(child) and not isinstance(child, jax.Array | np.ndarray):
            raise TypeError(f"{_at(path)}: {name}.{field} is a {type(child).__name__}, not an array")
        fields[field] = _describe(child, f"{path}/{field}", put)
    for field, value in static.items():
        try:
            same = _as_tuples(json.loads(json.dumps(value, allow_nan=False))) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise TypeError(f"{_at(path)}: {name}.{field} is {value!r}; static fields must be of JSON types and tuples")
        if value != _defaults(type(leaf)).get(field):
            fields[field] = value
    return {name: fields}


def _restore(description: Any, get: Get) -> Any:
    if isinstance(description, str):
        return get(description)
    if isinstance(description, dict) and len(description) == 1:
        ((kind, content),) = description.items()
        if kind == "tuple" and content == []:
            return ()
        if kind == "float":
            return float(content)
        if kind == "complex":
            return complex(*map(float, content))
        if kind == "key":
            return jax.random.wrap_key_data(_on_device(get(content[1])), impl=content[0])
        return _restore_leaf(kind, content, get)
    if isinstance(description, (dict, list)) and description:
        raise PackError(f"nothing is described by {str(description)[:80]}")
    return description


def _restore_leaf(name: str, fields: dict[str, Any], get: Get) -> Leaf:
    if name not in Leaf.registry:
        importlib.import_module("jaxcompress.quantize")  # which has leaves of its own: those of `Floats(inputs=...)`
    if name not in Leaf.registry:
        raise PackError(f"it is a {name}, a leaf class that is not defined here; import the module that defines it")
    cls = Leaf.registry[name]
    known = {field.name: field.metadata.get("static", False) for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {field: None for field in known if field != "strict"} | _defaults(cls)
    for field, description in fields.items():
        if field not in known:
            raise PackError(f"{name} has no field {field}")
        if known[field]:
            values[field] = _as_tuples(description)
        else:
            child = _restore(description, get)
            if not is_leaf(child) and not isinstance(child, np.ndarray | jax.Array):
                raise PackError(f"{name}.{field} is not an array")
            values[field] = child if is_leaf(child) else _on_device(child)
    leaf = cls(**values)
    leaf.aval()  # refuses children that do not fit together
    return leaf


def _defaults(cls: type[Leaf]) -> dict[str, Any]:
    """What fields are that a file leaves out; those without a default here are None."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING and f.init}


def _on_device(array: Any) -> jax.Array:
    """A compressed leaf's children are JAX arrays, as its methods and annotations expect."""
    if isinstance(array, np.ndarray) and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise PackError(f"it holds {array.dtype} within a compressed leaf: set jax_enable_x64 to load it")
    return jnp.asarray(array)


def _as_tuples(x: Any) -> Any:
    return tuple(_as_tuples(item) for item in x) if isinstance(x, list) else x
