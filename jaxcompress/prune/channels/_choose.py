"""From scores to a plan: which units go."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcompress import paths
from jaxcompress._numbers import real, whole
from jaxcompress.prune.channels._cost import flops as count_flops
from jaxcompress.prune.channels._groups import Group, Groups
from jaxcompress.prune.channels._plan import Plan, from_units

Scope = Literal["local", "global", "isomorphic"]

_MOST = 1.0 - 1e-6


def plan(
    groups: Groups,
    scores: Mapping[str, Any],
    ratio: float | paths.Rules[float] | None = None,
    *,
    parameters: float | None = None,
    flops: float | None = None,
    until: Callable[[Plan], bool] | None = None,
    scope: Scope = "local",
    normalize: Literal["mean", "max", None] = None,
    round_to: int = 1,
    minimum: int = 1,
    max_ratio: float = 1.0,
    inexact: bool = False,
) -> Plan:
    """Choose the units with the lowest scores, and make the plan without them.

    Exactly one of `ratio`, `parameters`, `flops` and `until` says how much goes.

    Args:
      groups: of the function.
      scores: `group name -> [units]`, as `channels.norm` and others give; groups without scores stay whole.
      ratio: the share of units that goes, in [0, 1); or, for the local scope, rules by group name (what no rule
        matches stays whole).
      parameters: the share of parameters to be left, in (0, 1]: the smallest ratio that reaches it is found.
      flops: the same for `channels.flops`.
      until: any other target: whether a plan is small enough (a time measured with `shrink`, a number of bytes). The
        smallest ratio for which it is true is searched for in steps of 1/64, with at most seven calls.
      scope: `local`: each group loses the same share. `global`: all groups' units are ranked together. `isomorphic`:
        those of groups with the same kinds of members are (Fang et al. 2024, "Isomorphic Pruning for Vision Models").
      normalize: divide each group's scores by their mean or largest, before groups are ranked together: norms of layers
        of different sizes don't compare. Network slimming ranks its scales as they are.
      round_to: a group keeps a multiple of this many units, rounded up (all, where it has fewer).
      minimum: the least units that a group keeps; at least 1.
      max_ratio: the largest share that a group loses under a common ranking.
      inexact: whether groups are cut that change the model's other units too (`Group.notes` says how); otherwise they
        stay whole.

    Raises:
      ValueError: no or several targets; numbers out of range; scores that are not finite, or not one a unit, or of
        inexact groups only; a target that cannot be reached.
      UnmatchedRuleError: a rule of `ratio` matches no group.
    """
    if sum(x is not None for x in (ratio, parameters, flops, until)) != 1:
        raise ValueError("give exactly one of ratio, parameters, flops and until")
    if scope not in ("local", "global", "isomorphic"):
        raise ValueError(f"scope must be 'local', 'global' or 'isomorphic', got {scope!r}")
    if normalize not in ("mean", "max", None):
        raise ValueError(f"normalize must be 'mean', 'max' or None, got {normalize!r}")
    round_to, minimum = whole("round_to", round_to), whole("minimum", minimum)
    if round_to < 1 or minimum < 1 or not 0 < real("max_ratio", max_ratio) <= 1:
        raise ValueError(
            f"want round_to >= 1, minimum >= 1, 0 < max_ratio <= 1; got {round_to}, {minimum}, {max_ratio}"
        )
    checked = _checked(groups, scores, inexact)
    if normalize is not None:
        checked = {name: _normalized(s, normalize) for name, s in checked.items()}

    def most(n: int) -> int:  # units that a group of n may lose
        kept = max(min(minimum, n), 1, n - int(max_ratio * n) if scope != "local" else 1)
        return n - kept

    def with_ratio(share: Any) -> Plan:
        counts = _counts(groups, checked, share, scope, most)
        dropped = {}
        for name, s in checked.items():
            kept = len(s) - min(counts[name], most(len(s)))
            kept = min(len(s), -(-kept // round_to) * round_to)
            dropped[name] = np.argsort(s, kind="stable")[: len(s) - kept]
        return from_units(groups, dropped)

    if ratio is not None:
        if not isinstance(ratio, Sequence | Mapping):  # a number, of whatever type
            ratio = float(ratio)
            _in_range("ratio", ratio)
        elif scope != "local":
            raise ValueError(f"rules of ratios need scope='local', got {scope!r}")
        return with_ratio(ratio)
    if until is not None:
        return _smallest(with_ratio, until, "until cannot be met", turns=6)
    share = parameters if parameters is not None else flops
    assert share is not None
    if not 0 < real("parameters or flops", share) <= 1:
        raise ValueError(f"parameters and flops are shares in (0, 1], got {share}")
    cost = (lambda made: made.parameters[1]) if parameters is not None else (lambda made: count_flops(groups, made))
    uncut, least = cost(with_ratio(0.0)), cost(with_ratio(_MOST))
    what = "parameters" if parameters is not None else "flops"
    message = f"cannot bring {what} down to {share:.3g}: with the least units kept {least / uncut:.3g} remain"
    return _smallest(with_ratio, lambda made: cost(made) <= share * uncut, message)


def _checked(groups: Groups, scores: Mapping[str, Any], inexact: bool) -> dict[str, np.ndarray]:
    by_name = {group.name: group for group in groups}
    if not by_name:
        raise ValueError(f"the function has no groups to choose from:\n{groups}")
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores are a dict, group name -> [units], as channels.norm gives; got {type(scores).__name__}"
        )
    checked = {}
    for name, s in scores.items():
        if name not in by_name:
            raise ValueError(f"scores for {name!r}, which is no group; there are {', '.join(by_name)}")
        s = np.asarray(s, np.float64)
        if s.shape != (by_name[name].size,):
            raise ValueError(f"group {name!r} wants {by_name[name].size} scores, got shape {s.shape}")
        if not np.isfinite(s).all():
            raise ValueError(f"scores of {name!r} are not finite")
        if by_name[name].exact or inexact:
            checked[name] = s
    if not checked:
        inexact_only = f"{', '.join(scores)} are inexact, which stay whole without inexact=True"
        raise ValueError(f"nothing to choose from: {inexact_only if scores else 'there are no scores'}")
    return checked


def _counts(
    groups: Groups, scores: dict[str, np.ndarray], share: Any, scope: Scope, most: Callable[[int], int]
) -> dict[str, int]:
    """How many units each group loses, before rounding."""
    if scope == "local":
        ratios = [share] * len(scores)
        if not isinstance(share, float):
            ratios = paths.match(share, list(scores), default=0.0)
            for each in ratios:
                _in_range("ratio", each)
        return {name: int(each * len(s) + 1e-9) for (name, s), each in zip(scores.items(), ratios, strict=True)}
    kinds: dict[Any, list[str]] = {}
    for name in scores:
        kinds.setdefault(_kind(groups[name]) if scope == "isomorphic" else None, []).append(name)
    counts = dict.fromkeys(scores, 0)
    for names in kinds.values():
        # A group's best units are out of reach, so that the ranking takes others instead.
        owner = np.concatenate([np.full(most(len(scores[name])), i) for i, name in enumerate(names)])
        values = np.concatenate([np.sort(scores[name])[: most(len(scores[name]))] for name in names])
        total = sum(len(scores[name]) for name in names)
        lowest = np.argsort(values, kind="stable")[: int(share * total + 1e-9)]
        for i, name in enumerate(names):
            counts[name] = int((owner[lowest] == i).sum())
    return counts


def _kind(group: Group) -> Any:
    return tuple(sorted((len(m.shape), m.axis, tuple(sorted(m.roles)), m.index.shape[1]) for m in group.members))


def _smallest(made: Callable[[float], Plan], reached: Callable[[Plan], bool], message: str, turns: int = 18) -> Plan:
    """The plan of the smallest ratio that reaches the target, by bisection."""
    low, high = 0.0, _MOST
    best = made(high)
    if not reached(best):
        raise ValueError(message + ": keep fewer units at least, or ask for less")
    for _ in range(turns):
        middle = (low + high) / 2
        tried = made(middle)
        if reached(tried):
            best, high = tried, middle
        else:
            low = middle
    return best


def _normalized(s: np.ndarray, how: str) -> np.ndarray:
    scale = np.abs(s).mean() if how == "mean" else np.abs(s).max()
    return s / scale if scale > 0 else s


def _in_range(what: str, ratio: float) -> None:
    if isinstance(ratio, str) or ratio is None:
        raise TypeError(
            f"{what} must be a number in [0, 1), got {ratio!r}: what no rule matches stays whole, and so does 0"
        )
    if not 0 <= ratio < 1:
        raise ValueError(f"{what} must be in [0, 1), got {ratio}: a ratio of 1 would empty every layer")
