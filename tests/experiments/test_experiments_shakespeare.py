"""Text as a data set: what windows hold, what is predicted, who sees what."""

import numpy as np
import pytest

from experiments import _quantizing
from experiments._shakespeare import CONTEXT, load_text, next_characters
from experiments.data import DataNotFoundError


def test_windows_are_the_text_in_order_and_labels_what_comes_next(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcde "), 5000))
    text = text[:-100] + "Z" + text[-99:]  # a character that training never sees
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(text)
    dataset = load_text("shakespeare", tmp_path, context=9, test_windows=50)
    known = np.array(sorted(set(text[:4000])))
    assert dataset.classes == len(known)
    train, validation = dataset.train, dataset.validation
    told = "".join(known[train.images.ravel()])
    assert len(told) == (4000 - 1) // 9 * 9 and text.startswith(told)  # none twice, none left out
    behind = "".join(known[next_characters(train.images, train.labels).ravel()])
    assert text[1:].startswith(behind)
    assert text[4000:4500].startswith("".join(known[validation.images.ravel()]))
    test = dataset.test.read(for_model="the test's")
    starts = [text.find("".join(known[window]), 4500) for window in test.images]
    assert len(test) == 50 and starts[0] == 4500 and all((start - 4500) % 9 == 0 for start in starts if start >= 0)
    assert sum(start < 0 for start in starts) <= 1  # the one with Z, which reads as the first character


def test_the_file_is_found_in_the_data_dir_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCOMPRESS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=f"not at {tmp_path}/input.txt or .*; give --data-dir or .JAXCOMPRESS"):
        load_text("shakespeare")
    (tmp_path / "input.txt").write_text("To be, or not to be. " * 100)
    assert load_text("shakespeare").classes == len(set("To be, or not to be. "))


def test_the_bundled_text_and_refusals(tmp_path):
    dataset = load_text("pydoc")
    assert len(dataset.train) == (80_000 - 1) // CONTEXT and dataset.train.images.max() < dataset.classes < 256
    with pytest.raises(DataNotFoundError, match=r"input\.txt .* it is not at .*tinyshakespeare"):
        load_text("shakespeare", tmp_path)
    with pytest.raises(ValueError, match="no text 'hamlet': there are shakespeare, pydoc"):
        load_text("hamlet")
    with pytest.raises(ValueError, match="goes with shakespeare and pydoc only, got lenet on pydoc"):
        _quantizing.lab_for(_quantizing.Config(data="pydoc"))
    with pytest.raises(ValueError, match="no model 'vgg': there are lenet, convnet, folded, decoder"):
        _quantizing.lab_for(_quantizing.Config(model="vgg"))
