import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_guide_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *blocks, _ = BLOCKS
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/training.md", "exec"), names)
    assert int(names["state"].step) == 200
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 201, 10))
    assert lines[-1]["eval/accuracy"] > 0.85  # ten classes
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"150", "200"}
    np.testing.assert_array_less(lines[-1]["loss"], lines[0]["loss"])


def test_the_guides_program_for_several_hosts_runs(tmp_path):
    """As one host of one; `test_train_processes.py` runs two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    setup, losses, _, hosts = BLOCKS
    begin = hosts.index("jax.distributed")
    first, rest = hosts[:begin] + hosts[begin:].split("\n", 1)[0], hosts[begin:].split("\n", 1)[1]
    program = "\n".join(["import jax", first, setup, losses, rest, "print(int(state.step))"])
    environment = {**os.environ, "HOST": "0", "HOSTS": "1", "COORDINATOR": coordinator, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-1] == "20"
    assert (tmp_path / "shared" / "checkpoints" / "20").exists()
