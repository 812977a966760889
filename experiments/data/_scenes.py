"""Images with boxes around what is in them: BCCD from disk, and bundled digits on a canvas for trials.

`bccd` are microscope images of blood with boxes around red cells, white cells and platelets (the split that its
repository gives), read at a quarter of their size or less. `scattered` are scikit-learn's digits 0, 1 and 2, pasted
on a canvas without touching each other; training, validation and test scenes share no digit.
"""

import hashlib
import io
import os
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from experiments._command import UsageError
from experiments._splits import Dataset, HeldOut, Split
from experiments.data._prepare import DataNotFoundError

CELLS = ("RBC", "WBC", "Platelets")
MOST = 32
"""Boxes an image; rows of zeros fill up."""


@dataclass(frozen=True, eq=False)
class Scenes(Split):
    """Images, and what is where in them.

    Attributes:
      labels: `[examples]`, how many boxes each image has.
      boxes: `[examples, MOST, 5]`, float32: left, top, right, bottom in pixels, and the class from 1; 0 fills up.
    """

    boxes: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        mark = hashlib.sha256(self.sha256.encode() + self.boxes.astype("<f4").tobytes()).hexdigest()
        object.__setattr__(self, "sha256", mark)
        self.boxes.setflags(write=False)


def load_scenes(name: str, data_dir: str | os.PathLike[str] | None = None, width: int = 128) -> Dataset:
    """A data set of three kinds of objects; its splits are `Scenes`.

    Args:
      name: `"bccd"` or `"scattered"`.
      data_dir: for BCCD, the folder with `bccd.zip`; default `$JAXCOMPRESS_DATA_DIR`.
      width: of BCCD's images, in pixels; the height is three quarters of it.

    Raises:
      DataNotFoundError: the file is not there.
      ValueError: no such data set.
    """
    if name == "scattered":
        return scattered()
    if name != "bccd":
        raise UsageError(f"no data set of scenes {name!r}: there are bccd and scattered")
    path = Path(data_dir or os.environ.get("JAXCOMPRESS_DATA_DIR") or ".") / "bccd.zip"
    if not path.is_file():
        raise DataNotFoundError(f"no BCCD: there is no {path}; give --data-dir or $JAXCOMPRESS_DATA_DIR")
    with zipfile.ZipFile(path) as archive:
        parts = {
            part: archive.read(f"BCCD/ImageSets/Main/{name}.txt").decode().split()
            for part, name in {"train": "train", "validation": "val", "test": "test"}.items()
        }
        splits = {part: _read(archive, part, names, width) for part, names in parts.items()}
    return Dataset("bccd", len(CELLS), splits["train"], splits["validation"], HeldOut(splits["test"]))


def _read(archive: zipfile.ZipFile, part: str, names: list[str], width: int) -> Scenes:
    images, found = [], []
    for name in names:
        image = Image.open(io.BytesIO(archive.read(f"BCCD/JPEGImages/{name}.jpg")))
        scale = width / image.width
        size = (width, round(image.height * scale))
        image.draft("RGB", size)  # decodes no more than is needed
        images.append(np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)))
        found.append(annotated(archive.read(f"BCCD/Annotations/{name}.xml"), scale))
    return _scenes(part, np.stack(images), found, 255)


def annotated(xml: bytes, scale: float = 1.0) -> list[list[float]]:
    """Left, top, right, bottom and class of each box in a Pascal VOC file; boxes of no area are left out."""
    boxes = []
    for thing in ElementTree.fromstring(xml).iter("object"):
        edges = [float(thing.findtext(f"bndbox/{edge}", "nan")) for edge in ("xmin", "ymin", "xmax", "ymax")]
        if edges[2] > edges[0] and edges[3] > edges[1]:
            boxes.append([*(scale * edge for edge in edges), 1.0 + CELLS.index(thing.findtext("name", ""))])
    return boxes


def _scenes(part: str, images: np.ndarray, found: list[list[list[float]]], scale: int) -> Scenes:
    boxes = np.zeros((len(images), MOST, 5), np.float32)
    for row, things in zip(boxes, found, strict=True):
        if len(things) > MOST:
            raise ValueError(f"an image has {len(things)} boxes, and there is room for {MOST}")
        row[: len(things)] = np.reshape(things, (-1, 5))
    counts = np.array([len(things) for things in found], np.int32)
    return Scenes(part, images, counts, scale, boxes)


def scattered(scenes: int = 48, height: int = 32, width: int = 48) -> Dataset:
    """Scenes of one to four digits each; a sixth as many for validation, and as many again for test."""
    digits = load_digits()
    kept = digits.target < 3
    images, labels = digits.images[kept].astype(np.uint8), digits.target[kept]
    splits, begin = {}, 0
    for i, (part, n) in enumerate({"train": scenes, "validation": scenes // 6, "test": scenes // 6}.items()):
        share = slice(begin, begin + len(labels) * n // (scenes + 2 * (scenes // 6)))
        begin = share.stop
        splits[part] = _pasted(part, images[share], labels[share], n, (height, width), np.random.default_rng(i))
    return Dataset("scattered", 3, splits["train"], splits["validation"], HeldOut(splits["test"]))


def _pasted(
    part: str, images: np.ndarray, labels: np.ndarray, n: int, size: tuple[int, int], rng: np.random.Generator
) -> Scenes:
    side = images.shape[1]
    canvases, found = rng.integers(0, 3, (n, *size, 1)).astype(np.uint8), []
    cells = [(y, x) for y in range(size[0] // 10) for x in range(size[1] // 10)]
    for canvas in canvases:
        things = []
        for k in rng.permutation(len(cells))[: rng.integers(1, 5)]:
            which = rng.integers(len(labels))
            top, left = (10 * cell + rng.integers(0, 10 - side + 1) for cell in cells[k])
            canvas[top : top + side, left : left + side, 0] = images[which]
            things.append([left, top, left + side, top + side, 1.0 + labels[which]])
        found.append(things)
    return _scenes(part, canvases, found, 16)
