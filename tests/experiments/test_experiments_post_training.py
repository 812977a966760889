"""One-shot pruning on real digits, on a short setting; and what the recorded runs show."""

import dataclasses
from pathlib import Path

import pytest

from experiments import _results, prune_post_training

RECORDED = sorted((Path(__file__).parents[2] / "experiments" / "results").glob("prune_post_training_*.json"))


@pytest.mark.slow
def test_the_order_of_the_methods_on_a_short_run(tmp_path):
    result = prune_post_training.main(dataclasses.replace(prune_post_training.SHORT, out=tmp_path))
    assert _results.read(tmp_path / "prune_post_training_lenet_digits.json") == result
    assert (tmp_path / "prune_post_training_lenet_digits.png").stat().st_size > 10_000
    mean = {row.name: {key: figure.mean for key, figure in row.ours.items()} for row in result.rows}
    assert len(result.test_reads) == 2 * (1 + 5 * 3)  # each final model once
    assert mean["SparseGPT"]["80"] > mean["magnitude"]["80"]
    for key in ("50", "2:4"):
        assert mean["dense"][key] > 85 and mean["SparseGPT"][key] > mean["dense"][key] - 3


def test_refuses_more_calibration_images_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="calibration images, got 100000"):
        prune_post_training.main(dataclasses.replace(prune_post_training.SHORT, calibration=100_000, out=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_runs(path):
    """What makes up for its errors keeps more accuracy than what does not."""
    result = _results.read(path)
    mean = {row.name: {key: figure.mean for key, figure in row.ours.items()} for row in result.rows}
    assert len(result.seeds) == 3
    for key in ("50", "60", "70", "2:4"):
        assert mean["SparseGPT"][key] > max(mean["magnitude"][key], mean["Wanda"][key])
    assert mean["SparseGPT"]["2:4"] > mean["dense"]["2:4"] - 2
