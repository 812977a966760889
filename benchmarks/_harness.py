"""What every benchmark stands on: interleaved timing, the interval of a median, compiled bytes, the registry.

To add a benchmark, put this into a public module of `benchmarks/` (`python -m benchmarks` imports them all):

    @benchmark("prune.step")
    def _step(rounds: int) -> Figures:
        '''Train step with masks and no mask update, against the plain adam step.'''
        plain = Stepper(mlp.train_step(optax.adam(1e-3)), mlp.init(optax.adam(1e-3)), mlp.batch())
        return paired(Stepper(pruning_step, pruning_state, mlp.batch()), plain, "plain adam step", rounds)

It may also return a dict of figures: key `"bytes"` of benchmark `prune.step` becomes the record `prune.step.bytes`,
key `""` the record `prune.step` itself. The docstring's first line is what `--list` shows.
"""

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it is compared with.

    Attributes:
      value: the number, in `unit`; for timings the median over the rounds.
      unit: `x` for a ratio to the baseline, `MB/s`, `bytes`, ...
      baseline: what it is compared with, in words.
      low: lower end of the interval around `value`.
      high: upper end of the interval.
      coverage: the probability that the interval holds the true median; 1 for what does not vary (bytes).
      rounds: how many times candidate and baseline were measured.
      detail: further numbers worth keeping, of JSON types.
    """

    value: float
    unit: str
    baseline: str
    low: float
    high: float
    coverage: float
    rounds: int
    detail: Mapping[str, Any] = field(default_factory=dict)


Figures = Figure | Mapping[str, Figure]
Benchmark = Callable[[int], Figures]
"""A benchmark takes the number of rounds and returns its figure or figures."""

REGISTRY: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark under `name`, such as `prune.step`."""
    if name in REGISTRY:
        raise ValueError(f"benchmark {name!r} is registered twice: give one of them another name")

    def register(function: Benchmark) -> Benchmark:
        if not (function.__doc__ or "").strip():
            raise ValueError(f"benchmark {name!r} needs a docstring: its first line is what --list shows")
        REGISTRY[name] = function
        return function

    return register


class Stepper:
    """A train step as a callable without arguments, for `paired`: each call goes on from the state of the last.

    Args:
      step: `step(state, *args) -> (state, result)`; it may donate the state.
      state: the first state. It is copied, so two steppers may start from the same one.
      *args: what every call gets besides the state.
    """

    def __init__(self, step: Callable[..., tuple[Any, Any]], state: Any, *args: Any) -> None:
        self.step, self.args = step, args
        self.state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)

    def __call__(self) -> Any:
        """Take one step; returns the new state and the step's result."""
        self.state, result = self.step(self.state, *self.args)
        return self.state, result


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """An interval for the median that assumes nothing about the distribution.

    The `k`-th smallest and `k`-th largest of `n` independent samples hold the true median between them with
    probability `1 - 2 P[Binomial(n, 1/2) < k]`. `k` is the largest that reaches `confidence`; below six samples none
    reaches 0.95, and the interval is the whole range with the coverage that it has.

    Returns:
      (low, high, coverage).
    """
    n = len(samples)
    if n == 0:
        raise ValueError("no samples: the interval of a median needs at least one round")
    if not all(math.isfinite(sample) for sample in samples):
        raise ValueError(f"samples must be finite, got {list(samples)}")
    ordered, k, tail = sorted(samples), 1, 0.5**n
    while k < n // 2:
        wider = tail + math.comb(n, k) * 0.5**n
        if 1 - 2 * wider < confidence:
            break
        k, tail = k + 1, wider
    return ordered[k - 1], ordered[n - k], max(0.0, 1 - 2 * tail)


def summary(samples: Sequence[float], unit: str, baseline: str, **detail: Any) -> Figure:
    """The figure of one sample a round: their median with its interval."""
    low, high, coverage = median_interval(samples)
    return Figure(statistics.median(samples), unit, baseline, low, high, coverage, len(samples), detail)


def exact(value: float, unit: str, baseline: str, **detail: Any) -> Figure:
    """The figure of a number that is the same on every run: compiled bytes, a file's size."""
    return Figure(value, unit, baseline, value, value, 1.0, 1, detail)


