"""CIFAR-100 from the binary version's two files, `train.bin` and `test.bin`, with the 100 fine labels.

A record is 3,074 bytes: the coarse label, the fine label, and 1,024 bytes each of red, green and blue, row by row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments._command import UsageError
from experiments.data._prepare import DataNotFoundError, Source

PARTS = ("train", "test")
RECORD = 2 + 3 * 32 * 32


class Cifar100Binary(tfds.core.GeneratorBasedBuilder):
    """The images and their fine labels."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, files: dict[str, Path] | None = None, **kwargs: Any) -> None:
        self._files = files or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(32, 32, 3), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-100, binary version",
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=100)}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {part: self._generate_examples(path) for part, path in self._files.items()}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        content = np.fromfile(path, np.uint8)
        if not len(content) or len(content) % RECORD:
            raise UsageError(f"{path} is not of CIFAR-100's binary version: {len(content)} bytes are no whole records")
        for i, record in enumerate(content.reshape(-1, RECORD)):
            pixels = record[2:].reshape(3, 32, 32).transpose(1, 2, 0)
            yield i, {"image": Image.fromarray(np.ascontiguousarray(pixels)), "label": int(record[1])}


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
    return Cifar100Binary(files=files, data_dir=into, file_format="array_record")


SOURCE = Source(
    "cifar100_binary", "1.0.0", classes=100, scale=255, train="train", test="test", validation=5000, builder=builder
)
