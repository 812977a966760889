"""The guide's code runs as it stands, and each way is as good as the guide lets one expect."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "low_rank.md"


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), {})
    out = capsys.readouterr().out
    lines = re.findall(r"^(\S.*): ([\d,]+) bytes, loss (\S+)$", out, re.M)
    size = {name: int(count.replace(",", "")) for name, count, _ in lines}
    loss = {name: float(value) for name, _, value in lines}
    biases = 4 * (128 + 128 + 10)
    assert size["a quarter"] < 0.25 * 4 * (64 + 128) * 128 + 4 * 1280 + biases
    assert max(size["budget"], size["budget, inputs"]) <= 4 * 7_000 + biases < 0.3 * size["dense"]
    assert loss["budget, inputs"] < 0.5 * loss["budget"]
    assert loss["budget, trained"] < loss["dense"] + 0.01
    assert loss["in 8 bits"] < loss["budget, trained"] + 0.01 and size["in 8 bits"] < 0.5 * size["budget"]
    assert "16 units of 256 parameters" in out  # the ranks of one layer
