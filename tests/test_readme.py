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
