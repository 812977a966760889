"""The traced program with a label on every axis of every value: what the rules write, and the evaluator reads.

A jaxpr is walked once, from the inputs to the outputs. For each equation the primitive's rule makes the output values
with their labels, and the equation is kept as a `Step` on a `Tape`. Inner `jit`s are walked in place, with new values
each time, since JAX shares one inner jaxpr between its callers; bodies of loops are tapes of their own.

What depends on no argument (tables, masks, indices: *known* values) has no labels. It is computed in full, and cut at
each use to what the others there have kept; so constants never tie layers to each other.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr

from jaxcompress.prune.channels._labels import Atoms, Label

_INLINE = {"jit", "pjit", "closed_call", "core_call"}
_KEEPS_ZERO = {"broadcast_in_dim", "convert_element_type", "reshape", "copy", "transpose", "squeeze", "slice", "neg"}


@dataclass(eq=False, slots=True)
class Value:
    """One array of the program.

    Attributes:
      shape: as traced.
      dtype: likewise.
      labels: one an axis.
      zero: for each axis, whether the slices that are cut are exactly zero where the units are zeroed instead.
      known: depends on no argument; it is computed in full and has no labels.
      constant: of a known value, the array if it is at hand.
      is_zero: a known value that is zero everywhere.
      made_by: of a known value, the step that computes it.
      whole: the known value that this one is cut from, or handed on from into a body.
      source: (parameter leaf, for each axis the leaf's axes it runs along) while the value is just a parameter.
      summed: the labels of the axes that were summed over, and their sizes, while the value is just such a sum.
      mat: inside a `shard_map`, how it varies over the mesh; JAX's type.
      held: for each axis, the number that the slices that are cut hold instead of zero, where that is known.
    """

    shape: tuple[int, ...]
    dtype: Any
    labels: tuple[Label, ...]
    zero: tuple[bool, ...]
    known: bool = False
    constant: Any = None
    is_zero: bool = False
    made_by: "Step | None" = None
    whole: "Value | None" = None
    source: tuple[int, tuple[tuple[int, ...], ...]] | None = None
    summed: tuple[tuple[np.ndarray, ...], int] | None = None
    mat: Any = None
    held: tuple[Any, ...] = ()

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)


@dataclass(eq=False, slots=True)
class Step:
    """One equation. `run` computes the outputs from smaller inputs; without one the primitive is bound as it was."""

    primitive: Any
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    run: "Run | None" = None
    extra: Any = None
    eqn: Any = None


@dataclass(eq=False, slots=True)
class Tape:
    """A function: its inputs, its steps, its outputs."""

    inputs: list[Value]
    steps: list[Step] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Call:
    """What a rule gets: one equation with its inputs.

    A rule returns the outputs (`Value`s; `Tracer.value` makes them), and may set `run` and `extra` for the evaluator.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: list[Value]
    avals: list[Any]
    tape: Tape
    run: "Run | None" = None
    extra: Any = None
    eqn: Any = None

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name


Run = Callable[[Any, Step, list[Any]], Sequence[Any]]
"""`(evaluator, step, inputs) -> outputs`, on arrays of which some indices are gone."""


@dataclass(frozen=True)
class Rule:
    """How a primitive's labels follow, and how it runs on smaller arrays."""

    label: Callable[["Tracer", Call], list[Value]]
    run: Run | None = None
    raw: bool = False  # gets known inputs as they are, instead of cut to labels


RULES: dict[str, Rule] = {}


def rule(*names: str, run: Run | None = None, raw: bool = False) -> Callable[[Any], Any]:
    """Register a label function as the rule of primitives, by name."""

    def register(label: Any) -> Any:
        for name in names:
            RULES[name] = Rule(label, run, raw)
        return label

    return register


class Tracer:
    """Walks a jaxpr, and gathers what the labels say of it."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.unknown: Counter[str] = Counter()  # primitives without a rule that met something prunable
        self.inexact: list[tuple[Label, str]] = []  # labels that are summed over where the cut slices are not zero
        self.steep: list[tuple[Label, str]] = []  # labels that pass an infinite derivative where they are zero
        self.pieces: list[np.ndarray] = []  # labels of parts of axes: none may become empty
        self.roles: dict[tuple[int, int], set[str]] = {}  # of (leaf, axis): in, out, scale, shift
        self.in_derivative = False
        self.stage = _staged  # a function of values at their original shapes; as things are in a `shard_map`, there

    def value(
        self,
        aval: Any,
        labels: Sequence[Label] | None = None,
        zero: Sequence[bool] | None = None,
        **more: Any,
    ) -> Value:
        """A value with the aval's shape; without labels it is kept whole."""
        shape = tuple(aval.shape)
        for size in shape:
            if not isinstance(size, int | np.integer):
                raise ValueError(
                    f"a value has the symbolic size {size}; channels work on traced sizes: trace with integers, "
                    "and export the shrunk function once for each shape"
                )
        labels = tuple(labels) if labels is not None else (None,) * len(shape)
        assert all(label is None or len(label) == n for label, n in zip(labels, shape, strict=True)), (aval, labels)
        more = {"mat": getattr(aval, "mat", None), **more}
        return Value(shape, aval.dtype, labels, tuple(zero) if zero is not None else (False,) * len(shape), **more)

    def use(self, value: Value, tape: Tape) -> Value:
        """The value with labels: new ones if it is known, which is then cut to them."""
        if not value.known:
            return value
        labels = [self.atoms.fresh(n) if n > 1 else None for n in value.shape]
        used = self.value(value, labels, (value.is_zero,) * value.ndim, is_zero=value.is_zero, whole=value)
        tape.steps.append(Step(None, {}, [value], [used], run=_cut))
        return used

    def freeze(self, value: Value, axes: Sequence[int], why: str) -> None:
        """Keep the axes of a value whole."""
        for axis in axes:
            self.atoms.freeze(value.labels[axis], why)

    def piece(self, label: Label, why: str) -> Label:
        """A label of a part of an axis; a single index is kept."""
        if label is None or len(label) <= 1:
            self.atoms.freeze(label, why)
            return None
        self.pieces.append(label)
        return label

    def contract(self, label: Label, zero: bool, why: str) -> None:
        """Note a sum along an axis: it changes if what is cut is not zero there."""
        if label is not None and not zero:
            self.inexact.append((label, why))

    def mark(self, value: Value, axis: int, role: str) -> None:
        """Note what a parameter's axis is for."""
        if value.source is not None:
            for leaf_axis in value.source[1][axis]:
                self.roles.setdefault((value.source[0], leaf_axis), set()).add(role)

    def walk(self, jaxpr: Any, inputs: Sequence[Value], tape: Tape) -> list[Value]:
        """Run the rules of a jaxpr's equations on labelled inputs; the steps go to `tape`."""
        jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())
        env: dict[Any, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.known(const)
            tape.steps.append(Step(None, {}, [], [env[var]], run=_constant, extra=const))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            read = [self._literal(v, tape) if isinstance(v, Literal) else env[v] for v in eqn.invars]
            outs = self._equation(eqn, read, tape)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [self._literal(v, tape) if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def body(self, jaxpr: Any, inputs: Sequence[Value]) -> Tape:
        """A tape of its own for a loop's or a branch's jaxpr; `inputs` are values made for it."""
        tape = Tape(list(inputs))
        tape.outputs = self.walk(jaxpr, inputs, tape)
        return tape

    def known(self, constant: Any) -> Value:
        """A value that is at hand."""
        if isinstance(constant, jax.core.Tracer):
            return self.value(constant, known=True)
        if hasattr(constant, "dtype") and jax.dtypes.issubdtype(constant.dtype, jax.dtypes.extended):
            return self.value(constant, known=True, constant=constant)
        small = np.size(constant) <= 1 << 16
        is_zero = small and np.asarray(constant).dtype != bool and not np.asarray(constant).any()
        return self.value(jax.typeof(constant), known=True, constant=constant, is_zero=bool(is_zero))

    def _literal(self, literal: Any, tape: Tape) -> Value:
        value = self.known(literal.val)
        tape.steps.append(Step(None, {}, [], [value], run=_constant, extra=literal.val))
        return value

    def _equation(self, eqn: Any, inputs: list[Value], tape: Tape) -> list[Value]:
        name, avals = eqn.primitive.name, [v.aval for v in eqn.outvars]
        if name in _INLINE:
            return self.walk(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), inputs, tape)
        if all(v.known for v in inputs) and not eqn.effects:
            outs = [self.value(aval, known=True) for aval in avals]
            step = Step(eqn.primitive, eqn.params, inputs, outs, eqn=eqn)
            for out in outs:
                out.made_by, out.is_zero = step, name in _KEEPS_ZERO and inputs[0].is_zero
            tape.steps.append(step)
            return outs
        found = RULES.get(name, _BARRIER)
        if not found.raw:
            inputs = [self.use(v, tape) for v in inputs]
        call = Call(eqn.primitive, eqn.params, inputs, avals, tape, run=found.run, eqn=eqn)
        outs = found.label(self, call)
        tape.steps.append(Step(eqn.primitive, eqn.params, call.inputs, outs, call.run, call.extra, eqn))
        return outs


def live(jaxpr: Any) -> Any:
    """The jaxpr without what no output and no effect depends on: a sum that nobody reads decides nothing."""
    left, _ = dce_jaxpr(jaxpr.jaxpr, True, True)
    return left if hasattr(left, "consts") else jaxpr.replace(jaxpr=left)  # one class in JAX 0.12, two before


def _staged(fn: Callable[..., Any], inputs: Sequence[Value]) -> Any:
    return jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))


