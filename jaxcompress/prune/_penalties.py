"""Penalties that make weights small, or whole groups of them exactly zero: L1 and group lasso.

Each comes in two ways. `penalize` adds the penalty's subgradient to the gradient and stands before the optimizer;
weights shrink, but hover around zero. `proximal` stands last in the chain and takes the proximal step after the
optimizer's; weights become exactly zero, and whole groups do.

    network slimming:  optax.chain(prune.penalize({"BatchNorm_.*/scale$": prune.L1(1e-4)}), optax.sgd(0.1))
    group lasso:       optax.chain(optax.sgd(0.1), prune.proximal({"kernel$": prune.GroupLasso(1e-3)}, 0.1))
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src import base  # its message for a missing `params`, as every transformation raises it

from jaxcompress import paths
from jaxcompress._numbers import integers, real
from jaxcompress.prune._patterns import Blocks
from jaxcompress.prune._plan import check_weight, flatten


@dataclass(frozen=True)
class L1:
    """`strength * sum(|w|)`: each weight on its own.

    On the scales of batch normalisation it is network slimming (Liu et al. 2017, "Learning Efficient Convolutional
    Networks through Network Slimming"): channels whose scale is near zero can go.
    """

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def check(self, shape: tuple[int, ...]) -> None:
        """Any shape will do."""

    def norms(self, weight: jax.Array) -> jax.Array:
        """Each weight's absolute value, float32, shaped like the weight."""
        return jnp.abs(weight.astype(jnp.float32))

    def strengths(self, shape: tuple[int, ...]) -> jax.Array:
        """What each weight's norm is multiplied by."""
        return jnp.float32(self.strength)

    def value(self, weight: jax.Array) -> jax.Array:
        """The penalty of a weight, float32 []."""
        return jnp.sum(self.norms(weight)) * jnp.float32(self.strength)


@dataclass(frozen=True)
class GroupLasso:
    """`strength * sum over groups of ||w_g||_2`: a group is zero as a whole, or not at all.

    Yuan & Lin 2006; for filters, channels and shapes of networks Wen et al. 2016, "Learning Structured Sparsity in Deep
    Neural Networks", equation (2).

    Attributes:
      strength: not negative.
      groups: the axis (or axes) that index groups: -1, the outputs of a Flax kernel, makes a group of each neuron or
        filter, -2 of each input, () one group of the layer. Or a `Blocks` pattern (`kernels(0)`, `vectors(0, 4)`),
        whose blocks are the groups; its sparsity and norm don't count.
      by_size: multiply a group's norm by the root of its size, so that large and small groups shrink alike (Yuan &
        Lin's weights; Wen et al. have none).
    """

    strength: float
    groups: int | tuple[int, ...] | Blocks = -1
    by_size: bool = False

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        if not isinstance(self.groups, Blocks):
            several = self.groups if isinstance(self.groups, tuple | list) else (self.groups,)
            object.__setattr__(self, "groups", integers("groups", several))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if weights of `shape` can't be grouped so."""
        if isinstance(self.groups, Blocks):
            self.groups.check(shape)
        elif not all(-len(shape) <= axis < len(shape) for axis in self._axes()):
            raise ValueError(f"groups along axes {self._axes()}, but the shape {shape} has no such axis")

    def norms(self, weight: jax.Array) -> jax.Array:
        """Of each weight, the norm of its group, float32; shaped like the weight, or to be broadcast to it."""
        return jnp.sqrt(self._summed(jnp.square(weight.astype(jnp.float32))))

    def strengths(self, shape: tuple[int, ...]) -> jax.Array:
        """What the norms are multiplied by, an entry each."""
        sizes = self._summed(jnp.ones(shape, jnp.float32)) if self.by_size else jnp.ones((), jnp.float32)
        return self.strength * jnp.sqrt(sizes)

    def value(self, weight: jax.Array) -> jax.Array:
        """The penalty of a weight, float32 []."""
        sizes = self._summed(jnp.ones(weight.shape, jnp.float32))
        shares = jnp.broadcast_to(self.norms(weight) * self.strengths(weight.shape) / sizes, weight.shape)
        return jnp.sum(shares)  # each of a group's weights has its share of the group's norm

    def _axes(self) -> tuple[int, ...]:
        assert isinstance(self.groups, tuple)
        return self.groups

    def _summed(self, x: jax.Array) -> jax.Array:
        if isinstance(self.groups, Blocks):
            means = dataclasses.replace(self.groups, norm="l1").pool  # linear: a block's mean
            pooled, back = jax.vjp(means, x)
            (shares,) = back(jnp.ones_like(pooled))  # of each weight, one over the size of its block
            return back(pooled)[0] / jnp.square(shares)
        kept = {axis % x.ndim for axis in self._axes()}
        return jnp.sum(x, axis=tuple(axis for axis in range(x.ndim) if axis not in kept), keepdims=True)


Penalty = L1 | GroupLasso


class ProximalState(NamedTuple):
    """State of `proximal`."""

    step: jax.Array  # int32 []; updates so far


def penalty(rules: paths.Rules[Penalty | None], params: Any) -> jax.Array:
    """The sum of all penalties, float32 []: for the log, since the transformations don't show it in the loss.

    Args and errors: as for `penalize`.
    """
    pairs = zip(_planned(rules, params), jax.tree.leaves(params), strict=True)
    return sum((term.value(x) for term, x in pairs if term is not None), jnp.zeros((), jnp.float32))


def penalize(rules: paths.Rules[Penalty | None]) -> optax.GradientTransformationExtraArgs:
    """Adds penalties' subgradients to the gradients. It stands *before* the optimizer.

    `sign(w)` times the strength for `L1`, `w / ||w_g||` times it for `GroupLasso`, and zero where the weight or the
    group is zero (the subgradient of least norm), so it is finite everywhere.

    Args:
      rules: by path, `L1`, `GroupLasso` or `None`; the first match wins, parameters that no rule matches stay free.

    Returns:
      A transformation whose `init` and `update` raise ValueError for rules that don't fit the parameters, and for an
      `update` without parameters.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        _planned(rules, params)
        return optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        leaves, treedef = flatten(params)
        new = [
            u if term is None else u + _subgradient(term, x).astype(u.dtype)
            for term, x, u in zip(_planned(rules, params), leaves, treedef.flatten_up_to(updates), strict=True)
        ]
        return treedef.unflatten(new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def proximal(
    rules: paths.Rules[Penalty | None], learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Takes the penalties' proximal step after the optimizer's: small weights and groups become exactly zero.

    It stands *last* in the chain (before `prune.sparsify`, if both are there). With `z = w + update` the new weight is
    `argmin_v ||v - z||**2 / 2 + t * penalty(v)`, where `t` is the learning rate: for `L1` the soft threshold
    `sign(z) * max(|z| - t * strength, 0)`, for `GroupLasso` `z * max(1 - t * strength / ||z_g||, 0)`. After `optax.sgd`
    that is proximal gradient descent, if both have one learning rate; after `optax.adam` it is the decoupled form (as
    AdamW's weight decay is), not the proximal step in Adam's own metric.

    Args:
      rules: as for `penalize`.
      learning_rate: a number, or a schedule of the number of updates so far: the optimizer's.

    Returns:
      A transformation; errors as of `penalize`. Its updates have the parameters' dtype wherever a rule matched, and
      leave exact zeros (`w + (-w)` is).

    Raises:
      ValueError: a concrete learning rate is negative or not finite.
    """
    if isinstance(learning_rate, int | float) and not (learning_rate >= 0 and math.isfinite(learning_rate)):
        raise ValueError(f"a learning rate is finite and not negative, got {learning_rate}")

    def init_fn(params: Any) -> ProximalState:
        _planned(rules, params)
        return ProximalState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any, state: ProximalState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ProximalState]:
        del extra_args
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        leaves, treedef = flatten(params)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        new = [
            u if term is None else _proximal(term, x, u, rate)
            for term, x, u in zip(_planned(rules, params), leaves, treedef.flatten_up_to(updates), strict=True)
        ]
        return treedef.unflatten(new), ProximalState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _subgradient(term: Penalty, weight: jax.Array) -> jax.Array:
    norms = term.norms(weight)
    safe = jnp.where(norms > 0, norms, 1)
    return jnp.where(norms > 0, weight / safe, 0) * term.strengths(weight.shape)


