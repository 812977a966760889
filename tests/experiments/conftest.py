from pathlib import Path

import numpy as np
import pytest

from experiments import _results
from experiments._splits import Dataset, HeldOut, Split
from experiments.data import load


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("JAXCOMPRESS_DATA_DIR", raising=False)
    return cache / "jaxcompress" / "tfds"


RECORDED = Path(__file__).parents[2] / "experiments" / "results"


@pytest.fixture(scope="session")
def recorded():
    """Of a recorded result, by name, each row's figures."""
    return lambda name: {row.name: row.ours for row in _results.read(RECORDED / f"{name}.json").rows}


@pytest.fixture(scope="session")
def recorded_means():
    """Of a recorded result of three seeds, by name, each row's means."""

    def means(name: str) -> dict:
        result = _results.read(RECORDED / f"{name}.json")
        assert all(len(row.seeds) == 3 for row in result.rows)
        return {row.name: {key: figure.mean for key, figure in row.ours.items()} for row in result.rows}

    return means


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A folder in which the real builder has made the digits' records."""
    folder = tmp_path_factory.mktemp("digits")
    load("digits", folder)
    return folder


@pytest.fixture
def digits(digits_dir):
    return load("digits", digits_dir)


def numbered(name: str, n: int) -> Split:
    """`n` distinct 2x2 images, and the image's number as its label."""
    images = np.arange(n, dtype="<u4").view(np.uint8).reshape(n, 2, 2, 1)
    return Split(name, images, np.arange(n, dtype=np.int32), 255)


@pytest.fixture
def toy() -> Dataset:
    """A data set of 103, 20 and 30 numbered examples."""
    return Dataset("toy", 200, numbered("train", 103), numbered("validation", 20), HeldOut(numbered("test", 30)))
