"""CIFAR-100 through tfds's official builder: from its prepared files, or from the binary version's two files on disk.

A record of the binary version is 3,074 bytes: the coarse label, the fine label, and 1,024 bytes each of red, green and
blue, row by row. Labels are the 100 fine ones.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments._command import UsageError
from experiments.data._prepare import DataNotFoundError, Source

PARTS = ("train", "test")
RECORD = 2 + 3 * 32 * 32

with tfds.core.registered.skip_registration():  # or it would stand in the official builder's place

    class _Cifar100FromDisk(tfds.image_classification.Cifar100):
        """The official builder, but that it takes its two files from disk, without TensorFlow."""

        name = "cifar100"

        def __init__(self, *, files: Mapping[str, Path], **kwargs: Any) -> None:
            self._files = files
            super().__init__(**kwargs)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {part: self._generate_examples(part, path) for part, path in self._files.items()}

        def _generate_examples(self, part: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
            content = np.fromfile(path, np.uint8)
            if not len(content) or len(content) % RECORD:
                raise UsageError(
                    f"{path} is not of CIFAR-100's binary version: {len(content)} bytes are no whole records"
                )
            for i, record in enumerate(content.reshape(-1, RECORD)):
                pixels = np.ascontiguousarray(record[2:].reshape(3, 32, 32).transpose(1, 2, 0))
                labels = {"coarse_label": int(record[0]), "label": int(record[1])}
                yield i, {"id": f"{part}_{i:05d}", "image": Image.fromarray(pixels), **labels}


def builder(originals: Path, into: Path) -> tfds.core.DatasetBuilder:
    """The builder that reads the two files in `originals/cifar-100-binary` or `originals`."""
    files = {}
    for part in PARTS:
        places = [folder / f"{part}.bin" for folder in (originals / "cifar-100-binary", originals)]
        if found := [place for place in places if place.is_file()]:
            files[part] = found[0]
    if missing := [f"{part}.bin" for part in PARTS if part not in files]:
        raise DataNotFoundError(
            f"no CIFAR-100 in {originals}: neither tfds's files in {originals / SOURCE.name / SOURCE.version}, nor"
            f" {', '.join(missing)} of the binary version in {originals / 'cifar-100-binary'} or {originals}. Give the"
            " folder that has them with --data-dir or $JAXCOMPRESS_DATA_DIR"
        )
    return _Cifar100FromDisk(files=files, data_dir=into, file_format="array_record")


SOURCE = Source(
    "cifar100", "3.0.2", classes=100, scale=255, train="train", test="test", validation=5000, builder=builder
)
