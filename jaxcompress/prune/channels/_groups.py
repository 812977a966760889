"""Groups: which indices of which parameters' axes make one unit, and which units can be chosen among."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxcompress.prune.channels._labels import Atoms, Label
from jaxcompress.prune.channels._trace import Traced, trace


@dataclass(frozen=True, eq=False)
class Member:
    """What a group's units own of one axis of one parameter.

    Attributes:
      path: the parameter's.
      axis: of the parameter.
      index: the axis's indices that each unit owns; int [units, indices a unit].
      roles: what the axis is for: `in` (contracted in a product), `out` (the result's axis), `scale`, `shift`.
      shape: the parameter's.
    """

    path: str
    axis: int
    index: np.ndarray
    roles: frozenset[str]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        each = self.index.shape[1]
        of = f"{each} of {self.shape[self.axis]} a unit" if each > 1 else f"{self.shape[self.axis]}"
        return f"{self.path}[{self.axis}] ({', '.join(sorted(self.roles)) or 'other'}; {of})"


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: each owns the same number of indices along the same axes. Any of them may go.

    Attributes:
      name: the path and axis of the first member that the units come out of.
      size: how many units there are.
      members: what they own.
      exact: without a unit, the model gives what it gives where the unit is zeroed.
      notes: why not, where it isn't; and where the zeroed model's gradient may not be finite, unlike the smaller one's.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    exact: bool = True
    notes: tuple[str, ...] = ()

    @property
    def unit_size(self) -> int:
        """How many parameters go with one unit."""
        left: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        for m in self.members:
            left.setdefault(m.path, np.array(m.shape))
            left[m.path][m.axis] -= m.index.shape[1]
            sizes[m.path] = m.shape
        return int(sum(np.prod(sizes[path]) - np.prod(shape) for path, shape in left.items()))

    def why(self) -> str:
        """The group in words: its members, and what each is for."""
        lines = [f"{self.name}: {self.size} units of {self.unit_size} parameters" + ("" if self.exact else ", inexact")]
        lines += [f"  {m}" for m in self.members]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Group]):
    """All groups of a function, and what could not be grouped.

    Attributes:
      groups: in the order of the parameters' leaves.
      frozen: of each axis (`path[axis]`) that stays whole or in part, why.
      unknown: primitives without a rule that met something prunable, and how often.
      shapes: of all parameters.
      free_out: as given.
    """

    groups: tuple[Group, ...]
    frozen: Mapping[str, str]
    unknown: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    free_out: tuple[str, ...] = ()
    traced: Traced = field(repr=False, kw_only=True)

    def __getitem__(self, key: Any) -> Any:
        """A group by name or by number."""
        if isinstance(key, str):
            found = [group for group in self.groups if group.name == key]
            if not found:
                raise KeyError(f"no group {key!r}; there are {', '.join(group.name for group in self.groups)}")
            return found[0]
        return self.groups[key]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __str__(self) -> str:
        """All groups with their members, then what is frozen and why."""
        lines = [group.why() for group in self.groups]
        by_reason: dict[str, list[str]] = {}
        for axis, reason in self.frozen.items():
            by_reason.setdefault(reason, []).append(axis)
        lines += [f"whole: {', '.join(axes)}: {reason}" for reason, axes in by_reason.items()]
        lines += [f"no rule for {name!r}: met {n} times" for name, n in self.unknown.items()]
        return "\n".join(lines)


def groups(fn: Callable[..., Any], params: Any, *args: Any, free_out: Sequence[str] = ()) -> Groups:
    """The groups of units that can be cut out of `fn(params, *args)`.

    The function is traced, never run: arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      fn: any JAX function; its first argument is the tree that is to be cut. Arrays that it closes over are constants:
        they are cut where they are used, but stay in the program.
      params: parameters, and whatever state has their channels (batch statistics, caches).
      *args: inputs; their axes stay whole.
      free_out: patterns of outputs, by path, that may shrink: new batch statistics, features. All others stay whole.

    Raises:
      ValueError: `params` has no arrays or has compressed leaves, or a size is symbolic.
      UnmatchedRuleError: a pattern of `free_out` matches no output.
    """
    free_out = (free_out,) if isinstance(free_out, str) else tuple(free_out)
    return found(trace(fn, params, args, free_out), free_out)


def found(traced: Traced, free_out: tuple[str, ...] = ()) -> Groups:
    """The groups of a traced function."""
    tracer, atoms = traced.tracer, traced.tracer.atoms
    owned = []  # (leaf, axis, atoms of each index)
    frozen: dict[str, str] = {}
    for leaf, value in enumerate(traced.params):
        for axis, label in enumerate(value.labels):
            resolved = atoms.resolve(label)
            if resolved is not None:
                owned.append((leaf, axis, resolved))
            if label is not None and (resolved is None or not resolved.any(axis=1).all()):
                whole = label if resolved is None else label[~resolved.any(axis=1)]
                frozen[f"{traced.names[leaf]}[{axis}]"] = atoms.why(whole)
    kind = _kinds(traced, owned)
    families: dict[int, list[tuple[int, int, np.ndarray]]] = {}
    for leaf, axis, resolved in owned:
        rows, columns = np.nonzero(resolved)
        own = resolved[rows, columns]
        order = np.argsort(kind[own], kind="stable")
        own, rows = own[order], rows[order]
        starts = np.flatnonzero(np.diff(kind[own], prepend=np.uint64(0)) != 0)
        starts = np.unique(np.concatenate([[0], starts]))
        for begin, end in zip(starts, [*starts[1:], len(own)], strict=True):
            part = np.stack([own[begin:end], rows[begin:end]])
            families.setdefault(int(kind[own[begin]]), []).append((leaf, axis, part))
    inexact, steep = _noted(atoms, kind, tracer.inexact), _noted(atoms, kind, tracer.steep)
    made = []
    for key, parts in families.items():
        members, size = _members(traced, parts)
        if size > 1:
            made.append((members, size, [noted.get(key) for noted in (inexact, steep)]))
        for m in members if size == 1 else ():
            frozen.setdefault(f"{m.path}[{m.axis}]", "what there is of it goes together, as one unit")
    names = _names([members for members, _, _ in made])
    return Groups(
        tuple(
            Group(name, size, members, exact=notes[0] is None, notes=tuple(note for note in notes if note))
            for name, (members, size, notes) in zip(names, made, strict=True)
        ),
        frozen,
        dict(tracer.unknown),
        {name: value.shape for name, value in zip(traced.names, traced.params, strict=True)},
        free_out,
        traced=traced,
    )


def _noted(atoms: Atoms, kind: np.ndarray, labels: Sequence[tuple[Label, str]]) -> dict[int, str]:
    """The first note of each kind of atoms."""
    noted: dict[int, str] = {}
    for label, note in labels:
        resolved = atoms.resolve(label)
        for key in np.unique(kind[resolved[resolved > 0]]) if resolved is not None else ():
            noted.setdefault(int(key), note)
    return noted


def _kinds(traced: Traced, owned: Sequence[tuple[int, int, np.ndarray]]) -> np.ndarray:
    """A number for each atom; those with the same one own alike: as many indices of the same axes and pieces."""
    atoms = traced.tracer.atoms
    kind = np.zeros(atoms.count, np.uint64)
    places = [resolved for _, _, resolved in owned]
    for piece in traced.tracer.pieces:
        resolved = atoms.resolve(piece)
        if resolved is not None:
            places.append(resolved)
    for i, resolved in enumerate(places):
        for j, column in enumerate(resolved.T):  # a product's factors are never of one kind
            own, counts = np.unique(column, return_counts=True)
            kind[own] += _mixed(np.uint64(((i + 1) << 8) + j << 32) + counts.astype(np.uint64))
    return kind


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64: numbers that add up without meeting by accident."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _members(traced: Traced, parts: Sequence[tuple[int, int, np.ndarray]]) -> tuple[tuple[Member, ...], int]:
    members = []
    order: np.ndarray | None = None
    for leaf, axis, (own, rows) in parts:
        if order is None:  # units in the order of the first parameter's indices
            _, first = np.unique(own, return_index=True)
            order = own[np.sort(first)]
        rank = np.argsort(order)
        unit = rank[np.searchsorted(order, own, sorter=rank)]
        index = rows[np.lexsort((rows, unit))].reshape(len(order), -1)
        roles = frozenset(traced.tracer.roles.get((leaf, axis), ()))
        members.append(Member(traced.names[leaf], axis, index, roles, traced.params[leaf].shape))
    assert order is not None
    return tuple(members), len(order)


def _names(all_members: Sequence[tuple[Member, ...]]) -> list[str]:
    firsts = []
    for members in all_members:
        head = next((m for m in members if "out" in m.roles), members[0])
        firsts.append(f"{head.path}[{head.axis}]")
    total, seen, names = Counter(firsts), Counter[str](), []
    for first in firsts:
        names.append(f"{first}#{seen[first]}" if total[first] > 1 else first)
        seen[first] += 1
    return names
