"""Singular value decompositions of weights, plain and weighed by what meets them."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxcompress._numbers import integers, real, whole
from jaxcompress.arrays import LowRank
from jaxcompress.calibrate import InputStatistics

_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Svd:
    """How a weight is seen as a matrix, and the rank it gets; of `rank`, `energy` and `ratio` at most one.

    Attributes:
      rank: so many singular values are kept.
      energy: the least rank that keeps this share of the sum of squared singular values: `1 - energy` is what is lost
        of `|W|^2`, or of the squared outputs where inputs were measured.
      ratio: the largest rank whose factors have at most this share of the weight's parameters; at least 1.
      rows: the weight's axes that are the matrix's rows; the others are its columns. By default all but the last one:
        inputs against outputs of Linen's and NNX's `Dense`, `Conv` and the output of attention. `(0,)` suits kernels
        `[inputs, heads, size]`; `(0, 2)` of a kernel `[height, width, in, out]` makes a vertical and a horizontal one.
      stacked: how many leading axes stack weights, as `nn.scan` does; `rows` counts them too. All weights of a stack
        get one rank, the largest that one of them asks for.
      round_to: the rank is a multiple of it: rounded up, but for `ratio`, which is not exceeded unless nothing is left.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    rows: tuple[int, ...] | None = None
    stacked: int = 0
    round_to: int = 1

    def __post_init__(self) -> None:
        for name in ("rank", "stacked", "round_to"):
            if name != "rank" or self.rank is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name)))
        if self.rows is not None:
            object.__setattr__(self, "rows", integers("rows", self.rows))
        if sum(x is not None for x in (self.rank, self.energy, self.ratio)) > 1:
            raise ValueError(f"give one of rank, energy and ratio, got {self}")
        if (self.rank is not None and self.rank < 1) or self.round_to < 1 or self.stacked < 0:
            raise ValueError(f"rank and round_to are at least 1, stacked at least 0, got {self}")
        if not all(x is None or 0 < real("a share", x) <= 1 for x in (self.energy, self.ratio)):
            raise ValueError(f"energy and ratio are shares, above 0 and at most 1, got {self}")

    def rank_of(self, spectrum: "Spectrum") -> int:
        """The rank that a weight of these singular values gets; that of the whole matrix at most."""
        values = spectrum.values
        if self.rank is not None:
            rank = self.rank
        elif self.ratio is not None:
            rank = max(1, math.floor(self.ratio * spectrum.size / spectrum.each / self.round_to) * self.round_to)
        elif self.energy is not None:
            if isinstance(values, jax.core.Tracer):
                raise TypeError("the rank depends on the singular values: convert outside jit, or give rank or ratio")
            squares = np.asarray(values, np.float64) ** 2
            lost = np.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]  # by each rank: the sum from there on
            enough = lost <= (1 - self.energy) * lost[..., :1]
            rank = max(1, int(np.max(np.where(enough.any(-1), enough.argmax(-1), values.shape[-1]), initial=1)))
        else:
            raise ValueError("no rank: give Svd one of rank, energy and ratio, or let factorize.ranks choose")
        return min(values.shape[-1], -(-rank // self.round_to) * self.round_to)


class Spectrum(NamedTuple):
    """A weight taken apart: `basis @ diag(values) @ right` for each of a stack, and what ranks cost."""

    basis: Float[Array, "stack rows k"]
    values: Float[Array, "stack k"]
    """Descending."""
    right: Float[Array, "stack k columns"]
    order: tuple[int, ...]
    """The weight's axes that are the rows, in their order."""

    @property
    def each(self) -> int:
        """The parameters that one more rank costs a weight of the stack."""
        return self.basis.shape[1] + self.right.shape[2]

    @property
    def size(self) -> int:
        """The parameters of one weight of the stack."""
        return self.basis.shape[1] * self.right.shape[2]

    @property
    def too_much(self) -> int:
        """The least rank that saves no parameters."""
        return -(-self.size // self.each)


def svd(
    weight: Float[Array, "*shape"], spec: Svd, inputs: InputStatistics | None = None, *, damping: float = 1e-4
) -> LowRank:
    """The weight as two factors of `spec`'s rank, whatever that saves; the best approximation there is.

    `left = U sqrt(S)` and `right = sqrt(S) V^T` of the largest singular values. No matrix of that rank is nearer to the
    weight: the squared distance is the sum of the squared singular values that are dropped (Eckart & Young 1936).

    With the inputs' Gram matrix `G = sum of x x^T = C C^T` what is least is the squared change of the outputs,
    `sum |x W - x W'|^2 = |C^T (W - W')|^2`: the decomposition is that of `C^T W`, and `left = C^-T U sqrt(S)` (Wang et
    al. 2025, "SVD-LLM", section 3.1). `C` is the symmetric root, which exists also where inputs are dependent.

    Args:
      weight: of at least two axes behind the stacked ones.
      spec: which axes are rows, and the rank.
      inputs: of the weight (`calibrate.input_statistics`), with Gram matrices. What it sums over must be the rows, or
        the columns.
      damping: added to the Gram matrix's diagonal, relative to its mean.

    Raises:
      TypeError: the weight isn't a real floating-point array, or is traced where the rank depends on its values.
      ValueError: non-finite weights, axes that don't exist, a rank above the matrix's, no rank at all, or statistics
        that don't fit.
    """
    found = spectrum(weight, spec, inputs, damping=damping)
    if spec.rank is not None and spec.rank > found.values.shape[-1]:
        raise ValueError(f"rank {spec.rank} of a matrix that has {found.values.shape[-1]} singular values")
    return truncated(weight, found, spec.rank_of(found), spec.stacked)


def truncated(weight: Array, found: Spectrum, rank: int, stacked: int) -> LowRank:
    """The leaf of the largest singular values."""
    root = jnp.sqrt(found.values[:, :rank])
    stack = weight.shape[:stacked]
    rest = [axis for axis in range(stacked, weight.ndim) if axis not in found.order]
    left = (found.basis[..., :rank] * root[:, None]).reshape(*stack, *(weight.shape[a] for a in found.order), rank)
    right = (root[..., None] * found.right[:, :rank]).reshape(*stack, rank, *(weight.shape[a] for a in rest))
    return LowRank.from_factors(
        left.astype(weight.dtype), right.astype(weight.dtype), left_axes=found.order, stacked=stacked
    )


def spectrum(weight: Any, spec: Svd, inputs: InputStatistics | None = None, *, damping: float = 1e-4) -> Spectrum:
    """The singular values and vectors of a weight, or, with inputs, of its outputs; in float32."""
    weight = _checked(weight)
    ndim, stacked = weight.ndim, spec.stacked
    rows = tuple(range(stacked, ndim - 1)) if spec.rows is None else tuple(spec.rows)
    own = tuple(axis % ndim for axis in rows if -ndim <= axis < ndim)
    if not own or len(set(own)) < len(rows) or min(own) < stacked or len(own) > ndim - stacked - 1:
        raise ValueError(
            f"a weight of shape {weight.shape} with {stacked} stacked axes can't have the rows {rows}: want some of "
            f"its other axes, and some left for columns"
        )
    columns = tuple(axis for axis in range(stacked, ndim) if axis not in own)
    if inputs is not None:
        met = _met(inputs, stacked, ndim)
        if met is not None and set(met) == set(columns):
            columns = tuple(sorted(own))
        elif met is None or set(met) != set(own):
            raise ValueError(
                f"the inputs that were measured meet axes {met} of the weight, and the rows are {own}: give Svd the "
                f"axes that the inputs meet as rows (and stacked=1 where scan slices the weight), or leave this "
                f"weight's statistics out"
            )
        own = met
    shape = [math.prod(weight.shape[axis] for axis in axes) for axes in (range(stacked), own, columns)]
    matrix = jnp.transpose(weight, (*range(stacked), *own, *columns)).reshape(shape).astype(jnp.float32)
    if inputs is None:
        basis, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        return Spectrum(basis, values, right, own)
    root, inverse = _roots(inputs.gram, damping)
    basis, values, right = jnp.linalg.svd(jnp.matmul(root, matrix, precision=_HIGHEST), full_matrices=False)
    return Spectrum(jnp.matmul(inverse, basis, precision=_HIGHEST), values, right, own)


def _roots(gram: Float[Array, "stack n n"] | None, damping: float) -> tuple[Array, Array]:
    """The symmetric root of each damped Gram matrix, and its inverse."""
    if gram is None:
        raise ValueError("a decomposition takes the inputs' Gram matrices: measure them with gram=True")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be positive, got {damping}")
    mean = jnp.mean(jnp.diagonal(gram, axis1=1, axis2=2), axis=1)[:, None]
    mean = jnp.where(mean > 0, mean, 1.0)
    values, vectors = jnp.linalg.eigh(gram / mean[..., None])
    values = jnp.sqrt((jnp.maximum(values, 0.0) + damping) * mean)

    def times(scale: Array) -> Array:
        return jnp.einsum("snk,sk,smk->snm", vectors, scale, vectors, precision=_HIGHEST)

    return times(values), times(1 / values)


def _met(inputs: InputStatistics, stacked: int, ndim: int) -> tuple[int, ...] | None:
    """The weight's axes that its inputs meet, in the order of the Gram matrix; `None` if they are no such axes."""
    layout = inputs.layout
    found = layout.own_axes(layout.inputs)
    stack = layout.own_axes((*range(layout.stack), *layout.batch))
    if None in found or layout.groups > 1 or len(layout.shape) != ndim or stack != tuple(range(stacked)):
        return None
    return tuple(axis for axis in found if axis is not None)


def _checked(weight: Any) -> Array:
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"factorize takes a real floating-point weight, got {weight.dtype}{list(weight.shape)}")
    if not weight.size:
        raise ValueError(f"a weight of shape {weight.shape} has nothing to factorize")
    if not isinstance(weight, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(weight))):
        raise ValueError(f"weight of shape {weight.shape} has non-finite values; no singular values exist")
    return weight
