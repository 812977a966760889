"""Scores of units: what each is worth, from the scores of the weights that it owns. The lowest go first.

A unit owns slices of several parameters, and a parameter's axis has a role: units come *out* of one axis and go *in*
at others, and pass a *scale* and a *shift*. Li et al. look at `out` only, network slimming at `scale`, a Taylor
expansion at all. Every score is a dict, `group name -> [units]`, and can be made by hand.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import paths
from jaxcompress._numbers import real
from jaxcompress.prune._scores import fisher, saliency
from jaxcompress.prune.channels._groups import Group, Groups, Member

Scores = dict[str, np.ndarray]

_ROLES = ("in", "out", "scale", "shift")

_REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda x: x.sum(axis=0),
    "mean": lambda x: x.mean(axis=0),
    "max": lambda x: x.max(axis=0),
    "prod": lambda x: x.prod(axis=0),
    "geometric": lambda x: np.exp(np.log(np.maximum(x, 1e-30)).mean(axis=0)),
    "first": lambda x: x[0],
}


def from_weights(groups: Groups, weights: Any, roles: Sequence[str] | None = ("out",), reduce: str = "sum") -> Scores:
    """Units' scores from a score for each weight: sums over what a unit owns, put together over the group's members.

    Args:
      groups: of the function.
      weights: a tree like the parameters, with scores in their place (`jax.tree.map(prune.magnitude, params)`).
      roles: only members with one of these count; where a group has none such, all its members do. `None`: all.
      reduce: how the members' sums become one score: `sum`, `mean`, `max`, `prod`, `geometric` (mean), `first`.

    Raises:
      ValueError: `weights` is no tree like the parameters, or its scores are complex; a role or `reduce` is unknown.
    """
    leaves = _leaves(groups, weights)
    unreal = [path for path, leaf in leaves.items() if np.iscomplexobj(leaf)]
    if unreal:
        raise ValueError(f"scores are real numbers, those of {unreal[0]!r} are complex: take jnp.abs of them")
    scores = {}
    for group in groups:
        sums = [_of_member(m, leaves[m.path]).sum(axis=1) for m in _chosen(group, roles)]
        scores[group.name] = _REDUCTIONS[_known(reduce)](np.stack(sums))
    return scores


def norm(
    groups: Groups, params: Any, p: int = 1, roles: Sequence[str] | None = ("out",), reduce: str = "sum"
) -> Scores:
    """The Lp norm of a unit's weights: of its filters, as in Li et al. 2017, "Pruning Filters for Efficient ConvNets".

    Args: as for `from_weights`; p: 1 or 2, or another positive power.
    """
    if not 0 < real("p", p) < math.inf:
        raise ValueError(f"p must be positive and finite, got {p}")
    leaves = _leaves(groups, params)
    scores = {}
    for group in groups:
        sums = [(np.abs(_of_member(m, leaves[m.path])) ** p).sum(axis=1) ** (1 / p) for m in _chosen(group, roles)]
        scores[group.name] = _REDUCTIONS[_known(reduce)](np.stack(sums))
    return scores


def scale(groups: Groups, params: Any, pattern: str = "") -> Scores:
    """The magnitude of the normalisation's scale behind a unit: network slimming (Liu et al. 2017).

    Args:
      groups: of the function.
      params: the parameters.
      pattern: only scales whose path matches count.

    Returns:
      Scores of the groups that have a scale; the others are not in it, and stay whole.
    """
    leaves = _leaves(groups, params)
    names = {m.path for group in groups for m in group.members if m.roles == {"scale"}}
    matches = dict(zip(names, paths.match([(pattern, True)], list(names), default=False), strict=True)) if names else {}
    scores = {}
    for group in groups:
        members = [m for m in group.members if matches.get(m.path)]
        if members:
            scores[group.name] = np.stack([np.abs(_of_member(m, leaves[m.path])).sum(axis=1) for m in members]).sum(0)
    return scores


def geometric_median(groups: Groups, params: Any, roles: Sequence[str] | None = ("out",)) -> Scores:
    """How far a unit's weights are from all other units': sums of L2 distances (FPGM, He et al. 2019).

    Args: as for `from_weights`.
    """
    leaves = _leaves(groups, params)
    scores = {}
    for group in groups:
        rows = np.concatenate([_of_member(m, leaves[m.path]) for m in _chosen(group, roles)], axis=1)
        squares = (np.abs(rows) ** 2).sum(axis=1)
        apart = squares[:, None] + squares[None] - 2 * (rows @ rows.conj().T).real
        scores[group.name] = np.sqrt(np.maximum(apart, 0)).sum(axis=1)
    return scores


def taylor(groups: Groups, params: Any, gradients: Any, signed: bool = True) -> Scores:
    """To first order, how much the loss changes without the unit: over all that it owns, `|sum(w g)|`.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", their equation (8), the root of it.

    Args:
      groups: of the function.
      params: the parameters.
      gradients: of the loss, mean over a batch; a tree like `params`.
      signed: `False` gives `sum(|w g|)`, where terms don't cancel.
    """
    if not signed:
        return from_weights(groups, jax.tree.map(saliency, params, gradients), roles=None)
    products = from_weights(groups, jax.tree.map(lambda w, g: jnp.real(w * g), params, gradients), roles=None)
    return {name: np.abs(s) for name, s in products.items()}


def hessian(groups: Groups, params: Any, squared_gradients: Any) -> Scores:
    """To second order, with a diagonal Fisher information: `sum(w**2 F / 2)` (LeCun et al. 1990; Theis et al. 2018).

    Args:
      groups: of the function.
      params: the parameters.
      squared_gradients: mean over examples of the squared gradient of each one's loss; a tree like `params`.
    """
    scores = jax.tree.map(lambda w, f: fisher(jnp.abs(w), f), params, squared_gradients)
    return from_weights(groups, scores, roles=None)


def lamp(groups: Groups, params: Any, roles: Sequence[str] | None = ("out",)) -> Scores:
    """Squared norms over the sum of those not smaller (Lee et al. 2021, equation 1, of units): for the global scope.

    Args: as for `from_weights`.
    """
    scores = {}
    for name, norms in norm(groups, params, 2, roles).items():
        order = np.argsort(norms, kind="stable")
        squares = norms[order] ** 2
        left = np.cumsum(squares[::-1])[::-1]
        scores[name] = np.empty_like(squares)
        scores[name][order] = squares / np.maximum(left, 1e-30)
    return scores


def random(groups: Groups, key: jax.Array) -> Scores:
    """Uniform scores in [0, 1): what every other score is to beat."""
    keys = jax.random.split(key, max(1, len(groups)))
    return {group.name: np.asarray(jax.random.uniform(k, (group.size,))) for group, k in zip(groups, keys, strict=True)}


def _known(reduce: str) -> str:
    if reduce not in _REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(_REDUCTIONS)}, got {reduce!r}")
    return reduce


def _chosen(group: Group, roles: Sequence[str] | None) -> list[Member]:
    if roles is not None and (isinstance(roles, str) or not set(roles) <= set(_ROLES)):
        raise ValueError(f"roles are a tuple of some of {', '.join(_ROLES)}, or None, got {roles!r}")
    found = [m for m in group.members if roles is None or m.roles & set(roles)]
    return found or list(group.members)


def owned(groups: Groups, tree: Any) -> dict[str, Any]:
    """The leaves that groups are made of; raises ValueError if they are of another tree."""
    found = dict(paths.named_leaves(tree))
    needed = {m.path: m.shape for group in groups for m in group.members}
    for path, shape in needed.items():
        if path not in found or tuple(np.shape(found[path])) != shape:
            has = f"shape {np.shape(found[path])}" if path in found else "nothing"
            raise ValueError(f"the groups are of another tree: {path!r} has {has}, want shape {shape}")
    return {path: found[path] for path in needed}


def _leaves(groups: Groups, tree: Any) -> dict[str, np.ndarray]:
    """The leaves that groups are made of, in double precision, checked."""
    leaves = {}
    for path, leaf in owned(groups, tree).items():
        if jnp.iscomplexobj(leaf):
            leaves[path] = np.asarray(leaf, np.complex128)
        else:
            leaves[path] = np.asarray(jnp.asarray(leaf, jnp.float32), np.float64)
    return leaves


def _of_member(m: Member, leaf: np.ndarray) -> np.ndarray:
    """The weights that each unit owns: [units, weights a unit]."""
    rows = np.moveaxis(leaf, m.axis, 0).reshape(leaf.shape[m.axis], -1)
    return rows[m.index].reshape(len(m.index), -1)
