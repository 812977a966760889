import dataclasses
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from experiments.data import SOURCES, DataNotFoundError, _digits, _mnist, load
from experiments.data.__main__ import main
from experiments.data._prepare import prepared, read_records

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = os.environ.get("JAXCOMPRESS_DATA_DIR")


def python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def rows(images, labels):
    """Examples as a sorted list of bytes: a multiset."""
    return sorted(
        image.tobytes() + int(label).to_bytes(4, "little") for image, label in zip(images, labels, strict=True)
    )


# --- digits


def test_the_digits_are_scikit_learns(digits):
    test = digits.test.read(for_model="none: a test of the loader")
    splits = [digits.train, digits.validation, test]
    assert [len(split) for split in splits] == [718, 180, 899]
    original = load_digits()
    found = rows(np.concatenate([s.images for s in splits]), np.concatenate([s.labels for s in splits]))
    assert found == rows(original.images.astype(np.uint8), original.target)
    assert len(set(found)) == 1797  # no example twice, so the splits are disjoint
    for split in splits:
        shares = np.bincount(original.target) * len(split) / 1797
        assert np.all(np.abs(np.bincount(split.labels, minlength=10) - shares) < 2)
        assert split.images.shape[1:] == (8, 8, 1) and split.labels.dtype == np.int32
    assert digits.train.inputs().min() == 0 and digits.train.inputs().max() == 1


def test_the_digits_splits_stay_what_they_are(digits):
    # golden: figures of different days and machines rest on the same splits
    assert {name: record.sha256[:16] for name, record in digits.records().items()} == {
        "train": "d69c11e1547cdc43",
        "validation": "f3d5e45ba176aae6",
        "test": "d23be942add7b2bf",
    }


def test_records_are_made_once(tmp_path, capsys):
    first = load("digits", tmp_path)
    assert "Preparing digits" in capsys.readouterr().err
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert load("digits", tmp_path).records() == first.records()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]  # no downloads folder
    assert len(list(tmp_path.glob("digits/1.0.0/*.array_record*"))) == 1


def test_where_records_go(tmp_path, own_cache, monkeypatch):
    load("digits")
    assert (own_cache / "digits/1.0.0/dataset_info.json").is_file()
    monkeypatch.setenv("JAXCOMPRESS_DATA_DIR", str(tmp_path / "not" / "there" / "yet"))
    load("digits")
    assert (tmp_path / "not/there/yet/digits/1.0.0/dataset_info.json").is_file()


def test_a_folder_that_is_not_to_be_written_to_is_left_alone(tmp_path, own_cache):
    tmp_path.chmod(0o555)  # root could write all the same: the mode counts
    try:
        dataset = load("digits", tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o755)
    assert dataset.records() == load("digits", own_cache).records()


def test_no_tensorflow_and_light_imports(digits_dir):
    code = """
import sys
import experiments
assert not {"tensorflow_datasets", "grain", "jax", "tensorflow"} & set(sys.modules)
from experiments.data import batches, load
dataset = load("digits", sys.argv[1])
next(batches(dataset.train, 8, seed=0))
import experiments.tables, experiments._selection
assert "tensorflow" not in sys.modules
print("done")
"""
    assert output(python(code, str(digits_dir))) == "done\n"


@pytest.mark.slow
def test_processes_that_start_at_once(tmp_path):
    code = "import sys, experiments.data as d; print(d.load('digits', sys.argv[1]).records())"
    outputs = [output(process) for process in [python(code, str(tmp_path)) for _ in range(2)]]
    assert len(set(outputs)) == 1 and "d69c11e1" in outputs[0]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]  # and nothing half-made


def digits_with(generate_examples):
    """The digits' source with another generator of examples in its builder."""
    with tfds.core.registered.skip_registration():
        builder = type("Digits", (_digits.Digits,), {"name": "digits", "_generate_examples": generate_examples})
    return dataclasses.replace(
        _digits.SOURCE, builder=lambda originals, into: builder(data_dir=into, file_format="array_record")
    )


def test_another_process_that_was_first(tmp_path):
    def examples(builder):
        yield from _digits.Digits._generate_examples(builder)
        load("digits", tmp_path)  # the other one ends while this one has yet to rename its folder

    source = digits_with(examples)
    assert prepared(source, tmp_path) == tmp_path
    assert len(read_records(source, tmp_path, "records")[1]) == 1797
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_a_preparation_that_fails_leaves_nothing(tmp_path):
    def examples(builder):
        yield next(_digits.Digits._generate_examples(builder))
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepared(digits_with(examples), tmp_path)
    assert list((tmp_path / "digits").iterdir()) == []
    assert len(load("digits", tmp_path).train) == 718


def test_a_killed_preparation_is_ignored(tmp_path):
    left = tmp_path / "digits" / "incomplete.ABC123_1.0.0"
    left.mkdir(parents=True)
    (left / "digits-records.array_record-00000-of-00001").write_bytes(b"half")
    assert len(load("digits", tmp_path).train) == 718


# --- bad folders and names