def concrete(value: Value, limit: int = 1 << 20) -> np.ndarray | None:
    """A known value, whole, as a NumPy array; `None` if it depends on an argument, or is too large."""
    if value.whole is not None:
        return concrete(value.whole, limit)
    if math.prod(value.shape) > limit:
        return None
    if value.constant is None and value.made_by is not None:
        step = value.made_by
        inputs = [concrete(v, limit) for v in step.inputs]
        if any(x is None for x in inputs):
            return None
        if step.primitive.name == "pvary":  # means something only in a shard_map
            return inputs[0]
        with jax.core.eval_context():  # also where quax traces, which constants are not to meet
            outs = step.primitive.bind(*inputs, **step.primitive.get_bind_params(step.params))
        for out, x in zip(step.outputs, outs if step.primitive.multiple_results else [outs], strict=True):
            out.constant = x
    constant = value.constant
    if constant is None or (hasattr(constant, "dtype") and jax.dtypes.issubdtype(constant.dtype, jax.dtypes.extended)):
        return None
    return np.asarray(constant)


def barrier(tracer: Tracer, call: Call) -> list[Value]:
    """The rule of what has none: everything stays whole, and that is reported."""
    why = f"the primitive {call.name!r} has no rule"
    if any(tracer.atoms.resolve(label) is not None for value in call.inputs for label in value.labels):
        tracer.unknown[call.name] += 1
    for value in call.inputs:
        tracer.freeze(value, range(value.ndim), why)
    return [tracer.value(aval) for aval in call.avals]


_BARRIER = Rule(barrier)


def _constant(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    return [step.extra]


def _cut(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    return [runner.cut(inputs[0], step.outputs[0])]
