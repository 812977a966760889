"""Splits of a data set: what training, choices and the final measurement may see.

A split is a function of the examples alone. Every example gets the SHA-256 of a fixed salt and its bytes; examples
are put in the order of these digests, and each held-out split takes, class by class, the first examples of that
order. So the split does not depend on the order in which files store the examples, nor on any library's random
numbers; equal examples stand together and do not straddle splits (but for one group a boundary); and the order mixes
the classes, so `split.images[:256]` is a fair sample.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

SALT = b"jaxcompress splits 1"  # the fixed seed of all splits; with another salt they are other splits


@dataclass(frozen=True)
class SplitRecord:
    """What a result file says of a split: its number of examples and their hash."""

    examples: int
    sha256: str


@dataclass(frozen=True)
class Read:
    """One reading of test data: the final model it was for, and the split's hash."""

    model: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Split:
    """Examples in memory.

    Attributes:
      name: `"train"`, `"validation"` or `"test"`.
      images: `[examples, height, width, channels]`, uint8, read-only.
      labels: `[examples]`, int32, read-only.
      scale: the value that stands for white: 16 for the digits, 255 elsewhere.
      sha256: of every example's image bytes and label (4 bytes, little-endian), in order.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    scale: int
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(_rows(self.images, self.labels).tobytes()).hexdigest())
        self.images.setflags(write=False)
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self) -> np.ndarray:
        """The images as a model takes them: float32 in [0, 1], `[examples, height, width, channels]`."""
        return self.images.astype(np.float32) / np.float32(self.scale)

    def record(self) -> SplitRecord:
        """The split's line in a result file."""
        return SplitRecord(len(self), self.sha256)


class HeldOut:
    """A test split that is read once for each final model, and remembers for which."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._reads: list[Read] = []

    def __len__(self) -> int:
        return len(self._split)

    @property
    def sha256(self) -> str:
        """The split's hash."""
        return self._split.sha256

    @property
    def reads(self) -> tuple[Read, ...]:
        """The log, in order: goes into the result file."""
        return tuple(self._reads)

    def record(self) -> SplitRecord:
        """The split's line in a result file."""
        return self._split.record()

    def read(self, for_model: str) -> Split:
        """The test examples, for the one evaluation of a final model.

        Args:
          for_model: the model's name, unique in the experiment: `"student distilled, seed 0"`. Every figure of that
            model (accuracy, accuracy under noise) is measured on what this one call returns.

        Raises:
          ValueError: the name is empty, or test data were already read for this model.
        """
        self.include([Read(for_model, self.sha256)])
        return self._split

    def include(self, reads: Iterable[Read]) -> None:
        """Adds the reads of another process (one that evaluates a packed file, say) to this log.

        Raises:
          ValueError: a model has no name, is in the log already, or was read from another test split; nothing is added.
        """
        known, new = {read.model for read in self._reads}, list(reads)
        for read in new:
            if not read.model.strip():
                raise ValueError(
                    "a read of test data names the final model it is for: read(for_model='student, seed 0')"
                )
            if read.model in known:
                raise ValueError(
                    f"test data were already read for {read.model!r}: they are read once for each final model. Keep"
                    " that evaluation's figures, make choices on the validation split, give another model another name"
                )
            if read.sha256 != self.sha256:
                raise ValueError(f"the read for {read.model!r} is of test split {read.sha256}, not of {self.sha256}")
            known.add(read.model)
        self._reads += new


@dataclass(frozen=True)
class Dataset:
    """A data set cut in three. `test` hands out its examples once for each final model."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: HeldOut

    def records(self) -> dict[str, SplitRecord]:
        """Sizes and hashes of the three splits, for a result file. Reads no test data."""
        return {"train": self.train.record(), "validation": self.validation.record(), "test": self.test.record()}


def stratify(images: np.ndarray, labels: np.ndarray, held_out: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Cuts examples into held-out parts and the rest, deterministically and with equal shares of every class.

    Args:
      images: `[examples, ...]`, uint8.
      labels: `[examples]`, integers.
      held_out: the number of examples of each held-out part; a part takes of each class its share of the whole,
        rounded so that the part has exactly that number (largest remainders).

    Returns:
      Indices of the examples of each part in canonical order, and those of the rest under `"train"`.

    Raises:
      ValueError: a part is empty, nothing is left for `"train"`, or a class has too few examples.
    """
    total, wanted = len(labels), sum(held_out.values())
    if min(held_out.values(), default=1) < 1 or wanted >= total:
        raise ValueError(f"cannot hold {dict(held_out)} out of {total} examples: each part and the rest need examples")
    digests = [hashlib.sha256(SALT + row.tobytes()).digest() for row in _rows(images, labels)]
    order = np.array(sorted(range(total), key=digests.__getitem__), dtype=np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    part = np.full(total, "train", dtype=object)
    taken = np.zeros_like(counts)
    for name, size in held_out.items():
        shares = _apportion(counts, size)
        for k, label in enumerate(classes):
            of_class = order[labels[order] == label][taken[k] : taken[k] + shares[k]]
            if len(of_class) < shares[k]:
                raise ValueError(
                    f"class {label} has too few examples ({counts[k]}) for held-out parts {dict(held_out)}"
                )
            part[of_class] = name
        taken += shares
    return {name: order[part[order] == name] for name in (*held_out, "train")}


def _apportion(counts: np.ndarray, size: int) -> np.ndarray:
    """`size` shared out in proportion to `counts`, in whole numbers: floors, then the largest remainders."""
    floors, remainders = np.divmod(counts * size, counts.sum())
    floors[np.argsort(-remainders, kind="stable")[: size - floors.sum()]] += 1
    return floors


def _rows(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """One row of bytes an example: the image, then the label as 4 bytes, little-endian."""
    if images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(f"want uint8 images and as many labels; got {images.dtype} {images.shape} and {labels.shape}")
    label_bytes = labels.astype("<i4").view(np.uint8).reshape(len(labels), 4)
    return np.concatenate([images.reshape(len(images), -1), label_bytes], axis=1)
