"""Compressed weights as values that stand where arrays stood."""

from jaxcompress.arrays._leaf import Leaf, dense, is_leaf, nbytes

__all__ = ["Leaf", "dense", "is_leaf", "nbytes"]
