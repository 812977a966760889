"""Static quantization: integers whose inputs' steps are known before the inputs come."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcompress.arrays import Quantized, is_leaf
from jaxcompress.paths import named_leaves, with_leaves
from jaxcompress.quantize._ranges import Range, check_ranges, steps_of


def static(params: Any, ranges: Mapping[str, Range]) -> Any:
    """`params` with ranges in the `Quantized` leaves whose inputs are quantized, so that none is sought as inputs come.

        ranges = quantize.input_ranges(model.apply, params, batches, rules)
        small = quantize.static(quantize.convert(params, rules), ranges)  # or of what gptq made

    Layer by layer and from the same inputs, the integers are those of `fake(fn, rules, ranges)`. But a NaN among the
    inputs becomes some integer, for a fixed step can't carry it; without ranges its row's results are NaN.

    Raises:
      ValueError: weights without a range, or ranges without a weight whose inputs are quantized.
    """
    leaves = named_leaves(params, is_leaf)
    chosen = [name for name, x in leaves if isinstance(x, Quantized) and x.activation_bits is not None]
    check_ranges(ranges, chosen)

    def with_steps(name: str, x: Any) -> Any:
        if name not in chosen:
            return x
        step, zero_point = steps_of(name, ranges[name], len(x.shape), x.activation_bits)
        return dataclasses.replace(x, input_scale=step, input_zero_point=zero_point)

    return with_leaves(params, [with_steps(name, x) for name, x in leaves], is_leaf)
