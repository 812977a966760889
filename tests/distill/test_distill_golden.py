"""The reference implementations' numbers: every case in `tests/golden`, values and gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_adapter import FAMILIES, evaluate

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.npz"))


def read(path):
    with np.load(path, allow_pickle=False) as data:
        arrays = dict(data)
    return arrays, json.loads(str(arrays.pop("meta")))


def families_of_the_manifest():
    lines = (GOLDEN / "MANIFEST.md").read_text().splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    return [h for h in headings if h.islower() and " " not in h]


def test_every_family_has_a_call():
    assert set(families_of_the_manifest()) == set(FAMILIES)
    assert len(FILES) == 58


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_value_and_gradients(path):
    arrays, meta = read(path)
    inputs = {k: v for k, v in arrays.items() if not k.startswith(("loss", "grad"))}
    result = evaluate(meta["family"], inputs, {**meta["params"], "case": meta["case"]})
    np.testing.assert_allclose(result["loss"], arrays.get("loss_f64", arrays["loss"]), rtol=5e-5)
    gradients = {k.removeprefix("grad_"): v for k, v in arrays.items() if k.startswith("grad_") and "_f64" not in k}
    assert gradients
    for name, single in gradients.items():
        want = arrays.get(f"grad_{name}_f64", single)
        got = np.asarray(result["grads"][name])
        assert got.shape == want.shape and np.all(np.isfinite(got)), name
        rows = np.setdiff1d(np.arange(len(want)), meta["edge_rows"])  # elsewhere the peer's own is NaN or 1e10
        np.testing.assert_allclose(got[rows], want[rows], rtol=0, atol=1e-4 * np.max(np.abs(want[rows])), err_msg=name)


def test_unknown_family():
    with pytest.raises(ValueError, match="unknown family 'kd'"):
        evaluate("kd", {}, {})
