"""Rules for primitives that have none: the user's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcompress.prune.channels._tape import RULES, Call, Rule, Step, Tracer, Value

Axis = tuple[int, int]
"""(which operand, which of its axes)."""


@dataclass(frozen=True)
class Along:
    """How a primitive treats axes: see `register`."""

    agree: Sequence[Sequence[Axis]]
    outputs: Sequence[Sequence[Axis | None]]


def register(
    name: str,
    along: Callable[[Sequence[tuple[int, ...]], dict[str, Any]], Along],
    params: Callable[[dict[str, Any], Sequence[tuple[int, ...]], Sequence[tuple[int, ...]]], dict[str, Any]]
    | None = None,
    replace: bool = False,
) -> None:
    """Give a primitive a rule, so that axes pass through it instead of staying whole.

    A primitive that works on the last axis of its first operand, and on the others index by index:

        channels.register("my_kernel", lambda shapes, params: channels.Along(
            agree=[], outputs=[[(0, 0), (0, 1), None]]))

    Axes that are named in no tuple stay whole, and so does an output axis that is `None`. Nothing is claimed of zeros:
    a sum over what comes out counts as inexact unless something zero meets it.

    Args:
      name: the primitive's.
      along: `(operands' shapes, the equation's parameters) -> Along`. `agree` lists sets of operands' axes whose
        indices belong together; `outputs` says for each output, axis by axis, which operand's axis it runs along.
      params: `(parameters, operands' shapes now, outputs' shapes now) -> parameters` to bind, where they hold sizes.
      replace: whether an existing rule may be replaced.

    Raises:
      ValueError: the primitive has a rule, and `replace` is not set; where it is met: axes that do not exist, or are
        not of one size.
    """
    if name in RULES and not replace:
        raise ValueError(f"{name!r} has a rule already; pass replace=True to put yours in its place")

    def label(tracer: Tracer, call: Call) -> list[Value]:
        shapes = [x.shape for x in call.inputs]
        found = along(shapes, call.params)
        _check(name, found, shapes, [tuple(aval.shape) for aval in call.avals])
        why = f"meets a whole axis in {name!r}"
        passing = {axis for each in found.outputs for axis in each if axis is not None}
        passing |= {axis for together in found.agree for axis in together}
        for i, x in enumerate(call.inputs):
            tracer.freeze(x, [a for a in range(x.ndim) if (i, a) not in passing], f"{name!r} runs along it")
        for together in found.agree:
            first = call.inputs[together[0][0]].labels[together[0][1]]
            for i, a in together[1:]:
                tracer.atoms.unify(first, call.inputs[i].labels[a], why)
        outs = []
        for aval, axes in zip(call.avals, found.outputs, strict=True):
            labels = [call.inputs[axis[0]].labels[axis[1]] if axis is not None else None for axis in axes]
            outs.append(tracer.value(aval, labels))
        return outs

    def run(runner: Any, step: Step, inputs: list[Any]) -> Sequence[Any]:
        bound = step.params
        if params is not None:
            bound = params(bound, [x.shape for x in inputs], [runner.shape(out) for out in step.outputs])
        outs = step.primitive.bind(*inputs, **step.primitive.get_bind_params(bound))
        return outs if step.primitive.multiple_results else [outs]

    RULES[name] = Rule(label, run)


def _check(name: str, found: Along, operands: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]]) -> None:
    """Raises ValueError unless the axes exist, and those that are said to be one are of one size."""
    told = [len(axes) for axes in found.outputs]
    if told != [len(shape) for shape in outputs]:
        raise ValueError(f"the rule of {name!r} names outputs of {told} axes; it gave the shapes {list(outputs)}")

    def size(axis: Axis) -> int:
        i, a = axis
        if not 0 <= i < len(operands) or not 0 <= a < len(operands[i]):
            raise ValueError(
                f"the rule of {name!r} names axis {a} of operand {i}; they have the shapes {list(operands)}"
            )
        return operands[i][a]

    for together in found.agree:
        if len({size(axis) for axis in together}) > 1:
            raise ValueError(
                f"the rule of {name!r} says that {list(together)} agree; their sizes are {[size(x) for x in together]}"
            )
    for axes, shape in zip(found.outputs, outputs, strict=True):
        for axis, n in zip(axes, shape, strict=True):
            if axis is not None and size(axis) != n:
                raise ValueError(f"the rule of {name!r} takes {axis}, of size {size(axis)}, for an output axis of {n}")
