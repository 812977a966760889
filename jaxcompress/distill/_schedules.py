"""When to teach what: weights and temperatures as functions of the step, and the teacher that follows its student.

A schedule maps a step, traced or not, to a number, as optax's do, and optax's own (`linear_schedule`,
`join_schedules`, ...) serve as well.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.distill._inputs import check_between, check_positive

Schedule = Callable[[int | jax.Array], jax.Array]


def early_stopped(weight: float, stop: int, fade: int = 0) -> Schedule:
    """The distillation term's weight until a step, nothing after: early-stopped distillation.

    Cho and Hariharan, "On the efficacy of knowledge distillation", 2019, section 4.2: late in training a small student
    is hurt by a teacher it can't match.

    Args:
      weight: until `stop`.
      stop: the first step with less.
      fade: how many steps the weight takes, linearly, to 0; 0 for at once.

    Returns:
      A schedule.
    """
    if stop < 0 or fade < 0:
        raise ValueError(f"stop and fade must not be negative, got {stop} and {fade}")
    return lambda step: weight * jnp.clip(1 - (jnp.asarray(step, jnp.float32) - stop + 1) / (fade + 1), 0, 1)


def warmed_up(weight: float, steps: int) -> Schedule:
    """`weight * min(step / steps, 1)`: a term that comes in gradually, as decoupled distillation's does (20 epochs)."""
    check_positive(steps, "steps")
    return lambda step: weight * jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1)


def annealed_temperature(start: float, end: float, steps: int) -> Schedule:
    """The temperature from `start` to `end`, linearly over `steps`: from vague targets to sharp ones.

    Jafari et al., "Annealing knowledge distillation", 2021, have the targets' temperature fall to 1.
    """
    for value, name in ((start, "start"), (end, "end"), (steps, "steps")):
        check_positive(value, name)
    return lambda step: start + (end - start) * jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0, 1)


class StageWeights(NamedTuple):
    """The weights of the two terms of `hints_first` at a step."""

    hint: jax.Array
    soft_target: jax.Array


def hints_first(hint_steps: int) -> Callable[[int | jax.Array], StageWeights]:
    """FitNet's two stages: hints alone for `hint_steps`, then soft targets alone.

    Romero et al., "FitNets: hints for thin deep nets", 2015, section 2.3 and algorithm 1.
    """
    if hint_steps < 0:
        raise ValueError(f"hint_steps must not be negative, got {hint_steps}")

    def weights(step: int | jax.Array) -> StageWeights:
        hinting = jnp.asarray(step) < hint_steps
        return StageWeights(hinting.astype("float32"), (~hinting).astype("float32"))

    return weights


def moving_average(teacher: Any, student: Any, decay: float, step: int | jax.Array | None = None) -> Any:
    """The teacher's parameters moved towards the student's: `decay * teacher + (1 - decay) * student`.

    Tarvainen and Valpola, "Mean teachers are better role models", 2017: the network teaches itself by the average of
    its past. Leaves that are not floating (counters), or 8-bit floats (codes), are the student's. Sums are made in
    float32, and each leaf keeps the teacher's dtype; keep the teacher in float32, since a half-precision average stops
    moving when its steps fall below its rounding.

    Args:
      teacher: a parameter tree.
      student: a tree of the same structure and shapes.
      decay: in [0, 1].
      step: if given, from 0, decay is at most `1 - 1 / (step + 1)`, so that early on the average is the plain mean of
        all students from step 0 rather than of the initial weights.

    Returns:
      The new teacher's tree.
    """
    check_between(decay, 0.0, 1.0, "decay")
    check_between(0 if step is None else step, 0, math.inf, "step")
    theirs: Any = jax.tree.structure(teacher)
    ours: Any = jax.tree.structure(student)
    if theirs != ours:
        raise ValueError(f"teacher and student must be trees of one structure, got {theirs} and {ours}")
    rate = jnp.asarray(decay) if step is None else jnp.minimum(decay, 1 - 1 / (jnp.asarray(step, float) + 1))

    def of_leaf(t: jax.Array, s: jax.Array) -> jax.Array:
        t, s = jnp.asarray(t), jnp.asarray(s)
        if not jnp.issubdtype(t.dtype, jnp.inexact) or t.dtype.itemsize == 1:
            return s
        wide = jnp.promote_types(t.dtype, jnp.float32)
        return (rate.astype(wide) * t.astype(wide) + (1 - rate).astype(wide) * s.astype(wide)).astype(t.dtype)

    return jax.tree.map(of_leaf, teacher, student)
