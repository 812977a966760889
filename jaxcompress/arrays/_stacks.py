"""Parts of weights: `w[i]` of a stack, as loops over layers take it, and `w[:, :n]`, as fused projections are split.

A part is the leaf of what each child has there, as `scan` gives it to its steps; so it meets a product as it is stored.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays._compressed import compressed
from jaxcompress.arrays._leaf import Leaf, register
from jaxcompress.arrays._products import explicit_sharding

PARTS = (lax.slice_p, lax.dynamic_slice_p, lax.unstack_p, lax.split_p)


def take_parts(leaf: type[Leaf]) -> None:
    """Lets `w[i]`, slices along the first axis and unstacking give leaves of a class of leaves, of each child's part.

    It is for stacks (`Leaf.is_stack`) of matrices or more; a row of a table is numbers. Of a class with `unit` and
    `tile` other axes can be sliced and split, too. Indexing ends with `squeeze`, which is registered as well: axes that
    don't stack weights it drops by the class's rule for `reshape`.

    Args:
      leaf: the class.
    """

    # rules are chosen by their annotations, of which this one is a variable: a type checker cannot follow
    @register(lax.slice_p)
    def _slice(w: leaf, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:  # type: ignore[valid-type]
        steps = strides or [1] * len(start_indices)
        slices = list(map(slice, start_indices, limit_indices, steps))
        whole = [slice(0, size, 1) for size in w.shape]  # type: ignore[attr-defined]
        cut = [axis for axis, (one, all_of_it) in enumerate(zip(slices, whole, strict=True)) if one != all_of_it]
        if len(cut) > 1:
            return NotImplemented
        return _cut(w, cut[0], slices[cut[0]]) if cut else w

    @register(lax.dynamic_slice_p)
    def _dynamic_slice(w: leaf, *starts: ArrayLike, slice_sizes: Any) -> Any:  # type: ignore[valid-type]
        if not _is_stack(w) or tuple(slice_sizes[1:]) != w.shape[1:]:  # type: ignore[attr-defined]
            return NotImplemented
        return _each(w, lambda child: lax.dynamic_slice_in_dim(child, starts[0], slice_sizes[0]))

    @register(lax.unstack_p)
    def _unstack(w: leaf, *, axis: int) -> Any:  # type: ignore[valid-type]
        if axis != 0 or not _is_stack(w):
            return NotImplemented
        return [_one(w, i) for i in range(w.shape[0])]  # type: ignore[attr-defined]

    @register(lax.split_p)
    def _split(w: leaf, *, sizes: Sequence[int], axis: int) -> Any:  # type: ignore[valid-type]
        ends = itertools.accumulate(sizes)
        parts = [_cut(w, axis, slice(end - size, end, 1)) for end, size in zip(ends, sizes, strict=True)]
        return NotImplemented if any(part is NotImplemented for part in parts) else parts

    @register(lax.squeeze_p)
    def _squeeze(w: leaf, *, dimensions: tuple[int, ...]) -> Any:  # type: ignore[valid-type]
        part: Any = w
        while dimensions[:1] == (0,) and _is_stack(part):
            part, dimensions = _one(part, 0), tuple(axis - 1 for axis in dimensions[1:])
        if not dimensions:
            return part
        shape = [size for axis, size in enumerate(part.shape) if axis not in dimensions]
        return compressed(functools.partial(lax.reshape, new_sizes=shape))(part)


def _is_stack(w: Any) -> bool:
    return w.ndim > 2 and w.is_stack


def _cut(w: Any, axis: int, part: slice) -> Any:
    """Some weights of a stack; or some rows or columns of each, as projections that stand in one array are taken apart.

    Of what is stored in bytes and groups whole ones can be; a weight that rounds its inputs stays whole, as in `fake`.
    """
    if axis == 0 and _is_stack(w):
        return _each(w, lambda child: lax.slice_in_dim(child, part.start, part.stop, part.step))
    size = part.stop - part.start
    if w.ndim < 2 or size < 2 or part.step != 1 or not hasattr(w, "tile") or _rounds_inputs(w):
        return NotImplemented
    unit = w.unit(axis)
    whole = part.start % unit == 0 and (size % unit == 0 or part.stop == w.shape[axis])
    return w.tile(axis, part.start, size) if whole and not _is_divided(w) else NotImplemented


def _rounds_inputs(w: Any) -> bool:
    return getattr(w, "activation_bits", None) is not None


def _is_divided(w: Any) -> bool:
    """Over explicit axes of a mesh, along which a tile can't be cut."""
    return any(explicit_sharding(child) is not None for child in jax.tree.leaves(w))


def _one(w: Any, i: int) -> Any:
    return jax.tree.map(lambda child: child[i if child.shape[0] > 1 else 0], w)


def _each(w: Any, cut: Callable[[Array], Array]) -> Any:
    """The leaf of what `cut` leaves of each child; what all parts share stays."""
    return jax.tree.map(lambda child: child if child.shape[0] != w.shape[0] else cut(child), w)
