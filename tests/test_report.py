import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaves import low_rank, quantized, sparse

from jaxcompress import report


def test_counts():
    tree = {"a": jnp.asarray([[1.0, 0.0], [2.0, 3.0]]), "b": jnp.zeros(5)}
    assert (report.parameters(tree), report.nonzeros(tree)) == (9, 3)


def test_counts_of_numbers_keys_and_what_64_bits_hold():
    tree = {"scale": 2.0, "steps": 0, "none": None, "keys": jax.random.split(jax.random.key(0), 3)}
    assert (report.parameters(tree), report.nonzeros(tree)) == (5, 4)
    assert report.nonzeros({"tiny": np.float64([1e-300, 0.0]), "large": np.int64([2**40, 0])}) == 2


@pytest.mark.parametrize(
    "leaf", [quantized((12, 10)), quantized((12, 9), bits=4, asymmetric=True), sparse((12, 10)), low_rank((12, 10))]
)
def test_compressed_leaves_count_as_what_they_stand_for(leaf):
    assert report.parameters(leaf) == leaf.size
    assert report.nonzeros(leaf) == int(jnp.count_nonzero(leaf.materialise()))


def test_cost_of_a_product_of_known_size():
    w, x = jnp.ones((64, 32)), jnp.ones((8, 64))
    found = report.cost(lambda w, x: x @ w, w, x, rounds=3)
    assert found.flops == pytest.approx(2 * 8 * 64 * 32, rel=0.05)
    assert found.nbytes == 64 * 32 * 4
    assert found.peak_bytes >= 4 * (64 * 32 + 8 * 64 + 8 * 32)
    assert 0 < found.latency < 1


def test_cost_of_a_compressed_model():
    found = report.cost(lambda w, x: x @ w, quantized((64, 32), bits=4), jnp.ones((8, 64)), rounds=3)
    assert (found.parameters, found.nbytes) == (64 * 32, 64 * 32 // 2 + 4 * 32)


ROWS = [report.Row("teacher", {"accuracy": 98.5, "bytes": 145936.0}), report.Row("student", {"bytes": 37632.0})]


def test_table():
    text = report.table(ROWS, [report.Column("accuracy", "accuracy (%)", ".1f"), report.Column("bytes", "bytes")])
    assert text.splitlines() == [
        "|         | accuracy (%) |   bytes |",
        "| ------- | -----------: | ------: |",
        "| teacher |         98.5 | 145,936 |",
        "| student |              |  37,632 |",
    ]


def test_json(tmp_path):
    report.write_json(tmp_path / "r.json", ROWS, seed=3)
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "seed": 3,
        "rows": {"teacher": {"accuracy": 98.5, "bytes": 145936.0}, "student": {"bytes": 37632.0}},
    }
    with pytest.raises(ValueError, match="'x': accuracy is nan"):
        report.write_json(tmp_path / "r.json", [report.Row("x", {"accuracy": float("nan")})])
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert json.loads((tmp_path / "r.json").read_text())["seed"] == 3


def test_figure(tmp_path):
    from PIL import Image

    rows = [report.Row(f"model {i}", {"bytes": 10.0**i, "accuracy": 90.0 + i}) for i in range(1, 4)]
    report.figure(tmp_path / "r.png", rows, x_title="bytes", y_title="accuracy")
    pixels = np.asarray(Image.open(tmp_path / "r.png").convert("L"))
    assert pixels.shape == (675, 1050) and np.mean(pixels < 128) > 0.005  # something is drawn
    with pytest.raises(ValueError, match=r"'a' lacks 'bytes' or 'accuracy'; it has \['nbytes'\]"):
        report.figure(tmp_path / "r.png", [report.Row("a", {"nbytes": 1.0})])


def test_import_is_light():
    """The core imports no data sets, no plotting and no Flax; no TensorFlow anywhere."""
    heavy = ("tensorflow", "tensorflow_datasets", "grain", "matplotlib", "flax", "sklearn")
    rooms = "distill, jaxcompress.prune, jaxcompress.quantize, jaxcompress.pack, jaxcompress.report"
    code = f"import sys, jaxcompress.{rooms}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_calls_are_timed_in_turns():
    made = []
    found = report.in_turns({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, rounds=3, seconds=0.0)
    assert set(found) == {"a", "b"} and min(found.values()) > 0
    assert "".join(made) == "aabb" + "ab" + "ba" + "ab"  # warmed up, counted, then in turns
