"""A plan: which indices of which parameters stay. It is plain data, and needs no trace to be applied or stored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxcompress import paths
from jaxcompress.arrays._bits import pack_bits
from jaxcompress.prune._stored import booleans, mask_shape
from jaxcompress.prune.channels._groups import Groups
from jaxcompress.prune.channels._rules_shape import pick

_FORMAT = "jaxcompress.channels.plan/1"


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays of each parameter.

    Attributes:
      keep: `path -> axis -> the indices that stay`, ascending; axes that stay whole are not in it.
      shapes: of all parameters before.
      widths: of each group, the number of units before and after.
      free_out: the outputs that may shrink.
    """

    keep: Mapping[str, Mapping[int, np.ndarray]]
    shapes: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    free_out: tuple[str, ...] = ()

    def apply(self, params: Any) -> Any:
        """The smaller parameters: of jax or NumPy arrays, or shapes; a sharded array stays sharded.

        Raises:
          ValueError: another tree than the plan's: a path is missing or has another shape.
        """
        self.check(params)
        return self._mapped(params, lambda name, x: _cut(x, self.keep[name]) if name in self.keep else x)

    def mask(self, params: Any) -> Any:
        """The parameters with zeros where `apply` cuts: what the smaller model is compared with. Errors: as there."""
        self.check(params)

        def zeroed(name: str, x: Any) -> Any:
            for axis, kept in self.keep.get(name, {}).items():
                stays = np.zeros(x.shape[axis], bool)
                stays[kept] = True
                x = x * stays.reshape([-1 if a == axis else 1 for a in range(x.ndim)]).astype(x.dtype)
            return x

        return self._mapped(params, zeroed)

    def _above(self, name: str, x: Any) -> str | None:
        """The parameter that a leaf lies beneath, if the leaf is as long as one of the axes that are cut."""
        keys = name.split("/")
        for end in range(len(keys) - 1, 0, -1):
            owner = paths.owner("/".join(keys[:end]), self.shapes)
            if owner and any(self.shapes[owner][axis] in np.shape(x) for axis in self.keep.get(owner, {})):
                return owner
        return None

    def undone(self, small: Any) -> Any:
        """The shapes before, for a tree that `apply` gave: what `shrink` takes where the whole parameters are gone.

        Raises:
          ValueError: another tree than `apply` gave.
        """
        left = {name: tuple(np.shape(x)) for name, x in paths.named_leaves(small) if hasattr(x, "shape")}
        for name, shape in self.shapes.items():
            axes = self.keep.get(name, {})
            wanted = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(shape))
            if left.get(name) != wanted:
                raise ValueError(f"want {name!r} of shape {wanted}, as plan.apply leaves it; it is {left.get(name)}")
        return self._mapped(
            small, lambda name, x: jax.ShapeDtypeStruct(self.shapes[name], x.dtype) if name in self.shapes else x
        )

    def apply_like(self, tree: Any, fresh: Any = None) -> Any:
        """Cut the leaves of a tree that belong to parameters by path and shape: an optimizer's state, an average.

        A leaf belongs to a parameter if its path ends with the parameter's. Leaves of one element (counts,
        placeholders) and leaves without a parameter stay as they are; one beneath a parameter's path that is as long as
        an axis that is cut (SM3's vectors, an axis each) can't be cut.

        Args:
          tree: of the whole parameters.
          fresh: the same for the smaller ones, such as `optimizer.init(small_params)`: gives the leaves that can't be
            cut, like Adafactor's moments of rows and columns.

        Raises:
          ValueError: a leaf has a parameter's path but another shape, or lies beneath one, and there is no `fresh`; or
            `fresh` has other leaves.
        """
        made_small = dict(paths.named_leaves(fresh)) if fresh is not None else {}
        if fresh is not None and list(made_small) != [name for name, _ in paths.named_leaves(tree)]:
            raise ValueError("fresh has other leaves than the tree: make both in the same way")

        def of_leaf(name: str, x: Any) -> Any:
            owner = paths.owner(name, self.shapes)
            owner = self._above(name, x) if owner is None else owner
            if owner is None or owner not in self.keep or np.size(x) <= 1:
                small = x
            elif tuple(np.shape(x)) == self.shapes[owner]:
                small = _cut(x, self.keep[owner])
            elif _packs(x, self.shapes[owner]):
                mask = _cut(booleans(x), self.keep[owner])
                small = mask if mask.shape[-1] % 8 else pack_bits(mask)
            elif fresh is not None:
                return made_small[name]
            else:
                raise ValueError(
                    f"{name!r} has shape {np.shape(x)}, its parameter {owner!r} had {self.shapes[owner]}: it can't be "
                    "cut alike; pass fresh=optimizer.init(plan.apply(params)), from which such leaves are taken"
                )
            return small if fresh is None or np.shape(small) == np.shape(made_small[name]) else made_small[name]

        return self._mapped(tree, of_leaf)

    def check(self, params: Any) -> None:
        """Raises ValueError unless `params` is a tree that the plan was made for."""
        shapes = {name: tuple(np.shape(x)) for name, x in paths.named_leaves(params) if hasattr(x, "shape")}
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise ValueError(f"the plan is for another tree: it has {name!r}, params has {_near(name, shapes)}")
            if shapes[name] != shape:
                small = " (these parameters are cut already?)" if name in self.keep else ""
                raise ValueError(f"the plan is for another tree: {name!r} has shape {shapes[name]}, not {shape}{small}")

    def to_json(self) -> str:
        """The plan as text; `from_json` reads it."""
        return json.dumps(
            {
                "format": _FORMAT,
                "keep": {n: {str(a): list(map(int, k)) for a, k in axes.items()} for n, axes in self.keep.items()},
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                "widths": {name: list(pair) for name, pair in self.widths.items()},
                "free_out": list(self.free_out),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
          ValueError: the text is not a plan, or its indices don't fit its shapes.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}")
            keep = {n: {int(a): np.array(k) for a, k in axes.items()} for n, axes in data["keep"].items()}
            shapes = {name: tuple(map(int, shape)) for name, shape in data["shapes"].items()}
            widths = {name: (int(a), int(b)) for name, (a, b) in data["widths"].items()}
            for name, axes in keep.items():
                for axis, kept in axes.items():
                    numbers = kept.dtype == np.int64 and axis >= 0  # no fraction is rounded to an index
                    if not numbers or (np.diff(kept) <= 0).any() or kept[0] < 0 or kept[-1] >= shapes[name][axis]:
                        raise ValueError(f"indices of {name}[{axis}] don't fit its shape {shapes[name]}")
            return cls(keep, shapes, widths, tuple(data["free_out"]))
        except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError, ValueError) as error:
            raise ValueError(f"not a plan that to_json wrote ({_FORMAT}): {error!r}") from error

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of parameters before and after."""
        before = sum(int(np.prod(shape)) for shape in self.shapes.values())
        after = 0
        for name, shape in self.shapes.items():
            axes = self.keep.get(name, {})
            after += int(np.prod([len(axes[a]) if a in axes else n for a, n in enumerate(shape)]))
        return before, after

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{before} -> {after} parameters"]
        return "\n".join([*lines, *(f"  {name}: {a} -> {b}" for name, (a, b) in self.widths.items())])

    def _mapped(self, tree: Any, of_leaf: Any) -> Any:
        leaves = [of_leaf(name, x) if hasattr(x, "shape") else x for name, x in paths.named_leaves(tree)]
        return paths.with_leaves(tree, leaves)


def from_units(groups: Groups, dropped: Mapping[str, np.ndarray]) -> Plan:
    """The plan that drops the given units.

    Args:
      groups: of the function.
      dropped: `group name -> the units that go`, as numbers; groups that are not in it stay whole.

    Raises:
      ValueError: a name that is no group, a number that is no unit, or a parameter's axis would become empty.
      TypeError: a mask, or what are no whole numbers, in place of units.
    """
    stays: dict[tuple[str, int], np.ndarray] = {}
    widths = {}
    known = {group.name for group in groups}
    for name in dropped:
        if name not in known:
            raise ValueError(f"no group {name!r}; there are {', '.join(sorted(known))}")
    for group in groups:
        units = np.asarray(dropped.get(group.name, ()))
        if units.dtype == bool:
            raise TypeError(f"units are given by number: of a mask of {group.name!r} take np.flatnonzero")
        if units.size and not np.issubdtype(units.dtype, np.integer):
            raise TypeError(f"units are given by number, as whole numbers; those of {group.name!r} are {units.dtype}")
        gone = np.unique(units.astype(np.int64))
        if gone.size and (gone[0] < 0 or gone[-1] >= group.size):
            raise ValueError(f"group {group.name!r} has units 0 to {group.size - 1}, got {gone[0]} to {gone[-1]}")
        if len(gone) == group.size:
            raise ValueError(f"all {group.size} units of {group.name!r} would go; keep at least one")
        widths[group.name] = (group.size, group.size - len(gone))
        if gone.size:
            for m in group.members:
                mask = stays.setdefault((m.path, m.axis), np.ones(m.shape[m.axis], bool))
                mask[m.index[gone].ravel()] = False
    keep: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), mask in stays.items():
        if not mask.any():
            raise ValueError(f"nothing of {path}[{axis}] would be left; drop fewer units")
        keep.setdefault(path, {})[axis] = np.flatnonzero(mask)
    return Plan(keep, dict(groups.shapes), widths, groups.free_out)


def _packs(x: Any, shape: tuple[int, ...]) -> bool:
    """Whether this is a mask of `prune` for weights of `shape`, stored as a bit a weight."""
    return not isinstance(x, jax.ShapeDtypeStruct) and x.dtype == np.uint8 and mask_shape(x) == shape


def _cut(x: Any, axes: Mapping[int, np.ndarray]) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(x.shape))
        return jax.ShapeDtypeStruct(shape, x.dtype)
    small = x
    spread = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and len(x.sharding.device_set) > 1
    if spread and isinstance(x.sharding, jax.sharding.NamedSharding):  # along Explicit axes JAX refuses to look up
        mesh = x.sharding.mesh
        automatic = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
        small = jax.device_put(x, jax.sharding.NamedSharding(automatic, x.sharding.spec))
    for axis, kept in axes.items():
        small = np.take(small, kept, axis) if isinstance(x, np.ndarray) else pick(small, kept, axis)
    return _placed(small, x.sharding) if spread else small


def _placed(x: jax.Array, sharding: Any) -> jax.Array:
    """On the same mesh; along axes that its devices no longer divide, whole."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = list(sharding.spec) + [None] * (x.ndim - len(sharding.spec))
        for axis, names in enumerate(spec):
            parts = 1
            for name in (names,) if isinstance(names, str) else names or ():
                parts *= sharding.mesh.shape[name]
            if x.shape[axis] % parts:
                spec[axis] = None
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.P(*spec))
    return jax.device_put(x, sharding)


def _near(name: str, shapes: Mapping[str, Any]) -> str:
    return paths._unmatched_message(name, list(shapes)).split("nearest paths: ")[1]
