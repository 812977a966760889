"""The evaluator: a tape's function on arrays of which some indices are gone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax._src import source_info_util

from jaxcompress.prune.channels._convolve import is_as_written, is_compressed
from jaxcompress.prune.channels._labels import Label
from jaxcompress.prune.channels._once import once, shared
from jaxcompress.prune.channels._rules_shape import pick
from jaxcompress.prune.channels._tape import Step, Tape, Tracer, Value


class Runner:
    """Evaluates tapes with some atoms dropped.

    Args:
      tracer: of the tapes, after the walk.
      dropped: of each atom, whether it goes; bool [atoms].
      rederive: divide means by the widths that are left, instead of those that were traced.
    """

    def __init__(self, tracer: Tracer, dropped: np.ndarray, rederive: bool = False) -> None:
        self.tracer, self.dropped, self.rederive = tracer, dropped, rederive
        self._left: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def positions(self, label: Label, n: int) -> np.ndarray:
        """The indices that are left of an axis of `n`."""
        if label is None:
            return np.arange(n)
        found = self._left.get(id(label))
        if found is None:
            found = label, np.flatnonzero(self.tracer.atoms.kept(label, self.dropped))
            self._left[id(label)] = found
        return found[1]

    def count(self, label: np.ndarray) -> int:
        """How many indices of a label are left."""
        return len(self.positions(label, len(label)))

    def shape(self, value: Value) -> tuple[int, ...]:
        """The value's shape now."""
        pairs = zip(value.labels, value.shape, strict=True)
        return tuple(n if label is None else self.count(label) for label, n in pairs)

    def cut(self, x: Any, value: Value) -> Any:
        """A whole array, cut to what is left of the value."""
        for axis, (label, n) in enumerate(zip(value.labels, value.shape, strict=True)):
            if label is not None:
                x = pick(x, self.positions(label, n), axis)
        return x

    def width(self, labels: Sequence[np.ndarray], width: int) -> float | None:
        """What a mean over `width` elements, along axes with these labels, divides by; `None`: as traced."""
        if not self.rederive:
            return None
        total = float(width)
        for label in labels:
            total = total / len(label) * self.count(label)
        return total

    def run(self, tape: Tape, inputs: Sequence[Any]) -> list[Any]:
        """The tape's outputs."""
        env: dict[Value, Any] = dict(zip(tape.inputs, inputs, strict=True))
        kept = set() if is_as_written() else shared(tape)
        for step in tape.steps:
            outs = self._step(step, [env[v] for v in step.inputs])
            for value, out in zip(step.outputs, outs, strict=True):
                if not value.known and np.shape(out) != self.shape(value):
                    raise AssertionError(
                        f"{step.primitive} gave {np.shape(out)} where {self.shape(value)} was planned; "
                        "please report this, with the function"
                    )
                env[value] = once(out) if value in kept and not is_compressed(out) else out
        return [env[v] for v in tape.outputs]

    def _step(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        if step.eqn is None:
            assert step.run is not None
            return step.run(self, step, inputs)
        stack = source_info_util.current_name_stack() + step.eqn.source_info.name_stack
        with source_info_util.user_context(step.eqn.source_info.traceback, name_stack=stack), step.eqn.ctx.manager:
            if step.run is not None:
                return step.run(self, step, inputs)
            outs = step.primitive.bind(*inputs, **step.primitive.get_bind_params(step.params))
            return outs if step.primitive.multiple_results else [outs]
