"""From trained float weights to integers."""

from typing import Any, Protocol

from jaxtyping import Array

from jaxcompress.arrays import Leaf, is_leaf
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
