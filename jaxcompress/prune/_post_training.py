"""One-shot pruning of a trained model from calibration batches: SparseGPT, and Wanda. No training, no gradients."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from jaxcompress import paths
from jaxcompress.calibrate import InputObserver, InputStatistics, Layout
from jaxcompress.calibrate._compensate import check_compensation, check_settled, compensated, inverse_factor
from jaxcompress.calibrate._meshes import in_place
from jaxcompress.calibrate._statistics import observer_for
from jaxcompress.prune._patterns import NM, Pattern, Unstructured
from jaxcompress.prune._plan import plan_for
from jaxcompress.prune._ranking import Ranking, lowest
from jaxcompress.prune._schedules import one_shot
from jaxcompress.prune._scores import wanda

Rules = paths.Rules[Pattern | float | None]
Prune = Callable[[str, Array, InputStatistics, Pattern], tuple[Array, Array]]


class Pruned(NamedTuple):
    """A model that was pruned in one shot."""

    params: Any  # the parameters, exactly zero where pruned
    masks: Any  # a tree of the parameters: bool, True is kept, as `fixed` and `apply_masks` take it; None: not pruned


def sparsegpt(
    fn: Callable[[Any, Any], Any] | InputObserver,
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    sequential: bool | Sequence[str] = False,
    allow_empty: bool = False,
) -> Pruned:
    """Prunes each chosen weight so that its outputs change little, and lets the kept weights make up for the pruned.

    SparseGPT (Frantar & Alistarh 2023, algorithm 1). With the inputs' Gram matrix `H` and `U^T U` the inverse of its
    damped form, weights are pruned input by input in the order of the weight's axes; the error of each is taken up by
    the weights of later inputs. Which go is decided for `block_size` inputs at a time (`Unstructured`), or for each
    group of `m` as it is reached (`NM`): those of lowest `w**2 / U[j, j]**2`.

        pruned = prune.sparsegpt(lambda v, x: model.apply(v, x), variables, batches, {"kernel$": prune.NM(2, 4)})
        tx = optax.chain(optax.adam(1e-4), prune.fixed(pruned.masks))  # to train what is left

    Dense kernels of any rank, weights stacked by `scan`, grouped and depthwise convolutions: see
    `calibrate.input_statistics`, which also says what the function may contain. A weight that is divided among devices
    along its outputs is pruned where it is.

    Args:
      fn: `fn(params, batch)`, the model; whatever it returns, some of it floating point. Or a `calibrate.InputObserver`
        of the model, which is compiled once for many calls.
      params: a tree of arrays.
      batches: calibration data: some hundred examples or more, like those of training.
      rules: by path, what is pruned how: a sparsity, `Unstructured` (without a scope), `NM` along the last of the input
        axes, or `None` (kept dense). The first match wins.
      damping: added to the Gram matrix's diagonal, relative to its mean.
      block_size: inputs whose weights are ranked together, and after which the later ones are brought up to date.
      sequential: measure each weight's inputs with the weights before it already pruned: True takes the order of their
        first use, a list of paths another order. It reads the batches once a weight. The layers of a weight that is
        stacked by `scan` count as one.
      allow_empty: whether a layer may lose all its weights.

    Returns:
      Parameters and masks. In each layer the number pruned is that asked for.

    Raises:
      ValueError: rules that don't fit (see `sparsify`), or patterns other than those above; weights or statistics that
        are not finite; a weight whose inputs can't be measured; a Gram matrix that needs more damping; an order that is
        not of the chosen weights, or batches that can be read only once, with `sequential`.
    """
    check_compensation(damping, block_size)

    def prune_one(name: str, weight: Array, statistics: InputStatistics, pattern: Pattern) -> tuple[Array, Array]:
        layout = statistics.layout
        if isinstance(pattern, NM):
            group, nm, budgets = pattern.m, pattern, None
        else:
            assert isinstance(pattern, Unstructured)
            group, nm = min(block_size, layout.matrix_shape[1]), None
            budgets = _budgets(pattern, layout, group)
        compensate = functools.partial(_sparsegpt, layout=layout, nm=nm, group=group, block=block_size)
        new, kept = in_place(compensate, weight, statistics.gram, damping, budgets)
        check_settled(name, new, damping)
        return new, kept

    return _pruned(fn, params, batches, rules, prune_one, sequential, allow_empty, gram=True)


def wanda_one_shot(
    fn: Callable[[Any, Any], Any] | InputObserver,
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    *,
    per_output: bool = True,
    sequential: bool | Sequence[str] = False,
    allow_empty: bool = False,
) -> Pruned:
    """Prunes of each output's weights those of lowest `|w| norm(x)`, and leaves the others as they are.

    Wanda (Sun et al. 2024): the score `prune.wanda`, with the inputs' norms over `batches`, ranked output by output, so
    that each output keeps as many weights as any other; or within the groups of `NM`. A kernel of a convolution has the
    patches under it as its inputs. `per_output=False` ranks all weights of a layer together (of a group, of a grouped
    convolution), which does better in the small image classifiers of `experiments`: there outputs differ in worth.

    Args, Returns, Raises: as for `sparsegpt`, which changes the kept weights and costs more; `NM` may run along any of
    the input axes, and the part pruned of each output is rounded to whole weights.
    """

    def prune_one(name: str, weight: Array, statistics: InputStatistics, pattern: Pattern) -> tuple[Array, Array]:
        layout = statistics.layout
        if isinstance(pattern, NM):
            return in_place(functools.partial(_wanda, layout=layout, nm=pattern), weight, statistics.squares, None)
        assert isinstance(pattern, Unstructured)
        _, inputs, outputs = layout.matrix_shape
        units = inputs if per_output else inputs * outputs
        gone = math.floor(pattern.sparsity * units + 0.5)
        if gone == units and not allow_empty:
            raise ValueError(
                f"{name!r}: {'every output' if per_output else 'it'} would lose all its {units} weights to {pattern}: "
                f"lower the sparsity, give it the rule None, or pass allow_empty=True"
            )
        ranked = functools.partial(_wanda, layout=layout, nm=None, stack=1 + per_output)
        return in_place(ranked, weight, statistics.squares, jnp.uint32(gone))

    return _pruned(fn, params, batches, rules, prune_one, sequential, allow_empty, gram=False)


def _pruned(
    fn: Callable[[Any, Any], Any] | InputObserver,
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    prune_one: Prune,
    sequential: bool | Sequence[str],
    allow_empty: bool,
    *,
    gram: bool,
) -> Pruned:
    """Measures and prunes: all weights at once, or one after the other."""
    in_steps = sequential is True or (not isinstance(sequential, bool) and len(sequential) > 0)
    if in_steps and iter(batches) is batches:
        raise ValueError("sequential=True reads the batches once a weight: hand in a list of them, not an iterator")
    plan = [layer for layer in plan_for(rules, params, one_shot(0), allow_empty) if layer is not None]
    patterns = {layer.name: layer.pattern for layer in plan}
    leaves = dict(paths.named_leaves(params))
    for name in patterns:
        if not bool(jnp.all(jnp.isfinite(leaves[name]))):
            raise ValueError(f"the weights {name!r} are not finite (NaN or infinite): nothing is pruned")
    observer, batches = observer_for(fn, params, batches, list(patterns), gram=gram)
    order = [name for name in observer.layouts if name in patterns]
    for name in order:
        _check(name, observer.layouts[name], patterns[name], last_only=gram)

    masks: dict[str, Array] = {}
    for names in _rounds(order, sequential if in_steps else False):
        only = names if len(names) < len(observer.layouts) else None
        statistics = observer.measure(paths.with_leaves(params, leaves.values()), batches, only)
        for name in names:
            leaves[name], masks[name] = prune_one(name, leaves[name], statistics.pop(name), patterns[name])
    return Pruned(
        paths.with_leaves(params, leaves.values()), paths.with_leaves(params, [masks.get(name) for name in leaves])
    )


def _rounds(names: list[str], sequential: bool | Sequence[str]) -> list[list[str]]:
    """Which weights are pruned on one measurement, in order."""
    if sequential is False:
        return [names]
    if sequential is True:
        return [[name] for name in names]
    if sorted(sequential) != sorted(names):
        raise ValueError(f"sequential gives the order of {list(sequential)}, but the rules choose {names}")
    return [[name] for name in sequential]


def _check(name: str, layout: Layout, pattern: Pattern, last_only: bool) -> None:
    """Raises ValueError for patterns that the methods here have no answer to."""
    if isinstance(pattern, Unstructured) and pattern.scope is None:
        own = layout.own_axes(tuple(range(layout.stack)))[: pattern.stack]
        if own != tuple(range(pattern.stack)):
            raise ValueError(f"{name!r}: {pattern} stacks axes that no scan slices off: {layout}")
    elif isinstance(pattern, NM):
        axes = layout.own_axes(layout.inputs)
        axes = axes[-1:] if last_only else axes
        length = layout.shape[pattern.axis]
        if pattern.axis % len(layout.shape) not in axes or (last_only and length % pattern.m):
            raise ValueError(
                f"{name!r} of shape {layout.shape} can be pruned {pattern.n}:{pattern.m} along its input axes "
                f"{[axis for axis in axes if axis is not None]}, whose lengths {pattern.m} must divide, not along axis "
                f"{pattern.axis}: pass NM({pattern.n}, {pattern.m}, axis=...), or another pattern"
            )
    else:
        raise ValueError(f"{name!r}: want a sparsity, Unstructured without a scope, or NM, got {pattern}")


@functools.partial(jax.jit, static_argnames=("layout", "nm", "group", "block"))
def _sparsegpt(
    weight: Float[Array, "*shape"],
    gram: Float[Array, "problems inputs inputs"],
    damping: float,
    budgets: UInt32[Array, "problems groups"] | None,
    *,
    layout: Layout,
    nm: NM | None,
    group: int,
    block: int,
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """The pruned weight and its mask: `nm`, or so many of each group of inputs as the budgets say."""

    def prune_matrix(matrix: Array, gram: Array, budgets: Array | None) -> tuple[Array, Array]:
        factor, dead = inverse_factor(gram, damping)
        matrix = jnp.where(dead[:, None], 0.0, matrix)

        def decide(rows: Array, diagonal: Array, index: Array) -> Array:
            scores = jnp.square(rows / diagonal[:, None])  # NaN, which is never pruned, where a group is filled up
            if budgets is None:
                assert nm is not None
                return jnp.isnan(NM(nm.n, nm.m, axis=0).pool(scores))
            return ~lowest([Ranking([scores], budgets[index])])[0][0]

        def settle(row: Array, kept: Array, i: Array) -> Array:
            return jnp.where(kept[i], row, 0.0)

        new, kept = compensated(matrix, factor, decide, settle, group=group, block=block)
        return new, kept.reshape(-1, matrix.shape[1])[: matrix.shape[0]]

    new, kept = jax.vmap(prune_matrix)(layout.matrices(weight.astype(jnp.float32)), gram, budgets)
    mask = layout.weight(kept)
    return jnp.where(mask, layout.weight(new), 0.0).astype(weight.dtype), mask


@functools.partial(jax.jit, static_argnames=("layout", "nm", "stack"))
def _wanda(
    weight: Float[Array, "*shape"],
    squares: Float[Array, "problems inputs"],
    gone: UInt32[Array, ""] | None,
    *,
    layout: Layout,
    nm: NM | None,
    stack: int = 2,
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """The pruned weight and its mask: `nm`, or so many of each output's weights; of each problem's, if `stack` is 1."""
    scores = jax.vmap(wanda)(layout.matrices(weight.astype(jnp.float32)), jnp.sqrt(squares))
    if gone is None:
        assert nm is not None
        kept = jnp.isnan(nm.pool(layout.weight(scores)))
    else:
        pruned = lowest([Ranking([jnp.swapaxes(scores, 1, 2)], gone, stack=stack)])[0][0]
        kept = layout.weight(~jnp.swapaxes(pruned, 1, 2))
    return jnp.where(kept, weight, jnp.zeros_like(weight)), kept


def _budgets(pattern: Unstructured, layout: Layout, group: int) -> np.ndarray:
    """How many weights go in each group of inputs, `[problems, groups]`: in a layer as many as the pattern says."""
    problems, inputs, outputs = layout.matrix_shape
    layers = int(np.prod(layout.shape[: pattern.stack], dtype=np.int64))
    ends = np.minimum(np.arange(1, -(-inputs // group) + 1) * group, inputs)
    before = np.arange(problems // layers)[:, None] * inputs
    gone = np.floor(pattern.sparsity * outputs * (before + ends) + 0.5).astype(np.int64).reshape(-1)
    return np.tile(np.diff(gone, prepend=0).reshape(problems // layers, -1), (layers, 1)).astype(np.uint32)
