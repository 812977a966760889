"""Weights of low rank: the product of two thin factors."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array

from jaxcompress.arrays._leaf import Leaf, dense
from jaxcompress.arrays._products import like_part

Factor = Array | Leaf


class LowRank(Leaf):
    """`left @ right`: a tall factor, its rows some of the weight's axes, times a wide one, its columns the other axes.

    With `a` rows, `b` columns and rank `r` it holds `r (a + b)` numbers where the array holds `a b`, and a product with
    an input takes as many multiplications a row. The factors are floats and can be trained as they are; a factor may
    itself be a compressed leaf (`factorize.convert_factors`).

    `jaxcompress.factorize` makes these; `LowRank.from_factors` builds one from factors you have.
    """

    left: Factor
    """`[*stack, *rows, rank]`."""
    right: Factor
    """`[*stack, rank, *columns]`, of the same dtype."""
    left_axes: tuple[int, ...] = eqx.field(static=True)
    """Which axes of the weight (counted from the end) the rows are, in the factor's order."""
    right_axes: tuple[int, ...] = eqx.field(static=True)
    """Which axes the columns are."""

    @classmethod
    def from_factors(
        cls, left: Factor, right: Factor, *, left_axes: Sequence[int] | None = None, stacked: int = 0
    ) -> "LowRank":
        """A leaf from its factors, `[*stack, *rows, rank]` and `[*stack, rank, *columns]`.

        Args:
          left: floats, or a compressed leaf.
          right: of the same dtype.
          left_axes: which of the weight's axes the rows are, in order; by default those in front (behind the stack).
            The columns are the others, ascending.
          stacked: how many leading axes stack weights, as `nn.scan` does.

        Raises:
          ValueError: ranks, stacks or dtypes that differ; a factor without rows or columns; axes that don't exist.
        """
        rows, columns = left.ndim - stacked - 1, right.ndim - stacked - 1
        ndim = stacked + rows + columns
        taken = (
            tuple(range(-rows - columns, -columns)) if left_axes is None else tuple(a % ndim - ndim for a in left_axes)
        )
        rest = tuple(axis for axis in range(-rows - columns, 0) if axis not in taken)
        if min(rows, columns) < 1 or len(rest) != columns or len(taken) != rows:
            raise ValueError(
                f"want factors [*stack, *rows, rank] and [*stack, rank, *columns], and a left axis for each of the "
                f"rows, got {left.shape} and {right.shape}, stacked={stacked}, left_axes={left_axes}"
            )
        if not jnp.issubdtype(left.dtype, jnp.floating):
            raise ValueError(f"factors are floats, got {left.dtype}")
        w = cls(left=left, right=right, left_axes=taken, right_axes=rest)
        w.aval()
        return w

    def aval(self) -> ShapedArray:
        left, right = self.sides
        n, ours, theirs = self.stacked, self.left.shape, self.right.shape
        if ours[:n] != theirs[:n] or ours[-1] != theirs[n] or self.left.dtype != self.right.dtype:
            raise ValueError(
                f"factors of one stack, rank and dtype are wanted, got {self.left.dtype}{list(ours)} and "
                f"{self.right.dtype}{list(theirs)} with {n} stacked axes"
            )
        sizes = {axis: ours[left.place[axis]] for axis in left.axes}
        sizes |= {axis: theirs[right.place[axis]] for axis in right.axes}
        shape = (*ours[:n], *(sizes[axis] for axis in sorted(sizes)))
        return like_part(shape, self.left.dtype, self.left, range(n))

    def materialise(self) -> Array:
        n, (left, right) = self.stacked, self.sides
        stack = tuple(range(n))
        stored = lax.dot_general(
            dense(self.left),
            dense(self.right),
            (((left.rank,), (right.rank,)), (stack, stack)),
            precision=lax.Precision.HIGHEST,
        )
        order = (*stack, *left.axes, *right.axes)
        return jnp.transpose(stored, [order.index(axis) for axis in range(stored.ndim)])

    @property
    def is_stack(self) -> bool:
        return self.stacked > 0 and super().is_stack  # a rank may be as large as a stack

    @property
    def stacked(self) -> int:
        """How many leading axes stack weights."""
        return self.left.ndim - 1 - len(self.left_axes)

    @property
    def rank(self) -> int:
        """How many columns `left` has, and rows `right`."""
        return self.left.shape[-1]

    @property
    def sides(self) -> "tuple[Side, Side]":
        """The left factor and the right one, with the places of their axes counted from the front."""
        n, ndim = self.stacked, self.stacked + len(self.left_axes) + len(self.right_axes)
        left, right = (tuple(axis + ndim for axis in axes) for axes in (self.left_axes, self.right_axes))
        stack = {axis: axis for axis in range(n)}
        return (
            Side(self.left, left, stack | {axis: n + i for i, axis in enumerate(left)}, n + len(left)),
            Side(self.right, right, stack | {axis: n + 1 + i for i, axis in enumerate(right)}, n),
        )


class Side(NamedTuple):
    """One factor of a weight."""

    factor: Factor
    axes: tuple[int, ...]
    """The weight's axes that are this factor's, in its order."""
    place: dict[int, int]
    """The factor's axis for each of them, and for the stacked ones."""
    rank: int
    """The factor's axis that the product sums over."""
