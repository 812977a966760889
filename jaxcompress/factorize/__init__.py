"""Weights as products of two thin factors: fewer numbers, and fewer multiplications, on the hardware as it is.

`convert(params, rules)` puts `LowRank` leaves where weights stood, by singular value decompositions, and
`jaxcompress.compressed` runs the model on them. An `Svd` says how a weight is seen as a matrix and which rank it gets:
a number, the share of the energy to keep, or the share of the parameters to spend. `ranks` chooses the ranks of
many layers under one budget. With the statistics of a weight's inputs (`calibrate.input_statistics`) both measure the
error where it counts, in what the layer gives. `svd` is the decomposition of one weight.

The factors are parameters: train them as they are. `convert_factors` makes compressed leaves of them afterwards.
"""

from jaxcompress.factorize._convert import FactorScheme, convert, convert_factors
from jaxcompress.factorize._ranks import ranks
from jaxcompress.factorize._svd import Svd, svd

__all__ = ["FactorScheme", "Svd", "convert", "convert_factors", "ranks", "svd"]
