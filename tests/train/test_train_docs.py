import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.M | re.S)

REPORT = 'print("steps taken:", int(state.step))'


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(tmp_path):
    """All of it in one process, as one host of one, on two devices; `test_train_processes.py` runs two hosts."""
    model, losses, loop, first, rows = BLOCKS
    devices = 'import jax\njax.config.update("jax_num_cpu_devices", 2)'
    program = "\n".join([devices, first, model, losses, loop, REPORT, rows, "state = run(210)", REPORT])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "HOST": "0", "HOSTS": "1", "COORDINATOR": coordinator, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.findall(r"steps taken: (\d+)", done.stdout) == ["200", "210"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 211, 10))
    assert lines[-1]["eval/accuracy"] > 0.85  # of ten classes
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"200", "210"}
