"""Data sets for experiments, without TensorFlow: `load` a data set, then draw `batches`.

A tensorflow-datasets builder turns the original files into array_record files once, `tfds.data_source` reads them,
and a grain pipeline shuffles, batches and keeps the position:

    dataset = load("digits")
    stream = batches(dataset.train, 128, seed=0)
    batch = next(stream)  # {"image": float32 [128, 8, 8, 1] in [0, 1], "label": int32 [128]}
    position = stream.get_state()  # JSON; stream.set_state(position) goes on exactly from there
    final = dataset.test.read(for_model="student, seed 0")  # once; then final.inputs(), final.labels

Choices are made on `dataset.validation`. `python -m experiments.data --name mnist --data-dir DIR` prepares a data set
and prints its splits. To add one, write a file like `_digits.py` and list it in `SOURCES`.
"""

import os

from experiments._command import UsageError
from experiments._splits import Dataset, HeldOut, Read, Split, SplitRecord, stratify
from experiments.data import _cifar10, _cifar100, _digits, _mnist
from experiments.data._batches import Augment, Batch, Batches, batches
from experiments.data._prepare import DataNotFoundError, Source, cache_folder, prepared, read_records

__all__ = [
    "SOURCES",
    "Augment",
    "Batch",
    "Batches",
    "DataNotFoundError",
    "Dataset",
    "HeldOut",
    "Read",
    "Source",
    "Split",
    "SplitRecord",
    "batches",
    "cache_folder",
    "load",
]

SOURCES = {
    "digits": _digits.SOURCE,
    "mnist": _mnist.SOURCE,
    "cifar10": _cifar10.SOURCE,
    "cifar100": _cifar100.SOURCE,
}


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Reads a data set into memory, preparing its records if this is the first time.

    Args:
      name: a key of `SOURCES`.
      data_dir: the folder with prepared tfds files or the original files. Default: `$JAXCOMPRESS_DATA_DIR`, else
        `~/.cache/jaxcompress/tfds`, which also takes what is prepared from a folder that cannot be written to.

    Returns:
      The data set in three splits; `test` is guarded.

    Raises:
      DataNotFoundError: the data are not there; the message has the files wanted, where and how.
      ValueError: no such data set, or its files are not what they should be.
    """
    if name not in SOURCES:
        raise UsageError(f"no data set {name!r}: there are {', '.join(SOURCES)}")
    source = SOURCES[name]
    root = prepared(source, data_dir)
    images, labels = read_records(source, root, source.train)
    held_out = {"test": source.test} if isinstance(source.test, int) else {}
    parts = stratify(images, labels, held_out | {"validation": source.validation})
    splits = {part: Split(part, images[chosen], labels[chosen], source.scale) for part, chosen in parts.items()}
    if isinstance(source.test, str):
        images, labels = read_records(source, root, source.test)
        order = stratify(images, labels, {})["train"]
        splits["test"] = Split("test", images[order], labels[order], source.scale)
    return Dataset(name, source.classes, splits["train"], splits["validation"], HeldOut(splits["test"]))
