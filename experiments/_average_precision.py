"""Mean average precision of detections, as Pascal VOC counts it since 2010."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Detections(NamedTuple):
    """What a detector found in one image."""

    boxes: np.ndarray
    """`[found, 4]`: left, top, right, bottom."""
    scores: np.ndarray
    """`[found]`"""
    classes: np.ndarray
    """`[found]`, from 1."""


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union `[m, n]` of boxes `[m, 4]` and `[n, 4]`; 0 where both have no area."""
    corners = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.prod(np.maximum(corners[1] - corners[0], 0), axis=-1)
    areas = [np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=-1) for x in (a, b)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)


def average_precision(right: np.ndarray, wanted: int) -> float:
    """The area under the precision's upper hull over recall.

    Args:
      right: `[found]`, bool: whether each detection is right, the surest first.
      wanted: how many objects there are; 1 or more.
    """
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    hull = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(hull[right]) / wanted)


def mean_average_precision(
    found: Sequence[Detections], boxes: np.ndarray, *, classes: int, overlap: float = 0.5
) -> tuple[float, list[float]]:
    """The mean over classes of the average precision, and each class's.

    A detection is right if the object of its class that it overlaps most does so by `overlap` or more and was not
    found before; a second detection of one object is wrong.

    Args:
      found: the detections of each image.
      boxes: `[images, most, 5]`, left, top, right, bottom and class from 1; class 0 fills up.
      classes: how many; one without any object is left out of the mean.
      overlap: the intersection over union that counts as found.
    """
    each = []
    for label in range(1, classes + 1):
        rights, scores, wanted = [], [], 0
        for image, things in zip(found, boxes, strict=True):
            true = things[things[:, 4] == label, :4]
            mine = image.classes == label
            order = np.argsort(-image.scores[mine], kind="stable")
            shared, taken = overlaps(image.boxes[mine][order], true), np.zeros(len(true), bool)
            for row in shared:
                best = int(np.argmax(row)) if len(true) else -1
                right = best >= 0 and row[best] >= overlap and not taken[best]
                if right:
                    taken[best] = True
                rights.append(right)
            scores += image.scores[mine][order].tolist()
            wanted += len(true)
        if wanted:
            surest = np.argsort(-np.array(scores), kind="stable")
            each.append(average_precision(np.array(rights, bool)[surest], wanted))
        else:
            each.append(float("nan"))
    return float(np.nanmean(each)), each
