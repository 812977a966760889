"""Quantization on real digits, on short settings; and what the recorded runs show."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    _quantizing,
    _results,
    quantize_codebooks,
    quantize_normalised,
    quantize_peer,
    quantize_post_training,
    quantize_training,
)
from experiments._command import UsageError
from jaxcompress import quantize

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
    assert len(result.test_reads) == 2 * (1 + 9 * 2 + 12)  # each final model once
    formats = means(_results.read(tmp_path / "quantize_formats_lenet_digits.json"))
    assert (
        formats["float32"]["bytes"] > 1.9 * formats["bfloat16"]["bytes"] > 3.5 * formats["nf4, groups of 64"]["bytes"]
    )
    mean = means(result)
    for name in quantize_post_training.METHODS:
        assert abs(mean[name]["8"] - mean["float"]["8"]) < 1
    with pytest.raises(ValueError, match="calibration images, got 100000"):
        quantize_post_training.main(dataclasses.replace(config, calibration=100_000))


@pytest.mark.slow
def test_training_on_a_short_run(tmp_path, monkeypatch):
    """Every arm; and a table of fewer bits from what was kept, without training under quantization."""
    config = dataclasses.replace(quantize_training.SHORT, out=tmp_path, seeds=1, resume=tmp_path / "kept")
    result = quantize_training.main(config)
    assert _results.read(tmp_path / "quantize_training_lenet_digits.json") == result
    mean, steps = means(result), means(_results.read(tmp_path / "quantize_steps_lenet_digits.json"))
    assert mean["trained"]["binary"] > mean["rounded"]["binary"]
    assert steps["learned steps"]["2/2 bits"] > steps["rounded"]["2/2 bits"]
    assert "kept" not in result.command
    monkeypatch.setattr(quantize_training, "trainer_for", lambda *_: None)
    fewer = quantize_training.main(dataclasses.replace(config, bits=(3,), both=(), out=tmp_path / "again"))
    assert means(fewer)["distilled"] == {key: mean["distilled"][key] for key in means(fewer)["distilled"]}
    assert {read.model for read in fewer.test_reads} < {read.model for read in result.test_reads}


@pytest.mark.slow
def test_with_norms_on_a_short_run(tmp_path):
    """Every arm; and from what was kept, without training under quantization."""
    config = dataclasses.replace(quantize_normalised.SHORT, out=tmp_path, seeds=1, resume=tmp_path / "kept")
    result = quantize_normalised.main(config)
    assert _results.read(tmp_path / "quantize_normalised_digits.json") == result
    assert len(result.test_reads) == 2 + 3 * 4
    mean = means(result)
    for key in ("2 bits", "ternary", "binary"):
        assert mean["trained"][key] > mean["rounded"][key] + 10
        assert mean["distilled"][key] > mean["rounded"][key]
    assert quantize_normalised.main(config).rows == result.rows
    with pytest.raises(UsageError, match="other settings"):
        quantize_normalised.main(dataclasses.replace(config, rate=0.1))


def test_a_training_that_diverges_is_measured_too():
    """Weights of 1e25 make products that overflow: the steps behind are left out, so that weights stay finite."""
    config = quantize_training.Config(model="folded", epochs=1, tuning=1)
    lab = _quantizing.lab_for(config)
    scheme = {"kernel$": quantize.Affine(2, symmetric=False, activation_bits=2)}
    trainer = quantize_training.trainer_for(lab, config, quantize.fake(lab.apply, scheme))
    begun = lab.trained(0)
    arguments = {"rate": jnp.float32(1e25), "teacher": begun, "share": jnp.float32(0)}
    params = trainer(begun, arguments, seed=0, epochs=1)
    assert jnp.max(jnp.abs(params["Dense_0"]["kernel"])) > 1e20
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(quantize.convert(params, scheme)))
    with pytest.raises(ValueError, match="finite"):
        quantize.convert(lab.trainer(_quantizing.sgd)(begun, arguments, seed=0, epochs=1), scheme)


def test_formats_in_training_on_a_short_run(tmp_path):
    config = dataclasses.replace(quantize_training.SHORT, out=tmp_path, seeds=1, tuning=1, formats=True)
    result = quantize_training.main(config)
    assert result.name == "quantize_trained_formats_lenet_digits"
    mean = means(result)
    assert set(mean) == {"float", "rounded", "trained", "distilled"} and set(mean["float"]) == set(
        quantize_training.FORMATS
    )
    for way in ("rounded", "trained", "distilled"):
        assert mean[way]["mx, fp8 e4m3"] > mean["float"]["mx, fp8 e4m3"] - 2


def test_codebooks_on_a_short_run(tmp_path):
    result = quantize_codebooks.main(dataclasses.replace(quantize_codebooks.SHORT, out=tmp_path, seeds=1))
    assert _results.read(tmp_path / "quantize_codebooks_lenet_digits.json") == result
    assert (tmp_path / "quantize_codebooks_lenet_digits_centroids.png").stat().st_size > 10_000
    mean = means(result)
    assert mean["optimal"]["8"] > mean["float"]["8"] - 3


@pytest.mark.slow
def test_folded_networks_are_the_trained_ones(tmp_path):
    """Of what batch normalisation made: the same logits, from kernels and biases; kept, and found again."""
    lab = _quantizing.lab_for(_quantizing.Config(model="folded", epochs=2, batch_size=64, floats=tmp_path))
    params = lab.trained(0)
    begun, extras = lab.normalised.begin(0)
    arguments = {"rate": jnp.float32(lab.rate)}
    params_, extras = lab._normalised(begun, arguments, seed=0, epochs=2, extras=extras)
    wanted = lab.normalised.model.apply({"params": params_, **extras}, lab.images[:50])
    np.testing.assert_allclose(lab.apply(params, lab.images[:50]), wanted, rtol=1e-3, atol=1e-3)
    assert len(list(tmp_path.iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, lab.trained(0), params)


@pytest.mark.slow
def test_the_decoder_on_a_short_run(tmp_path):
    config = dataclasses.replace(
        quantize_training.SHORT,
        model="decoder",
        data="pydoc",
        examples=500,
        out=tmp_path,
        seeds=1,
        bits=(2,),
        both=(),
    )
    mean = means(quantize_training.main(config))
    assert mean["trained"]["2 bits bpc"] < mean["rounded"]["2 bits bpc"] > mean["float"]["2 bits bpc"]
    assert mean["trained"]["binary bpc"] < mean["rounded"]["binary bpc"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="needs qwix")
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # which qwix 0.1.8 still names
def test_beside_qwix_on_a_short_run(tmp_path):
    # qwix tells weights from inputs by their shapes: 64 rows of 64 would be taken for the kernel that they meet
    config = dataclasses.replace(quantize_peer.SHORT, model="folded", batch_size=48, out=tmp_path)
    mean = means(quantize_peer.main(config))
    for name in ("jaxcompress, w8", "jaxcompress, w8a8", "qwix, w8a8"):  # qwix refuses convolutions' weights alone
        assert abs(mean[name]["kept"] - mean["float32"]["kept"]) < 3
        assert mean[name]["bytes"] < 0.35 * mean["float32"]["bytes"]


@pytest.mark.skipif(importlib.util.find_spec("qwix") is not None, reason="qwix is there")
def test_without_qwix_it_says_so():
    with pytest.raises(UsageError, match=r"pip install jaxcompress\[peers\]"):
        quantize_peer.main(quantize_peer.SHORT)


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
        least = min(mean["float"], key=lambda key: (" " in key, key))
        assert mean[name][least] > mean["to nearest"][least]


@recorded("quantize_training_*.json")
def test_recorded_training(path):
    mean = means(_results.read(path))
    for key in (min(mean["float"]), "ternary", "binary"):  # the fewest bits
        assert mean["trained"][key] > mean["rounded"][key]


@recorded("quantize_normalised_*.json")
def test_recorded_with_norms(path):
    """Beside the papers' losses, 0.3 points for ternary and 2.7 for binary weights."""
    mean = means(_results.read(path))
    for key, most in (("ternary", 0.5), ("binary", 2.7)):
        lost = {name: mean["float, trained on"][key] - mean[name][key] for name in ("rounded", "trained", "distilled")}
        assert lost["distilled"] < most and lost["trained"] < most + 1.5 < 10 < lost["rounded"]


@recorded("quantize_steps_*.json")
def test_recorded_steps(path):
    mean = means(_results.read(path))
    assert mean["learned steps"][min(mean["float"])] > mean["rounded"][min(mean["float"])]


@recorded("quantize_codebooks_*.json")
def test_recorded_codebooks(path):
    mean = means(_results.read(path))
    for start in ("density", "linear", "optimal"):
        for way in ("trained", "distilled"):
            assert mean[f"{start}, {way}"]["4"] > mean[start]["4"]


@recorded("quantize_trained_formats_*.json")
def test_recorded_formats_in_training(path):
    mean = means(_results.read(path))
    assert mean["rounded"]["mx, fp8 e4m3"] > mean["float"]["mx, fp8 e4m3"] - 0.5
    for way in ("trained", "distilled"):
        assert mean[way]["mx, fp4 e2m1"] > mean["rounded"]["mx, fp4 e2m1"] - 0.2  # nothing was lost that shows
