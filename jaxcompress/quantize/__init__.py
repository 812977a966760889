"""From float weights to integers: fake quantization while training, and conversion after.

A grid is an `Affine` (bits, which axes have scales of their own, symmetric or not). `fake(apply, rules)` trains under
the grids that `rules` give to parameters by path; `convert(params, rules)` then makes the `Quantized` leaves that
`jaxcompress.compressed` runs. `gptq(fn, params, batches, rules)` makes them of a model that was not trained for it,
from calibration batches. Where values need not be evenly spaced, `KMeans`, `Binary` and `Ternary` make `Codebook`
leaves instead, whose few centroids can be trained on.

Inputs of a weight are quantized too where its grid says so: with steps found as they come, with steps of calibrated
ranges (`input_ranges`, then `static` or `fake`), or with steps that are learned (`learn`, then `settle`).
"""

from jaxcompress.quantize._affine import Affine, fake_quantize, quantize
from jaxcompress.quantize._awq import awq
from jaxcompress.quantize._codebook import Binary, KMeans, Ternary
from jaxcompress.quantize._convert import Scheme, convert
from jaxcompress.quantize._fake import FakeQuantized, fake, fake_quantize_input
from jaxcompress.quantize._gptq import gptq
from jaxcompress.quantize._learned import Learned, learn, settle
from jaxcompress.quantize._ranges import Entropy, LeastSquares, MinMax, Percentile, Range, input_ranges
from jaxcompress.quantize._static import static

__all__ = [
    "Affine",
    "Binary",
    "Entropy",
    "FakeQuantized",
    "KMeans",
    "Learned",
    "LeastSquares",
    "MinMax",
    "Percentile",
    "Range",
    "Scheme",
    "Ternary",
    "awq",
    "convert",
    "fake",
    "fake_quantize",
    "fake_quantize_input",
    "gptq",
    "input_ranges",
    "learn",
    "quantize",
    "settle",
    "static",
]
