"""Parts of stacked weights: `w[i]`, as loops over layers and choices among experts take them.

A part is the leaf of what each child has there, as `scan` gives it to its steps; so it meets a product as it is stored.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._compressed import compressed
from jaxcompress.arrays._leaf import Leaf, register

PARTS = (lax.slice_p, lax.dynamic_slice_p, lax.unstack_p)


def take_parts(leaf: type[Leaf]) -> None:
    """Lets `w[i]`, slices along the first axis and unstacking give leaves of a class of leaves, of each child's part.

    It is for stacks (`Leaf.is_stack`) of matrices or more; rows of a table are numbers. Indexing ends with `squeeze`,
    which is registered too: axes that don't stack weights it drops by the class's rule for `reshape`.

    Args:
      leaf: the class.
    """

    # rules are chosen by their annotations, of which this one is a variable: a type checker cannot follow
    @register(lax.slice_p)
    def _slice(w: leaf, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:  # type: ignore[valid-type]
        steps = strides or [1] * len(start_indices)
        sizes = [stop - start for start, stop in zip(start_indices, limit_indices, strict=True)]
        if any(step != 1 for step in steps[1:]) or not _is_cut_first(w, sizes):
            return NotImplemented
        return _each(w, lambda child: lax.slice_in_dim(child, start_indices[0], limit_indices[0], steps[0]))

    @register(lax.dynamic_slice_p)
    def _dynamic_slice(w: leaf, *starts: ArrayLike, slice_sizes: Any) -> Any:  # type: ignore[valid-type]
        if not _is_cut_first(w, slice_sizes):
            return NotImplemented
        return _each(w, lambda child: lax.dynamic_slice_in_dim(child, starts[0], slice_sizes[0]))

    @register(lax.unstack_p)
    def _unstack(w: leaf, *, axis: int) -> Any:  # type: ignore[valid-type]
        if axis != 0 or not _is_cut_first(w, w.shape):  # type: ignore[attr-defined]
            return NotImplemented
        return [_one(w, i) for i in range(w.shape[0])]  # type: ignore[attr-defined]

    @register(lax.squeeze_p)
    def _squeeze(w: leaf, *, dimensions: tuple[int, ...]) -> Any:  # type: ignore[valid-type]
        part: Any = w
        while dimensions[:1] == (0,) and _is_cut_first(part, part.shape):
            part, dimensions = _one(part, 0), tuple(axis - 1 for axis in dimensions[1:])
        if not dimensions:
            return part
        shape = [size for axis, size in enumerate(part.shape) if axis not in dimensions]
        return compressed(functools.partial(lax.reshape, new_sizes=shape))(part)


def _is_cut_first(w: Any, sizes: Sequence[int]) -> bool:
    """Whether a slice of such sizes leaves all axes of a stack whole but the first."""
    return w.ndim > 2 and w.is_stack and tuple(sizes[1:]) == w.shape[1:]


def _one(w: Any, i: int) -> Any:
    return jax.tree.map(lambda child: child[i if child.shape[0] > 1 else 0], w)


def _each(w: Any, cut: Callable[[Array], Array]) -> Any:
    """The leaf of what `cut` leaves of each child; what all parts share stays."""
    return jax.tree.map(lambda child: child if child.shape[0] != w.shape[0] else cut(child), w)
