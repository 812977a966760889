import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments._splits import HeldOut, Read, Split, stratify


def examples(counts, seed=0):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 2, 1), dtype=np.uint8)
    return images, labels


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(5, 40), min_size=1, max_size=6),
    test=st.integers(1, 10),
    validation=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_are_exact_disjoint_and_stratified(counts, test, validation, seed):
    images, labels = examples(counts, seed)
    total = len(labels)
    if test + validation >= total:
        return
    try:
        parts = stratify(images, labels, {"test": test, "validation": validation})
    except ValueError:  # both parts' rounded-up shares can be more than a small class has
        assert min(counts) < 2 + (test + validation) * min(counts) / total
        return
    assert {name: len(chosen) for name, chosen in parts.items()} == {
        "test": test,
        "validation": validation,
        "train": total - test - validation,
    }
    assert sorted(np.concatenate(list(parts.values()))) == list(range(total))
    for name, size in (("test", test), ("validation", validation)):
        share = np.bincount(labels[parts[name]], minlength=len(counts))
        assert np.all(np.abs(share - size * np.array(counts) / total) < 1)


def test_the_split_does_not_depend_on_the_order_of_storage(rng):
    images, labels = examples([30, 50, 20])
    shuffled = rng.permutation(len(labels))
    one = stratify(images, labels, {"test": 20, "validation": 10})
    other = stratify(images[shuffled], labels[shuffled], {"test": 20, "validation": 10})
    for name in one:
        np.testing.assert_array_equal(images[one[name]], images[shuffled][other[name]])
        np.testing.assert_array_equal(labels[one[name]], labels[shuffled][other[name]])


def test_an_order_that_mixes_the_classes():
    images, labels = examples([500, 500])
    first = labels[stratify(images, labels, {"test": 100})["train"][:200]]
    assert 60 < first.sum() < 140  # 100 +- 5.7 standard deviations


@pytest.mark.parametrize("held_out", [{"test": 0}, {"test": -1}, {"test": 100}, {"test": 60, "validation": 40}])
def test_parts_without_examples_raise(held_out):
    with pytest.raises(ValueError, match="hold"):
        stratify(*examples([50, 50]), held_out)


def test_a_class_too_small_for_the_parts_raises():
    # the remainders are equal, so the first class gives an example to both parts
    with pytest.raises(ValueError, match="class 0 has too few"):
        stratify(*examples([1, 1, 1]), {"test": 1, "validation": 1})


def test_the_hash_is_of_the_bytes_in_order():
    images = np.array([[[[1], [2]]], [[[3], [4]]]], dtype=np.uint8)
    split = Split("train", images, np.array([7, 258], dtype=np.int32), 16)
    by_hand = bytes([1, 2, 7, 0, 0, 0, 3, 4, 2, 1, 0, 0])
    assert split.sha256 == hashlib.sha256(by_hand).hexdigest()
    np.testing.assert_array_equal(split.inputs().ravel(), np.array([1, 2, 3, 4], np.float32) / 16)
    assert split.inputs().dtype == np.float32


def test_a_split_cannot_be_altered(toy):
    for array in (toy.train.images, toy.train.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("images", [np.zeros((2, 3), np.float32), np.zeros((3, 3), np.uint8)])
def test_other_images_raise(images):
    with pytest.raises(ValueError, match="uint8 images"):
        Split("train", images, np.zeros(2, np.int32), 255)


def test_test_data_are_read_once_a_model(toy):
    split = toy.test.read(for_model="student, seed 0")
    assert isinstance(split, Split) and split.sha256 == toy.test.sha256 and len(split) == len(toy.test) == 30
    toy.test.read(for_model="student, seed 1")
    with pytest.raises(ValueError, match="already read for 'student, seed 0'"):
        toy.test.read(for_model="student, seed 0")
    assert [read.model for read in toy.test.reads] == ["student, seed 0", "student, seed 1"]
    with pytest.raises(ValueError, match="names the final model"):
        toy.test.read(for_model=" ")


def test_reads_of_another_process_join_the_log(toy):
    toy.test.read(for_model="a")
    there = HeldOut(toy.test._split)
    there.read(for_model="b")
    toy.test.include(there.reads)
    assert [read.model for read in toy.test.reads] == ["a", "b"]
    for reads, message in (
        ([Read("c", toy.test.sha256), Read("a", toy.test.sha256)], "already read for 'a'"),
        ([Read("c", toy.test.sha256), Read("c", toy.test.sha256)], "already read for 'c'"),
        ([Read("c", "0" * 64)], "is of test split 0000"),
    ):
        with pytest.raises(ValueError, match=message):
            toy.test.include(reads)
    assert [read.model for read in toy.test.reads] == ["a", "b"]


def test_a_data_set_does_not_show_its_test_data(toy):
    assert not hasattr(toy.test, "images") and not hasattr(toy.test, "labels")
    assert toy.records()["test"].examples == 30 and toy.test.reads == ()
