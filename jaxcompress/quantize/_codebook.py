"""Weights that share values: k-means codebooks, and weights of two or three values."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
        if not 2 <= self.centroids <= 256:
            raise ValueError(f"a codebook has 2 to 256 centroids, got {self.centroids}")
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

    Attributes:
      axes: the axes along which each index has a magnitude of its own; the default is per output channel.
      scaled: False takes the magnitude 1 (Courbariaux et al. 2015, BinaryConnect).
    """

    axes: tuple[int, ...] = (-1,)
    scaled: bool = True

    def convert(self, weight: jax.Array) -> Codebook:
        """The weight's signs (zero counts as positive), with one magnitude a block. Runs on the host."""

        def signs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scale = np.abs(values, dtype=np.float64).mean() if self.scaled else 1.0
            return np.array([-scale, scale], np.float32), (values >= 0).astype(np.uint8)

        return _by_block(weight, self.axes, signs, False)


@dataclasses.dataclass(frozen=True)
class Ternary:
    """Three values, two bits a weight: zero below a threshold, and the mean of what is above it.

    Li & Liu 2016, "Ternary Weight Networks": the threshold `0.7 mean|w|`, one magnitude for both signs. With `signed`
    each sign has its own, which training moves (Zhu et al. 2017, "Trained Ternary Quantization").

    Attributes:
      threshold: in units of the mean magnitude.
      axes: the axes along which each index has values of its own; `()` is one pair for the layer, as in the papers.
      signed: whether the two magnitudes differ.
    """

    threshold: float = 0.7
    axes: tuple[int, ...] = ()
    signed: bool = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"the threshold is positive, in units of the mean magnitude, got {self.threshold}")

    def convert(self, weight: jax.Array) -> Codebook:
        """The weight on its three values; zero is index 0 and stays zero. Runs on the host."""

        def thirds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            level = self.threshold * np.abs(values, dtype=np.float64).mean()
            above, below = values > level, values < -level
            high, low = (_mean(np.abs(values[which])) for which in (above, below))
            if not self.signed:
                high = low = _mean(np.abs(values[above | below]))
            return np.array([0, high, -low], np.float32), np.where(above, 1, np.where(below, 2, 0)).astype(np.uint8)

        return _by_block(weight, self.axes, thirds, True)


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else 0.0


def _by_block(weight: Any, axes: tuple[int, ...], cluster: Any, keep_zeros: bool) -> Codebook:
    """`cluster(values [n]) -> (centroids [k], indices [n])` of each block of the weight, put together."""
    dtype = check_float(weight).dtype
    if isinstance(weight, jax.core.Tracer):
        raise TypeError("codebooks are made on the host: convert outside jit, of concrete weights")
    values = np.asarray(weight, np.float32)
    if not all(-values.ndim <= axis < values.ndim for axis in axes):
        raise ValueError(f"axes {axes} do not exist in a weight of {values.ndim} axes")
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
