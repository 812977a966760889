"""Which leaf a rule speaks of: one naming of paths and one way to match them.

A path is the leaf's keys joined by `/`, as `jax.tree_util.keystr` writes them, without the wrappers that frameworks
put around parameters: Linen's `params` collection in front, and NNX's and `nn.Partitioned`'s `value` behind. So the
rule `("Dense_0/kernel$", ...)` means the same leaf in a Linen dict, an `nnx.State`, a `TrainState` and a plain tree.

Rules are pairs of a regular expression (`re.search` on the path) and a value. The first match wins; a leaf that no
rule matches gets the default; a rule that matches no leaf at all is an error, because it is almost always a typo that
would otherwise leave a model quietly uncompressed.
"""

import difflib
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

__all__ = ["Rules", "UnmatchedRuleError", "assign", "match", "named_leaves", "owner", "path_name", "with_leaves"]

T = TypeVar("T")

Rules = Sequence[tuple[str, T]] | Mapping[str, T]
"""Pairs of a pattern and a value, tried in order; a mapping is read in its own order."""


class UnmatchedRuleError(ValueError):
    """A rule that matches no path of the tree it is applied to."""


def path_name(path: Sequence[Any]) -> str:
    """The name of a `jax.tree_util` key path, without framework wrappers: `Dense_0/kernel`."""
    name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
    return name.removeprefix("params/").removesuffix("/value")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Every leaf of `tree` with its name, in tree order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def with_leaves(tree: Any, leaves: Iterable[Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """A tree like `tree` with these leaves, in the order of `named_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_leaf), leaves)


def owner(path: str, names: Container[str]) -> str | None:
    """The longest of the parameters' `names` that ends `path`, a place in an optimizer's state; None without one.

    `names` are those of all parameters: among fewer, `mu/head/kernel` would pass for another layer's `kernel`.
    """
    keys = path.split("/")
    ends = ("/".join(keys[i:]) for i in range(len(keys) + 1))  # at last "", the name of a bare array
    return next((end for end in ends if end in names), None)


def match(rules: Rules[T], names: Sequence[str], default: T) -> list[T]:
    """The value of the first matching rule for each of `names`.

    Args:
      rules: pairs of a regular expression and a value.
      names: paths, as `path_name` writes them.
      default: the value of a name that no rule matches.

    Returns:
      One value a name, in order.

    Raises:
      UnmatchedRuleError: a rule matches none of the names; the message has the nearest ones.
      ValueError: a pattern is not a regular expression.
      TypeError: rules that are no pairs.
    """
    try:
        pairs = [(pattern, value) for pattern, value in (rules.items() if isinstance(rules, Mapping) else rules)]
    except (TypeError, ValueError):
        raise TypeError(f"rules are pairs of a pattern and a value, or a mapping of such, got {rules!r}") from None
    values, hit = [default] * len(names), [False] * len(pairs)
    patterns = [_compile(pattern) for pattern, _ in pairs]
    for i, name in enumerate(names):
        matching = [r for r, pattern in enumerate(patterns) if pattern.search(name)]
        for r in matching:
            hit[r] = True
        if matching:
            values[i] = pairs[matching[0]][1]
    for (pattern, _), was_hit in zip(pairs, hit, strict=True):
        if not was_hit:
            raise UnmatchedRuleError(_unmatched_message(pattern, names))
    return values


def assign(rules: Rules[T], tree: Any, default: Any = None, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """A tree like `tree` with, in each leaf's place, the value of the first rule that matches the leaf's path.

    Values may be any object, also `None` or a pytree: use `jax.tree.structure(tree, is_leaf=is_leaf)` to walk both
    side by side, or `named_leaves` and `match` for flat lists.
    """
    names = [name for name, _ in named_leaves(tree, is_leaf)]
    return with_leaves(tree, match(rules, names, default), is_leaf)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from error


def _unmatched_message(pattern: str, names: Sequence[str]) -> str:
    literal = re.sub(r"[\\^$.*+?()\[\]{}|]+", "", pattern)
    near = difflib.get_close_matches(literal, names, n=3, cutoff=0.3)
    if not near:  # a short pattern against long paths: compare with the paths' ends
        tails = {name.rsplit("/", 1)[-1]: name for name in names}
        near = [tails[tail] for tail in difflib.get_close_matches(literal, list(tails), n=3, cutoff=0.3)]
    shown = near or list(names[:3])
    listing = ", ".join(repr(name) for name in shown) if shown else "none: the tree has no leaves"
    return f"rule {pattern!r} matches no path; nearest paths: {listing}"
