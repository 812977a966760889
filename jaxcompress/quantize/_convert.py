"""From trained float weights to integers."""

from typing import Any, Protocol

from jaxtyping import Array

from jaxcompress.arrays import Leaf, Quantized, is_leaf
from jaxcompress.paths import Rules, match, named_leaves, with_leaves


class Scheme(Protocol):
    """How a weight is quantized: `Affine`, `KMeans`, `Binary`, `Ternary`, or anything that converts."""

    def convert(self, weight: Array) -> Leaf:
        """The compressed leaf that stands for the weight."""


def convert(params: Any, rules: Rules[Scheme | None]) -> Any:
    """`params` with the leaves that `rules` choose compressed; run the result with `jaxcompress.compressed`.

    With the `Affine` rules that `fake` was trained under, the integers are, layer by layer, those training rounded to.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: a weight that can't be quantized, named by its path. Nothing is converted then.
    """
    leaves = named_leaves(params, is_leaf)
    schemes = match(rules, [name for name, _ in leaves], default=None)
    converted = [
        leaf if scheme is None else converted_leaf(name, leaf, scheme)
        for (name, leaf), scheme in zip(leaves, schemes, strict=True)
    ]
    return with_leaves(params, converted, is_leaf)


def converted_leaf(name: str, weight: Array, scheme: Scheme) -> Leaf:
    """The weight as its scheme has it; what it raises names the weight."""
    try:
        if is_leaf(weight):
            raise TypeError(f"it is a {type(weight).__name__} already; convert float weights")
        return scheme.convert(weight)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot quantize {name!r}: {error}") from error


def outputs_first(params: Any, rules: Rules[bool]) -> Any:
    """`params` with the int8 codes of the chosen weights stored outputs first, for few rows of input on a CPU.

        small = quantize.convert(params, {"kernel$": quantize.Affine(bits=8)})
        small = quantize.outputs_first(small, {"Dense_.*/kernel$": True})

    Each number stays, and so does the shape `[inputs, outputs]`. Where the CPU has AVX-512 VNNI or AMX, up to 128 rows
    of floats are then multiplied as exact products of integers, as near to the true product as one in float32 (`python
    -m benchmarks quantize.outputs_first` has the times, and `quantize.weight_only` those of codes that were left as
    they are); inputs of 8 bits gain at any number of rows. On other platforms nothing changes. For matrices (stacked by
    `nn.scan` or not) that meet inputs; not for tables that are looked up, nor for convolutions.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError: a weight that has no int8 codes, named by its path. Nothing is changed then.
    """
    leaves = named_leaves(params, is_leaf)
    chosen = match(rules, [name for name, _ in leaves], default=False)

    def turned(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            raise ValueError(f"{name!r} is no quantized weight: convert it first, or leave it out of the rules")
        try:
            return leaf.outputs_first()
        except ValueError as error:
            raise ValueError(f"cannot lay {name!r} out: {error}") from error

    turns = [turned(name, leaf) if turn else leaf for (name, leaf), turn in zip(leaves, chosen, strict=True)]
    return with_leaves(params, turns, is_leaf)
