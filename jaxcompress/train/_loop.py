import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxcompress.train._checkpoint import Checkpoints, opened, to_json
from jaxcompress.train._state import TrainState, split

_IN_FLIGHT = 2  # steps that the devices may have before them while the host goes on


class NonFiniteError(FloatingPointError):
    """Training has left the finite numbers."""


@runtime_checkable
class ResumableIterator(Protocol):
    """An iterator that knows its position: grain's `DatasetIterator` is one.

    `get_state()` is a JSON value; after `set_state` of it, on a new iterator of the same data, `next` gives what it
    would have given.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> Any:
        """The position."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position."""
        ...


StepFn = Callable[[TrainState, Any, Any], tuple[TrainState, Mapping[str, jax.Array]]]


def fit(
    step: StepFn,
    state: TrainState,
    batches: Iterator[Any],
    *,
    steps: int,
    frozen: Any = None,
    eval_fn: Callable[[TrainState], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    on_metrics: Callable[[int, dict[str, float]], None] | None = None,
    log_every: int = 1,
    stop_at_nonfinite: bool = True,
) -> TrainState:
    """Trains until the state has taken `steps` steps, resuming where an earlier call was cut off.

    If `checkpoints` has a checkpoint of a later step than the state's, the state and the data's position are restored
    from the latest one, and what follows is what would have followed: the same batches, keys and updates, bit for bit
    on the same devices. A call for steps that are taken already returns the restored state. So early stopping, or one
    more round, is a loop around `fit` with growing `steps`.

    The host runs ahead of the devices by two steps and reads a step's metrics when the devices are through with it: so
    nothing waits, and a loss that is not finite stops the run within two steps, named by its own.

    Args:
      step: as `make_step` makes it.
      state: a fresh state, placed where it shall lie. It is donated.
      batches: each process's own batches. With `checkpoints`, a `ResumableIterator`.
      steps: how many steps the state shall have taken in all.
      frozen: the teacher's variables, handed on to every step.
      eval_fn: gets the state and returns scalars by name, reported with `eval/` before the name.
      eval_every: after how many steps to call it; also after the last one. By default only then.
      checkpoints: a directory, or a `Checkpoints` for more choice.
      checkpoint_every: after how many steps to save; also after the last one. By default only then.
      on_metrics: called with a step's number (the first is 1) and its metrics, in order, on every process.
      log_every: it is called for every step that this divides, those of an evaluation or a checkpoint, and the last.
      stop_at_nonfinite: `False` goes on after a loss that is not finite, for an optimizer that skips such a step
        (`optax.apply_if_finite`). Parameters that are not finite are never saved or returned.

    Raises:
      NonFiniteError: the loss of a step, which the message names, or the parameters about to be saved or returned, are
        not finite.
      ValueError: the batches end before the last step.
      TypeError: `checkpoints` with an iterator that has no position to save.
    """
    for name, every in [("eval_every", eval_every), ("checkpoint_every", checkpoint_every), ("log_every", log_every)]:
        if every is not None and every < 1:
            raise ValueError(f"{name} must be at least 1, got {every}")
    if checkpoints is not None and not isinstance(batches, ResumableIterator):
        raise TypeError(
            f"to resume, batches must have get_state() and set_state(), as grain's iterators have; "
            f"{type(batches).__name__} has not. Train without checkpoints=, or iterate over a grain dataset"
        )

    def due(n: int, every: int | None) -> bool:
        return n == steps or (every is not None and n % every == 0)

    with opened(checkpoints) as saved:
        if saved is not None:
            to_json(batches.get_state())  # type: ignore[attr-defined]  # better now than at the first checkpoint
            if (saved.latest_step() or 0) > int(state.step):
                state, position = saved.restore(state, release=True)
                batches.set_state(position)  # type: ignore[attr-defined]
        reader = _Reader(on_metrics, stop_at_nonfinite)
        for n in range(int(state.step) + 1, steps + 1):
            state, metrics = step(state, _next(batches, n, steps), frozen)
            evaluates = eval_fn is not None and due(n, eval_every)
            saves = saved is not None and due(n, checkpoint_every)
            reader.add(n, metrics, evaluates or saves or due(n, log_every))
            if eval_fn is not None and evaluates:
                reader.read_all_but(1)
                reader.extend(eval_fn(state))
            if saves or n == steps:
                reader.read_all_but(0)
                _check_params(state, n)
            if saved is not None and saves:
                saved.save(state, batches.get_state(), reader.last)  # type: ignore[attr-defined]
            reader.read_all_but(_IN_FLIGHT)
    return state


class _Reader:
    """Metrics on their way from the devices: read in order, checked, and handed on."""

    def __init__(self, on_metrics: Callable[[int, dict[str, float]], None] | None, stop_at_nonfinite: bool):
        self._pending: deque[tuple[int, Mapping[str, Any], dict[str, float], bool]] = deque()
        self._on_metrics = on_metrics
        self._stop_at_nonfinite = stop_at_nonfinite
        self.last: dict[str, float] = {}

    def add(self, n: int, metrics: Mapping[str, Any], reported: bool) -> None:
        self._pending.append((n, metrics, {}, reported))

    def extend(self, evaluated: Mapping[str, Any]) -> None:
        """Adds an evaluation's results to the latest step's."""
        self._pending[-1][2].update({f"eval/{name}": float(value) for name, value in evaluated.items()})

    def read_all_but(self, count: int) -> None:
        """Reads all steps but the latest `count`."""
        while len(self._pending) > count:
            n, metrics, evaluated, reported = self._pending.popleft()
            loss = float(metrics["loss"])
            if self._stop_at_nonfinite and not math.isfinite(loss):
                raise NonFiniteError(f"the loss of step {n} is {loss}; all steps before it had a finite one")
            if reported:
                values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
                self.last = values | evaluated
                if self._on_metrics is not None:
                    self._on_metrics(n, self.last)


def _next(batches: Iterator[Any], n: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the batches ended before step {n} of {steps}; repeat the data, or take fewer steps"
        ) from None


def _check_params(state: TrainState, n: int) -> None:
    """A checkpoint of a broken model would push the good ones out."""
    if not _finite(split(state.params)[0]):
        raise NonFiniteError(f"the parameters are not finite after step {n}, though its loss is; they were not saved")


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
