"""Labels: which conditions an index of an axis is kept under.

Every condition is an *atom*, a number; an index is kept if all its atoms are. So a label is an int array
`[indices, factors]`, one row an index, where atom 0 stands for no condition; `None` is the label of an axis that is
kept whole. A neuron's row has one atom. The rows of an axis that is made of heads times dimensions have two: its head's
and its dimension's.

Rules only ever say that two labels must agree (`unify`), or that one must stay whole (`freeze`). Every choice of atoms
therefore gives shapes that fit together. Atoms are merged by union-find, or, where one atom meets a product of several,
replaced by that product; all of it on whole arrays, because axes have thousands of indices.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np

Label = np.ndarray | None
"""`[indices, factors]` int32 atoms, or `None`: every index is kept."""


class Atoms:
    """All conditions of one program, and what is known of them."""

    def __init__(self) -> None:
        self.parent = np.zeros(1024, np.int32)  # union-find
        self.cause = np.zeros(1024, np.int32)  # why it is frozen: an index of `reasons`; 0 if it isn't
        self.replaced = np.zeros(1024, np.int32)  # a row of `products` that stands for it; 0 if none does
        self.products = np.zeros((1, 2), np.int32)
        self.count = 1
        self.reasons: list[str] = [""]
        self._reason_index: dict[str, int] = {"": 0}

    def fresh(self, n: int) -> np.ndarray:
        """A label of `n` new atoms."""
        start, self.count = self.count, self.count + n
        while self.count > len(self.parent):
            size = 2 * len(self.parent)
            for name in ("parent", "cause", "replaced"):
                grown = np.zeros(size, np.int32)
                grown[: size // 2] = getattr(self, name)
                setattr(self, name, grown)
        label = np.arange(start, self.count, dtype=np.int32)
        self.parent[start : self.count] = label
        return label[:, None]

    def resolve(self, label: Label) -> Label:
        """The label in the atoms that are still free; `None` if there are none."""
        if label is None:
            return None
        atoms = self._find(label)
        while self.replaced[atoms].any():
            atoms = self._find(self._expanded(atoms))
        atoms = np.where(self.cause[atoms] > 0, 0, atoms)
        for j in range(1, atoms.shape[1]):
            for i in range(j):
                atoms[:, j][atoms[:, j] == atoms[:, i]] = 0
        used = atoms.any(axis=0)
        if not used.any():
            return None
        return atoms if used.all() else atoms[:, used]

    def unify(self, a: Label, b: Label, why: str) -> None:
        """Make two labels agree: index i of one is kept exactly if index i of the other is."""
        if a is b:
            return
        if a is not None and b is not None and a.shape[0] != b.shape[0]:
            raise AssertionError(f"labels of {a.shape[0]} and {b.shape[0]} indices cannot agree")
        while True:  # each turn ends some atoms' freedom
            x, y = self.resolve(a), self.resolve(b)
            if x is None or y is None:
                self.freeze(x if y is None else y, why)
                return
            if x.shape == y.shape and np.array_equal(x, y):
                return
            x, y = _without_common(x, y)
            in_x, in_y = (x > 0).sum(axis=1), (y > 0).sum(axis=1)
            differ = (in_x > 0) | (in_y > 0)
            if not differ.any():
                return
            one_sided = (in_x == 0) != (in_y == 0)
            paired = (in_x == in_y) & differ
            single = ((in_x == 1) | (in_y == 1)) & ~paired & ~one_sided
            if one_sided.any():  # kept whenever the common part is
                self._freeze_atoms(np.concatenate([x[one_sided].ravel(), y[one_sided].ravel()]), why)
            elif paired.any():  # the factors, in order: enough, though not always necessary
                width = min(x.shape[1], y.shape[1])
                self._merge(x[paired, :width], y[paired, :width])
            elif single.any():
                leaf = np.where(in_x == 1, x[:, 0], y[:, 0])[single]
                self._replace(leaf, _padded(x, y, in_x == 1)[single])
            else:
                first = x[differ, :1]
                for other in (x[differ], y[differ]):
                    self._merge(np.where(other > 0, other, first), np.broadcast_to(first, other.shape))

    def freeze(self, label: Label, why: str) -> None:
        """Keep every index of a label."""
        resolved = self.resolve(label)
        if resolved is not None:
            self._freeze_atoms(resolved.ravel(), why)

    def split(self, label: Label, sizes: Sequence[int], why: str) -> list[Label]:
        """Labels of the axes that an axis is split into, first the slowest; their product agrees with `label`.

        Factors that the label has already are read off; where an index has none, new ones are made.
        """
        resolved = self.resolve(label)
        parts: list[list[np.ndarray]] = [[] for _ in sizes]
        for column in [] if resolved is None else resolved.T:
            grid = column.reshape(tuple(sizes))
            axes = [d for d in range(len(sizes)) if (grid != grid.take([0], axis=d)).any()]
            if not axes:
                self._freeze_atoms(column[:1], why)
            elif len(axes) == 1:
                along = np.moveaxis(grid, axes[0], 0).reshape(sizes[axes[0]], -1)
                parts[axes[0]].append(along[:, :1])
            else:
                made = {d: self.fresh(sizes[d]) for d in axes}
                self.unify(column[:, None], outer([made.get(d) for d in range(len(sizes))], sizes), why)
                for d, fresh in made.items():
                    parts[d].append(fresh)
        return [np.concatenate(columns, axis=1) if columns else None for columns in parts]

    def kept(self, label: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        """Of each index, whether it stays when the atoms marked in `dropped` go; bool [indices]."""
        resolved = self.resolve(label)
        return np.ones(len(label), bool) if resolved is None else np.logical_not(dropped[resolved].any(axis=1))

    def why(self, label: np.ndarray) -> str:
        """The first reason for which an index of a frozen label is frozen."""
        atoms = self._find(label).ravel()
        while True:
            causes = self.cause[atoms]
            if causes.any():
                return self.reasons[causes[causes > 0][0]]
            rows = self.replaced[atoms]
            if not rows.any():
                return ""
            atoms = self._find(self.products[rows[rows > 0]]).ravel()

    def _find(self, atoms: np.ndarray) -> np.ndarray:
        root = self.parent[atoms]
        while True:
            above = self.parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self.parent[atoms] = root
        return root

    def _expanded(self, atoms: np.ndarray) -> np.ndarray:
        columns: list[np.ndarray] = []
        for column in atoms.T:
            rows = self.replaced[column]
            if rows.any():
                alone = np.zeros((len(column), self.products.shape[1]), np.int32)
                alone[:, 0] = column
                columns.extend(np.where(rows[:, None] > 0, self.products[rows], alone).T)
            else:
                columns.append(column)
        return np.stack([c for c in columns if c.any()], axis=1)

    def _merge(self, a: np.ndarray, b: np.ndarray) -> None:
        a, b = a.ravel(), b.ravel()
        while True:
            a, b = self._find(a), self._find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def _replace(self, leaf: np.ndarray, product: np.ndarray) -> None:
        leaf, first = np.unique(leaf, return_index=True)
        product = product[first]
        safe = ~np.isin(leaf, product)  # else two could stand for each other
        chosen = np.flatnonzero(safe) if safe.any() else np.arange(1)
        width = max(product.shape[1], self.products.shape[1])
        rows = np.zeros((len(self.products) + len(chosen), width), np.int32)
        rows[: len(self.products), : self.products.shape[1]] = self.products
        rows[len(self.products) :, : product.shape[1]] = product[chosen]
        self.replaced[leaf[chosen]] = np.arange(len(self.products), len(rows))
        self.products = rows

    def _freeze_atoms(self, atoms: np.ndarray, why: str) -> None:
        if why not in self._reason_index:
            self._reason_index[why] = len(self.reasons)
            self.reasons.append(why)
        self.cause[atoms[atoms > 0]] = self._reason_index[why]


def outer(labels: Sequence[Label], sizes: Sequence[int]) -> Label:
    """The label of axes merged into one, first the slowest: an index is kept if it is along all of them."""

    def merged(a: tuple[int, Label], b: tuple[int, Label]) -> tuple[int, Label]:
        (n, x), (m, y) = a, b
        columns = [np.repeat(x, m, axis=0)] if x is not None else []
        columns += [np.tile(y, (n, 1))] if y is not None else []
        return n * m, np.concatenate(columns, axis=1) if columns else None

    return reduce(merged, zip(sizes, labels, strict=True))[1]


def joined(labels: Sequence[Label], sizes: Sequence[int]) -> Label:
    """The label of axes one behind the other."""
    if all(label is None for label in labels):
        return None
    width = max(label.shape[1] for label in labels if label is not None)
    rows = np.zeros((sum(sizes), width), np.int32)
    at = 0
    for label, size in zip(labels, sizes, strict=True):
        if label is not None:
            rows[at : at + size, : label.shape[1]] = label
        at += size
    return rows


def _without_common(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides without the atoms that a row has on both, the others moved to the front."""
    x, y = x.copy(), y.copy()
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            same = x[:, i] == y[:, j]
            x[same, i] = y[same, j] = 0
    return _left(x), _left(y)


def _left(x: np.ndarray) -> np.ndarray:
    if x.shape[1] == 1:
        return x
    return np.take_along_axis(x, np.argsort(x == 0, axis=1, kind="stable"), axis=1)


def _padded(x: np.ndarray, y: np.ndarray, take_y: np.ndarray) -> np.ndarray:
    """Rows of y where `take_y`, else of x, as wide as the wider."""
    rows = np.zeros((len(x), max(x.shape[1], y.shape[1])), np.int32)
    rows[:, : x.shape[1]][~take_y] = x[~take_y]
    rows[:, : y.shape[1]][take_y] = y[take_y]
    return rows
