"""Sentences of two kinds, as the bytes of their text: SST-2 from disk, and a bundled set for trials.

`sst2` is the Stanford Sentiment Treebank (Socher et al. 2013): whole sentences, negative or positive, in the split of
the literature before GLUE. `descriptions` are the lines of the data set descriptions that scikit-learn brings along,
of tables (0) or of pictures and texts (1): real English, small, and no task that anybody else has measured.
"""

import hashlib
import importlib.resources
import os
import re
from pathlib import Path

import numpy as np

from experiments._command import UsageError
from experiments._splits import Dataset, HeldOut, Split, SplitRecord, stratify
from experiments.data._prepare import DataNotFoundError

PARTS = {"train": "train", "validation": "dev", "test": "test"}
TABLES = ("breast_cancer", "california_housing", "covtype", "diabetes", "iris", "linnerud", "wine_data", "kddcup99")
MEDIA = ("digits", "lfw", "olivetti_faces", "rcv1", "twenty_newsgroups")


def load_texts(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set of sentences; a split's `images` are their bytes, `[examples, longest]`, padded with zeros.

    Args:
      name: `"sst2"` or `"descriptions"`.
      data_dir: for SST-2, the folder with `train.tsv`, `dev.tsv` and `test.tsv`, or with them in `sst2`; default
        `$JAXCOMPRESS_DATA_DIR`.

    Raises:
      DataNotFoundError: a file is not there.
      ValueError: no such data set, or a line that is no `SENTENCE<TAB>LABEL`.
    """
    if name == "descriptions":
        return descriptions()
    if name != "sst2":
        raise UsageError(f"no data set of sentences {name!r}: there are sst2 and descriptions")
    read = {part: labelled(_found(data_dir, file)) for part, file in PARTS.items()}
    splits = {part: Split(part, as_bytes(texts), labels, 255) for part, (texts, labels) in read.items()}
    return Dataset(name, 2, splits["train"], splits["validation"], HeldOut(splits["test"]))


def descriptions() -> Dataset:
    """scikit-learn's descriptions, line by line; a fifth of them for validation, and a fifth for test."""
    folder = importlib.resources.files("sklearn.datasets") / "descr"
    texts, labels = [], []
    for label, names in enumerate((TABLES, MEDIA)):
        for name in names:
            for line in (folder / f"{name}.rst").read_text(encoding="utf-8").splitlines():
                words = re.findall("[a-z]+", line.lower())
                if len(words) > 4:
                    texts.append(" ".join(words))
                    labels.append(label)
    images, numbers = as_bytes(texts), np.array(labels, np.int32)
    parts = stratify(images, numbers, {"test": len(texts) // 5, "validation": len(texts) // 5})
    splits = {part: Split(part, images[chosen], numbers[chosen], 255) for part, chosen in parts.items()}
    return Dataset("descriptions", 2, splits["train"], splits["validation"], HeldOut(splits["test"]))


def as_bytes(texts: list[str]) -> np.ndarray:
    """`[texts, longest]`, uint8, zeros behind each text's UTF-8."""
    coded = [text.encode() for text in texts]
    rows = np.zeros((len(coded), max(map(len, coded))), np.uint8)
    for row, code in zip(rows, coded, strict=True):
        row[: len(code)] = np.frombuffer(code, np.uint8)
    return rows


def texts_of(split: Split) -> list[str]:
    """The sentences of a split."""
    return [row.tobytes().rstrip(b"\0").decode() for row in split.images]


def labelled(path: Path) -> tuple[list[str], np.ndarray]:
    """Sentences and their labels, int32, of a file with `SENTENCE<TAB>LABEL` a line, the label 0 or 1."""
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or row[1] not in ("0", "1") or not row[0]:
            raise UsageError(f"{path}, line {number}: want SENTENCE<TAB>LABEL with label 0 or 1, got {row}")
    if not rows:
        raise UsageError(f"{path} is empty")
    return [text for text, _ in rows], np.array([int(label) for _, label in rows], np.int32)


def sentences(data_dir: Path | None, part: str) -> tuple[list[str], SplitRecord]:
    """The sentences of SST-2's `part`.tsv, and the file's size and hash.

    Raises:
      DataNotFoundError: there is no such file.
    """
    path = _found(data_dir, part)
    texts, _ = labelled(path)
    return texts, SplitRecord(len(texts), hashlib.sha256(path.read_bytes()).hexdigest())


def _found(data_dir: str | os.PathLike[str] | None, part: str) -> Path:
    folder = Path(data_dir or os.environ.get("JAXCOMPRESS_DATA_DIR") or ".")
    places = [folder / "sst2" / f"{part}.tsv", folder / f"{part}.tsv"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataNotFoundError(
            f"no SST-2: neither {places[0]} nor {places[1]}; give --data-dir or $JAXCOMPRESS_DATA_DIR"
        )
    return found
