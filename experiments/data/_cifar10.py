"""CIFAR-10 from two archives of JPEG files: `train.tar.xz` and `test.tar.xz`, entries `./CLASS/NNNN.jpg`.

The JPEG files are lossy re-encodings of the official images, so the tfds name is `cifar10_jpeg`: compare results on
them with each other, not with published figures.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments._command import UsageError
from experiments.data._prepare import DataNotFoundError, Source

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHA256 = {
    "train": "05702e29c9f6fa54d4cc0f6b93606f068c45d6e6e001d61fb38f9885b9085751",
    "test": "4589325ddf814801e6a511c44ec534d7948599e5ad9bb81ced4d300104374e66",
}


class Cifar10Jpeg(tfds.core.GeneratorBasedBuilder):
    """The JPEG files, byte for byte, with their labels."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, archives: dict[str, Path] | None = None, **kwargs: Any) -> None:
        self._archives = archives or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(32, 32, 3), encoding_format="jpeg")
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-10, re-encoded as JPEG",
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=CLASSES)}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        for part, path in self._archives.items():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != SHA256[part]:
                raise UsageError(f"{path} is not the archive wanted: its sha256 is {found}, not {SHA256[part]}")
        return {part: self._generate_examples(path) for part, path in self._archives.items()}

    def _generate_examples(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, {"image": io.BytesIO(file.read()), "label": Path(member.name).parent.name}


def builder(originals: Path, into: Path) -> tfds.core.DatasetBuilder:
    """The builder that reads the archives in `originals/cifar10` or `originals`."""
    archives = {}
    for part in SHA256:
        places = [folder / f"{part}.tar.xz" for folder in (originals / "cifar10", originals)]
        if found := [place for place in places if place.is_file()]:
            archives[part] = found[0]
    if missing := [f"{part}.tar.xz" for part in SHA256 if part not in archives]:
        raise DataNotFoundError(
            f"no CIFAR-10 in {originals}: neither tfds's files in {originals / SOURCE.name / SOURCE.version}, nor the"
            f" archives of JPEG files {', '.join(missing)} in {originals / 'cifar10'} or {originals}. Give the folder"
            " that has them with --data-dir or $JAXCOMPRESS_DATA_DIR"
        )
    return Cifar10Jpeg(archives=archives, data_dir=into, file_format="array_record")


SOURCE = Source(
    "cifar10_jpeg", "1.0.0", classes=10, scale=255, train="train", test="test", validation=5000, builder=builder
)
