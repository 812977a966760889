"""Quantization on real digits, on short settings; and what the recorded runs show."""

import dataclasses
from pathlib import Path

import pytest

from experiments import _results, quantize_codebooks, quantize_post_training, quantize_training

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def means(result):
    return {row.name: {key: figure.mean for key, figure in row.ours.items()} for row in result.rows}


def recorded(pattern):
    paths = sorted(RESULTS.glob(pattern))
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


@pytest.mark.slow
def test_post_training_on_a_short_run(tmp_path):
    config = dataclasses.replace(quantize_post_training.SHORT, out=tmp_path)
    result = quantize_post_training.main(config)
    assert _results.read(tmp_path / "quantize_post_training_lenet_digits.json") == result
    assert len(result.test_reads) == 2 * (1 + 8 * 2)  # each final model once
    mean = means(result)
    for name in quantize_post_training.METHODS:
        assert abs(mean[name]["8"] - mean["float"]["8"]) < 1
    with pytest.raises(ValueError, match="calibration images, got 100000"):
        quantize_post_training.main(dataclasses.replace(config, calibration=100_000))


@pytest.mark.slow
def test_training_on_a_short_run(tmp_path):
    result = quantize_training.main(dataclasses.replace(quantize_training.SHORT, out=tmp_path, seeds=1))
    assert _results.read(tmp_path / "quantize_training_lenet_digits.json") == result
    mean, steps = means(result), means(_results.read(tmp_path / "quantize_steps_lenet_digits.json"))
    assert mean["trained"]["binary"] > mean["rounded"]["binary"]
    assert steps["learned steps"]["2/2 bits"] > steps["rounded"]["2/2 bits"]


@pytest.mark.slow
def test_codebooks_on_a_short_run(tmp_path):
    result = quantize_codebooks.main(dataclasses.replace(quantize_codebooks.SHORT, out=tmp_path, seeds=1))
    assert _results.read(tmp_path / "quantize_codebooks_lenet_digits.json") == result
    assert (tmp_path / "quantize_codebooks_lenet_digits_centroids.png").stat().st_size > 10_000
    mean = means(result)
    assert mean["optimal"]["8"] > mean["float"]["8"] - 3


@recorded("quantize_post_training_*.json")
def test_recorded_post_training(path):
    """The goals: static int8 within half a point of float, 4 bits by GPTQ or AdaRound within one."""
    result = _results.read(path)
    mean = means(result)
    assert len(result.seeds) == 3
    for name in mean:
        assert mean[name]["8"] > mean["float"]["8"] - 0.5, name
    for name in ("GPTQ", "AdaRound"):
        assert mean[name]["4"] > mean["float"]["4"] - 1
        assert mean[name]["2"] > mean["to nearest"]["2"]


@recorded("quantize_training_*.json")
def test_recorded_training(path):
    mean = means(_results.read(path))
    for key in ("2 bits", "ternary", "binary"):
        assert mean["trained"][key] > mean["rounded"][key]


@recorded("quantize_steps_*.json")
def test_recorded_steps(path):
    mean = means(_results.read(path))
    assert mean["learned steps"]["2/2 bits"] > mean["rounded"]["2/2 bits"]


@recorded("quantize_codebooks_*.json")
def test_recorded_codebooks(path):
    mean = means(_results.read(path))
    for start in ("density", "linear", "optimal"):
        assert mean[f"{start}, trained"]["4"] > mean[start]["4"]
