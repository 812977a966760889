"""Sparse training for structure: penalties that make whole units small or zero, over all that a unit owns.

`prune.penalize` and `prune.proximal` know one array at a time; a unit owns slices of several. `group_lasso` is
`strength * sum over units of ||w_u||`, where `w_u` is everything of the unit, so that at zero the unit can go;
`growing` is weight decay that grows, on the units that a plan will cut; `slimming` looks at the scale of a
normalisation, which says of a unit how much of it passes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src import base  # its message for a missing `params`, as every transformation raises it

from jaxcompress import paths
from jaxcompress.prune._penalties import L1, penalize, proximal
from jaxcompress.prune.channels._groups import Groups
from jaxcompress.prune.channels._plan import Plan


def group_lasso(groups: Groups, strength: Any) -> optax.GradientTransformation:
    """Adds `strength * w / ||w_u||` to the gradients: the subgradient of the group lasso; stands before the optimizer.

    Where a unit is zero the subgradient is zero. Units of several groups (a head and its widths) are penalised as each.

    Args:
      groups: whose exact groups are penalised.
      strength: not negative; or `step -> strength`.

    Returns:
      A transformation; `update` raises ValueError without parameters, or if they are of another tree.
    """
    if not callable(strength) and not strength >= 0:
        raise ValueError(f"strength must not be negative, got {strength}")
    schedule = strength if callable(strength) else lambda step: strength

    def init_fn(params: Any) -> optax.ScaleByScheduleState:
        unit_norms(groups, params)
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update_fn(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> Any:
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        slopes = jax.grad(lambda p: sum(jnp.sum(n) for n in unit_norms(groups, p).values()))(params)
        now = schedule(state.count)
        # Of complex weights JAX's gradient is the conjugate of the direction that an optimizer is to take.
        updates = jax.tree.map(lambda u, s: u + (now * jnp.conj(s)).astype(u.dtype), updates, slopes)
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


def growing(
    where: Plan | Groups, growth: float = 1e-4, every: int = 10, ceiling: float = 1.0
) -> optax.GradientTransformation:
    """Adds `strength * w` to the gradients of units that are to go: weight decay that grows; before the optimizer.

    Wang et al. 2021, "Neural Pruning via Growing Regularization". The strength is `min(growth * (step // every),
    ceiling)`, so that the network moves what the units do elsewhere before they are cut. With a plan it is their
    GReg-1: the units that the plan drops are decayed, and cut at the end. With groups it is GReg-2: all units are, to a
    low ceiling, since under the same decay those that matter stay larger; then choose by `norm`.

    Args:
      where: a plan: what it drops; or groups: all that a unit of an exact group owns. What is not among the parameters
        (batch statistics, which no optimizer trains) is passed over.
      growth: what each increase adds, not negative.
      every: steps between two increases.
      ceiling: the largest strength.

    Returns:
      A transformation; `init` and `update` raise ValueError for parameters of another tree, `update` without any.

    Raises:
      ValueError: numbers out of range, or a plan that drops nothing.
    """
    if not (growth >= 0 and ceiling >= 0) or every < 1:
        raise ValueError(f"want growth >= 0, ceiling >= 0 and every >= 1; got {growth}, {ceiling} and {every}")
    marks = _dropped(where) if isinstance(where, Plan) else _owned(where)
    if not marks:
        raise ValueError("nothing to decay: the plan drops no unit, or there is no exact group")

    def init_fn(params: Any) -> optax.ScaleByScheduleState:
        _check_shapes(marks, params)
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update_fn(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> Any:
        if params is None:
            raise ValueError(base.NO_PARAMS_MSG)
        _check_shapes(marks, params)
        strength = jnp.minimum(growth * (state.count // every), ceiling)
        named = paths.named_leaves(params)
        leaves = [
            u + jnp.where(marks[name], strength * x, 0).astype(u.dtype) if name in marks else u
            for (name, x), u in zip(named, jax.tree.leaves(updates), strict=True)
        ]
        return paths.with_leaves(updates, leaves), optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


def slimming(
    groups: Groups, strength: float, pattern: str = "", learning_rate: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """The L1 penalty on the scales of normalisations that units pass: network slimming (Liu et al. 2017).

    `scale` scores by the same arrays. Without a learning rate it adds the subgradient `strength * sign(w)` to the
    gradients, and stands before the optimizer, as in the paper; scales shrink, but hover around zero. With the
    optimizer's learning rate it takes the proximal step, stands last, and leaves exact zeros: see `prune.proximal`.

    Args:
      groups: of the function; scales of units that stay whole are not penalised.
      strength: not negative.
      pattern: only scales whose path matches count: `scale$` leaves out the running variances of a tree that has them.
      learning_rate: for the proximal step: a number, or a schedule of the number of updates so far.

    Raises:
      ValueError: no exact group has such a scale.
    """
    marks: dict[str, np.ndarray] = {}
    for group in groups:
        for m in group.members:
            if group.exact and m.roles == {"scale"} and re.search(pattern, m.path):
                _mark(marks, m.path, m.shape, m.axis, m.index)
    if not marks:
        raise ValueError(f"no unit passes a scale whose path matches {pattern!r}: the groups are\n{groups}")
    rules = [(f"^{re.escape(path)}$", _Owned(strength, mark)) for path, mark in marks.items()]
    return penalize(rules) if learning_rate is None else proximal(rules, learning_rate)


@dataclass(frozen=True, eq=False)
class _Owned(L1):
    """L1 of those entries that units own."""

    mark: np.ndarray

    def check(self, shape: tuple[int, ...]) -> None:
        if shape != self.mark.shape:
            raise ValueError(f"the groups are of another tree: want shape {self.mark.shape}, got {shape}")

    def strengths(self, shape: tuple[int, ...]) -> jax.Array:
        return self.strength * jnp.asarray(self.mark, jnp.float32)


def _mark(marks: dict[str, np.ndarray], path: str, shape: tuple[int, ...], axis: int, index: np.ndarray) -> None:
    """Adds to `marks` that all weights at these indices of an axis are meant."""
    of_axis = np.zeros(shape[axis], bool)
    of_axis[index.ravel()] = True
    marks.setdefault(path, np.zeros(shape, bool))
    marks[path] |= of_axis.reshape([-1 if a == axis else 1 for a in range(len(shape))])


def _dropped(plan: Plan) -> dict[str, np.ndarray]:
    marks: dict[str, np.ndarray] = {}
    for path, axes in plan.keep.items():
        for axis, kept in axes.items():
            gone = np.setdiff1d(np.arange(plan.shapes[path][axis]), kept)
            _mark(marks, path, plan.shapes[path], axis, gone)
    return marks


def _owned(groups: Groups) -> dict[str, np.ndarray]:
    marks: dict[str, np.ndarray] = {}
    for group in groups:
        for m in group.members if group.exact else ():
            _mark(marks, m.path, m.shape, m.axis, m.index)
    return marks


def _check_shapes(marks: Mapping[str, np.ndarray], params: Any) -> None:
    shapes = {name: tuple(np.shape(x)) for name, x in paths.named_leaves(params)}
    known = marks.keys() & shapes.keys()
    for path in known or marks:
        if shapes.get(path) != marks[path].shape:
            has = f"has shape {shapes[path]}" if path in shapes else "is not there"
            raise ValueError(f"the units are of another tree: want {path!r} of shape {marks[path].shape}; it {has}")


def unit_norms(groups: Groups, params: Any) -> dict[str, jax.Array]:
    """The L2 norm of everything that each unit of each exact group owns: `group name -> [units]`; differentiable.

    What a unit owns outside `params` (batch statistics, which no optimizer trains) does not count.

    Raises:
      ValueError: the parameters are not those of the groups.
    """
    leaves = dict(paths.named_leaves(params))
    norms = {}
    for group in groups:
        if not group.exact:
            continue
        squares, members = jnp.zeros(group.size), [m for m in group.members if m.path in leaves]
        for m in members or group.members:
            if m.path not in leaves or jnp.shape(leaves[m.path]) != m.shape:
                raise ValueError(f"the groups are of another tree: want {m.path!r} of shape {m.shape}")
            leaf = leaves[m.path]
            leaf = leaf if jnp.iscomplexobj(leaf) else leaf.astype(jnp.float32)
            rows = jnp.sum(jnp.real(leaf * jnp.conj(leaf)), axis=tuple(a for a in range(leaf.ndim) if a != m.axis))
            squares = squares + jnp.sum(rows[np.asarray(m.index)], axis=1)
        is_zero = squares == 0
        norms[group.name] = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares)))
    return norms
