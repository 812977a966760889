"""The main job, whole, on a short setting: real data, real stages, a real second process."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import _results, quickstart
from experiments._artefacts import accuracies, accuracy
from experiments.data import load
from experiments.models import Convnet, build, describe, initialise
from jaxcompress import pack, quantize, report
from jaxcompress.arrays import Quantized

RECORDED = Path(__file__).parents[2] / "experiments" / "results" / "quickstart.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    return out, quickstart.main(dataclasses.replace(quickstart.SHORT, out=out))


def test_a_row_a_stage_and_what_it_says_is_on_the_disk(run):
    out, result = run
    rows = {row.name: row for row in result.rows}
    stages = ["teacher", "student from scratch", "student distilled", "+ pruned", "+ quantized", "+ packed file"]
    assert list(rows) == stages
    for seed in (0,):
        packed = out / f"seed{seed}" / "packed.jxc"
        assert rows["+ packed file"].ours["bytes"].values[seed] == packed.stat().st_size
        assert (
            rows["teacher"].ours["bytes"].values[seed] == (out / f"seed{seed}" / "teacher.safetensors").stat().st_size
        )
        tree = pack.load(packed)
        assert isinstance(tree["params"]["Dense_0"]["kernel"], Quantized)
        assert rows["+ packed file"].ours["nonzeros"].values[seed] == report.nonzeros(tree)
    assert rows["+ packed file"].ours["accuracy"].values == rows["+ quantized"].ours["accuracy"].values  # lossless
    assert json.loads((out / "quickstart.json").read_text())["name"] == "quickstart"
    assert (out / "quickstart.png").stat().st_size > 10_000


def test_pruned_weights_stay_pruned_under_fake_quantization(run):
    out, _ = run
    tree = pack.load(out / "seed0" / "packed.jxc")
    for layer in tree["params"].values():
        assert np.mean(np.asarray(layer["kernel"].codes()) == 0) >= quickstart.SHORT.sparsity - 0.01


def test_the_discipline_is_in_the_file(run):
    out, _ = run
    result = _results.read(out / "quickstart.json")
    assert set(result.splits) == {"train", "validation", "test"}
    assert len(result.test_reads) == 6 and len({read.model for read in result.test_reads}) == 6
    assert [choice.what for choice in result.choices] == [
        "learning rate of the student from scratch, seed 0",
        "learning rate of the student distilled, seed 0",
    ]


def test_the_recorded_run_keeps_its_promises():
    """Five seeds: the student gains by distillation, the teacher by its width, and little is lost at the end."""
    result = _results.read(RECORDED)
    differences = {(c.first, c.second): c.difference for c in result.comparisons}
    assert all(d.count == 5 for d in differences.values())
    assert differences["student distilled", "student from scratch"].low > 0
    assert differences["teacher", "teacher of half the width"].low > 0
    rows = {row.name: row.ours for row in result.rows}
    packed, teacher, student = (rows[name] for name in ("+ packed file", "teacher", "student distilled"))
    for small, large, other in zip(*(r["bytes"].values for r in (packed, teacher, student)), strict=True):
        assert large / small >= 30 and other / small >= 8
    for small, large in zip(packed["accuracy"].values, teacher["accuracy"].values, strict=True):
        assert small >= large - 1


@pytest.mark.slow
def test_a_seed_decides_accuracies_and_sizes(run, tmp_path):
    _, first = run
    again = quickstart.main(dataclasses.replace(quickstart.SHORT, out=tmp_path))
    rows = {row.name: row for row in first.rows}
    for row in again.rows:
        for key in ("accuracy", "noisy_accuracy", "bytes", "nonzeros", "parameters"):
            assert row.ours[key].values[0] == rows[row.name].ours[key].values[0], (row.name, key)


def test_a_model_is_made_again_from_its_description():
    model = Convnet(6, normalise=True, dropout=0.3)
    assert build(json.loads(json.dumps(describe(model)))) == model


def test_accuracy_of_a_compressed_model_is_that_of_its_dense_value():
    dataset = load("digits")
    model = Convnet(4)
    variables = initialise(model, 0, (8, 8, 1))
    small = quantize.convert(variables, {"kernel$": quantize.Affine(8)})
    plain = accuracy(model, variables, dataset.validation)
    assert accuracy(model, small, dataset.validation) == pytest.approx(plain, abs=0.06)
    clean, noisy = accuracies(model, variables, dataset.validation, [0.0, 100.0])
    assert clean == plain and noisy < 0.4  # nothing is left to see under such noise


def test_the_second_process_asks_for_no_tpu_and_for_no_more_memory_than_it_needs(monkeypatch):
    here = quickstart.beside()
    assert here["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" and here["PATH"]
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "JAX_PLATFORMS" not in quickstart.beside()
    monkeypatch.setattr(quickstart.jax, "default_backend", lambda: "tpu")
    assert quickstart.beside()["JAX_PLATFORMS"] == "cpu"


def test_refuses_no_seeds(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        quickstart.main(quickstart.Config(seeds=0, out=tmp_path))
    assert list(tmp_path.iterdir()) == []
