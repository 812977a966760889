"""From trained float weights to integers."""

from typing import Any

import jax
from jaxtyping import Array

from jaxcompress.arrays import Quantized, is_leaf
from jaxcompress.paths import Rules, match, named_leaves
from jaxcompress.quantize._affine import Affine, quantize


def convert(params: Any, rules: Rules[Affine | None]) -> Any:
    """`params` with the leaves that `rules` choose as `Quantized`; run the result with `jaxcompress.compressed`.

    With the rules that `fake` was trained under, layer by layer the integers are those that training rounded to.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: a weight that can't be quantized, named by its path. Nothing is converted then.
    """
    leaves = named_leaves(params, is_leaf)
    specs = match(rules, [name for name, _ in leaves], default=None)
    converted = [
        leaf if spec is None else _named(name, leaf, spec) for (name, leaf), spec in zip(leaves, specs, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_leaf), converted)


def _named(name: str, weight: Array, spec: Affine) -> Quantized:
    try:
        if is_leaf(weight):
            raise TypeError(f"it is a {type(weight).__name__} already; convert float weights")
        return quantize(weight, spec)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot quantize {name!r}: {error}") from error
