"""The state that masks live in, and masks outside the transformation: applied to other trees, counted, checked."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress import paths
from jaxcompress.arrays import Sparse
from jaxcompress.prune._ranking import Ranking, common_dtype, kth_lowest
from jaxcompress.prune._scores import Score, magnitude
from jaxcompress.prune._stored import booleans


class SparsifyState(NamedTuple):
    """State of `sparsify`."""

    step: jax.Array  # int32 []; updates so far
    masks: Any  # tree of the parameters, stored as `_stored` says, sharded like them; None where no rule matched
    statistics: Any = None  # tree of the parameters: float, what an `Accumulated` score has seen; None for other scores


def masks(state: Any) -> dict[str, jax.Array]:
    """The masks in an optimizer's state, by the path of their parameter; True is kept.

    Args:
      state: the state of `sparsify`, `rewire` or `fixed`, or of any optimizer it is a part of (`optax.chain`, `around`,
        `optax.multi_transform`, `nnx.Optimizer.opt_state`, ...); or a tree of boolean masks, as `choose` makes it.

    Raises:
      ValueError: there is no pruning state in it, or two of them have a mask for one parameter.
    """
    found: dict[str, jax.Array] = {}
    states = list(_pruning_states(state))
    if not states:
        named = paths.named_leaves(state)
        if named and all(jnp.issubdtype(jnp.result_type(x), jnp.bool_) for _, x in named):
            return dict(named)
        raise ValueError(
            f"no pruning state in this {type(state).__name__}: hand in the state of an optimizer that contains "
            f"prune.sparsify, as the optimizer's init or update returned it (of nnx.Optimizer: its opt_state)"
        )
    for pruning in states:
        for name, mask in paths.named_leaves(pruning.masks):
            if name in found:
                raise ValueError(f"two pruning states have a mask for {name!r}: hand in the one that is meant")
            found[name] = booleans(mask)
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
    return map_masked(lambda x, mask: jnp.where(mask, x, jnp.zeros_like(x)), tree, masks(state))


def to_sparse(tree: Any, state: Any, stacked: paths.Rules[int] | None = None) -> Any:
    """`tree` with every masked parameter as a `jaxcompress.arrays.Sparse` leaf: a bit a weight, and the kept values.

    Args:
      tree: concrete parameters, found by their paths as in `apply_masks`.
      state: the state of the optimizer that `sparsify` is a part of.
      stacked: by path, how many leading axes stack layers (`nn.scan`); 0 where no rule matches. A `scan` over a weight
        that is not said to be stacked makes it dense.

    Returns:
      A tree to be run by `jaxcompress.arrays.compressed`; parameters without a mask are as they were.

    Raises:
      ValueError: as `apply_masks`.
      TypeError: called under jit, where the number of kept values is not known.
    """
    kept, leaves = masks(state), paths.named_leaves(apply_masks(tree, state))
    depths = paths.match(stacked or {}, [name for name, _ in leaves], 0)
    converted = [
        Sparse.from_dense(x, kept[name], stacked=depth) if name in kept else x
        for (name, x), depth in zip(leaves, depths, strict=True)
    ]
    return paths.with_leaves(tree, converted)


def threshold(tree: Any, part: float, score: Score = magnitude) -> jax.Array:
    """The score up to which `part` of all weights in `tree` lie: the exact `k`-th lowest, for a global threshold.

    No sort and no copy of the weights: about 20 passes over them, and over a mesh as many scalar all-reduces, so it
    runs under jit on sharded trees. `k` is `part` times the number of weights, rounded, and at least 1.

    Args:
      tree: weights; leaves that are not floating point are left out.
      part: in (0, 1]: 0.9 gives the score that 90 % of the weights don't exceed.
      score: of a weight, the scores of its entries.

    Returns:
      A scalar of the leaves' common dtype. Scores that are NaN count as greater than all others.

    Raises:
      ValueError: `part` out of its range, or a tree without floating-point weights.
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    leaves = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    if not leaves or not 0 < part <= 1:
        raise ValueError(f"want floating-point weights and a part of them in (0, 1], got {len(leaves)} leaves, {part}")
    dtype = common_dtype(leaves)
    k = max(1, math.floor(part * sum(x.size for x in leaves) + 0.5))
    return _threshold(leaves, jnp.uint32(k), score, dtype)


@functools.partial(jax.jit, static_argnames=("score", "dtype"))
def _threshold(leaves: list[jax.Array], k: jax.Array, score: Score, dtype: jnp.dtype) -> jax.Array:
    return kth_lowest(Ranking(leaves, k, score=lambda x: score(x).astype(dtype)))


def sparsity(tree: Any) -> dict[str, float]:
    """The part of zeros in each leaf of `tree`, by path; the key `""` has that of all leaves together.

    Works on parameters (zeros counted) and on masks (False counted). Of compressed leaves it counts in the arrays that
    they hold, a low-rank weight's factors, say; `report.nonzeros` counts in those that they stand for. Reads concrete
    values.
    """
    counts = {name: (int(jnp.sum(x == 0, dtype=jnp.uint32)), np.size(x)) for name, x in paths.named_leaves(tree)}
    zeros, size = (sum(numbers) for numbers in zip(*counts.values(), strict=True)) if counts else (0, 0)
    return {name: _part(*count) for name, count in counts.items()} | {"": _part(zeros, size)}


def check_finite(tree: Any, what: str = "weights") -> None:
    """Raises ValueError, naming the leaves, if concrete floating-point values in `tree` are not all finite.

    Values under a transformation (`jit`, `vmap`) are not known and pass.
    """
    known = [(name, x) for name, x in paths.named_leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
    floats = [(name, x) for name, x in known if jnp.issubdtype(x.dtype, jnp.floating)]
    bad = [name for name, x in floats if not isinstance(x, Tracer) and not bool(jnp.all(jnp.isfinite(x)))]
    if bad:
        raise ValueError(f"{what} are not finite (NaN or infinite) in {', '.join(map(repr, bad))}: nothing is pruned")


def map_masked(fn: Callable[[jax.Array, jax.Array], jax.Array], tree: Any, kept: dict[str, jax.Array]) -> Any:
    """`tree` with `fn(leaf, mask)` for each leaf that has a mask; raises ValueError for a mask without its leaf."""
    named = paths.named_leaves(tree)
    missing = sorted(kept.keys() - {name for name, _ in named})
    if missing:
        raise ValueError(
            f"the tree has no leaf for the mask of {missing[0]!r} ({len(missing)} such): its leaves are "
            f"{[name for name, _ in named][:5]}...; hand in parameters of the model that the state was made for"
        )
    for name, x in named:
        if name in kept and jnp.shape(x) != kept[name].shape:
            raise ValueError(
                f"the mask of {name!r} has shape {kept[name].shape}, but the tree's leaf has {jnp.shape(x)}"
            )
    leaves = [fn(x, kept[name]) if name in kept else x for name, x in named]
    return paths.with_leaves(tree, leaves)


def _part(zeros: int, size: int) -> float:
    return zeros / size if size else 0.0


def _pruning_states(state: Any) -> Iterator[SparsifyState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparsifyState))
    return (x for x in leaves if isinstance(x, SparsifyState))
