"""A weight as matrices: which of its axes are summed over where it meets an input, which stay, which index problems."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress.arrays._products import block_map

Step = tuple[str, tuple[int, ...]]
"""What was done to a weight before a product: `("transpose", permutation)`, `("reshape", shape)`, `("rev", axes)`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the array of a weight and its matrices `[problems, inputs, outputs]` are made from each other.

    A problem is a product of its own: one for a dense kernel, one a layer for weights stacked by `scan`, one an index
    of a batch axis, one a group for a grouped convolution. In each, `out = x @ matrix`, with the inputs `x` whose
    statistics `InputStatistics` holds in the same order: the axes that are summed over, as they stand in the weight.

    Attributes:
      shape: the weight's.
      steps: the changes of shape between the weight and the product; the other fields speak of the array after them.
      stack: leading axes that `scan` slices off.
      batch: the product's batch axes.
      inputs: the axes that are summed over; of a convolution kernel also the spatial ones.
      outputs: the axes that stay.
      groups: of a grouped convolution; its outputs' axis has group after group.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    stack: int
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int = 1

    @property
    def view(self) -> tuple[int, ...]:
        """The shape after all steps."""
        return viewed_shape(self.shape, self.steps)

    @property
    def stacked(self) -> tuple[int, ...]:
        """The lengths of the leading axes that `scan` slices off."""
        return self.view[: self.stack]

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """`(problems, inputs, outputs)`."""
        problems = self._size((*range(self.stack), *self.batch)) * self.groups
        return problems, self._size(self.inputs), self._size(self.outputs) // self.groups

    def matrices(self, weight: Float[Array, "*shape"]) -> Float[Array, "problems inputs outputs"]:
        """The weight as matrices."""
        for kind, argument in self.steps:
            weight = _APPLY[kind](weight, argument)
        problems, inputs, outputs = self.matrix_shape
        laid = jnp.transpose(weight, self._order)
        laid = laid.reshape(problems // self.groups, inputs, self.groups, outputs)
        return jnp.swapaxes(laid, 1, 2).reshape(problems, inputs, outputs)

    def weight(self, matrices: Float[Array, "problems inputs outputs"]) -> Float[Array, "*shape"]:
        """The array whose `matrices` these are."""
        problems, inputs, outputs = self.matrix_shape
        laid = matrices.reshape(problems // self.groups, self.groups, inputs, outputs)
        laid = jnp.swapaxes(laid, 1, 2).reshape([self.view[axis] for axis in self._order])
        weight = jnp.transpose(laid, inverse(self._order))
        shapes = [viewed_shape(self.shape, self.steps[:i]) for i in range(len(self.steps))]
        for (kind, argument), shape in zip(reversed(self.steps), reversed(shapes), strict=True):
            weight = _UNDO[kind](weight, argument, shape)
        return weight

    def own_axes(self, view_axes: tuple[int, ...]) -> tuple[int | None, ...]:
        """For each axis after all steps the weight's own axis that it is; `None` where a reshape made or changed it."""
        own: list[int | None] = list(range(len(self.shape)))
        shape = self.shape
        for kind, argument in self.steps:
            if kind == "transpose":
                own = [own[axis] for axis in argument]
            elif kind == "reshape":
                new: list[int | None] = [None] * len(argument)
                for left, right in block_map(shape, argument) or []:
                    wide, target = [a for a in left if shape[a] > 1], [a for a in right if argument[a] > 1]
                    if len(wide) == len(target) == 1:
                        new[target[0]] = own[wide[0]]
                own = new
            else:
                own = [None if axis in argument else a for axis, a in enumerate(own)]
            shape = viewed_shape(shape, ((kind, argument),))
        return tuple(own[axis] for axis in view_axes)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*range(self.stack), *self.batch, *self.inputs, *self.outputs)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.view[axis] for axis in axes)


def viewed_shape(shape: tuple[int, ...], steps: tuple[Step, ...]) -> tuple[int, ...]:
    """The shape that an array of this one has after these steps."""
    for kind, argument in steps:
        if kind == "transpose":
            shape = tuple(shape[axis] for axis in argument)
        elif kind == "reshape":
            shape = argument
    return shape


def inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes this one."""
    return tuple(int(i) for i in np.argsort(permutation))


_APPLY: dict[str, Any] = {"transpose": jnp.transpose, "reshape": jnp.reshape, "rev": jax.lax.rev}
_UNDO: dict[str, Any] = {
    "transpose": lambda x, permutation, _: jnp.transpose(x, inverse(permutation)),
    "reshape": lambda x, _, shape: x.reshape(shape),
    "rev": lambda x, axes, _: jax.lax.rev(x, axes),
}
