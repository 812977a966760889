"""The README's code runs as it stands, and its table is the recorded one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {})


def test_there_is_a_block_for_each_kind_of_user():
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_the_setup_blocks_come_first():
    text = (ROOT / "README.md").read_text()
    for title, must in (("Quick start", "experiments.quickstart"), ("Tests", "pytest")):
        section = text.split(f"## {title}\n", 1)[1].strip()
        assert section.startswith("```") and must in section.split("```")[1]


def test_no_file_names_a_machine_path():
    for path in ROOT.rglob("*.md"):
        if not any(part.startswith(".") or part == "runs" for part in path.relative_to(ROOT).parts):
            assert "/work/" not in path.read_text(), path


def test_the_benchmark_table_is_the_recorded_one():
    from benchmarks import _records

    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- benchmarks -->\n```text\n(.*?)```\n<!-- end of benchmarks -->", text, re.DOTALL)
    assert block is not None
    recorded = _records.read(ROOT / "benchmarks" / "results.json")
    assert [line for line in block[1].splitlines() if not line.startswith("#")] == _records.table(recorded).splitlines()


def test_the_quickstart_table_is_of_the_recorded_run():
    """The README shows one seed's print; what does not depend on the clock stands in the five-seed record."""
    from experiments import _results

    recorded = _results.read(ROOT / "experiments" / "results" / "quickstart.json")
    block = (ROOT / "README.md").read_text().split("<!-- quickstart -->")[1].split("<!-- end of quickstart -->")[0]
    lines = {cells[1].strip(): cells for cells in (line.split("|") for line in block.splitlines()) if len(cells) > 3}
    for row in recorded.rows:
        if row.name in lines:
            cells = [cell.strip() for cell in lines[row.name]]
            assert cells[2] == f"{row.ours['accuracy'].values[0]:.2f}"
            assert cells[6] == f"{row.ours['bytes'].values[0]:,.0f}"
    assert {"teacher", "student distilled", "+ packed file"} <= set(lines)