def time_pairs(
    candidate: Callable[[], Any],
    baseline: Callable[[], Any],
    rounds: int = 9,
    *,
    calls: int | None = None,
    seconds: float = 0.1,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Mean seconds a call of candidate and of baseline, one pair a round, called in the order A B, B A, A B, ...

    They alternate call by call, so that a drift or a busy spell of the machine meets both. Each call is waited for
    (`jax.block_until_ready`). Both are called once first, so that compiling is not timed. The mean keeps what only
    some calls pay (a mask update every tenth step).

    Args:
      candidate: called without arguments; what it returns is waited for.
      baseline: likewise.
      rounds: how many pairs to return.
      calls: calls of each in one round; by default as many as make the baseline take `seconds`.
      seconds: see `calls`.
      warm: whether each is called in a row, for `seconds` a round and once before that isn't timed, as a network that
        serves is. Otherwise caches and allocator are as the other one left them: right for what meets its weights once
        in a while, such as one layer of many.
      clock: the time in seconds (a test may hand in its own).

    Returns:
      (seconds a call of the candidate, seconds a call of the baseline), one entry a round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    jax.block_until_ready(candidate())
    jax.block_until_ready(baseline())

    def fitting(function: Callable[[], Any]) -> int:
        return calls or max(1, math.ceil(seconds / max(_seconds(function, clock), 1e-9)))

    both = candidate, baseline
    totals: tuple[list[float], list[float]] = ([], [])
    with _no_collection():
        counts = [fitting(f) for f in both] if warm else [fitting(baseline)] * 2
        for i in range(rounds):
            pair = [0.0, 0.0]
            if warm:
                for which in (i % 2, 1 - i % 2):
                    jax.block_until_ready(both[which]())
                    pair[which] = sum(_seconds(both[which], clock) for _ in range(counts[which]))
            else:
                for j in range(counts[0]):
                    first = (i + j) % 2  # A B, B A, A B, ...
                    for which in (first, 1 - first):
                        pair[which] += _seconds(both[which], clock)
            for times, total, count in zip(totals, pair, counts, strict=True):
                times.append(total / count)
            gc.collect()
    return totals


def paired(
    candidate: Callable[[], Any],
    baseline: Callable[[], Any],
    baseline_name: str,
    rounds: int = 9,
    *,
    calls: int | None = None,
    seconds: float = 0.1,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    **detail: Any,
) -> Figure:
    """How many times longer the candidate takes: the median of the rounds' ratios, timed as `time_pairs` says.

    Args:
      candidate: called without arguments; a train step goes into a `Stepper`.
      baseline: likewise.
      baseline_name: the baseline in words, for the record.
      rounds: how many; nine give an interval of 96 % coverage.
      calls: see `time_pairs`.
      seconds: see `time_pairs`.
      warm: see `time_pairs`.
      clock: see `time_pairs`.
      **detail: kept in the record's detail, beside the two median times in milliseconds.
    """
    ours, theirs = time_pairs(candidate, baseline, rounds, calls=calls, seconds=seconds, warm=warm, clock=clock)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    medians = {"ms": 1e3 * statistics.median(ours), "baseline_ms": 1e3 * statistics.median(theirs)}
    return summary(ratios, "x", baseline_name, **medians, **detail)


def faster(
    candidate: Callable[[], Any], baseline: Callable[[], Any], baseline_name: str, rounds: int = 9, **kwargs: Any
) -> Figure:
    """How many times faster the candidate is: `paired` the other way round, for what should be large."""
    times = paired(baseline, candidate, baseline_name, rounds, **kwargs)
    swapped = {**times.detail, "ms": times.detail["baseline_ms"], "baseline_ms": times.detail["ms"]}
    return dataclasses.replace(times, unit="x faster", detail=swapped)


def compiled_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """What XLA sets aside to run `function(*args, **kwargs)`: bytes of temporaries, arguments, outputs, aliases.

    `function` may be jitted already (then its own donation and shardings count); arguments may be
    `jax.ShapeDtypeStruct`s. Deterministic for one version and one target.
    """
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    analysis = jitted.lower(*args, **kwargs).compile().memory_analysis()
    return {
        "temp": analysis.temp_size_in_bytes,
        "argument": analysis.argument_size_in_bytes,
        "output": analysis.output_size_in_bytes,
        "alias": analysis.alias_size_in_bytes,
    }


def _seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the garbage collector back while something is timed, as `timeit` does."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
