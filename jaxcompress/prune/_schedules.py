"""Schedules: at which steps the masks change, and how much of the final sparsity is reached by then."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcompress._numbers import real

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
        if not 0 <= real("initial", self.initial) < 1:
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
    begin, end, every = _step("begin", begin), _step("end", end), _step("every", every, 1)
    if end <= begin:
        raise ValueError(
            f"the schedule ends before it begins: begin={begin}, end={end}; give an end after begin, "
            f"or use one_shot({begin}) to prune at once"
        )
    if not 0 < real("power", power) < math.inf:
        raise ValueError(f"power must be positive, got {power}")

    def due(step: jax.Array) -> jax.Array:
        return (step >= begin) & (step <= end) & (((step - begin) % every == 0) | (step == end))

    def progress(step: jax.Array) -> jax.Array:
        left = jnp.clip((end - step) / (end - begin), 0, 1)
        return 1 - left**power

    return Schedule(due, progress, initial)


def cosine(begin: int, end: int, every: int = 1, *, initial: float = 0.0) -> Schedule:
    """Gradual pruning along half a cosine: slow at both ends, `progress = (1 - cos(pi * u)) / 2`.

    Arguments, the steps that are due and errors are those of `polynomial`; `u` runs from 0 at `begin` to 1 at `end`.
    """
    ramp = polynomial(begin, end, every, power=1, initial=initial)
    return Schedule(ramp.due, lambda step: (1 - jnp.cos(jnp.pi * ramp.progress(step))) / 2, initial)


def iterative(final: float, rate: float, begin: int, every: int) -> Schedule:
    """Prunes the part `rate` of the *remaining* weights every `every` steps, until `final` of them are gone.

    As in Han et al. 2015 and in the lottery tickets of Frankle & Carbin 2019 (rate 0.2): after the `i`-th time
    `1 - (1 - rate) ** i` are pruned, and at the last exactly `final`. Give the rules the same final sparsity; a layer
    of another one gets its own in proportion.

    Raises:
      ValueError: `final` or `rate` outside (0, 1), or a number of steps out of its range.
    """
    begin, every = _step("begin", begin), _step("every", every, 1)
    if not (0 < real("final", final) < 1 and 0 < real("rate", rate) < 1):
        raise ValueError(f"final sparsity and rate must be in (0, 1), got {final} and {rate}")
    times = math.ceil(math.log(1 - final) / math.log(1 - rate) - 1e-9)

    def progress(step: jax.Array) -> jax.Array:
        done = (step - begin) // every + 1
        return jnp.where(done >= times, 1.0, (1 - (1 - rate) ** done.astype(jnp.float32)) / final)

    last = begin + (times - 1) * every
    return Schedule(lambda step: (step >= begin) & (step <= last) & ((step - begin) % every == 0), progress)


def periodic(begin: int, end: int, dense: int, sparse: int) -> Schedule:
    """Alternates dense and sparse phases between `begin` and `end`, and stays sparse after (AC/DC, Peste et al. 2021).

    From `begin` on the weights are sparse for `sparse` steps, then dense for `dense` steps, and so on. When a dense
    phase begins, pruned weights may move again, starting from zero. At `end` the final sparsity is taken for good.

    Raises:
      ValueError: the schedule ends before it begins, or a phase is shorter than a step.
    """
    begin, end = _step("begin", begin), _step("end", end)
    dense, sparse = _step("dense", dense, 1), _step("sparse", sparse, 1)
    if end <= begin:
        raise ValueError(f"the schedule ends before it begins: begin={begin}, end={end}")

    def is_sparse(step: jax.Array) -> jax.Array:
        return ((step - begin) % (dense + sparse) < sparse) | (step >= end)

    def due(step: jax.Array) -> jax.Array:
        inside = (step >= begin) & (step <= end)
        return inside & ((step == begin) | (is_sparse(step) != is_sparse(step - 1)) | (step == end))

    return Schedule(due, lambda step: is_sparse(step).astype(jnp.float32))


def _step(name: str, value: int, least: int = 0) -> int:
    if not real(name, value) >= least or value % 1 != 0:  # 1e4 is one, and so is a NumPy integer
        raise ValueError(f"{name} must be a whole number of steps, {least} or more, got {value}")
    return int(value)
