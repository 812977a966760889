"""The guide's code runs as it stands, and says what the text around it says."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "channels.md"


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    scope: dict = {}
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), scope)
    out = capsys.readouterr().out
    assert sorted(group.size for group in scope["groups"]) == [4, 8, 8, 64]
    assert "verified: True True True" in out
    assert "before: 0 {'smooth': 1} the primitive 'smooth' has no rule" in out
    assert "after: in[1] 64 ['gain', 'in', 'last']" in out
    assert "equal: True" in out
    assert re.search(r"spread: \d+ -> \d+ parameters", out)
    assert "state: (16, 32)" in out
    assert re.search(r"kept: \(8, 4\)", out)
    assert re.findall(r"round: ([0-9.]+), learned: True", out) == ["0.75", "0.65", "0.55"]
    assert "units left: True" in out
    assert "linen: 16 True" in out
    assert "nnx: 2 4" in out
