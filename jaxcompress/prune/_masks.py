"""The state that masks live in, and masks outside the transformation: applied to other trees, counted, checked."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress import paths


class SparsifyState(NamedTuple):
    """State of `sparsify`."""

    step: jax.Array  # int32 []; updates so far
    masks: Any  # tree of the parameters: bool, shape and sharding of each, True is kept; None where no rule matched


def masks(state: Any) -> dict[str, jax.Array]:
    """The masks in an optimizer's state, by the path of their parameter; True is kept.

    Args:
      state: the state of `sparsify`, or of any optimizer it is a part of (`optax.chain`, `optax.multi_transform`,
        `nnx.Optimizer.opt_state`, ...).

    Raises:
      ValueError: there is no pruning state in it, or two of them have a mask for one parameter.
    """
    found: dict[str, jax.Array] = {}
    states = list(_pruning_states(state))
    if not states:
        raise ValueError(
            f"no pruning state in this {type(state).__name__}: hand in the state of an optimizer that contains "
            f"prune.sparsify, as the optimizer's init or update returned it (of nnx.Optimizer: its opt_state)"
        )
    for pruning in states:
        for name, mask in paths.named_leaves(pruning.masks):
            if name in found:
                raise ValueError(f"two pruning states have a mask for {name!r}: hand in the one that is meant")
            found[name] = mask
    return found


def apply_masks(tree: Any, state: Any) -> Any:
    """`tree` with zeros where `state` has pruned the weight: for parameters that did not come from `apply_updates`.

    While the sparsity ramps, an average of parameters (an EMA, `optax.contrib.schedule_free_eval_params`, stochastic
    weight averaging) still holds old values of weights that are pruned by now; so does a checkpoint of another step.

    Args:
      tree: a tree that has every masked parameter, found by its path; other leaves pass through.
      state: the state of the optimizer that `sparsify` is a part of.

    Returns:
      A tree like `tree`.

    Raises:
      ValueError: there is no pruning state in `state`, or a mask finds no leaf of its path and shape in `tree`.
    """
    left = masks(state)
    named = paths.named_leaves(tree)
    missing = sorted(left.keys() - {name for name, _ in named})
    if missing:
        raise ValueError(
            f"the tree has no leaf for the mask of {missing[0]!r} ({len(missing)} such): its leaves are "
            f"{[name for name, _ in named][:5]}...; hand in parameters of the model that the state was made for"
        )
    leaves = [_masked(name, x, left.get(name)) for name, x in named]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def sparsity(tree: Any) -> dict[str, float]:
    """The part of zeros in each leaf of `tree`, by path; the key `""` has that of all leaves together.

    Works on parameters (zeros counted) and on masks (False counted). Reads concrete values.
    """
    counts = {name: (int(jnp.sum(x == 0, dtype=jnp.uint32)), np.size(x)) for name, x in paths.named_leaves(tree)}
    zeros, size = (sum(numbers) for numbers in zip(*counts.values(), strict=True)) if counts else (0, 0)
    return {name: _part(*count) for name, count in counts.items()} | {"": _part(zeros, size)}


def check_finite(tree: Any) -> None:
    """Raises ValueError, naming the leaves, if concrete floating-point values in `tree` are not all finite.

    Values under a transformation (`jit`, `vmap`) are not known and pass.
    """
    known = [(name, x) for name, x in paths.named_leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
    floats = [(name, x) for name, x in known if jnp.issubdtype(x.dtype, jnp.floating)]
    bad = [name for name, x in floats if not isinstance(x, Tracer) and not bool(jnp.all(jnp.isfinite(x)))]
    if bad:
        raise ValueError(f"weights are not finite (NaN or infinite) in {', '.join(map(repr, bad))}: nothing is pruned")


def _masked(name: str, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return x
    if jnp.shape(x) != mask.shape:
        raise ValueError(f"the mask of {name!r} has shape {mask.shape}, but the tree's leaf has {jnp.shape(x)}")
    return jnp.where(mask, x, jnp.zeros_like(x))


def _part(zeros: int, size: int) -> float:
    return zeros / size if size else 0.0


def _pruning_states(state: Any) -> Iterator[SparsifyState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparsifyState))
    return (x for x in leaves if isinstance(x, SparsifyState))
