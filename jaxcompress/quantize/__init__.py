"""From float weights to integers: fake quantization while training, and conversion after.

A grid is an `Affine` (bits, which axes have scales of their own, symmetric or not). `fake(apply, rules)` trains under
the grids that `rules` give to parameters by path; `convert(params, rules)` then makes the `Quantized` leaves that
`jaxcompress.compressed` runs. Where values need not be evenly spaced, `KMeans`, `Binary` and `Ternary` make `Codebook`
leaves instead, whose few centroids can be trained on; `Floats`, `NF4` and `MX` are the formats of hardware and papers.

A trained model is made easier to round by `fold` (batch norms into kernels), `equalize`, `smooth` and `awq` (scales
from one layer into the next: `pairs` finds which); `gptq` and `adaround` round it better than to nearest;
`correct_biases` makes up for what is left.

`layer_costs` says what each scheme costs each layer, and `allocate` chooses one a layer under a budget of bytes.

Inputs of a weight are quantized too where its grid says so: with steps found as they come, with steps of calibrated
ranges (`input_ranges`, then `static` or `fake`), or with steps that are learned (`learn`, then `settle`).
"""

from jaxcompress.quantize._adaround import adaround
from jaxcompress.quantize._affine import Affine, fake_quantize, quantize
from jaxcompress.quantize._allocate import LayerCost, allocate, chosen_rules, layer_costs
from jaxcompress.quantize._awq import awq
from jaxcompress.quantize._biases import correct_biases
from jaxcompress.quantize._codebook import Binary, KMeans, Ternary
from jaxcompress.quantize._convert import Scheme, as_int4, convert, outputs_first
from jaxcompress.quantize._equalize import equalize, smooth
from jaxcompress.quantize._fake import FakeQuantized, fake, fake_quantize_input
from jaxcompress.quantize._float_products import FloatProduct
from jaxcompress.quantize._fold import fold
from jaxcompress.quantize._formats import MX, NF4, Floats
from jaxcompress.quantize._gptq import gptq
from jaxcompress.quantize._learned import Learned, LearnedTernary, learn, settle
from jaxcompress.quantize._pairs import pairs
from jaxcompress.quantize._ranges import Entropy, LeastSquares, MinMax, Percentile, Range, input_ranges
from jaxcompress.quantize._static import static

__all__ = [
    "MX",
    "NF4",
    "Affine",
    "Binary",
    "Entropy",
    "FakeQuantized",
    "FloatProduct",
    "Floats",
    "KMeans",
    "LayerCost",
    "Learned",
    "LearnedTernary",
    "LeastSquares",
    "MinMax",
    "Percentile",
    "Range",
    "Scheme",
    "Ternary",
    "adaround",
    "allocate",
    "as_int4",
    "awq",
    "chosen_rules",
    "convert",
    "correct_biases",
    "equalize",
    "fake",
    "fake_quantize",
    "fake_quantize_input",
    "fold",
    "gptq",
    "input_ranges",
    "layer_costs",
    "learn",
    "outputs_first",
    "pairs",
    "quantize",
    "settle",
    "smooth",
    "static",
]
