"""Calibration: what a trained model's weights see, measured over a few batches of data.

One-shot methods (Wanda and SparseGPT in `prune`, GPTQ and AWQ in `quantize`) decide about a weight by the inputs that
meet it. `input_statistics(fn, params, batches, rules)` measures them for any JAX function: of each weight the Gram
matrix of its inputs, the sum of their squares, and the number of rows, with a `Layout` that says how the weight's array
is the matrices `[problems, inputs, outputs]` that such methods work on. Nothing is patched and nothing leaks: the sums
are the gradients of zeros that stand beside the weights during one call (`_observed.py` has the trick).

`InputObserver` does the same for methods that measure again after each change of a weight. The walk over a weight's
inputs that SparseGPT and GPTQ share (settle one, let the later ones make up for the error) is in `_compensate.py`.

`input_values` gives the range and the histogram of a weight's inputs, which are not sums of derivatives but values that
the weights name as they meet them (`_watched.py`).
"""

from jaxcompress.calibrate._layout import Layout
from jaxcompress.calibrate._ranges import InputValues, input_values
from jaxcompress.calibrate._statistics import InputObserver, InputStatistics, input_statistics

__all__ = [
    "InputObserver",
    "InputStatistics",
    "InputValues",
    "Layout",
    "input_statistics",
    "input_values",
]
