"""From trained float weights to integers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jaxtyping import Array

from jaxcompress.arrays import Leaf, Quantized, is_leaf
from jaxcompress.paths import Rules, match, named_leaves, with_leaves
from jaxcompress.quantize._affine import Affine, quantize


class Scheme(Protocol):
    """How a weight is quantized: `Affine`, `KMeans`, `Binary`, `Ternary`, or anything that converts."""

    def convert(self, weight: Array) -> Leaf:
        """The compressed leaf that stands for the weight."""


def convert(params: Any, rules: Rules[Scheme | None], *, key: Array | None = None) -> Any:
    """`params` with the leaves that `rules` choose compressed; run the result with `jaxcompress.compressed`.

    With the `Affine` rules that `fake` was trained under, the integers are, layer by layer, those training rounded to.
    With a random `key` weights on `Affine` grids are rounded up or down at random, so that their mean is the weight
    (see `quantize`); all others as without.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: a weight that can't be quantized, named by its path. Nothing is converted then.
    """
    leaves = named_leaves(params, is_leaf)
    schemes = match(rules, [name for name, _ in leaves], default=None)
    if key is not None:
        schemes = [
            _Stochastic(scheme, jax.random.fold_in(key, i)) if isinstance(scheme, Affine) else scheme
            for i, scheme in enumerate(schemes)
        ]
    converted = [
        leaf if scheme is None else converted_leaf(name, leaf, scheme)
        for (name, leaf), scheme in zip(leaves, schemes, strict=True)
    ]
    return with_leaves(params, converted, is_leaf)


@dataclasses.dataclass(frozen=True)
class _Stochastic:
    grid: Affine
    key: Array

    def convert(self, weight: Array) -> Leaf:
        """Up with the probability of the fraction."""
        return quantize(weight, self.grid, key=self.key)


def converted_leaf(name: str, weight: Array, scheme: Scheme) -> Leaf:
    """The weight as its scheme has it; what it raises names the weight."""
    try:
        check_scheme(scheme)
        if is_leaf(weight):
            raise TypeError(f"it is a {type(weight).__name__} already; convert float weights")
        return scheme.convert(weight)
    except (TypeError, ValueError) as error:
        raise named(error, name) from error


def named(error: TypeError | ValueError, name: str) -> TypeError | ValueError:
    """The error with the weight's path; of a plain class, for some of JAX's take no message."""
    kind = ValueError if isinstance(error, ValueError) else TypeError
    return kind(f"cannot quantize {name!r}: {error}")


def check_scheme(scheme: Any) -> None:
    """Raises TypeError for what does not convert."""
    if isinstance(scheme, type) or not callable(getattr(scheme, "convert", None)):
        raise TypeError(f"want a scheme, such as Affine(8) or KMeans(16), or None for leaving it alone; got {scheme!r}")


def outputs_first(params: Any, rules: Rules[bool]) -> Any:
    """`params` with the int8 codes of the chosen weights stored outputs first, for few rows of input on a CPU.

        small = quantize.convert(params, {"kernel$": quantize.Affine(bits=8)})
        small = quantize.outputs_first(small, {"Dense_.*/kernel$": True})

    Each number stays, and so does the shape `[inputs, outputs]`. Where the CPU has AVX-512 VNNI or AMX, up to 128 rows
    of floats are then multiplied as exact products of integers, as near to the true product as one in float32 (`python
    -m benchmarks quantize.outputs_first` has the times, and `quantize.weight_only` those of codes that were left as
    they are); a few rows of 8 bits gain too. On other platforms nothing changes. For large matrices (stacked by
    `nn.scan` or not) that meet inputs; those that fit a cache gain little or nothing. Not for tables that are looked
    up, nor for convolutions.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError: a weight that has no int8 codes, named by its path. Nothing is changed then.
    """
    return _laid_out(params, rules, Quantized.outputs_first)


def as_int4(params: Any, rules: Rules[bool]) -> Any:
    """`params` with the chosen weights' codes of 4 bits as arrays of JAX's int4 (of 2 bits: int2), for a TPU.

        small = quantize.convert(params, {"kernel$": quantize.Affine(bits=4, group=(0, 128))})
        small = quantize.as_int4(small, {"kernel$": True})

    Each number stays, and so does the number of bytes. As `convert` leaves them codes lie two (four) a byte, which
    every backend and file format can hold, and are taken apart by shifts; XLA for a TPU does not always fuse those into
    a product, and then reads the weight twice or writes it out. It takes int4 and int2 apart itself. `python -m
    benchmarks quantize.tpu` has the bytes that a TPU reads and writes for either. On a GPU the two are the same
    program, and on a CPU leave codes as they are.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError: a weight that has no codes of 4 or 2 bits, named by its path. Nothing is changed then.
    """
    return _laid_out(params, rules, Quantized.as_int4)


def _laid_out(params: Any, rules: Rules[bool], change: Callable[[Quantized], Quantized]) -> Any:
    leaves = named_leaves(params, is_leaf)
    chosen = match(rules, [name for name, _ in leaves], default=False)

    def laid(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            raise ValueError(f"{name!r} is no quantized weight: convert it first, or leave it out of the rules")
        try:
            return change(leaf)
        except ValueError as error:
            raise ValueError(f"cannot lay {name!r} out: {error}") from error

    changed = [laid(name, leaf) if this else leaf for (name, leaf), this in zip(leaves, chosen, strict=True)]
    return with_leaves(params, changed, is_leaf)
