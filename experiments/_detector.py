"""A small two-stage detector with fixed shapes, after Faster R-CNN (Ren et al. 2015).

A backbone of stride 8, a proposal network over square anchors, a fixed number of proposals by non-maximum suppression,
and a head on 5x5 crops of the features around each region. All of it runs under `jit`; boxes are left, top, right,
bottom in pixels, offsets are `(dx / w, dy / h, log w, log h)` over their standard deviations of 0.1 and 0.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

STRIDE, CROP = 8, 5
SPREAD = np.array([0.1, 0.1, 0.2, 0.2], np.float32)
LEAST = -1e9


class Outputs(NamedTuple):
    """What a head says of anchors or regions."""

    logits: jax.Array
    """`[..., classes]`, background first."""
    offsets: jax.Array
    """`[..., 4]`"""


class Detector(nn.Module):
    """The networks; what is done with their outputs are functions of this file.

    Attributes:
      widths: channels of the backbone's three sizes.
      sides: of the anchors, in pixels.
      classes: of objects.
      hidden: units of the head's hidden layer.
    """

    widths: tuple[int, int, int]
    sides: tuple[int, ...] = (8, 21, 40)
    classes: int = 3
    hidden: int = 64

    def setup(self) -> None:
        """Convolutions and dense layers."""
        a, b, c = self.widths
        self.convolutions = [nn.Conv(n, (3, 3), strides=s, use_bias=False) for n, s in ((a, 2), (b, 2), (c, 2), (c, 1))]
        self.norms = [nn.GroupNorm(num_groups=4) for _ in self.convolutions]
        self.around = nn.Conv(c, (3, 3))
        self.objectness = nn.Conv(2 * len(self.sides), (1, 1))
        self.shifts = nn.Conv(4 * len(self.sides), (1, 1))
        self.region = nn.Dense(self.hidden)
        self.naming = nn.Dense(1 + self.classes)
        self.fitting = nn.Dense(4)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Outputs, Outputs]:
        """Features, proposals of the anchors, and what the head says of the whole image: for `init`."""
        found = self.features(images)
        height, width = images.shape[1:3]
        whole = jnp.broadcast_to(jnp.array([0.0, 0.0, width, height]), (len(images), 1, 4))
        return found, self.proposals(found), self.named(found, whole)

    def features(self, images: jax.Array) -> jax.Array:
        """`[batch, height / 8, width / 8, channels]` of images `[batch, height, width, channels]`."""
        x = images - 0.5
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.relu(norm(convolution(x)))
        return x

    def proposals(self, features: jax.Array) -> Outputs:
        """Two logits (background, object) and offsets of every anchor, in the order of `anchors`."""
        x = nn.relu(self.around(features))
        n = len(features)
        return Outputs(self.objectness(x).reshape(n, -1, 2), self.shifts(x).reshape(n, -1, 4))

    def named(self, features: jax.Array, regions: jax.Array) -> Outputs:
        """Logits `[batch, regions, 1 + classes]` and offsets of regions `[batch, regions, 4]`."""
        crops = cropped(features, regions)
        x = nn.relu(self.region(crops.reshape(*crops.shape[:2], -1)))
        return Outputs(self.naming(x), self.fitting(x))


def anchors(height: int, width: int, sides: Sequence[float]) -> jax.Array:
    """`[height / 8 * width / 8 * sides, 4]`: squares around the middle of each stride."""
    y, x = (STRIDE * (np.arange(-(-n // STRIDE)) + 0.5) for n in (height, width))
    middle = np.stack(np.broadcast_arrays(x[None, :, None], y[:, None, None]), axis=-1)
    half = np.asarray(sides, np.float32)[:, None] / 2
    return jnp.asarray(np.concatenate([middle - half, middle + half], axis=-1).reshape(-1, 4), jnp.float32)


def cropped(features: jax.Array, regions: jax.Array) -> jax.Array:
    """RoI align with one sample a cell: `[batch, regions, CROP, CROP, channels]`, by bilinear interpolation.

    The interpolation's weights are hat functions, so that two small matrix products gather and their gradients scatter.
    """
    low, high = regions[..., :2] / STRIDE, regions[..., 2:] / STRIDE
    steps = (jnp.arange(CROP) + 0.5) / CROP
    points = low[..., None] + (high - low)[..., None] * steps - 0.5  # [batch, regions, 2, CROP], in cells

    def hats(at: jax.Array, size: int) -> jax.Array:
        at = jnp.clip(at, 0, size - 1)
        return jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(size)))

    across, down = (hats(points[:, :, i], features.shape[2 - i]) for i in range(2))
    rows = jnp.einsum("bryh,bhwc->brywc", down, features)
    return jnp.einsum("brxw,brywc->bryxc", across, rows)


def encoded(boxes: jax.Array, bases: jax.Array) -> jax.Array:
    """Offsets that make `boxes` of `bases`; sides below a pixel count as one."""
    (bx, by, bw, bh), (x, y, w, h) = _middles(bases), _middles(boxes)
    offsets = jnp.stack([(x - bx) / bw, (y - by) / bh, jnp.log(w / bw), jnp.log(h / bh)], axis=-1)
    return offsets / SPREAD


def decoded(offsets: jax.Array, bases: jax.Array, height: int, width: int) -> jax.Array:
    """The boxes that offsets make of `bases`, cut at the image's border; none grows by more than 8."""
    dx, dy, dw, dh = jnp.moveaxis(offsets * SPREAD, -1, 0)
    bx, by, bw, bh = _middles(bases)
    x, y = bx + dx * bw, by + dy * bh
    w, h = (n * jnp.exp(jnp.clip(d, -np.log(8), np.log(8))) / 2 for n, d in ((bw, dw), (bh, dh)))
    edges = (jnp.clip(x - w, 0, width), jnp.clip(y - h, 0, height), jnp.clip(x + w, 0, width))
    return jnp.stack([*edges, jnp.clip(y + h, 0, height)], axis=-1)


