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

from jaxcompress._numbers import real, whole

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
      scope: a name; layers of one scope are ranked together, and share what all of them are to lose ("global" pruning).
        `None` ranks each layer on its own.
    """

    sparsity: float
    stack: int = 0
    scope: str | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        object.__setattr__(self, "stack", whole("stack", self.stack))
        if not isinstance(self.scope, str | None):
            raise TypeError(f"scope is a name or None, got {self.scope!r}")
        if self.stack < 0:
            raise ValueError(f"stack must be 0 or more leading axes, got {self.stack}")
        if self.stack and self.scope is not None:
            raise ValueError("layers of a scope are ranked together, layers of a stack apart: give stack or scope")

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
class Below:
    """Single weights whose score is below a threshold: how many go, the weights decide.

    A ramping schedule raises the threshold from zero. Ties, and a weight at the threshold, stay.

    Attributes:
      threshold: a score, set by hand; with `deviations`, a number of the layer's standard deviations instead, as Han et
        al. 2015, "Learning both Weights and Connections", take it (pruned weights count, as the zeros that they are:
        of the kept ones alone the deviation would grow at every update, until nothing is left).
      deviations: see `threshold`.
    """

    threshold: float
    deviations: bool = False

    stack = 0

    def __post_init__(self) -> None:
        if not 0 < real("threshold", self.threshold) < math.inf:
            raise ValueError(f"a threshold is a positive number, got {self.threshold}")

    def check(self, shape: Shape) -> None:
        """Every shape will do."""

    def units(self, shape: Shape) -> int:
        """Each weight is a unit."""
        return math.prod(shape)

    def budget(self, shape: Shape) -> int:
        """None in advance: see `level`."""
        return 0

    def pool(self, scores: jax.Array) -> jax.Array:
        """Each weight is a unit."""
        return scores

    def level(self, weight: jax.Array) -> jax.Array:
        """The threshold in units of the scores; []."""
        if not self.deviations:
            return jnp.float32(self.threshold)
        return self.threshold * jnp.std(weight.astype(jnp.float32))

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
        for name in ("n", "m", "axis"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
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


@dataclass(frozen=True)
class Blocks:
    """Whole blocks: all weights of a block are kept, or none. `vectors`, `kernels` and `filters` make the usual ones.

    A block's score is the mean of its weights' scores (`norm="l1"`) or their root mean square (`"l2"`): of magnitudes,
    the order of the L1 or L2 norms (Li et al. 2017, "Pruning Filters for Efficient ConvNets"; Mao et al. 2017,
    "Exploring the Granularity of Sparsity in Convolutional Neural Networks").

    Attributes:
      sparsity: the part of the blocks that is pruned in the end, in [0, 1).
      shape: a block's length along each of the last axes; `None` is the whole axis. Axes further in front count as 1.
      pad: allow lengths that do not divide their axis: the last block is smaller, and counts as one block.
      norm: `"l1"` or `"l2"`.
    """

    sparsity: float
    shape: tuple[int | None, ...]
    pad: bool = False
    norm: str = "l1"

    stack = 0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        try:
            shape = tuple(None if n is None else whole("a length", n) for n in self.shape)
        except TypeError:
            raise TypeError(f"a block's shape is a tuple of lengths, integers or None, got {self.shape!r}") from None
        object.__setattr__(self, "shape", shape)
        if not self.shape or any(n is not None and n < 1 for n in self.shape):
            raise ValueError(f"a block has a length of 1 or more, or None, along each axis, got {self.shape}")
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"norm must be 'l1' or 'l2', got {self.norm!r}")

    def check(self, shape: Shape) -> None:
        """Raises ValueError if there are too few axes, or a length does not divide its axis and `pad` is off."""
        if len(shape) < len(self.shape):
            raise ValueError(f"blocks of {self.shape} need {len(self.shape)} axes, but the shape is {shape}")
        if not self.pad and any(n % size for n, size in zip(shape, self._sizes(shape), strict=True)):
            raise ValueError(
                f"blocks of {self.shape} do not divide the shape {shape}; choose another block, or pass pad=True to "
                f"allow smaller blocks at the end"
            )

    def units(self, shape: Shape) -> int:
        """The blocks of a layer."""
        return math.prod(-(-n // size) for n, size in zip(shape, self._sizes(shape), strict=True))

    def budget(self, shape: Shape) -> int:
        """`sparsity * blocks`, rounded."""
        return math.floor(self.sparsity * self.units(shape) + 0.5)

    def pool(self, scores: jax.Array) -> jax.Array:
        """The blocks' scores: an axis a weight's axis, as long as there are blocks along it."""
        if self.norm == "l2":
            return jnp.sqrt(self._mean(jnp.square(scores.astype(jnp.float32))))
        return self._mean(scores.astype(jnp.float32))

    def keep(self, pruned: jax.Array, shape: Shape) -> jax.Array:
        """Each block's entry, repeated over its weights."""
        kept = ~pruned
        for axis, (n, size) in enumerate(zip(shape, self._sizes(shape), strict=True)):
            if size > 1:
                blocks = kept.shape[axis]
                wide = jnp.broadcast_to(
                    jnp.expand_dims(kept, axis + 1), (*kept.shape[: axis + 1], size, *kept.shape[axis + 1 :])
                )
                kept = wide.reshape(*kept.shape[:axis], blocks * size, *kept.shape[axis + 1 :])
                kept = lax.slice_in_dim(kept, 0, n, axis=axis)
        return kept

    def _sizes(self, shape: Shape) -> Shape:
        """A block's length along every axis of a weight."""
        own = (1,) * (len(shape) - len(self.shape)) + self.shape
        return tuple(max(1, n) if size is None else size for n, size in zip(shape, own, strict=True))

    def _mean(self, x: jax.Array) -> jax.Array:
        for axis, (n, size) in enumerate(zip(x.shape, self._sizes(x.shape), strict=True)):
            if size == 1:
                continue
            fill = -n % size
            padded = jnp.pad(x, [(0, fill if a == axis else 0) for a in range(x.ndim)])
            split = padded.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
            real = np.full(split.shape[axis], size, np.float32)
            real[-1:] -= fill
            x = jnp.sum(split, axis=axis + 1) / real.reshape(-1, *[1] * (x.ndim - axis - 1))
        return x


def vectors(
    sparsity: float, length: int | None = None, axis: int = -1, *, pad: bool = False, norm: str = "l1"
) -> Blocks:
    """Blocks of `length` weights along `axis` (counted from the end; `None`: its whole length): rows, columns.

    `pad` and `norm` are those of `Blocks`.

    Raises:
      ValueError: an axis that is counted from the front, and as `Blocks`.
    """
    if whole("axis", axis) >= 0:
        raise ValueError(f"axis is counted from the end, -1 or less, got {axis}")
    return Blocks(sparsity, (length,) + (1,) * (-axis - 1), pad, norm)


def kernels(sparsity: float, *, norm: str = "l1") -> Blocks:
    """Whole two-dimensional kernels of convolutions [height, width, inputs, outputs]: one a pair of channels."""
    return Blocks(sparsity, (None, None, 1, 1), norm=norm)


def filters(sparsity: float, *, norm: str = "l1") -> Blocks:
    """Whole filters: all weights that lead to one output of a convolution [height, width, inputs, outputs]."""
    return Blocks(sparsity, (None, None, None, 1), norm=norm)


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError unless `sparsity` is in [0, 1)."""
    if not 0 <= real("sparsity", sparsity) < 1:
        raise ValueError(f"sparsity is the part of weights pruned, in [0, 1), got {sparsity}")