def _proximal(term: Penalty, weight: jax.Array, update: jax.Array, rate: Any) -> jax.Array:
    moved = weight + update.astype(weight.dtype)
    norms = term.norms(moved)
    left = norms - rate * term.strengths(weight.shape)
    shrunk = moved * (jnp.maximum(left, 0) / jnp.where(norms > 0, norms, 1)).astype(weight.dtype)
    shrunk = jnp.where(jnp.isfinite(norms), shrunk, moved)  # overflowed in float32: far above any threshold
    return jnp.where(left <= 0, -weight, shrunk - weight).astype(weight.dtype)  # NaN stays NaN


def _planned(rules: paths.Rules[Penalty | None], params: Any) -> list[Penalty | None]:
    """The penalty of each leaf of `params`, in tree order."""
    named = paths.named_leaves(params)
    terms = paths.match(rules, [name for name, _ in named], None)
    for (name, x), term in zip(named, terms, strict=True):
        if term is None:
            continue
        if not isinstance(term, L1 | GroupLasso):
            raise ValueError(f"the rule for {name!r} gives {term!r}: want prune.L1(strength), GroupLasso or None")
        check_weight(name, x, "penalized")
        try:
            term.check(x.shape)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return terms


def _check_strength(strength: float) -> None:
    if not 0 <= real("strength", strength) < math.inf:
        raise ValueError(f"strength is finite and not negative, got {strength}")
