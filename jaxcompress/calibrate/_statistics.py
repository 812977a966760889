"""Statistics of the inputs that meet each weight, over calibration batches, from one compiled pass a batch."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.arrays import compressed, is_leaf
from jaxcompress.calibrate._batches import check_batches
from jaxcompress.calibrate._layout import Layout
from jaxcompress.calibrate._observed import Observed, Uses, log
from jaxcompress.calibrate._watched import chosen_weights
from jaxcompress.paths import Rules, named_leaves, with_leaves

_tokens = itertools.count(1)
_REASONS = (
    "what it gives must reach a floating-point result of the function, by a way that has a derivative (not through "
    "stop_gradient, rounding, comparisons or integers alone, nor through a custom_vjp or custom_jvp that takes the "
    "weight itself), in at least one batch; measure a function that returns what the weight gives, or leave the "
    "weight out of the rules"
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["gram", "squares", "rows"], meta_fields=["layout"])
@dataclass(frozen=True)
class InputStatistics:
    """Sums over the inputs that met one weight; `x` is a row, of the order of the `layout`'s matrices.

    Attributes:
      gram: the sum of `x x^T`, `[problems, inputs, inputs]` in float32; `None` if only squares were asked for.
      squares: the sum of `x**2`, `[problems, inputs]` in float32.
      rows: how many rows there were, `[problems]` in float32.
      layout: how the weight's array and its matrices `[problems, inputs, outputs]` are made from each other.
    """

    gram: Float[Array, "problems inputs inputs"] | None
    squares: Float[Array, "problems inputs"]
    rows: Float[Array, " problems"]
    layout: Layout


def input_statistics(
    fn: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], rules: Rules[Any], *, gram: bool = True
) -> dict[str, InputStatistics]:
    """For each weight that `rules` choose, the statistics of the inputs that meet it in `fn`, over `batches`.

        stats = calibrate.input_statistics(lambda v, x: model.apply(v, x), variables, batches, {"kernel$": True})
        stats["Dense_0/kernel"].gram  # float32 [1, inputs, inputs]

    A weight meets an input in a product (any `dot_general`: dense layers, einsum, attention projections, `x @ w` and
    `w @ x`, through transposes and reshapes of the weight) or as the kernel of a convolution, where the inputs are the
    patches under the kernel. Rows of several uses add up, of every step of a `scan` too. A lookup (`Embed`) is no
    product, and counts nothing. `fn` may use `jit`, `scan`, `jax.checkpoint`, `cond` and `vmap`; on a batch that is
    sharded over devices the sums are all-reduced, and no weight is gathered.

    Args:
      fn: `fn(params, batch)`; its results are only looked at for floating-point arrays among them.
      params: a tree of arrays.
      batches: what `fn` takes, one after another; those of one shape are served by one compiled function.
      rules: by path, whether a weight is measured: a value that is neither None nor False. The first match wins.
      gram: False measures sums of squares alone, which need neither the time nor the memory of a Gram matrix.

    Returns:
      Statistics by path, in the order in which the weights are first used.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      TypeError: a chosen leaf is no floating-point array; `batches` is a single batch.
      ValueError: there are no batches; a weight is used in two ways whose inputs differ (a matrix and its transpose); a
        weight gets no statistic, or one that is not finite. The message names the path.
    """
    first, batches = _peeked(batches)
    return InputObserver(fn, params, first, rules, gram=gram).measure(params, batches)


class InputObserver:
    """`input_statistics` for functions that measure again and again, as weights change: traced and compiled once.

    Attributes:
      layouts: of the weights that `rules` choose, by path, in the order in which they are first used.
      gram: whether Gram matrices are measured, or sums of squares alone.
    """

    layouts: dict[str, Layout]
    gram: bool

    def __init__(
        self, fn: Callable[[Any, Any], Any], params: Any, batch: Any, rules: Rules[Any], *, gram: bool = True
    ) -> None:
        """Finds where weights are used, for a batch like `batch`; see `input_statistics`."""
        leaves = named_leaves(params, is_leaf)
        names = chosen_weights(params, rules)
        for name, x in leaves:
            if name in names and (is_leaf(x) or not jnp.issubdtype(jnp.result_type(x), jnp.floating)):
                kind = type(x).__name__ if is_leaf(x) else jnp.result_type(x)
                raise TypeError(f"{name!r} is {kind}: inputs are measured of floating-point weights only")
        self._fn, self.gram = fn, gram
        self.layouts = _found(fn, params, batch, names)
        self._step = jax.jit(self._accumulate, donate_argnums=0)

    def measure(
        self, params: Any, batches: Iterable[Any], only: Collection[str] | None = None
    ) -> dict[str, InputStatistics]:
        """The statistics under these parameters; of the weights in `only`, if given (the others cost nothing).

        Raises:
          ValueError: there are no batches; a weight met no input, or inputs that are not finite.
        """
        check_batches(batches)
        names = list(self.layouts) if only is None else [name for name in self.layouts if name in only]
        totals = {name: self._zeros(layout) for name, layout in self.layouts.items()}
        wanted = {name: jnp.full(layout.stacked, name in names) for name, layout in self.layouts.items()}
        count = 0
        for batch in batches:
            totals, count = self._step(totals, params, batch, None if only is None else wanted), count + 1
        if not count:
            raise ValueError("there are no batches to measure inputs on: `batches` is empty")
        found = {name: _finished(totals[name], self.layouts[name], self.gram) for name in names}
        for name, statistics in found.items():
            if not bool(jnp.any(statistics.rows > 0)):
                raise ValueError(f"nothing was measured for {name!r}: {_REASONS}")
            if not bool(jnp.all(jnp.isfinite(statistics.squares))):
                raise ValueError(f"the inputs of {name!r} are not finite, or their squares overflow float32")
        return found

    def _zeros(self, layout: Layout) -> tuple[Array, Array]:
        problems, inputs, _ = layout.matrix_shape
        stacked = layout.stacked
        own = problems // max(1, math.prod(stacked))
        return jnp.zeros((*stacked, own, *[inputs] * (1 + self.gram))), jnp.zeros(stacked)

    def _accumulate(self, totals: Any, params: Any, batch: Any, wanted: Any) -> Any:
        def outputs(sums: Any) -> Array:
            views = {name: (*sums[name], None if wanted is None else wanted[name], name) for name in sums}
            out = compressed(self._fn)(_viewed(params, views, 0), batch)
            return sum((jnp.sum(x).astype(jnp.float32) for x in _floats(out)), jnp.float32(0))

        try:
            seen = jax.grad(outputs)(totals)
        except ValueError as error:
            if "Reverse-mode differentiation" not in str(error):
                raise
            raise ValueError(
                "inputs are measured by a backward pass, which cannot go through a while_loop (or a fori_loop whose "
                "bounds are not known): measure the function that the loop repeats, or use scan"
            ) from error
        return jax.tree.map(jnp.add, totals, seen)


def observer_for(
    fn: Callable[[Any, Any], Any] | InputObserver, params: Any, batches: Iterable[Any], names: list[str], *, gram: bool
) -> tuple[InputObserver, Iterable[Any]]:
    """What measures the weights of these paths (`fn` itself, if it is an observer), and all batches.

    Raises:
      ValueError: the observer does not measure them, or there are no batches; and as `InputObserver`.
    """
    if isinstance(fn, InputObserver):
        missing = [name for name in names if name not in fn.layouts]
        if missing:
            raise ValueError(f"the observer does not measure {missing}: make one that does")
        if gram and not fn.gram:
            raise ValueError(
                "the observer does not measure Gram matrices, but squares only (gram=False): make one that does"
            )
        return fn, batches
    first, rest = _peeked(batches)
    observer = InputObserver(fn, params, first, {f"^{re.escape(name)}$": True for name in names}, gram=gram)
    return observer, rest if iter(batches) is batches else batches


def _viewed(params: Any, views: dict[str, tuple[Any, ...]], token: int) -> Any:
    """`params` with the leaves that are measured as `Observed`."""

    def view(name: str, x: Any) -> Any:
        if name not in views:
            return x
        sums, rows, wanted, _ = views[name]
        return Observed(x, sums, rows, wanted, name=name, token=token, whole=tuple(x.shape))

    leaves = [view(name, x) for name, x in named_leaves(params, is_leaf)]
    return with_leaves(params, leaves, is_leaf)


def _uses(fn: Callable[[Any, Any], Any], params: Any, batch: Any, names: list[str]) -> dict[str, Uses]:
    """What becomes of each weight, in the order of first use."""
    uses: dict[str, Uses] = {}
    views = {name: (None, None, None, name) for name in names}
    token = log.set(uses)
    try:
        # under the transformation that measures too, which evaluates a function before it stages it
        out = jax.eval_shape(lambda p, b: _floats(compressed(fn)(_viewed(p, views, next(_tokens)), b)), params, batch)
    finally:
        log.reset(token)
    if not out:
        raise ValueError("the function returns no floating-point array, so nothing would be measured")
    return uses


def layouts_where_one(fn: Callable[[Any, Any], Any], params: Any, batch: Any, names: list[str]) -> dict[str, Layout]:
    """How weights meet their inputs: those of `names` that do so in one way; the others are not there."""
    uses = _uses(fn, params, batch, names)
    return {name: use.layouts[0] for name, use in uses.items() if len(set(use.layouts)) == 1}


def _found(fn: Callable[[Any, Any], Any], params: Any, batch: Any, names: list[str]) -> dict[str, Layout]:
    """How each weight is used, in the order of first use."""
    uses = _uses(fn, params, batch, names)
    layouts = {}
    for name in [name for name in uses if name in names] + [name for name in names if name not in uses]:
        use = uses.get(name, Uses())
        if not use.layouts:
            met = f"it met only {', '.join(dict.fromkeys(use.other))}" if use.other else "the function does not use it"
            raise ValueError(
                f"{name!r} meets no floating-point input in a product or convolution ({met}): leave it out of the "
                f"rules, or give it the rule None"
            )
        if len(set(use.layouts)) > 1:
            raise ValueError(
                f"{name!r} is used in {len(set(use.layouts))} ways, whose inputs are not the same "
                f"({' and '.join(str(layout) for layout in dict.fromkeys(use.layouts))}): leave it out of the rules"
            )
        layouts[name] = use.layouts[0]
    return layouts


def _floats(out: Any) -> list[Array]:
    """The floating-point arrays among a function's results, without weights that were handed through."""
    leaves = [x for x in jax.tree.leaves(out, is_leaf=is_leaf) if not is_leaf(x)]
    return [jnp.asarray(x) for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)]


def _finished(total: tuple[Array, Array], layout: Layout, gram: bool) -> InputStatistics:
    sums, rows = total
    problems, inputs, _ = layout.matrix_shape
    sums = sums.reshape(problems, *[inputs] * (1 + gram))
    squares = jnp.diagonal(sums, axis1=1, axis2=2) if gram else sums
    own = problems // max(1, rows.size)
    return InputStatistics(sums if gram else None, squares, jnp.repeat(rows.reshape(-1), own), layout)


def _peeked(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them."""
    check_batches(batches)
    rest = iter(batches)
    for first in rest:
        return first, itertools.chain([first], rest)
    raise ValueError("there are no batches to measure inputs on: `batches` is empty")
