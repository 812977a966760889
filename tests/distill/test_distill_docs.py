import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S)


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(tmp_path):
    """Every student it makes knows the digits, and the exported one is the student alone."""
    program = "\n".join([*BLOCKS, 'print(*sorted(pack.load("student.jxc")))'])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *results, exported = done.stdout.splitlines()
    accuracies = [float(x) for line in results for x in re.findall(r"0\.\d+", line)]
    assert len(accuracies) == 4 and min(accuracies) > 0.8, done.stdout
    assert exported == "Dense_0 Dense_1 Dense_2"
