import hashlib
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.data import batches

REPOSITORY = Path(__file__).parents[2]


def labels(stream, n):
    return np.concatenate([batch["label"] for batch in islice(stream, n)])


def noisy(image, rng):
    return image + rng.standard_normal(image.shape, dtype=np.float32)


def same(one, other):
    np.testing.assert_array_equal(one["image"], other["image"])
    np.testing.assert_array_equal(one["label"], other["label"])


def test_every_example_once_an_epoch(toy):
    seen = labels(batches(toy.train, 10, seed=3), 104)[: 10 * 103].reshape(10, 103)
    assert all(sorted(epoch) == list(range(103)) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 10


def test_seeds_share_no_epoch(toy):
    # in grain's own shuffle, seed 0's second epoch is seed 1's first
    epochs = [tuple(e) for seed in range(5) for e in labels(batches(toy.train, 103, seed=seed), 20).reshape(20, 103)]
    assert len(set(epochs)) == 100


def test_batches_are_the_splits_examples(toy):
    for batch in batches(toy.train, 8, seed=0, epochs=1):
        assert batch["image"].shape == (8, 2, 2, 1) and batch["image"].dtype == np.float32
        assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"], toy.train.inputs()[batch["label"]])


@pytest.mark.parametrize("epochs, count", [(1, 12), (2, 25)])
def test_epochs_end(toy, epochs, count):
    assert len(list(batches(toy.train, 8, seed=0, epochs=epochs))) == count


@pytest.mark.parametrize("augment", [None, noisy])
def test_a_position_in_the_middle_of_an_epoch(toy, augment):
    stream = batches(toy.train, 10, seed=1, augment=augment)
    for _ in range(14):  # 1.4 epochs
        next(stream)
    position = json.loads(json.dumps(stream.get_state()))
    rest = list(islice(stream, 30))

    anew = batches(toy.train, 10, seed=1, augment=augment)
    anew.set_state(position)
    stream.set_state(position)  # and the same iterator can go back
    for batch in rest:
        same(batch, next(anew))
        same(batch, next(stream))
    assert anew.get_state() == stream.get_state() != position


def test_a_position_before_the_first_and_after_the_last_batch(toy):
    stream = batches(toy.train, 10, seed=1, epochs=1)
    start = stream.get_state()
    everything = list(stream)
    end = stream.get_state()
    stream.set_state(start)
    same(next(stream), everything[0])
    stream.set_state(end)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_position_goes_on_in_another_process(digits, digits_dir, tmp_path):
    stream = batches(digits.train, 64, seed=2)
    for _ in range(21):
        next(stream)
    (tmp_path / "position.json").write_text(json.dumps(stream.get_state()))
    code = """
import hashlib, json, sys
from experiments.data import batches, load
stream = batches(load("digits", sys.argv[1]).train, 64, seed=2)
stream.set_state(json.load(open(sys.argv[2] + "/position.json")))
digest = hashlib.sha256()
for _ in range(25):
    batch = next(stream)
    digest.update(batch["image"].tobytes() + batch["label"].tobytes())
print(digest.hexdigest())
"""
    command = [sys.executable, "-c", code, str(digits_dir), str(tmp_path)]
    there = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120).stdout
    here = hashlib.sha256()
    for _ in range(25):
        batch = next(stream)
        here.update(batch["image"].tobytes() + batch["label"].tobytes())
    assert there.strip() == here.hexdigest()


def test_orbax_keeps_a_position(toy, tmp_path):
    stream = batches(toy.train, 10, seed=1)
    next(stream)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=ocp.args.JsonSave(stream.get_state())))
        manager.wait_until_finished()
        restored = manager.restore(1, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
    anew = batches(toy.train, 10, seed=1)
    anew.set_state(restored)
    same(next(stream), next(anew))


@pytest.mark.parametrize("augment", [None, noisy])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_shards_are_the_global_batch(toy, hosts, augment):
    whole = batches(toy.train, 12, seed=5, augment=augment)
    shards = [batches(toy.train, 12, seed=5, augment=augment, host=i, hosts=hosts) for i in range(hosts)]
    for _ in range(20):
        batch, parts = next(whole), [next(shard) for shard in shards]
        for key in ("image", "label"):
            together = np.stack([part[key] for part in parts], axis=1)  # host i has rows i, i + hosts, ...
            np.testing.assert_array_equal(together.reshape(batch[key].shape), batch[key])


def test_a_position_holds_for_another_number_of_hosts(toy):
    whole = batches(toy.train, 12, seed=5)
    for _ in range(11):
        next(whole)
    shards = [batches(toy.train, 12, seed=5, host=i, hosts=3) for i in range(3)]
    for shard in shards:
        shard.set_state(whole.get_state())
    parts = [next(shard)["label"] for shard in shards]
    np.testing.assert_array_equal(np.stack(parts, 1).ravel(), next(whole)["label"])


def test_augmentation_differs_between_epochs_and_examples(toy):
    def draw(image, rng):
        return np.full_like(image, rng.random())

    drawn = [b["image"][:, 0, 0, 0] for b in batches(toy.train, 103, seed=0, epochs=3, augment=draw)]
    assert len(np.unique(np.concatenate(drawn))) > 300  # of 309


@pytest.mark.parametrize("other", [{"seed": 2}, {"batch_size": 11}, {"augment": noisy}, {"split": "validation"}])
def test_a_position_of_another_stream_raises(toy, other):
    options = {"split": "train", "batch_size": 10, "seed": 1} | other
    split = getattr(toy, options.pop("split"))
    position = batches(toy.train, 10, seed=1).get_state()
    with pytest.raises(ValueError, match="resume with the same data, seed and batch size"):
        batches(split, **options).set_state(position)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "cannot share a batch of 0"),
        ({"batch_size": 10, "hosts": 3}, "cannot share a batch of 10"),
        ({"batch_size": 10, "hosts": 2, "host": 2}, "hosts numbered 0 to 1, this one 2"),
        ({"batch_size": 104, "epochs": 1}, "do not fill one batch of 104"),
        ({"batch_size": 10, "epochs": 0}, "do not fill one batch"),
        ({"batch_size": 10, "seed": -1}, "must not be negative"),
    ],
)
def test_bad_arguments(toy, options, message):
    with pytest.raises(ValueError, match=message):
        batches(toy.train, **{"seed": 0} | options)


def test_no_training_on_test_data(toy):
    with pytest.raises(ValueError, match="test data are not for training"):
        batches(toy.test.read(for_model="a"), 10, seed=0)


def test_an_augmentation_that_changes_the_shape(toy):
    with pytest.raises(ValueError, match="keep an image's shape"):
        next(batches(toy.train, 10, seed=0, augment=lambda image, rng: image[1:]))
