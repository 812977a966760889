"""The guide's code runs as it stands, and each way is as good as the guide lets one expect."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "quantization.md"


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\S.*: .* bytes", line)]
    found = {line.split(":")[0]: line for line in lines}
    size = {name: int(re.search(r"([\d,]+) bytes", line)[1].replace(",", "")) for name, line in found.items()}
    loss = {name: float(line.split()[-1]) for name, line in found.items()}
    assert size["8 bits"] < 0.3 * size["float"] and size["4 bits"] < 0.22 * size["float"]
    for name in ("8 bits", "dynamic", "static", "4 deviations", "outputs first"):
        assert loss[name] < loss["float"] + 0.01, found[name]
    assert max(loss["gptq"], loss["adaround"]) < loss["3 bits"]
    assert loss["4 values, trained"] < loss["4 values"]
    assert max(loss["2 bits, trained"], loss["2 bits, learned"]) < 0.2  # log(10) is 2.3
    assert size["mixed"] <= 5_000 + 4 * (64 + 64 + 10)
