"""What a function costs after a plan: the multiplications and additions of its products and convolutions."""

import math
from typing import Any

import numpy as np

from jaxcompress.prune.channels._groups import Groups
from jaxcompress.prune.channels._plan import Plan
from jaxcompress.prune.channels._rules_product import product_axes
from jaxcompress.prune.channels._run import Runner
from jaxcompress.prune.channels._shrink import dropped_atoms
from jaxcompress.prune.channels._tape import Step, Tape


def flops(groups: Groups, plan: Plan | None = None) -> int:
    """Floating-point operations of matrix products and convolutions, for the inputs that the groups were found with.

    A multiplication and an addition count two. A `scan`'s body counts once a turn, a `shard_map`'s once a device, a
    `while`'s once in all, and of branches the dearest one.

    Args:
      groups: of the function.
      plan: what stays; without one, everything.

    Raises:
      ValueError: the plan is of another function's groups.
    """
    if plan is not None and dict(plan.shapes) != dict(groups.shapes):
        raise ValueError("the plan is of other groups: make it from those whose operations are counted")
    atoms = groups.traced.tracer.atoms
    dropped = np.zeros(atoms.count, bool) if plan is None else dropped_atoms(groups.traced, plan)
    return _of_tape(Runner(groups.traced.tracer, dropped), groups.traced.tape)


def _of_tape(runner: Runner, tape: Tape) -> int:
    return sum(_of_step(runner, step) for step in tape.steps)


def _of_step(runner: Runner, step: Step) -> int:
    name = step.primitive.name if step.primitive is not None else ""
    if name in ("dot_general", "ragged_dot_general"):
        (contract, _), (batch, _) = product_axes(step)
        x, out = runner.shape(step.inputs[0]), runner.shape(step.outputs[0])
        if len(out) > len(x) + step.inputs[1].ndim - 2 * len(contract) - len(batch):  # each group's rows, once
            out = out[1:]
        return 2 * math.prod(out) * math.prod(x[i] for i in contract)
    if name == "conv_general_dilated":
        kernel, spec = runner.shape(step.inputs[1]), step.params["dimension_numbers"].rhs_spec
        return 2 * math.prod(runner.shape(step.outputs[0])) * math.prod(kernel[i] for i in spec[1:])
    inner = [_of_tape(runner, tape) for tape in _tapes(step, name)]
    if name == "cond":
        return max(inner, default=0)
    turns = step.params["length"] if name == "scan" else 1
    if name == "shard_map":  # every device's work
        turns = math.prod(step.params["mesh"].shape[axis] for axis in step.params["newly_manual_axes"])
    return sum(inner) * turns


def _tapes(step: Step, name: str) -> list[Any]:
    if isinstance(step.extra, Tape):
        return [step.extra]
    if name.startswith("custom_"):
        return [step.extra[0]] if step.extra else []
    return [x for x in step.extra if isinstance(x, Tape)] if isinstance(step.extra, list | tuple) else []
