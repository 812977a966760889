"""Compressed weights as values that stand where arrays stood.

A compressed model is the parameter tree it was, with some arrays replaced by leaves: `Quantized` (integers and a
scale), `Codebook` (indices of a few shared values), `Sparse` (a bit mask and the kept values) or `LowRank` (two thin
factors). `compressed(model)` runs on such a tree, `dense(tree)` turns it back into arrays, and `nbytes(tree)` counts
what it stores.
"""

from jaxcompress.arrays import (  # noqa: F401 (they register rules)
    _codebook_rules,
    _control,
    _loops,
    _low_rank_rules,
    _quantized_conv,
    _quantized_rules,
    _quantized_shapes,
    _quantized_updates,
    _sparse_rules,
)
from jaxcompress.arrays._codebook import Codebook
from jaxcompress.arrays._compressed import compressed
from jaxcompress.arrays._inputs import quantize_input
from jaxcompress.arrays._leaf import Leaf, MadeDenseError, Otherwise, dense, is_leaf, nbytes, register, watch
from jaxcompress.arrays._low_rank import LowRank
from jaxcompress.arrays._moved import put_off_transposes
from jaxcompress.arrays._products import Dims, register_product
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._sparse import Sparse
from jaxcompress.arrays._stacks import take_parts

__all__ = [
    "Codebook",
    "Dims",
    "Leaf",
    "LowRank",
    "MadeDenseError",
    "Otherwise",
    "Quantized",
    "Sparse",
    "compressed",
    "dense",
    "is_leaf",
    "nbytes",
    "put_off_transposes",
    "quantize_input",
    "register",
    "register_product",
    "take_parts",
    "watch",
]
