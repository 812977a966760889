"""From float weights to integers: fake quantization while training, and conversion after.

A grid is an `Affine` (bits, which axes have scales of their own, symmetric or not). `fake(apply, rules)` trains under
the grids that `rules` give to parameters by path; `convert(params, rules)` then makes the `Quantized` leaves that
`jaxcompress.compressed` runs.
"""

from jaxcompress.quantize._affine import Affine, fake_quantize, quantize
from jaxcompress.quantize._convert import convert
from jaxcompress.quantize._fake import FakeQuantized, fake, fake_quantize_input

__all__ = ["Affine", "FakeQuantized", "convert", "fake", "fake_quantize", "fake_quantize_input", "quantize"]