def test_unknown_name():
    with pytest.raises(ValueError, match="no data set 'digit': there are digits, mnist, cifar10"):
        load("digit")


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200_000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, cut, flip])
def test_damaged_records(tmp_path, damage):
    load("digits", tmp_path)
    damage(next(tmp_path.glob("digits/1.0.0/*array_record*")))
    with pytest.raises(ValueError, match=r"records in .*digits/1\.0\.0 are damaged; remove that folder"):
        load("digits", tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [('{"fileFormat": "tfrecord"}', "holds tfrecord files"), ("{", "are damaged; remove that folder")],
)
def test_other_records(tmp_path, content, message):
    info = tmp_path / "mnist/3.0.1/dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text(content)
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name, file", [("mnist", "t10k-images-idx3-ubyte"), ("cifar10", "train.tar.xz")])
def test_a_folder_without_data(tmp_path, own_cache, name, file):
    with pytest.raises(DataNotFoundError) as raised:
        load(name, tmp_path)
    message = str(raised.value)
    source = SOURCES[name]
    for part in (file, str(tmp_path / source.name / source.version), "--data-dir", "JAXCOMPRESS_DATA_DIR"):
        assert part in message
    with pytest.raises(DataNotFoundError, match=str(own_cache)):
        load(name)
    assert list(tmp_path.iterdir()) == [] and not own_cache.exists()


# --- MNIST


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, rng):
    """Four idx files of 40 and 20 examples, in both of the places and forms that are looked for."""
    folder = tmp_path / "small"
    (folder / "mnist").mkdir(parents=True)
    arrays = {}
    for part, n in (("train", 40), ("t10k", 20)):
        arrays[part] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        (folder / "mnist" / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(arrays[part][0])))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(arrays[part][1]))
    return folder, arrays


def test_idx_files_through_the_official_builder(small_mnist, tmp_path):
    folder, arrays = small_mnist
    source = dataclasses.replace(_mnist.SOURCE, builder=lambda a, b: _mnist.builder(a, b, md5={}))
    root = prepared(source, folder)
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = read_records(source, root, split)
        assert images.shape[1:] == (28, 28, 1) and images.dtype == np.uint8
        assert rows(images, labels) == rows(*arrays[part])


def test_content_that_is_not_the_official_one(small_mnist):
    folder, _ = small_mnist
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not the official file: .* has md5"):
        load("mnist", folder)
    assert not list((folder / "mnist").glob("*.0.*"))


def test_the_error_names_only_the_files_that_are_missing(small_mnist):
    folder, _ = small_mnist
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataNotFoundError, match=r"the original files t10k-labels-idx1-ubyte \(plain or \.gz\) in"):
        load("mnist", folder)


def test_idx_files_cut_at_every_length(tmp_path):
    path, content = tmp_path / "labels", idx(np.arange(5, dtype=np.uint8))
    for form in (content, gzip.compress(content, mtime=0)):
        path.write_bytes(form)
        np.testing.assert_array_equal(_mnist.read_idx(path, None), np.arange(5))
        for length in range(len(form)):
            path.write_bytes(form[:length])
            with pytest.raises(ValueError, match=r"not an idx file|not a whole gzip file"):
                _mnist.read_idx(path, None)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA, reason="needs $JAXCOMPRESS_DATA_DIR with MNIST")
def test_the_real_mnist(tmp_path):
    dataset = load("mnist", REAL_DATA)
    test = dataset.test.read(for_model="none: a test of the loader")
    assert [len(s) for s in (dataset.train, dataset.validation, test)] == [55_000, 5_000, 10_000]
    images = np.concatenate([dataset.train.images, dataset.validation.images])
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    # counts, mean and deviation as the literature has them
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (round(images.mean() / 255, 4), round(images.std() / 255, 4)) == (0.1307, 0.3081)
    assert {name: record.sha256[:16] for name, record in dataset.records().items()} == {
        "train": "bc97511b49d3473b",
        "validation": "b9b0c3ded553e167",
        "test": "acd9cb58a25dbd68",
    }


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA, reason="needs $JAXCOMPRESS_DATA_DIR with CIFAR-10")
def test_the_real_cifar10():
    dataset = load("cifar10", REAL_DATA)
    test = dataset.test.read(for_model="none: a test of the loader")
    images = np.concatenate([dataset.train.images, dataset.validation.images]) / 255
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    assert np.bincount(labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert images.mean((0, 1, 2)).round(4).tolist() == [0.4913, 0.4821, 0.4465]
    assert images.std((0, 1, 2)).round(4).tolist() == [0.2452, 0.2428, 0.2606]


def test_an_archive_that_is_not_the_one_wanted(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"{part}.tar.xz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"train\.tar\.xz is not the archive wanted"):
        load("cifar10", tmp_path)
    assert not list(tmp_path.rglob("*array_record*"))


# --- the command


def test_the_command_prints_counts_and_hashes(digits_dir, digits):
    command = [sys.executable, "-m", "experiments.data", "--name", "digits", "--data-dir", str(digits_dir)]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120).stdout
    for name, record in digits.records().items():
        assert any(
            line.split()[:2] == [name, f"{record.examples:,}"] and record.sha256 in line for line in out.splitlines()
        )
    with pytest.raises(DataNotFoundError, match=r"^no MNIST in .*nothing"):
        main("mnist", digits_dir / "nothing")
