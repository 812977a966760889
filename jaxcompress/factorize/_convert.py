"""Trees of parameters with thin factors where weights stood."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import Array

from jaxcompress.arrays import Leaf, LowRank, is_leaf
from jaxcompress.calibrate import InputStatistics
from jaxcompress.factorize._svd import Spectrum, Svd, spectrum, truncated
from jaxcompress.paths import Rules, match, named_leaves, with_leaves


class FactorScheme(Protocol):
    """How a factor is compressed: `quantize.Affine`, or anything else that converts."""

    def convert(self, weight: Array) -> Leaf:
        """The compressed leaf that stands for the factor."""


def convert(
    params: Any,
    rules: Rules[Svd | None],
    inputs: Mapping[str, InputStatistics] | None = None,
    *,
    damping: float = 1e-4,
) -> Any:
    """`params` with the leaves that `rules` choose as `LowRank`; run the result with `jaxcompress.compressed`.

        small = factorize.convert(params, {"kernel$": factorize.Svd(ratio=0.5)})
        seen = calibrate.input_statistics(fn, params, batches, {"kernel$": True})
        small = factorize.convert(params, {"kernel$": factorize.Svd(ratio=0.5)}, seen)  # the outputs change least

    A weight whose factors would hold no less than it does stays as it is. A rule under which every weight would stay is
    an error: it asks for nothing.

    Args:
      params: a tree of float arrays; other leaves are left alone.
      rules: by path, the rank. The first match wins.
      inputs: statistics of all chosen weights by path, with Gram matrices; see `svd`, which says what is least then.
      damping: see `svd`.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: as `svd`, naming the weight by its path; or a rule that makes no weight smaller.
    """
    leaves = named_leaves(params, is_leaf)
    specs = match(rules, [name for name, _ in leaves], default=None)
    converted: list[Any] = []
    smaller: set[Svd] = set()
    kept: dict[Svd, str] = {}
    for (name, leaf), spec in zip(leaves, specs, strict=True):
        if spec is not None:
            found = taken_apart(name, leaf, spec, inputs, damping)
            rank = spec.rank_of(found)
            if rank < found.too_much:
                smaller.add(spec)
                leaf = truncated(leaf, found, rank, spec.stacked)
            else:
                seen = (
                    f"{name!r}, seen as a matrix {[found.basis.shape[1], found.right.shape[2]]}, would get rank {rank}"
                )
                kept.setdefault(spec, f"{seen}, and saves nothing from {found.too_much} on")
        converted.append(leaf)
    for spec, why in kept.items():
        if spec not in smaller:
            raise ValueError(f"{spec} makes no weight smaller ({why}): ask for less, or leave the rule out")
    return with_leaves(params, converted, is_leaf)


def convert_factors(params: Any, rules: Rules[FactorScheme | None]) -> Any:
    """`params` with the factors of the `LowRank` leaves that `rules` choose compressed in their turn.

        small = factorize.convert(params, {"kernel$": factorize.Svd(ratio=0.5)})
        smaller = factorize.convert_factors(small, {"kernel$": quantize.Affine(8)})

    Raises:
      UnmatchedRuleError: a rule matches no `LowRank` leaf.
      ValueError, TypeError: as the scheme's, naming the weight by its path.
    """
    leaves = named_leaves(params, is_leaf)
    names = [name for name, leaf in leaves if isinstance(leaf, LowRank)]
    schemes = dict(zip(names, match(rules, names, default=None), strict=True))

    def factors(name: str, w: Any) -> Any:
        scheme = schemes.get(name)
        if scheme is None:
            return w
        if is_leaf(w.left) or is_leaf(w.right):
            raise TypeError(f"the factors of {name!r} are compressed already")
        try:
            return dataclasses.replace(w, left=scheme.convert(w.left), right=scheme.convert(w.right))
        except (TypeError, ValueError) as error:
            raise type(error)(f"cannot compress the factors of {name!r}: {error}") from error

    return with_leaves(params, [factors(name, leaf) for name, leaf in leaves], is_leaf)


def taken_apart(
    name: str, leaf: Any, spec: Svd, inputs: Mapping[str, InputStatistics] | None, damping: float
) -> Spectrum:
    """The spectrum of a tree's weight; what it raises names the weight."""
    try:
        if not isinstance(spec, Svd):
            raise TypeError(f"want a rule such as Svd(rank=8), or None, got {spec!r}")
        if is_leaf(leaf):
            raise TypeError(f"it is a {type(leaf).__name__} already; factorize float weights")
        if inputs is not None and name not in inputs:
            raise ValueError("its inputs were not measured; factorize it in a call of its own, without inputs")
        return spectrum(leaf, spec, None if inputs is None else inputs[name], damping=damping)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot factorize {name!r}: {error}") from error
