import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, tree_leaves_with_path, treedef_is_leaf

from jaxcompress.paths import Rules, match, owner, path_name, with_leaves
from jaxcompress.train._state import TrainState


def make_mesh(*, devices: Sequence[jax.Device] | None = None, **axes: int) -> Mesh:
    """A mesh of all devices with named Auto axes, on which an unmodified model runs.

    `make_mesh()` has one axis, `data`. `make_mesh(data=-1, model=2)` puts two devices along `model` and the rest along
    `data`.

    Args:
      devices: the devices to use; all devices of all processes by default.
      **axes: each axis's name and size, in order; one of them may be -1, "what is left".

    Raises:
      ValueError: the sizes' product is not the number of devices.
    """
    axes = axes or {"data": -1}
    count = len(jax.devices() if devices is None else devices)
    fixed = math.prod(size for size in axes.values() if size != -1)
    free = [name for name, size in axes.items() if size == -1]
    if any(size < 1 and size != -1 for size in axes.values()) or len(free) > 1:
        raise ValueError(f"axis sizes must be positive, one of them may be -1; got {axes}")
    if count % fixed or (not free and fixed != count):
        hint = "make one of them -1, or pass fewer devices=" if not free else f"the fixed sizes must divide {count}"
        raise ValueError(f"axes {axes} do not fit {count} devices; {hint}")
    shape = tuple(count // fixed if size == -1 else size for size in axes.values())
    return jax.make_mesh(shape, tuple(axes), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def shardings(tree: Any, mesh: Mesh, rules: Rules[PartitionSpec] = ()) -> Any:
    """A tree like `tree` with a `NamedSharding` for every leaf: for `jax.jit(out_shardings=...)`, or see `shard`.

    The first rule whose pattern matches a leaf's path (see `jaxcompress.paths`) says how it lies on the mesh; what no
    rule matches is replicated. Then:

    * an axis of a spec that does not divide the leaf's axis is left out: that axis is replicated. So one rule serves
      kernels of many widths; look at the result where it matters;
    * in a `TrainState`, the optimizer's arrays lie as their parameter does (an array is a parameter's if its path ends
      with the parameter's); those of another rank (adafactor's row and column factors) are replicated;
    * a compressed weight is one leaf with one path, that of the array it stands for. Its parts of that rank (integers,
      per-channel scales) take the spec, the others are replicated;
    * scalars are replicated.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape`); a whole `TrainState`, or a teacher's variables.
      mesh: what the specs' axes are names of.
      rules: `[(pattern, PartitionSpec)]`.

    Raises:
      UnmatchedRuleError: a rule matches nothing.
      ValueError: a spec names an axis that the mesh lacks, or has more axes than a leaf that it is for.
    """
    if isinstance(rules, PartitionSpec):
        raise TypeError(f'rules are pairs of a pattern and a spec: [("", {rules})] for all leaves')
    rules = list(rules.items()) if not isinstance(rules, Sequence) else list(rules)
    for pattern, spec in rules:
        _check(pattern, spec, mesh)
    parts = _parts(tree)
    specs = match(rules, [part.name for part in parts], PartitionSpec())
    leaves = [NamedSharding(mesh, _fit(spec, part, mesh)) for spec, part in zip(specs, parts, strict=True)]
    return with_leaves(tree, leaves)


def shard(tree: Any, mesh: Mesh, rules: Rules[PartitionSpec] = ()) -> Any:
    """A copy of `tree` on the mesh, as `shardings(tree, mesh, rules)` says; with no rules, one on every device.

    With several processes, each must hand in the same values. To make a state that fits on no single device, do not
    make it first: `jax.jit(create, out_shardings=shardings(jax.eval_shape(create), mesh, rules))()`.
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh, rules))


def shard_batch(batch: Any, mesh: Mesh, axis: str | tuple[str, ...] = "data") -> Any:
    """A batch of host arrays, with the first axis of each divided over a mesh axis.

    With several processes, each hands in its own rows, and the global batch is all of them, in the processes' order.
    All must hand in equally many: a process knows of its own alone, and a step compares them in its first call only.
    Arrays that already lie on this mesh are left alone; scalars are replicated.

    Raises:
      ValueError: the mesh has no such axis, or it does not divide the rows.
    """
    _check("batch", PartitionSpec(axis), mesh)
    names = (axis,) if isinstance(axis, str) else axis
    local = mesh.local_mesh if jax.process_count() > 1 else mesh
    parts = math.prod(local.shape[name] for name in names)

    def place(path: Any, x: Any) -> jax.Array:
        if on_mesh(x, mesh):
            return x
        shape = np.shape(x)
        if shape and shape[0] % parts:
            raise ValueError(
                f"{path_name(path) or 'the batch'} has {shape[0]} rows, which {parts} devices along {axis!r} cannot "
                f"share evenly; take a multiple of {parts}, or drop the remainder"
            )
        sharding = NamedSharding(mesh, PartitionSpec(axis) if shape else PartitionSpec())
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree_util.tree_map_with_path(place, batch)


def on_mesh(x: Any, mesh: Mesh) -> bool:
    """Whether `x` already has its place on `mesh`."""
    sharding = getattr(x, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array):
        x = jnp.copy(x)  # device_put may share a buffer with its source, even if asked not to; donation deletes both
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):  # device_put sends no key to another process
            data = jax.device_put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(x, sharding)


class _Part(NamedTuple):
    """A leaf, and the weight that it is (a part of)."""

    name: str
    shape: tuple[int, ...]
    rank: int


def _parts(tree: Any) -> list[_Part]:
    if not isinstance(tree, TrainState):
        return [part for _, part in _weight_parts((), tree)]
    before = _weight_parts((GetAttrKey("params"),), tree.params)
    known = dict(before)
    if treedef_is_leaf(jax.tree.structure(tree.params)):
        known = {"": before[0][1]}  # an array without a path of its own: every path ends with it
    parts = {"params": [part for _, part in before]}
    parts["opt_state"] = [
        _optimizer_part((GetAttrKey("opt_state"), *path), leaf, known)
        for path, leaf in tree_leaves_with_path(tree.opt_state)
    ]
    for field in ("step", "extras", "key"):
        parts[field] = [part for _, part in _weight_parts((GetAttrKey(field),), getattr(tree, field))]
    return [part for field in TrainState.__dataclass_fields__ for part in parts[field]]


def _weight_parts(prefix: tuple[Any, ...], tree: Any) -> list[tuple[str, _Part]]:
    """Every leaf's own name and part, in tree order. A node with a shape and a dtype is a compressed weight."""
    parts = []
    for path, weight in tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape") and hasattr(x, "dtype")):
        for inner, leaf in tree_leaves_with_path(weight):
            name = path_name((*prefix, *path, *inner))
            parts.append((name, _Part(path_name((*prefix, *path)), np.shape(leaf), len(np.shape(weight)))))
    return parts


def _optimizer_part(path: tuple[Any, ...], leaf: Any, known: dict[str, _Part]) -> _Part:
    """The part of the parameter whose name ends `path` (the longest such name), with the leaf's own shape."""
    name, shape = path_name(path), np.shape(leaf)
    own = owner(name, known)
    return _Part(name, shape, len(shape)) if own is None else _Part(known[own].name, shape, known[own].rank)


def _fit(spec: PartitionSpec, part: _Part, mesh: Mesh) -> PartitionSpec:
    if len(part.shape) != part.rank or not part.shape:
        return PartitionSpec()
    if len(spec) > len(part.shape):
        raise ValueError(
            f"{spec} has {len(spec)} axes, but {part.name!r} has shape {part.shape}; give it a rule of its own before"
        )
    kept = [axes if _divides(axes, n, mesh) else None for axes, n in zip(spec, part.shape, strict=False)]
    return PartitionSpec(*kept)


def _divides(axes: Any, size: int, mesh: Mesh) -> bool:
    return size > 0 and size % math.prod(mesh.shape[name] for name in _axis_names(axes)) == 0


def _axis_names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _check(pattern: str, spec: Any, mesh: Mesh) -> None:
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"rule {pattern!r}: want a PartitionSpec such as P(None, 'model'), got {spec!r}")
    missing = [name for axes in spec for name in _axis_names(axes) if name not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"{pattern!r}: {spec} names {missing}, but the mesh has the axes {mesh.axis_names}; "
            f"an axis of size 1 will do: make_mesh(data=-1, {missing[0]}=1)"
        )
