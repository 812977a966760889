"""Make trained JAX models smaller and faster.

A compressed model is the parameter tree it was, with some arrays replaced by compressed leaves; `compressed(model)`
runs on it. Rooms: `distill` (losses), `features` (values inside a model), `targets` (a teacher's outputs, kept),
`calibrate` (what weights meet), `prune` and `quantize` (optimizer and function transforms), `factorize` (weights as
thin factors), `pack` (files), `export` (programs), `train` (the sharded step and loop), `report` (what a model costs);
`linen` and `nnx` have Flax's wrappers.
"""

from jaxcompress.arrays import Codebook, LowRank, Quantized, Sparse, compressed, dense, nbytes

__all__ = ["Codebook", "LowRank", "Quantized", "Sparse", "compressed", "dense", "nbytes"]
__version__ = "0.1.0"
