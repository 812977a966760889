"""Sparse training for structure: penalties that make whole units small or zero, over all that a unit owns.

`prune.penalize` and `prune.proximal` know one array at a time; a unit owns slices of several. `group_lasso` is
`strength * sum over units of ||w_u||`, where `w_u` is everything of the unit, so that at zero the unit can go.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src import base  # its message for a missing `params`, as every transformation raises it

from jaxcompress import paths
from jaxcompress.prune.channels._groups import Groups


def group_lasso(groups: Groups, strength: Any) -> optax.GradientTransformation:
    """Adds `strength * w / ||w_u||` to the gradients: the subgradient of the group lasso; stands before the optimizer.

    With a schedule as `strength` it is growing regularisation (Wang et al. 2021, "Neural Pruning via Growing
    Regularization", their whole-group form). Where a unit is zero the subgradient is zero. Units of several groups (a
    head and its widths) are penalised as each.

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
        updates = jax.tree.map(lambda u, s: u + (now * s).astype(u.dtype), updates, slopes)
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


def unit_norms(groups: Groups, params: Any) -> dict[str, jax.Array]:
    """The L2 norm of everything that each unit of each exact group owns: `group name -> [units]`; differentiable.

    Raises:
      ValueError: the parameters are not those of the groups.
    """
    leaves = dict(paths.named_leaves(params))
    norms = {}
    for group in groups:
        if not group.exact:
            continue
        squares = jnp.zeros(group.size)
        for m in group.members:
            if m.path not in leaves or jnp.shape(leaves[m.path]) != m.shape:
                raise ValueError(f"the groups are of another tree: want {m.path!r} of shape {m.shape}")
            leaf = leaves[m.path].astype(jnp.float32)
            rows = jnp.sum(jnp.square(leaf), axis=tuple(a for a in range(leaf.ndim) if a != m.axis))
            squares = squares + jnp.sum(rows[np.asarray(m.index)], axis=1)
        is_zero = squares == 0
        norms[group.name] = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares)))
    return norms
