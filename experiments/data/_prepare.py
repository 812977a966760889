"""Original data once into array_record files, and those into arrays: what all data sets have in common."""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from experiments._command import UsageError


class DataNotFoundError(FileNotFoundError, UsageError):
    """The files of a data set are not where they were looked for."""


@dataclass(frozen=True)
class Source:
    """How the records of a data set are made and cut. A new one is a file like `_digits.py` and a line in `SOURCES`.

    Attributes:
      name: the tfds name; records stand in `ROOT/name/version/`, in tfds's own layout.
      version: the tfds version, raised whenever the records change.
      classes: the number of labels.
      scale: the image value that stands for white.
      train: the record set that the train split is cut from.
      test: the record set that is the test split, or the number of examples to hold out of `train` for it.
      validation: the number of examples to hold out of `train`.
      builder: from a folder with original files and a folder to write to, the tfds builder; raises `DataNotFoundError`
        where original files are missing. The builder's `file_format` is array_record, and it needs no TensorFlow.
    """

    name: str
    version: str
    classes: int
    scale: int
    train: str
    test: str | int
    validation: int
    builder: Callable[[Path, Path], tfds.core.DatasetBuilder]


def cache_folder() -> Path:
    """Where records are made if nobody says otherwise: `~/.cache/jaxcompress/tfds`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcompress" / "tfds"


def prepared(source: Source, data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder under which tfds finds the records of `source`, which are made there if they are not there yet.

    They are looked for and made in `data_dir`, or else `$JAXCOMPRESS_DATA_DIR`, or else `cache_folder()`; they go to
    `cache_folder()` if that folder cannot be written to. Writing is atomic: tfds fills a folder of another name and
    renames it, and of several processes that start at once the first to end wins.

    Raises:
      DataNotFoundError: neither records nor original files are there.
      ValueError: the records there are of another file format, or damaged.
    """
    given = data_dir or os.environ.get("JAXCOMPRESS_DATA_DIR")
    root = Path(given).expanduser() if given else cache_folder()
    if _has_records(source, root):
        return root
    home = root if _writable(root) else cache_folder()
    builder = source.builder(root, home)  # raises if the original files are not in `root`
    if not _has_records(source, home):
        print(f"Preparing {source.name} as array_record files in {home} (once)", file=sys.stderr)
        try:
            with _quiet(), tempfile.TemporaryDirectory() as downloads:
                builder.download_and_prepare(download_dir=downloads)
        except OSError:
            if not _has_records(source, home):  # else another process was first
                raise
    return home


def read_records(source: Source, root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All examples of a record set: images `[n, height, width, channels]` uint8 and labels `[n]` int32.

    Small sets are decoded once and kept: gathering rows is many times faster than decoding records for every epoch.

    Raises:
      ValueError: the files are damaged (array_record keeps a checksum a chunk).
    """
    with _quiet():
        try:
            records = tfds.data_source(f"{source.name}:{source.version}", split=split, data_dir=root, download=False)
            examples = records.__getitems__(range(len(records)))
        except RuntimeError as error:
            raise _damaged(root / source.name / source.version, error) from error
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], dtype=np.int32)


def _has_records(source: Source, root: Path) -> bool:
    info = root / source.name / source.version / "dataset_info.json"
    if not info.is_file():
        return False
    try:
        file_format = json.loads(info.read_text(encoding="utf-8")).get("fileFormat")
    except ValueError as error:
        raise _damaged(info.parent, error) from error
    if file_format != "array_record":
        raise UsageError(
            f"{info.parent} holds {file_format} files, which cannot be read without TensorFlow: prepare"
            f' {source.name} with tfds and file_format="array_record", or give a --data-dir with the original files'
        )
    return True


def _damaged(folder: Path, error: Exception) -> UsageError:
    return UsageError(f"the records in {folder} are damaged; remove that folder and they are made anew. ({error})")


def _writable(folder: Path) -> bool:
    """Whether files may be made in `folder`. Mode bits count too: they say what is meant, even where root may write."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK) and bool(folder.stat().st_mode & 0o222)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without tfds's progress bars and its notices of downloads (there are none) and of OpenCV (not needed)."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        absl_logging.set_verbosity(verbosity)
