"""Patterns: which weights can be pruned together, and how many of them.

A pattern sees a layer as units (single weights, blocks, whole filters). It gives each unit a score, says how many units
the final sparsity prunes, and turns pruned units into the mask of the layer's weights.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Shape = tuple[int, ...]


@runtime_checkable
class Pattern(Protocol):
    """What `sparsify` asks of a pattern; any hashable object that answers serves."""

    @property
    def stack(self) -> int:
        """Leading axes that index layers, each pruned on its own: 1 for the weights of a scanned layer."""

    def check(self, shape: Shape) -> None:
        """Raises ValueError, saying why, if weights of `shape` can't be pruned so."""

    def units(self, shape: Shape) -> int:
        """How many units a layer of `shape` has (of one layer of the stack)."""

    def budget(self, shape: Shape) -> int:
        """How many of the units the final sparsity prunes."""

    def pool(self, scores: jax.Array) -> jax.Array:
        """The units' scores from the weights', lowest pruned first; NaN for a unit that must stay."""

    def keep(self, pruned: jax.Array, shape: Shape) -> jax.Array:
        """The mask of weights of `shape`, True where a weight is kept, from the pruned units."""


@dataclass(frozen=True)
class Unstructured:
    """Single weights, anywhere in the layer.

    Attributes:
      sparsity: the part of the layer's weights that is pruned in the end, in [0, 1). The number pruned is
        `sparsity * size`, rounded.
      stack: leading axes that index layers (1 for a weight of `nn.scan`): each layer gets the sparsity on its own.
    """

    sparsity: float
    stack: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.stack < 0:
            raise ValueError(f"stack must be 0 or more leading axes, got {self.stack}")

    def check(self, shape: Shape) -> None:
        """Raises ValueError if there are fewer axes than `stack`."""
        if len(shape) < self.stack:
            raise ValueError(f"stack={self.stack} leading axes index layers, but the shape is {shape}")

    def units(self, shape: Shape) -> int:
        """The weights of one layer."""
        return math.prod(shape[self.stack :])

    def budget(self, shape: Shape) -> int:
        """`sparsity * size`, rounded."""
        return math.floor(self.sparsity * self.units(shape) + 0.5)

    def pool(self, scores: jax.Array) -> jax.Array:
        """Each weight is a unit."""
        return scores

    def keep(self, pruned: jax.Array, shape: Shape) -> jax.Array:
        """Each weight is a unit."""
        return ~pruned


@dataclass(frozen=True)
class NM:
    """`n` of every `m` consecutive weights along an axis are kept: the `n` of highest score.

    `NM(2, 4)` is the 2:4 pattern that sparse matrix units multiply (Mishra et al. 2021, "Accelerating Sparse Deep
    Neural Networks"); they want it along the axis that is summed over, which is the default here: inputs of a Flax
    `Dense` kernel [inputs, outputs] and of a `Conv` kernel [height, width, inputs, outputs].

    While a schedule ramps, of the weights that `n:m` would prune only the lowest-scored are, as many as the schedule
    asks: so a ramp has every sparsity between 0 and `1 - n / m`, not only a few steps, and its end is exactly `n:m`.

    Attributes:
      n: weights kept in a group, at least 1.
      m: weights in a group.
      axis: along which groups are formed.
      pad: allow an axis that `m` does not divide: the last group counts as filled up with zeros, so of its `q` real
        weights `min(n, q)` are kept.
    """

    n: int
    m: int
    axis: int = -2
    pad: bool = False

    stack = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"n:m keeps n of m weights, 1 <= n <= m, got {self.n}:{self.m}")

    def check(self, shape: Shape) -> None:
        """Raises ValueError if there is no such axis, or `m` does not divide it and `pad` is off."""
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"{self.n}:{self.m} along axis {self.axis}, but the shape {shape} has no such axis")
        if shape[self.axis] % self.m and not self.pad:
            raise ValueError(
                f"{self.n}:{self.m} along axis {self.axis} of shape {shape}: {self.m} does not divide "
                f"{shape[self.axis]}; choose another axis or pattern, or NM({self.n}, {self.m}, axis={self.axis}, "
                f"pad=True) to fill up the last group with zeros"
            )

    def units(self, shape: Shape) -> int:
        """Each weight is a unit."""
        return math.prod(shape)

    def budget(self, shape: Shape) -> int:
        """`m - n` of every group; of a last group of `q`, `q - n` or none."""
        groups, rest = divmod(shape[self.axis], self.m)
        a_line = groups * (self.m - self.n) + max(0, rest - self.n)
        return a_line * (math.prod(shape) // max(1, shape[self.axis]))

    def pool(self, scores: jax.Array) -> jax.Array:
        """The scores of the `m - n` lowest of each group; NaN for the rest, which stay."""
        axis, length = self.axis % scores.ndim, scores.shape[self.axis]
        fill = -length % self.m
        padding = [(0, fill if a == axis else 0) for a in range(scores.ndim)]
        known = jnp.where(jnp.isnan(scores), jnp.inf, scores)
        padded = jnp.pad(known, padding, constant_values=-jnp.inf)
        groups = padded.reshape(*scores.shape[:axis], -1, self.m, *scores.shape[axis + 1 :])
        order = np.arange(length + fill).reshape(-1, self.m)
        order = np.where(order < length, order, -1)  # filled-up places go before real ones
        order = order.reshape(*order.shape, *[1] * (scores.ndim - axis - 1))
        rank = jnp.zeros(groups.shape, jnp.uint16)
        for j in range(self.m):  # m comparisons a weight: cheaper than a sort for the m of this pattern
            other = lax.slice_in_dim(groups, j, j + 1, axis=axis + 1)
            rank += ((other < groups) | ((other == groups) & (order[:, j : j + 1] < order))).astype(rank.dtype)
        chosen = (rank < self.m - self.n).reshape(padded.shape)
        return jnp.where(lax.slice_in_dim(chosen, 0, length, axis=axis), scores, jnp.nan)

    def keep(self, pruned: jax.Array, shape: Shape) -> jax.Array:
        """Each weight is a unit."""
        return ~pruned


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError unless `sparsity` is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the part of weights pruned, in [0, 1), got {sparsity}")
