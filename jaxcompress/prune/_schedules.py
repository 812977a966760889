"""Schedules: at which steps the masks change, and how much of the final sparsity is reached by then."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Steps = Callable[[jax.Array], jax.Array]
"""Of a step (int32 [], the first update is step 0), a scalar."""


@dataclass(frozen=True)
class Schedule:
    """When masks change, and to what sparsity.

    At a step that is due, a layer of final sparsity `s` is brought to `initial + (s - initial) * progress(step)`.
    Between such steps the masks stand still and cost nothing but their application. Both functions are traced.

    Attributes:
      due: step -> bool [], whether the masks are computed anew at this step.
      progress: step -> float [] in [0, 1]. It may fall: then pruned weights come back.
      initial: the sparsity at progress 0, in [0, 1).
    """

    due: Steps
    progress: Steps
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial < 1:
            raise ValueError(f"initial must be in [0, 1), got {self.initial}")


def one_shot(step: int = 0) -> Schedule:
    """Everything at once, at `step` (0 is the first update); the masks never change again."""
    step = _step("step", step)
    return Schedule(lambda now: now == step, lambda now: jnp.ones((), jnp.float32))


def polynomial(begin: int, end: int, every: int = 1, *, power: float = 3, initial: float = 0.0) -> Schedule:
    """Gradual pruning: fast at first, ever slower towards the end (Zhu & Gupta 2017, "To prune, or not to prune").

    Their equation (1): at the steps `t = begin, begin + every, ...` up to and with `end`,
    `s_t = s_f + (s_i - s_f) * (1 - (t - begin) / (end - begin)) ** power`, with power 3.

    Args:
      begin: first step at which the masks change (0 is the first update).
      end: last one: the final sparsity is reached there, also if `every` steps would jump over it.
      every: steps between two changes, in which the weights can recover.
      power: 3 in the paper; 1 is a straight ramp.
      initial: the sparsity at `begin` (`s_i`).

    Raises:
      ValueError: the schedule ends before it begins, or a number is out of its range.
    """
    begin, end = _step("begin", begin), _step("end", end)
    if end <= begin:
        raise ValueError(
            f"the schedule ends before it begins: begin={begin}, end={end}; give an end after begin, "
            f"or use one_shot({begin}) to prune at once"
        )
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}")

    def due(step: jax.Array) -> jax.Array:
        return (step >= begin) & (step <= end) & (((step - begin) % every == 0) | (step == end))

    def progress(step: jax.Array) -> jax.Array:
        left = jnp.clip((end - step) / (end - begin), 0, 1)
        return 1 - left**power

    return Schedule(due, progress, initial)


def _step(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{name} must be a step, 0 or later, got {value}")
    return int(value)
