"""What XLA compiles for a TPU and for a GPU, without either: one row of inputs reads codes, not a decoded weight."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WHEELS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}


@pytest.mark.slow
@pytest.mark.parametrize("platform", WHEELS)
def test_a_row_moves_fewer_bytes_than_in_bfloat16(platform, tmp_path):
    if importlib.util.find_spec(WHEELS[platform]) is None:
        pytest.skip(f"compiling for it needs {WHEELS[platform]}")
    command = [sys.executable, "-m", "benchmarks", f"quantize.{platform}", "--rounds", "1", "--json", "r.json"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # conftest's are a CPU's
    env |= {"PYTHONPATH": str(ROOT), "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    found = {record["name"]: record["value"] for record in json.loads((tmp_path / "r.json").read_text())}
    one_row = {name.split(".", 2)[2][:-2]: value for name, value in found.items() if name.endswith(".1")}
    assert one_row.pop("int8") > 1.5 and one_row.pop("int4") > 2  # the goals
    assert one_row and min(one_row.values()) > 1.5