def _middles(boxes: jax.Array) -> tuple[jax.Array, ...]:
    left, top, right, bottom = jnp.moveaxis(boxes, -1, 0)
    w, h = jnp.maximum(right - left, 1), jnp.maximum(bottom - top, 1)
    return (left + right) / 2, (top + bottom) / 2, w, h


def shared(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union `[m, n]` of boxes `[m, 4]` and `[n, 4]`; 0 where neither has an area."""
    low, high = jnp.maximum(a[:, None, :2], b[None, :, :2]), jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    common = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    areas = [jnp.prod(jnp.maximum(x[:, 2:] - x[:, :2], 0), axis=-1) for x in (a, b)]
    return common / jnp.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)


def kept(boxes: jax.Array, scores: jax.Array, number: int, overlap: float) -> tuple[jax.Array, jax.Array]:
    """Non-maximum suppression: one after another the surest box that no surer kept one overlaps by more.

    Args:
      boxes: `[n, 4]`.
      scores: `[n]`; at most `LEAST` never counts.
      number: how many are kept.
      overlap: the intersection over union from which a box goes.

    Returns:
      Which, `[number]`, and whether there was one left, `[number]`.
    """
    common = shared(boxes, boxes) > overlap

    def one(left: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        best = jnp.argmax(left)
        real = left[best] > LEAST
        return jnp.where(common[best], LEAST, left).at[best].set(LEAST), (best, real)

    return jax.lax.scan(one, scores, None, length=number)[1]


def proposed(outputs: Outputs, bases: jax.Array, size: tuple[int, int], number: int, among: int = 128) -> jax.Array:
    """Regions `[number, 4]` of one image: the surest `among` anchors' boxes, suppressed at 0.7; no gradient."""
    logits, offsets = (jax.lax.stop_gradient(x) for x in outputs)
    scores, which = jax.lax.top_k(logits[:, 1] - logits[:, 0], min(among, len(bases)))
    boxes = decoded(offsets[which], bases[which], *size)
    chosen, real = kept(boxes, scores, number, 0.7)
    return jnp.where(real[:, None], boxes[chosen], 0)


class Assigned(NamedTuple):
    """What anchors or regions should say, and which of them count."""

    labels: jax.Array
    """`[n]`, 0 for background."""
    offsets: jax.Array
    """`[n, 4]`"""
    counts: jax.Array
    """`[n]`, bool: the sample that the losses see."""


def assigned(
    bases: jax.Array,
    things: jax.Array,
    key: jax.Array,
    *,
    number: int,
    objects: int,
    enough: float = 0.5,
    little: float = 0.5,
    best: bool = False,
) -> Assigned:
    """Matches anchors or regions of one image with what is there, and draws a sample of both kinds.

    Args:
      bases: `[n, 4]`; those without an area never count.
      things: `[most, 5]`, boxes and classes from 1; class 0 fills up.
      key: draws the sample.
      number: how many count in all.
      objects: how many of them at most are matched to an object.
      enough, little: the overlap from which one is matched, and below which it is background.
      best: the anchors that overlap an object most are matched to it in any case.
    """
    overlap = jnp.where(things[:, 4] > 0, shared(bases, things[:, :4]), 0)
    most, which = jnp.max(overlap, axis=1), jnp.argmax(overlap, axis=1)
    match = most >= enough
    if best:
        top = (overlap >= jnp.max(overlap, axis=0) - 1e-6) & (overlap > 0.1)
        which = jnp.where(jnp.any(top, axis=1) & ~match, jnp.argmax(jnp.where(top, overlap, 0), axis=1), which)
        match |= jnp.any(top, axis=1)
    area = jnp.prod(bases[:, 2:] - bases[:, :2], axis=-1) > 0
    match, empty = match & area, (most < little) & ~match & area
    luck = jax.random.uniform(key, most.shape)
    positive = match & (_rank(jnp.where(match, luck, -1)) < objects)
    negative = empty & (_rank(jnp.where(empty, luck, -1)) < number - jnp.sum(positive))
    labels = jnp.where(match, things[which, 4].astype(int), 0)
    offsets = jnp.where(match[:, None], encoded(things[which, :4], bases), 0)
    return Assigned(labels, offsets, positive | negative)


def _rank(scores: jax.Array) -> jax.Array:
    """Each score's place, the largest 0."""
    return jnp.argsort(jnp.argsort(-scores))


def detected(
    outputs: Outputs, regions: jax.Array, size: tuple[int, int], number: int, least: float = 0.05
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An image's detections, of each class up to `number`: boxes, scores (0 where there is none) and classes from 1."""
    boxes = decoded(outputs.offsets, regions, *size)
    real = jnp.prod(regions[:, 2:] - regions[:, :2], axis=-1) > 0
    chances = jax.nn.softmax(outputs.logits)[:, 1:]

    def of_class(chance: jax.Array) -> tuple[jax.Array, jax.Array]:
        which, there = kept(boxes, jnp.where(real & (chance > least), chance, LEAST), number, 0.5)
        return boxes[which], jnp.where(there, chance[which], 0)

    found, scores = jax.vmap(of_class, 1)(chances)
    classes = jnp.broadcast_to(1 + jnp.arange(chances.shape[1])[:, None], scores.shape)
    return found.reshape(-1, 4), scores.reshape(-1), classes.reshape(-1)
