"""Packed files: how fast they are written and read, and how small they are.

The trees are those of the shared MLP (`_mlp.py`) with Gaussian weights: in float32; as int8 codes with a scale a
column; the same with nine codes of ten zero; as packed int4 codes. The peer is `numpy.savez_compressed` on the same
arrays: zlib at level 6, what one would use otherwise to make such a file smaller than its arrays.
"""

import io
import itertools
import pathlib
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _mlp as mlp
from benchmarks._harness import Figure, Figures, benchmark, exact, summary, time_pairs
from jaxcompress import pack
from jaxcompress.arrays import Quantized, nbytes

PEER = "numpy.savez_compressed (zlib level 6)"
MIN_SECONDS = 0.1  # of the peer's calls in a round


def codes_tree(bits: int, kept: float = 1.0, widths: tuple[int, ...] = mlp.WIDTHS) -> dict[str, Any]:
    """Quantized kernels of an MLP: Gaussian codes of three standard deviations a column, a share of them kept."""
    rng, largest, tree = np.random.default_rng(0), 2 ** (bits - 1) - 1, {}
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        codes = np.clip(np.round(rng.normal(size=(n, m)) * largest / 3), -largest, largest)
        codes = jnp.asarray(codes * (rng.uniform(size=(n, m)) < kept), jnp.int8)
        scale = jnp.asarray(rng.uniform(0.01, 0.02, (1, m)), jnp.float32)
        tree[f"Dense_{i}"] = {
            "kernel": Quantized.from_codes(codes, scale, bits=bits),
            "bias": jnp.asarray(rng.normal(size=m), jnp.float32),
        }
    return tree


TREES: dict[str, Callable[[], Any]] = {
    "float32": mlp.params,
    "int8": lambda: codes_tree(8),
    "int8_sparse": lambda: codes_tree(8, kept=0.1),
    "int4": lambda: codes_tree(4),
}


@benchmark("pack.rate")
def _rate(rounds: int) -> Figures:
    """MB/s (of the tree in memory) of pack.save and pack.load, each beside savez_compressed and its load."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pathlib.Path(folder) / "packed", pathlib.Path(folder) / "peer.npz"
        for name, make in TREES.items():
            tree = make()
            arrays = [np.asarray(x) for x in jax.tree.leaves(tree)]

            def save(tree: Any = tree) -> int:
                return pack.save(ours, tree)

            def peer_save(arrays: list[np.ndarray] = arrays) -> None:
                np.savez_compressed(theirs, *arrays)

            def peer_load() -> list[np.ndarray]:
                with np.load(theirs) as file:
                    return [file[key] for key in file.files]

            figures[f"save.{name}"] = _rates(save, peer_save, nbytes(tree), rounds)
            figures[f"load.{name}"] = _rates(lambda: pack.load(ours), peer_load, nbytes(tree), rounds)
    return figures


@benchmark("pack.size")
def _size(rounds: int) -> Figures:
    """The file's bytes over the order-0 entropy of its codes, and over the same bytes at zlib level 9."""
    del rounds  # a size does not vary
    trees = {name: make() for name, make in TREES.items() if name != "float32"}
    trees["small_int4"] = codes_tree(4, widths=(64, 48, 32, 10))  # 5,000 weights: tables and header count
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in trees.items():
            size, bound, peer = pack.save(f"{folder}/packed", tree), entropy_bytes(tree), zlib_bytes(tree)
            about = {"bytes": size, "in_memory_bytes": nbytes(tree)}
            figures[name] = exact(size / bound, "x", "order-0 entropy of the codes, other arrays as stored", **about)
            figures[f"{name}.zlib"] = exact(size / peer, "x", "zlib level 9 on the same bytes", **about)
    return figures


def entropy_bytes(tree: Any) -> float:
    """The bytes of the codes at their order-0 entropy, an array at a time, and of all other arrays as stored."""
    total = 0.0
    for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized)):
        total += nbytes(leaf)
        if isinstance(leaf, Quantized):
            _, counts = np.unique(np.asarray(leaf.codes()), return_counts=True)
            shares = counts / counts.sum()
            total += -(counts * np.log2(shares)).sum() / 8 - nbytes(leaf.values)
    return total


def zlib_bytes(tree: Any) -> int:
    """The bytes of the tree's arrays one after the other, at zlib level 9."""
    whole = io.BytesIO()
    for x in jax.tree.leaves(tree):
        whole.write(np.asarray(x).tobytes())
    return len(zlib.compress(whole.getvalue(), 9))


def _rates(ours: Callable[[], Any], theirs: Callable[[], Any], size: int, rounds: int) -> Figure:
    """The rate in MB/s with that of the peer, and their ratio with its interval, in the detail."""
    seconds, peer_seconds = time_pairs(ours, theirs, rounds, seconds=MIN_SECONDS)
    ratio = summary([b / a for a, b in zip(seconds, peer_seconds, strict=True)], "x", PEER)
    peer = summary([size / s / 1e6 for s in peer_seconds], "MB/s", PEER)
    return summary(
        [size / s / 1e6 for s in seconds],
        "MB/s",
        PEER,
        baseline_MB_s=peer.value,
        ratio=ratio.value,
        ratio_spread=[ratio.low, ratio.high],
        MB=size / 1e6,
    )
