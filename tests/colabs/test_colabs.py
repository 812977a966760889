"""Notebooks run on a short setting, carry no outputs, and are the text beside them."""

import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

COLABS = Path(__file__).parents[2] / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_its_text_without_outputs(path):
    notebook, text = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in text.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCOMPRESS_SHORT", "1")
    monkeypatch.setenv("PYTHONPATH", str(COLABS.parent))
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / path.name).write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--nbmake-timeout=600",
        "-p",
        "no:cacheprovider",
        "-q",
        path.name,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def test_there_is_one():
    assert NOTEBOOKS
