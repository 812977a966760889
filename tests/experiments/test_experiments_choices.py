import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from experiments._selection import Choice, select
from experiments._statistics import mean, paired_difference, std

finite = st.floats(-1e6, 1e6, allow_subnormal=False)


def test_the_best_on_validation(toy):
    scored = []

    def score(rate, split):
        scored.append((rate, split.name))
        return {0.1: 90.0, 0.3: 95.0, 1.0: 95.0}[rate]

    best, choice = select("learning rate", (0.1, 0.3, 1.0), score, toy.validation)
    assert best == 0.3  # of equals the first
    assert scored == [(0.1, "validation"), (0.3, "validation"), (1.0, "validation")]
    assert choice == Choice(
        what="learning rate",
        rule="largest accuracy on the validation split; of equals the first",
        validation_sha256=toy.validation.sha256,
        scores={"0.1": 90.0, "0.3": 95.0, "1.0": 95.0},
        chosen="0.3",
    )


def test_the_smallest_loss_and_divergence(toy):
    losses = {1: math.inf, 2: 0.5, 3: math.nan, 4: 0.4}
    best, choice = select("step", losses, lambda k, _: losses[k], toy.validation, measure="loss", largest=False)
    assert best == 4 and choice.scores == {"1": None, "2": 0.5, "3": None, "4": 0.4} and "smallest loss" in choice.rule


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_choice_on_other_data(toy, split):
    on = toy.test.read(for_model="a") if split == "test" else toy.train
    with pytest.raises(ValueError, match=f"on the validation split, not on the {split} split"):
        select("learning rate", (1, 2), lambda *_: pytest.fail("scored"), on)


@pytest.mark.parametrize(
    "candidates, message",
    [((), "there is none"), ((1, 2), "no candidate .* finite score: 1, 2"), ((1, 1), "called '1'")],
)
def test_nothing_to_choose_from(toy, candidates, message):
    with pytest.raises(ValueError, match=message):
        select("step", candidates, lambda *_: math.nan, toy.validation)


def test_a_choice_is_one_of_its_candidates():
    for scores in ({"a": 1.0}, {"a": 1.0, "b": None}):
        with pytest.raises(ValueError, match="'b' is not a candidate with a score"):
            Choice("x", "y", "0", scores, "b")


@given(st.lists(finite, min_size=2, max_size=20))
def test_mean_and_deviation_are_numpys(values):
    rounding = 1e-12 * max(map(abs, values)) + 1e-150  # numpy's squares underflow below that
    assert mean(values) == pytest.approx(np.mean(values), rel=1e-12, abs=rounding)
    assert std(values) == pytest.approx(np.std(values, ddof=1), rel=1e-9, abs=rounding)


def test_one_value_has_no_deviation():
    assert (mean([3.5]), std([3.5])) == (3.5, None)


def test_the_paired_interval_is_scipys(rng):
    first, second = rng.normal(1, 1, 7), rng.normal(0, 2, 7)
    for confidence in (0.5, 0.95, 0.99):
        ours = paired_difference(first.tolist(), second.tolist(), confidence)
        theirs = scipy.stats.ttest_rel(first, second).confidence_interval(confidence)
        np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=1e-12)
        assert ours.mean == pytest.approx((first - second).mean()) and ours.count == 7


def test_the_paired_interval_of_two_by_hand():
    # differences 1 and 3: mean 2, s = sqrt(2), s/sqrt(2) = 1; Student's t of one degree of freedom is Cauchy
    ours = paired_difference([2.0, 5.0], [1.0, 2.0])
    half = math.tan(math.pi * (0.975 - 0.5))
    assert (ours.mean, ours.low, ours.high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-12)


def test_pairing_takes_out_what_is_common_to_a_seed():
    ours = paired_difference([10.0, 20.0, 30.0], [9.0, 19.0, 29.0])
    assert (ours.mean, ours.low, ours.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "first, second, confidence, message",
    [
        ([1.0], [2.0], 0.95, "two or more pairs"),
        ([1.0, 2.0], [1.0], 0.95, "two or more pairs"),
        ([1.0, math.nan], [1.0, 2.0], 0.95, "finite"),
        ([1.0, 2.0], [1.0, math.inf], 0.95, "finite"),
        ([1.0, 2.0], [1.0, 2.0], 95.0, "confidence must be in"),
    ],
)
def test_bad_pairs(first, second, confidence, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second, confidence)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_means_of_nothing(values):
    for function in (mean, std):
        with pytest.raises(ValueError, match="finite values"):
            function(values)
