"""Weights that share values: k-means codebooks, and weights of two or three values."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._numbers import integers, real, whole
from jaxcompress.arrays import Codebook
from jaxcompress.quantize._affine import check_float
from jaxcompress.quantize._kmeans import STARTS, assigned, binned, lloyd, optimal, start


@dataclasses.dataclass(frozen=True)
class KMeans:
    """A codebook of at most `centroids` values, those of least squared error (Han et al. 2016, "Deep Compression").

        small = quantize.convert(params, {"kernel$": quantize.KMeans(16)})
        shared, rest = equinox.partition(small, equinox.is_inexact_array)  # to train the centroids

    Attributes:
      centroids: 2 to 256; 1, 2, 4 or 8 bits a weight are stored.
      axes: the axes along which each index has a codebook of its own; `()` is one for the layer, `(-1,)` one an output
        channel, `(0,)` one a layer of a stack that `nn.scan` slices.
      start: `"optimal"` solves for the least squared error (exactly, on 4,096 bins of the weights); `"linear"`,
        `"density"` and `"forgy"` begin there (the paper's three) and run Lloyd's iterations, to a local optimum.
      iterations: at most so many of Lloyd's; 0 leaves the centroids where they begin.
      keep_zeros: zeros, as pruning leaves them, are one of the centroids, and stay zero while centroids are trained.
      seed: of `"forgy"`.
    """

    centroids: int = 16
    axes: tuple[int, ...] = ()
    start: str = "optimal"
    iterations: int = 50
    keep_zeros: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", integers("axes", self.axes))
        if self.centroids not in range(2, 257):
            raise ValueError(f"a codebook has 2 to 256 centroids, got {self.centroids}")
        for name in ("centroids", "iterations", "seed"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if self.start not in STARTS or self.iterations < 0:
            raise ValueError(
                f"start is one of {STARTS} and iterations not negative, got {self.start!r}, {self.iterations}"
            )

    def convert(self, weight: jax.Array) -> Codebook:
        """The weight with each entry replaced by its nearest centroid. Runs on the host, on concrete weights."""
        rng = np.random.default_rng(self.seed)

        def cluster(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            kept = values[values != 0] if self.keep_zeros else values
            k = self.centroids - self.keep_zeros
            found = self._centroids(kept, k, rng) if kept.size else np.zeros(k, np.float32)
            indices = assigned(values, found)
            if self.keep_zeros:
                indices = np.where(values == 0, 0, indices + 1).astype(np.uint8)
                found = np.concatenate([np.zeros(1, np.float32), found])
            return found, indices

        return _by_block(weight, self.axes, cluster, self.keep_zeros)

    def _centroids(self, values: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
        bins = binned(values)
        if self.start == "optimal":
            found = optimal(bins, k)
        else:
            found = lloyd(bins, start(bins, k, self.start, rng), self.iterations)
        return np.sort(found).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Binary:
    """Two values, a bit a weight: the sign, times the mean magnitude (Rastegari et al. 2016, XNOR-Net, equation 6).

    `fake` trains under it: the forward pass has the two values, and gradients reach the float weights as they are.

    Attributes:
      axes: the axes along which each index has a magnitude of its own; the default is per output channel.
      scaled: False takes the magnitude 1 (Courbariaux et al. 2015, BinaryConnect).
    """

    axes: tuple[int, ...] = (-1,)
    scaled: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", integers("axes", self.axes))

    def convert(self, weight: jax.Array) -> Codebook:
        """The weight's signs (zero counts as positive), with one magnitude a block."""
        weight = check_float(weight)
        scale = _block_mean(jnp.abs(_wide(weight)), jnp.ones(weight.shape, bool), self.axes)
        scale = scale if self.scaled else jnp.ones_like(scale)
        centroids = jnp.stack([-scale, scale], axis=-1).astype(weight.dtype)
        return Codebook.from_indices((weight >= 0).astype(jnp.uint8), centroids)


@dataclasses.dataclass(frozen=True)
class Ternary:
    """Three values, two bits a weight: zero below a threshold, and the mean of what is above it.

    Li & Liu 2016, "Ternary Weight Networks": the threshold `0.7 mean|w|`, one magnitude for both signs. With `signed`
    each sign has its own. `fake` trains under it, as under `Binary`; `learn` trains the two magnitudes with the weights
    (Zhu et al. 2017, "Trained Ternary Quantization").

    Attributes:
      threshold: in units of the mean magnitude.
      axes: the axes along which each index has values of its own; `()` is one pair for the layer, as in the papers.
      signed: whether the two magnitudes differ.
    """

    threshold: float = 0.7
    axes: tuple[int, ...] = ()
    signed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", integers("axes", self.axes))
        if not 0 < real("threshold", self.threshold) < math.inf:
            raise ValueError(f"the threshold is positive, in units of the mean magnitude, got {self.threshold}")

    def convert(self, weight: jax.Array) -> Codebook:
        """The weight on its three values; zero is index 0 and stays zero."""
        weight = check_float(weight)
        wide = _wide(weight)
        size = jnp.abs(wide)
        level = self.threshold * _block_mean(size, jnp.ones(weight.shape, bool), self.axes)
        above, below = wide > level, wide < -level
        sides = (above, below) if self.signed else (above | below, above | below)
        high, low = (_block_mean(size, side, self.axes) for side in sides)
        centroids = jnp.stack([jnp.zeros_like(high), high, -low], axis=-1).astype(weight.dtype)
        return Codebook.from_indices(jnp.where(above, 1, jnp.where(below, 2, 0)), centroids, keep_zeros=True)


def _wide(weight: jax.Array) -> jax.Array:
    """The weight; of floats of one byte, which JAX promotes to no other dtype, in float32."""
    return weight.astype(jnp.float32) if weight.dtype.itemsize == 1 else weight


def _block_mean(x: jax.Array, where: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean of the chosen entries of each block, float32, 1 along all other axes; 0 where none is chosen.

    Huge numbers are scaled down first, for their sum is not finite; by a power of two, for XLA multiplies with the
    reciprocal of what it divides by, and that of the largest floats is zero.
    """
    _check_axes(axes, x.ndim)
    over = tuple(axis for axis in range(x.ndim) if axis not in {own % x.ndim for own in axes})
    largest = jnp.max(x, axis=over, keepdims=True).astype(jnp.float32)
    down = jnp.where(largest > 1e18, 2.0**-64, 1.0)
    total = jnp.sum(jnp.where(where, x * down, 0.0), axis=over, keepdims=True)
    mean = total / jnp.maximum(jnp.sum(where, axis=over, keepdims=True), 1)
    return jnp.minimum(mean, largest * down) / down  # no rounding takes the mean beyond the largest


def _check_axes(axes: tuple[int, ...], ndim: int) -> None:
    if not all(-ndim <= axis < ndim for axis in axes):
        raise ValueError(f"axes {axes} do not exist in a weight of {ndim} axes")


def _by_block(weight: Any, axes: tuple[int, ...], cluster: Any, keep_zeros: bool) -> Codebook:
    """`cluster(values [n]) -> (centroids [k], indices [n])` of each block of the weight, put together."""
    dtype = check_float(weight).dtype
    if isinstance(weight, jax.core.Tracer):
        raise TypeError(
            "codebooks are made on the host: convert concrete weights, outside of jit and `fake`, and train the values"
        )
    values = np.asarray(weight, np.float32)
    _check_axes(axes, values.ndim)
    own = sorted({axis % values.ndim for axis in axes})
    shared = [axis for axis in range(values.ndim) if axis not in own]
    moved = np.transpose(values, (*own, *shared))
    sizes = [values.shape[axis] for axis in own]
    blocks = [cluster(block) for block in moved.reshape(int(np.prod(sizes, dtype=int)), -1)]
    indices = np.stack([indices for _, indices in blocks]).reshape(moved.shape)
    centroids = np.stack([centroids for centroids, _ in blocks])
    laid = centroids.reshape([values.shape[axis] if axis in own else 1 for axis in range(values.ndim)] + [-1])
    back = np.transpose(indices, np.argsort((*own, *shared)))
    return Codebook.from_indices(jnp.asarray(back), jnp.asarray(laid, dtype), keep_zeros=keep_zeros)
