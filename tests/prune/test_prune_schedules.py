"""Schedules against the papers' formulas, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import prune


def run(schedule: prune.Schedule, steps: int) -> list[tuple[int, float]]:
    return [(t, float(schedule.progress(jnp.int32(t)))) for t in range(steps) if bool(schedule.due(jnp.int32(t)))]


def test_polynomial_is_equation_1_of_zhu_and_gupta() -> None:
    s_i, s_f, t_0, n, dt = 0.2, 0.9, 100, 10, 7
    schedule = prune.polynomial(t_0, t_0 + n * dt, dt, initial=s_i)
    got = [(t, s_i + (s_f - s_i) * p) for t, p in run(schedule, 300)]
    paper = [(t, s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt)) ** 3) for t in range(t_0, t_0 + n * dt + 1, dt)]
    assert [t for t, _ in got] == [t for t, _ in paper]
    np.testing.assert_allclose([s for _, s in got], [s for _, s in paper], atol=1e-6)


def test_the_end_is_reached_where_every_does_not_divide() -> None:
    assert run(prune.polynomial(2, 9, 4), 20) == [(2, 0.0), (6, pytest.approx(1 - (3 / 7) ** 3)), (9, 1.0)]


def test_power_one_is_a_straight_ramp() -> None:
    np.testing.assert_allclose([p for _, p in run(prune.polynomial(0, 4, power=1), 9)], [0, 0.25, 0.5, 0.75, 1])


def test_one_shot_is_once() -> None:
    assert run(prune.one_shot(3), 10) == [(3, 1.0)]


def test_cosine_is_half_a_wave() -> None:
    got = run(prune.cosine(10, 50, 10), 60)
    assert [t for t, _ in got] == [10, 20, 30, 40, 50]
    np.testing.assert_allclose([p for _, p in got], [0, 0.1464466, 0.5, 0.8535534, 1], atol=1e-6)


def test_iterative_prunes_a_fifth_of_what_is_left() -> None:
    """Frankle & Carbin 2019: 100, 80, 64, 51.2, 41.0, 32.8 ... percent of the weights remain."""
    got = run(prune.iterative(final=0.7, rate=0.2, begin=5, every=10), 200)
    assert [t for t, _ in got] == [5, 15, 25, 35, 45, 55]
    np.testing.assert_allclose([1 - 0.7 * p for _, p in got], [0.8, 0.64, 0.512, 0.4096, 0.32768, 0.3], atol=1e-6)


def test_iterative_ends_when_a_power_is_the_final_sparsity() -> None:
    assert [t for t, _ in run(prune.iterative(final=0.75, rate=0.5, begin=0, every=1), 9)] == [0, 1]


def test_periodic_changes_phase_and_ends_sparse() -> None:
    got = run(prune.periodic(begin=4, end=19, dense=2, sparse=3), 40)
    assert got == [(4, 1.0), (7, 0.0), (9, 1.0), (12, 0.0), (14, 1.0), (17, 0.0), (19, 1.0)]
    assert run(prune.periodic(0, 6, dense=5, sparse=1), 40) == [(0, 1.0), (1, 0.0), (6, 1.0)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: prune.polynomial(10, 10), "ends before it begins: begin=10, end=10"),
        (lambda: prune.polynomial(10, 5), "ends before it begins"),
        (lambda: prune.polynomial(-1, 5), "begin must be a whole number of steps, 0 or more, got -1"),
        (lambda: prune.polynomial(0, 5, 0), "every must be a whole number of steps, 1 or more"),
        (lambda: prune.polynomial(0, 50, 2.5), "every must be a whole number of steps"),
        (lambda: prune.polynomial(0, float("inf")), "end must be a whole number of steps"),
        (lambda: prune.polynomial(0, 5, power=0), "power must be positive"),
        (lambda: prune.polynomial(0, 5, initial=1.0), r"initial must be in \[0, 1\)"),
        (lambda: prune.cosine(7, 7), "ends before it begins"),
        (lambda: prune.iterative(1.0, 0.2, 0, 1), r"must be in \(0, 1\), got 1.0 and 0.2"),
        (lambda: prune.iterative(0.9, 0.2, 0, 0), "every must be a whole"),
        (lambda: prune.periodic(5, 5, 1, 1), "ends before it begins"),
        (lambda: prune.periodic(0, 5, 0, 1), "dense must be a whole number of steps, 1 or more"),
        (lambda: prune.one_shot(-3), "step must be a whole"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
