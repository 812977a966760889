"""MNIST through tfds's official builder, from its own prepared files or from the four idx files on disk."""

import gzip
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments._command import UsageError
from experiments.data._prepare import DataNotFoundError, Source

# md5 of the uncompressed content: the .gz around it differs from one gzip run to the next
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

with tfds.core.registered.skip_registration():  # or it would stand in the official builder's place

    class _MnistFromDisk(tfds.image_classification.MNIST):
        """The official builder, but that it takes its four files from disk."""

        name = "mnist"

        def __init__(self, *, files: Mapping[str, Path], md5: Mapping[str, str], **kwargs: Any) -> None:
            self._files, self._md5 = files, md5
            super().__init__(**kwargs)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            arrays = {name: read_idx(path, self._md5.get(name)) for name, path in self._files.items()}
            return {"train": self._generate_examples(arrays, "train"), "test": self._generate_examples(arrays, "t10k")}

        def _generate_examples(self, arrays: dict[str, np.ndarray], part: str) -> Iterator[tuple[int, dict[str, Any]]]:
            images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": Image.fromarray(image), "label": int(label)}


def read_idx(path: Path, md5: str | None) -> np.ndarray:
    """The uint8 array in an idx file, plain or gzipped.

    Args:
      path: the file.
      md5: what the md5 of its uncompressed content must be; `None` accepts any.

    Raises:
      ValueError: the content has another md5, or is not an idx file of bytes.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, ValueError) as error:
            raise UsageError(f"{path} is not a whole gzip file: {error}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise UsageError(f"{path} is not the official file: its uncompressed content has md5 {found}, not {md5}")
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = tuple(int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, rank + 1))
    if not rank or len(content) != 4 + 4 * rank + math.prod(shape):
        raise UsageError(
            f"{path} is not an idx file of unsigned bytes: {len(content)} bytes, header {content[:16].hex()}"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def builder(originals: Path, into: Path, md5: Mapping[str, str] = MD5) -> tfds.core.DatasetBuilder:
    """The builder that reads the idx files in `originals` or `originals/mnist`; `md5={}` accepts other content."""
    files = {}
    for name in MD5:
        places = [folder / (name + end) for folder in (originals / "mnist", originals) for end in ("", ".gz")]
        if found := [place for place in places if place.is_file()]:
            files[name] = found[0]
    if missing := [name for name in MD5 if name not in files]:
        raise DataNotFoundError(
            f"no MNIST in {originals}: neither tfds's files in {originals / 'mnist' / SOURCE.version}, nor the original"
            f" files {', '.join(missing)} (plain or .gz) in {originals / 'mnist'} or {originals}. Put the four"
            " idx files of the official MNIST there, or give the folder that has them with --data-dir or"
            " $JAXCOMPRESS_DATA_DIR"
        )
    return _MnistFromDisk(files=files, md5=md5, data_dir=into, file_format="array_record")


SOURCE = Source("mnist", "3.0.1", classes=10, scale=255, train="train", test="test", validation=5000, builder=builder)
