"""The statistics of the benchmarks, on timings whose truth is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import _harness as harness
from benchmarks import _mlp as mlp


class Clock:
    """A clock that goes on only when something says that it takes time."""

    def __init__(self, drift=0.0):
        self.now, self.drift, self.order = 0.0, drift, []

    def __call__(self):
        return self.now

    def job(self, name, seconds):
        def run():
            self.order.append(name)
            took = next(seconds) if hasattr(seconds, "__next__") else seconds
            self.now += took * (1 + self.drift * self.now)

        return run


# (samples, rank of the interval's ends, coverage): the usual table for the median's 95 % interval
TABLE = [(6, 1, 0.969), (8, 1, 0.992), (9, 2, 0.961), (10, 2, 0.979), (15, 4, 0.965), (20, 6, 0.959), (50, 18, 0.967)]


@pytest.mark.parametrize(("n", "rank", "coverage"), TABLE)
def test_the_interval_of_the_median_is_the_binomial_one(n, rank, coverage):
    samples = np.random.default_rng(n).permutation(np.arange(1, n + 1) ** 3.0)
    low, high, covered = harness.median_interval(list(samples))
    assert (low, high) == (rank**3, (n + 1 - rank) ** 3)
    assert covered == pytest.approx(coverage, abs=5e-4)


def test_the_interval_covers_the_median_as_often_as_it_says(rng):
    hits = 0
    for _ in range(4000):
        low, high, coverage = harness.median_interval(list(rng.lognormal(sigma=2, size=9)))
        hits += low <= 1 <= high  # the median of a lognormal is 1
    assert abs(hits / 4000 - coverage) < 4 * math.sqrt(coverage * (1 - coverage) / 4000)


@pytest.mark.parametrize(("n", "coverage"), [(1, 0), (2, 0.5), (3, 0.75), (5, 0.9375)])
def test_few_samples_give_their_range_and_say_how_little_it_covers(n, coverage):
    assert harness.median_interval([float(i) for i in range(n)]) == (0, n - 1, coverage)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_samples_that_are_no_numbers_are_refused(samples):
    with pytest.raises(ValueError, match=r"no samples|finite"):
        harness.median_interval(samples)


def test_candidate_and_baseline_alternate():
    clock = Clock()
    harness.time_pairs(clock.job("A", 1), clock.job("B", 1), 4, calls=1, clock=clock)
    assert "".join(clock.order[2:]) == "ABBAABBA"  # the first two warm up
    clock = Clock()
    harness.time_pairs(clock.job("A", 1), clock.job("B", 1), 2, calls=3, clock=clock)
    assert "".join(clock.order[2:]) == "ABBAAB" + "BAABBA"


def test_warm_calls_come_in_a_row_after_one_that_is_not_timed():
    clock = Clock()
    cold_first = iter([1.0, 1.0, *[9.0, 1.0, 1.0, 1.0] * 4])  # compiled, counted, then four rounds
    times, others = harness.time_pairs(
        clock.job("A", cold_first), clock.job("B", 3), 4, seconds=3, warm=True, clock=clock
    )
    assert "".join(clock.order[4:]) == "AAAABB" + "BBAAAA" + "AAAABB" + "BBAAAA"
    assert (times, others) == ([1.0] * 4, [3.0] * 4)


def test_the_ratio_is_exact_on_steady_timings():
    clock = Clock()
    figure = harness.paired(clock.job("A", 0.03), clock.job("B", 0.02), "B", 9, calls=2, clock=clock, note="kept")
    assert (figure.value, figure.low, figure.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (figure.rounds, figure.unit, figure.baseline) == (9, "x", "B")
    assert figure.detail == {"ms": pytest.approx(30), "baseline_ms": pytest.approx(20), "note": "kept"}


def test_a_drift_of_the_machine_does_not_move_the_ratio():
    clock = Clock(drift=0.01)  # after 1,000 seconds everything takes eleven times as long
    figure = harness.paired(clock.job("A", 1), clock.job("B", 1), "B", 10, calls=4, clock=clock)
    assert clock.now > 100
    assert figure.value == pytest.approx(1, abs=0.01)


def test_busy_rounds_do_not_move_the_median():
    clock = Clock()
    slow = iter([1, *([1.2] * 4), 50, 70, *([1.2] * 3)])
    figure = harness.paired(clock.job("A", slow), clock.job("B", 1), "B", 9, calls=1, clock=clock)
    assert figure.value == pytest.approx(1.2)
    assert figure.high == pytest.approx(50)  # the interval does show them: two of nine


def test_what_only_some_calls_pay_is_in_the_mean():
    clock = Clock()
    every_fifth = iter([6.0 if i % 5 == 0 else 1.0 for i in range(1000)])
    figure = harness.paired(clock.job("A", every_fifth), clock.job("B", 1), "B", 9, calls=10, clock=clock)
    assert figure.value == pytest.approx(2)


def test_the_number_of_calls_fits_the_time():
    clock = Clock()
    harness.time_pairs(clock.job("A", 1), clock.job("B", 0.015), 1, seconds=0.1, clock=clock)
    assert clock.order.count("A") == 1 + 7  # ceil(0.1 / 0.015), and one to warm up
    with pytest.raises(ValueError, match="rounds"):
        harness.time_pairs(lambda: None, lambda: None, 0)


def test_an_exact_figure_has_no_spread():
    figure = harness.exact(12, "bytes", "the same in float32", float32=48)
    assert (figure.low, figure.value, figure.high, figure.coverage, figure.detail) == (12, 12, 12, 1, {"float32": 48})


def test_steppers_go_on_from_their_own_state_though_the_step_donates_it():
    step = jax.jit(lambda state, x: ({"n": state["n"] + x}, state["n"].sum()), donate_argnums=0)
    start = {"n": jnp.zeros(1000)}
    one, two = harness.Stepper(step, start, 1.0), harness.Stepper(step, start, 2.0)
    for _ in range(3):
        one(), two()
    assert (one.state["n"][0], two.state["n"][0], start["n"][0]) == (3, 6, 0)


def test_compiled_bytes_are_those_of_the_buffers():
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    size = 4 * 512 * 256
    plain = harness.compiled_bytes(lambda x: x + 1, x)
    assert (plain["argument"], plain["output"], plain["alias"]) == (size, size, 0)
    donated = harness.compiled_bytes(jax.jit(lambda x: x + 1, donate_argnums=0), x)
    assert donated["alias"] == size
    between = harness.compiled_bytes(lambda x: (x @ x.T) @ x, x)
    assert 4 * 512 * 512 <= between["temp"] < 4 * 512 * 512 + 2 * size


def test_names_are_registered_once_and_with_a_docstring():
    def documented(rounds):
        """One."""

    try:
        assert harness.benchmark("test.once")(documented) is documented
        with pytest.raises(ValueError, match="twice"):
            harness.benchmark("test.once")
        with pytest.raises(ValueError, match="docstring"):
            harness.benchmark("test.silent")(lambda rounds: None)
        assert "test.silent" not in harness.REGISTRY
    finally:
        harness.REGISTRY.pop("test.once", None)


@pytest.mark.slow
def test_the_shared_mlp_is_what_it_says_and_learns():
    weights = mlp.params()
    assert sum(x.size for x in jax.tree.leaves(weights)) == 784 * 1024 + 2 * 1024**2 + 10240 + 3 * 1024 + 10
    inputs, labels = mlp.batch(size=16)
    assert (inputs.shape, labels.shape) == ((16, 784), (16,))
    optimizer = optax.adam(1e-3)
    step, state = mlp.train_step(optimizer), mlp.init(optimizer)
    before = optax.losses.softmax_cross_entropy_with_integer_labels(mlp.apply(weights, inputs), labels).mean()
    losses = []
    for _ in range(5):
        state, loss = step(state, (inputs, labels))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(float(before), rel=1e-5)
    assert losses[-1] < 0.1 * losses[0]


def test_the_shared_step_takes_the_candidates_apply_and_optimizer():
    optimizer = optax.sgd(0.0)
    step = mlp.train_step(optimizer, apply=lambda weights, x: 0 * mlp.apply(weights, x))
    state, loss = step(mlp.init(optimizer), mlp.batch(size=4))
    assert float(loss) == pytest.approx(math.log(10))
    np.testing.assert_array_equal(state[0]["Dense_0"]["kernel"], mlp.params()["Dense_0"]["kernel"])
