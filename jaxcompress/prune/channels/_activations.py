"""Scores from batches: how large or how often zero a unit's activations are, where the next product reads them.

A unit's activation is the operand that meets a weight along an axis of the unit. The function is staged as for `groups`
and evaluated with a probe at each such place: a vector of zeros, a number an index, whose cotangent is by definition
the sum that is wanted. Cotangents add up by themselves over the steps of a `scan`, through `remat`, `cond` and `vmap`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.prune.channels._groups import Groups
from jaxcompress.prune.channels._rules_product import product_axes
from jaxcompress.prune.channels._run import Runner
from jaxcompress.prune.channels._scores import Scores, owned
from jaxcompress.prune.channels._tape import Step, Tape
from jaxcompress.prune.channels._trace import is_array, trace

_STATISTICS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "mean": jnp.abs,
    "active": lambda x: x != 0,
    "square": lambda x: jnp.real(x * jnp.conj(x)),
}


def activation(
    groups: Groups, fn: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], statistic: str = "mean"
) -> Scores:
    """Units' scores from the activations that weights read: averages over examples, positions and the places.

    Args:
      groups: of the function.
      fn: `fn(params, batch)`: the function of `groups`, of which a batch is the one input; where it has several,
        `lambda params, batch: fn(params, *batch)`.
      params: the parameters.
      batches: what `fn` takes, one after another; those of one shape are served by one compiled function.
      statistic: `mean`: of the absolute value. `active`: the share that is not zero, `1 - APoZ` (Hu et al. 2016,
        "Network Trimming"). `square`: the mean square.

    Returns:
      Scores of the groups that some product reads outside `while` loops, `shard_map` and custom derivatives; others are
      not in it.

    Raises:
      ValueError: no batches; an unknown statistic; parameters of another tree; activations behind
        `stop_gradient`, which give no cotangent.
    """
    if statistic not in _STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(_STATISTICS)}, got {statistic!r}")
    owned(groups, params)
    steps: dict[Any, Any] = {}  # by the shapes of a batch
    sums: dict[tuple[str, int], Any] = {}
    for batch in batches:
        shapes = str(jax.tree.map(lambda x: jax.typeof(x) if is_array(x) else x, batch))
        if shapes not in steps:
            steps[shapes] = _prepared(groups, fn, params, (batch,), statistic)
        step, places = steps[shapes]
        found = step(params, (batch,))
        for place, number in places.items():
            sums[place] = jax.tree.map(jnp.add, sums[place], found[number]) if place in sums else found[number]
    if not steps:
        raise ValueError("no batches: activations need at least one")
    scores: Scores = {}
    for group in groups:
        values = []
        for (path, axis), (totals, counts) in sums.items():
            for m in group.members:
                if (m.path, m.axis) == (path, axis):
                    total, count = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
                    if not (count > 0).all():
                        raise ValueError(
                            f"the activations at {path}[{axis}] were not seen: they are behind a stop_gradient, or in "
                            "a branch that was not taken"
                        )
                    values.append((total / count)[m.index].mean(axis=1))
        if values:
            scores[group.name] = np.mean(values, axis=0)
    return scores


def _prepared(
    groups: Groups, fn: Any, params: Any, args: Any, statistic: str
) -> tuple[Any, dict[tuple[str, int], int]]:
    traced = trace(fn, params, args, groups.free_out)
    wanted = {(m.path, m.axis): m.shape[m.axis] for group in groups for m in group.members if "in" in m.roles}
    places: dict[tuple[str, int], int] = {}
    taps: dict[Step, tuple[int, int, int]] = {}  # step -> (number, operand, its axis)
    sizes = []

    def visit(tape: Tape) -> None:
        for step in tape.steps:
            tap = _tap(step, traced.names)
            if tap is not None and tap[0] in wanted and step.inputs[tap[1]].shape[tap[2]] == wanted[tap[0]]:
                place, operand, axis = tap
                if place not in places:
                    places[place] = len(places)
                    sizes.append(step.inputs[operand].shape[axis])
                taps[step] = (places[place], operand, axis)
            name = step.primitive.name if step.primitive is not None else ""
            if name in ("scan", "cond", "remat2", "checkpoint", "remat"):  # others can't be differentiated, or not so
                for inner in step.extra if isinstance(step.extra, list) else [step.extra]:
                    visit(inner)

    visit(traced.tape)
    none = np.zeros(traced.tracer.atoms.count, bool)
    tapped = partial(_tapped, _STATISTICS[statistic])

    class Probing(Runner):
        probes: Any = None

        def _step(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
            if step in taps and self.probes is not None:
                number, operand, axis = taps[step]
                inputs = list(inputs)
                inputs[operand] = tapped(axis, inputs[operand], *self.probes[number])
            return super()._step(step, inputs)

    @eqx.filter_jit
    def run(params: Any, args: Any) -> Any:
        leaves = [x for x in jax.tree.leaves((params, args)) if is_array(x)]

        def total(probes: Any) -> jax.Array:
            runner = Probing(traced.tracer, none)
            runner.probes = probes
            outs = runner.run(traced.tape, leaves)
            return sum(
                (jnp.sum(jnp.real(x)).astype(jnp.float32) for x in outs if jnp.issubdtype(x.dtype, jnp.inexact)),
                jnp.zeros(()),
            )

        return jax.grad(total)([(jnp.zeros(n), jnp.zeros(n)) for n in sizes])

    return run, places


def _tap(step: Step, names: Sequence[str]) -> tuple[tuple[str, int], int, int] | None:
    """((path, axis) of the weight, which operand is the activation, its axis), if a step is a product with a weight."""
    name = step.primitive.name if step.primitive is not None else ""
    if name in ("dot_general", "ragged_dot_general"):
        (x_contract, y_contract), _ = product_axes(step)
        for operand, other, axes in ((0, 1, (x_contract, y_contract)), (1, 0, (y_contract, x_contract))):
            weight = step.inputs[other]
            if weight.source is None or step.inputs[operand].source is not None:
                continue
            for i, j in zip(*axes, strict=True):
                leaf_axes = weight.source[1][j]
                if len(leaf_axes) == 1 and weight.labels[j] is not None:
                    return (names[weight.source[0]], leaf_axes[0]), operand, i
    if name == "conv_general_dilated" and (source := step.inputs[1].source) is not None and step.extra is None:
        numbers = step.params["dimension_numbers"]
        leaf_axes = source[1][numbers.rhs_spec[1]]
        if len(leaf_axes) == 1:
            return (names[source[0]], leaf_axes[0]), 0, numbers.lhs_spec[1]
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tapped(statistic: Any, axis: int, x: jax.Array, total: jax.Array, count: jax.Array) -> jax.Array:
    return x


def _tapped_fwd(statistic: Any, axis: int, x: jax.Array, total: jax.Array, count: jax.Array) -> Any:
    return x, x


def _tapped_bwd(statistic: Any, axis: int, x: jax.Array, cotangent: jax.Array) -> Any:
    others = tuple(a for a in range(x.ndim) if a != axis)
    seen = jnp.sum(statistic(x), axis=others, dtype=jnp.float32)
    return cotangent, seen, jnp.full_like(seen, x.size / x.shape[axis])


_tapped.defvjp(_tapped_fwd, _tapped_bwd)
