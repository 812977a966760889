"""Ranks of many layers under one budget of parameters."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.arrays import is_leaf
from jaxcompress.calibrate import InputStatistics
from jaxcompress.factorize._convert import taken_apart
from jaxcompress.factorize._svd import Spectrum, Svd
from jaxcompress.paths import Rules, match, named_leaves


class _Choice(NamedTuple):
    rank: int | None  # None: the weight as it is
    parameters: int
    error: float


def ranks(
    params: Any,
    rules: Rules[Svd | None],
    budget: int,
    inputs: Mapping[str, InputStatistics] | None = None,
    *,
    relative: bool = True,
    damping: float = 1e-4,
) -> dict[str, Svd | None]:
    """The ranks for which the weights that `rules` choose lose little, with no more than `budget` parameters in all.

        chosen = factorize.ranks(params, {"kernel$": factorize.Svd()}, budget=100_000)
        small = factorize.convert(params, chosen)

    What a rank loses is the sum of the squared singular values behind it, and a rank costs as many parameters as the
    matrix has rows and columns. Every weight begins at its least rank; then, again and again, the step is taken that
    saves most error a parameter, over all weights. A step may be several ranks, or lead to the whole weight: steps go
    along the lower convex hull of a weight's error against its parameters. One that does not fit goes as far as it can,
    and its weight no further. Up to there no choice that uses no more parameters has a smaller error (Everett 1963);
    the result's exceeds the least error by less than what the first step that did not fit would have saved.

    Args:
      params: a tree of float arrays.
      rules: by path, how a weight is seen as a matrix; an `Svd` without rank, energy and ratio. Its `round_to` is the
        step in ranks.
      budget: parameters of all chosen weights together, factors or whole.
      inputs: statistics of all chosen weights by path; the errors are then those of the outputs. See `svd`.
      relative: count each weight's error as a share of its whole energy (in front of a normalisation a weight's scale
        says nothing); False adds up the errors as they are.
      damping: see `svd`.

    Returns:
      Rules for `convert`: by path an `Svd` with its rank, or `None` for a weight that stays whole.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: as `convert`; not even the least ranks fit; an `Svd` that has a rank already.
    """
    leaves = named_leaves(params, is_leaf)
    specs = match(rules, [name for name, _ in leaves], default=None)
    chosen = {name: (leaf, spec) for (name, leaf), spec in zip(leaves, specs, strict=True) if spec is not None}
    choices = {}
    for name, (leaf, spec) in chosen.items():
        if isinstance(spec, Svd) and (spec.rank, spec.energy, spec.ratio) != (None, None, None):
            raise ValueError(f"ranks chooses the rank of {name!r} itself: leave it out of {spec}")
        choices[name] = _choices(taken_apart(name, leaf, spec, inputs, damping), spec.round_to, relative)
    taken = _allocated(choices, budget)
    return {
        f"^{re.escape(name)}$": None if choice.rank is None else dataclasses.replace(chosen[name][1], rank=choice.rank)
        for name, choice in taken.items()
    }


def _choices(found: Spectrum, step: int, relative: bool) -> list[_Choice]:
    """What may become of a weight, by its number of parameters."""
    squares = np.sum(np.asarray(found.values, np.float64) ** 2, axis=0)
    lost = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    if relative and lost[0] > 0:
        lost = lost / lost[0]
    stack = found.values.shape[0]
    thin = [_Choice(r, stack * r * found.each, float(lost[r])) for r in range(step, found.too_much, step)]
    return [*thin, _Choice(None, stack * found.size, 0.0)]


def _allocated(choices: Mapping[str, list[_Choice]], budget: int) -> dict[str, _Choice]:
    taken = {name: own[0] for name, own in choices.items()}
    spent = sum(choice.parameters for choice in taken.values())
    if spent > budget:
        raise ValueError(f"the least ranks take {spent:,} parameters, more than the budget of {budget:,}")
    steps = [(name, a, b) for name, own in choices.items() for a, b in _steps(own)]
    steps.sort(key=lambda step: -_saved(*(choices[step[0]][i] for i in step[1:])))  # stable: a weight's stay in order
    full: set[str] = set()
    for name, a, b in steps:
        if name in full:
            continue
        own, left = choices[name], budget - spent + taken[name].parameters
        reached = max(i for i in range(a, b + 1) if own[i].parameters <= left)
        spent += own[reached].parameters - taken[name].parameters
        taken[name] = own[reached]
        if reached < b:
            full.add(name)
    return taken


def _steps(own: list[_Choice]) -> list[tuple[int, int]]:
    """From point to point of the lower convex hull of error against parameters."""
    hull = [0]
    for i in range(1, len(own)):
        while len(hull) > 1 and _saved(own[hull[-2]], own[hull[-1]]) < _saved(own[hull[-1]], own[i]):
            hull.pop()
        hull.append(i)
    return list(itertools.pairwise(hull))


def _saved(a: _Choice, b: _Choice) -> float:
    """Error a parameter on the way from one choice to a larger one."""
    return (a.error - b.error) / (b.parameters - a.parameters)
