"""scikit-learn's handwritten digits: 1,797 images of 8x8 in 17 greys, bundled with scikit-learn.

They are the test part of the UCI "Optical Recognition of Handwritten Digits"; there is no customary split. Ours holds
out 899 (half) for test, so that one example is 0.11 points, and 180 for validation, and trains on 718.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from experiments.data._prepare import Source


class Digits(tfds.core.GeneratorBasedBuilder):
    """One record set, `records`, with every image as uint8 from 0 to 16."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's bundled handwritten digits",
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"records": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load_digits()
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            yield i, {"image": image[:, :, None].astype(np.uint8), "label": int(label)}


def _builder(originals: Path, into: Path) -> tfds.core.DatasetBuilder:
    return Digits(data_dir=into, file_format="array_record")


SOURCE = Source("digits", "1.0.0", classes=10, scale=16, train="records", test=899, validation=180, builder=_builder)
