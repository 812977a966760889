"""Walking a tree of weights beside trees of masks, scores or other weights, which are found by their paths."""

from collections.abc import Sequence
from typing import Any

from jaxcompress import paths


def beside(weights: Any, other: Any, what: str) -> list[Any]:
    """For each leaf of `weights` in tree order, the leaf of `other` with its path; `None` where there is none.

    Raises:
      ValueError: a leaf of `other` has no counterpart, or another shape than its counterpart.
    """
    found = dict(paths.named_leaves(other))
    named = paths.named_leaves(weights)
    if missing := sorted(found.keys() - {name for name, _ in named}):
        raise ValueError(
            f"no weight for the {what} of {missing[0]!r} ({len(missing)} such); the weights are "
            f"{[name for name, _ in named][:5]}"
        )
    for name, x in named:
        if name in found and found[name].shape != x.shape:
            raise ValueError(f"the {what} of {name!r} has shape {found[name].shape}, but the weight has {x.shape}")
    return [found.get(name) for name, _ in named]


def same(weights: Any, other: Any, what: str) -> list[Any]:
    """As `beside`, for a tree that must have every leaf of `weights`."""
    found = beside(weights, other, what)
    if missing := [name for (name, _), x in zip(paths.named_leaves(weights), found, strict=True) if x is None]:
        raise ValueError(
            f"the {what} has no leaf {missing[0]!r} ({len(missing)} such): hand in a tree of the same model"
        )
    return found


def like(weights: Any, leaves: Sequence[Any]) -> Any:
    """The tree of `weights` with other leaves."""
    return paths.with_leaves(weights, leaves)
