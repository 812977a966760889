"""Distilling a two-stage detector: `python -m experiments.distill_detection --data-dir DIR` (Chen et al. 2017).

A thin student alone, and under teachers of two sizes with each part of the paper's distillation, and with all of them:
class-weighted soft targets for the proposals' and the regions' classes, regression bounded by the teacher's, and hints
between the backbones through an adaptation layer. Teachers see the student's regions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _distilling, _results
from experiments._average_precision import Detections, mean_average_precision
from experiments._command import run_main
from experiments._detector import Assigned, Detector, Outputs, anchors, assigned, detected, proposed
from experiments._distilling import PARAMS, Learner, Lesson, Room, bars, command, gathered, parameters, written
from experiments._results import Column
from experiments.data._scenes import CELLS, Scenes, load_scenes
from jaxcompress import distill


@dataclass(frozen=True)
class Config(_distilling.Config):
    """A detector's student under two teachers."""

    data: str = "bccd"
    """bccd (with --data-dir), or scattered: bundled digits on a canvas."""
    width: int = 128
    """Of the images, in pixels."""
    batch_size: int = 8
    epochs: int = 18
    teacher_epochs: int = 30
    rate: float = 3e-3
    student: tuple[int, int, int] = (8, 16, 24)
    """Channels of the backbone's three sizes."""
    small_teacher: tuple[int, int, int] = (16, 32, 48)
    large_teacher: tuple[int, int, int] = (32, 64, 96)
    sides: tuple[int, ...] = (8, 21, 40)
    """Of the anchors, in pixels."""
    regions: int = 48
    """Proposals an image, in training and in use."""
    sample: int = 32
    """Regions an image that the head's losses see, a quarter of them objects at most; of the anchors twice as many."""
    soft: float = 0.5
    """The weight of the soft targets beside the labels (1 - mu)."""
    bound: float = 0.5
    """The weight of the bounded regression (nu)."""
    hint: float = 0.5
    """The weight of the hints (gamma)."""


SHORT = Config(
    data="scattered",
    seeds=1,
    epochs=2,
    teacher_epochs=2,
    student=(4, 4, 8),
    small_teacher=(4, 8, 8),
    large_teacher=(8, 8, 8),
    sides=(8, 12),
    regions=8,
    sample=8,
)
"""A run of seconds, for tests; its figures mean nothing."""

NOTHING = {"soft": 0.0, "bound": 0.0, "hint": 0.0}
ALONE, ALL = "student alone", "all three"
PARTS = {"soft": "soft targets", "bound": "bounded regression", "hint": "hints"}


class SceneRoom(Room):
    """Scenes on the device, each also mirrored both ways; `labels` are boxes, `[examples, most, 5]`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dataset = load_scenes(config.data, config.data_dir, config.width)
        train, validation = self.dataset.train, self.dataset.validation
        assert isinstance(train, Scenes) and isinstance(validation, Scenes)
        self.images, self.labels = mirrored(train.inputs()[: config.examples], train.boxes[: config.examples])
        self.validation = (jnp.asarray(validation.inputs()), jnp.asarray(validation.boxes))
        self.size: tuple[int, int] = (self.images.shape[1], self.images.shape[2])
        self.regions = config.regions
        self.batch = min(config.batch_size, len(self.labels))
        self.steps = len(self.labels) // 4 // self.batch  # as many as the images without their mirrored ones fill
        self._test, self._forward, self._init = None, {}, {}

    def precision(self, model: Detector, variables: Any, split: Scenes) -> tuple[float, list[float]]:
        """mAP@0.5 and each class's, in per cent."""
        if model not in self._forward:
            bases = anchors(*self.size, model.sides)
            self._forward[model] = jax.jit(partial(everything, model, bases, self.size, self.regions))
        run, found = self._forward[model], []
        images = jnp.asarray(split.inputs())
        for i in range(0, len(images), 8):
            some = images[i : i + 8]
            full = jnp.concatenate([some, jnp.zeros((8 - len(some), *some.shape[1:]))])
            boxes, scores, classes = (np.asarray(x)[: len(some)] for x in run(variables, full))
            for b, s, c in zip(boxes, scores, classes, strict=True):
                found.append(Detections(b[s > 0], s[s > 0], c[s > 0]))
        whole, each = mean_average_precision(found, split.boxes, classes=self.dataset.classes)
        return 100 * whole, [100 * value for value in each]


def mirrored(images: np.ndarray, boxes: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The images as they are, left to right, upside down, and both, with their boxes."""
    height, width = images.shape[1:3]
    flipped, moved = [], []
    for across in (False, True):
        for down in (False, True):
            x, b = images, boxes.copy()
            if across:
                x, b[..., [0, 2]] = x[:, :, ::-1], width - boxes[..., [2, 0]]
            if down:
                x, b[..., [1, 3]] = x[:, ::-1], height - boxes[..., [3, 1]]
            flipped.append(x)
            moved.append(np.where(boxes[..., 4:] > 0, b, 0))
    return jnp.asarray(np.concatenate(flipped)), jnp.asarray(np.concatenate(moved))


def everything(model: Detector, bases: jax.Array, size: tuple[int, int], number: int, variables: Any, x: Any) -> Any:
    """Detections of images: boxes, scores and classes, `[batch, classes * number, ...]`."""
    features = model.apply(variables, x, method=Detector.features)
    first: Any = model.apply(variables, features, method=Detector.proposals)
    regions = jax.vmap(lambda out: proposed(out, bases, size, number))(first)
    second: Any = model.apply(variables, features, regions, method=Detector.named)
    return jax.vmap(lambda out, r: detected(out, r, size, number))(second, regions)


def head_loss(student: Outputs, teacher: Outputs, wanted: Assigned, knobs: Any, background: float) -> jax.Array:
    """Equations 2 to 4 for one head: the mean over the sampled anchors or regions; knobs of 0 leave the plain losses.

    The teacher's outputs may be anything where the knobs are 0.
    """
    named = distill.detection_class_loss(
        student.logits,
        teacher.logits,
        wanted.labels,
        hard_weight=1 - knobs["soft"],
        background_weight=background,
        where=wanted.counts,
    )
    matched = wanted.counts & (wanted.labels > 0)
    fitted = distill.detection_box_loss(
        student.offsets, teacher.offsets, wanted.offsets, bound_weight=knobs["bound"], where=matched
    )
    return distill.masked_mean(named + fitted, wanted.counts)


def detection_loss(config: Config, room: SceneRoom, model: Detector, teacher: Detector | None = None) -> Any:
    """A `Loss`. With a teacher, `params` are `student` and `adapt`, `rows` the teacher's features and proposals."""
    bases = anchors(*room.size, model.sides)
    adapt = None if teacher is None else distill.conv_projector(*(map_shape(room, m) for m in (model, teacher)))

    def of_params(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        own = params if teacher is None else params["student"]
        knobs = NOTHING if teacher is None else lesson.knobs["weights"]
        features: Any = model.apply({PARAMS: own}, lesson.images, method=Detector.features)
        first: Any = model.apply({PARAMS: own}, features, method=Detector.proposals)
        keys = jax.random.split(lesson.key, (2, len(lesson.images)))

        def of_anchors(things: jax.Array, key: jax.Array) -> Assigned:
            found = assigned(bases, things, key, number=2 * config.sample, objects=config.sample, little=0.3, best=True)
            return found._replace(labels=jnp.minimum(found.labels, 1))

        def of_regions(out: Outputs, things: jax.Array, key: jax.Array) -> tuple[jax.Array, Assigned]:
            regions = jnp.concatenate([proposed(out, bases, room.size, config.regions), things[:, :4]])
            found = assigned(regions, things, key, number=config.sample, objects=config.sample // 4)
            chosen = jax.lax.top_k(found.counts.astype(jnp.float32), config.sample)[1]
            return regions[chosen], jax.tree.map(lambda x: x[chosen], found)

        for_anchors = jax.vmap(of_anchors)(lesson.labels, keys[0])
        regions, for_regions = jax.vmap(of_regions)(first, lesson.labels, keys[1])
        second: Any = model.apply({PARAMS: own}, features, regions, method=Detector.named)
        if teacher is None:
            guides: Any = first, second
        else:
            guides = (
                lesson.rows["proposals"],
                teacher.apply(lesson.knobs["teacher"], lesson.rows["features"], regions, method=Detector.named),
            )
        total = head_loss(first, guides[0], for_anchors, knobs, 1.5)
        total += head_loss(second, guides[1], for_regions, knobs, 1.5)
        if adapt is not None:
            hints = distill.hint_loss(adapt.apply(params["adapt"], features), lesson.rows["features"])
            total += knobs["hint"] * jnp.mean(hints)
        return total, extras

    return of_params


def map_shape(room: SceneRoom, model: Detector) -> tuple[int, int, int]:
    """Height, width and channels of a detector's features."""
    found = jax.eval_shape(model.init, jax.random.key(0), room.images[:1])
    features = jax.eval_shape(partial(model.apply, method=Detector.features), found, room.images[:1])
    return features.shape[1:]


def outputs_of(room: SceneRoom, model: Detector, variables: Any) -> dict[str, Any]:
    """A teacher's features and proposals of every training image."""

    @jax.jit
    def run(images: jax.Array) -> dict[str, Any]:
        features = model.apply(variables, images, method=Detector.features)
        return {"features": features, "proposals": model.apply(variables, features, method=Detector.proposals)}

    parts = [run(room.images[i : i + 64]) for i in range(0, len(room.images), 64)]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def main(config: Config) -> _results.Result:
    """Trains teachers and students, and writes the result and the figure."""
    c, room = config, SceneRoom(config)
    make = partial(Detector, sides=c.sides, classes=room.dataset.classes)
    student, figures = make(c.student), []

    def record(name: str, seed: int, model: Detector, variables: Any) -> dict[str, float]:
        split = room.dataset.test.read(for_model=f"{name}, seed {seed}")
        assert isinstance(split, Scenes)
        whole, each = room.precision(model, variables, split)
        print(f"{name}, seed {seed}: {whole:.2f}", flush=True)
        named = {f"class_{i}": value for i, value in enumerate(each)}
        return {"map": whole, **named, "size": parameters(variables)}

    def one(name: str, seed: int, model: Detector, learn: Any) -> None:
        figures.append((name, seed, room.kept(f"{name}, seed {seed}", lambda: record(name, seed, model, learn()))))

    alone = room.learner(student, detection_loss(c, room, student))
    for seed in range(c.seeds):
        one(ALONE, seed, student, lambda seed=seed: alone(f"{ALONE} {seed}", seed))
    sizes = {"small teacher": c.small_teacher, "large teacher": c.large_teacher}
    for who, widths in sizes.items():
        teacher = make(widths)
        teach = room.learner(teacher, detection_loss(c, room, teacher), epochs=c.teacher_epochs)
        variables = room.trained(who, teacher, partial(teach, who, 0))
        one(who, 0, teacher, lambda variables=variables: variables)
        rows = outputs_of(room, teacher, variables)
        adapt = distill.conv_projector(map_shape(room, student), map_shape(room, teacher))

        def init(seed: int, adapt: Any = adapt) -> Any:
            own = room.init(student, seed)[PARAMS]
            return {PARAMS: {"student": own, "adapt": adapt.init(jax.random.key(10_000 + seed))}}

        guided = Learner(room, init, detection_loss(c, room, student, teacher))
        full = {key: getattr(c, key) for key in NOTHING}
        arms = {title: NOTHING | {key: full[key]} for key, title in PARTS.items()} | {ALL: full}
        for title, weights in arms.items():

            def pupil(
                seed: int, name: str, weights: Any = weights, guided: Any = guided, rows: Any = rows, v: Any = variables
            ) -> Any:
                knobs = {"weights": weights, "teacher": v}
                return {PARAMS: guided(f"{name} {seed}", seed, rows=rows, knobs=knobs)[PARAMS]["student"]}

            for seed in range(c.seeds):
                one(f"{who}: {title}", seed, student, partial(pupil, seed, f"{who} {title}"))
    return reported(c, room, figures)


def reported(config: Config, room: SceneRoom, figures: list[Any]) -> _results.Result:
    """The result, its table and its figure."""
    c, rows = config, gathered(figures)
    names = CELLS if c.data == "bccd" else ("0", "1", "2")
    taught = [row.name for row in rows if ": " in row.name]
    result = room.result(
        name=f"distill_detection_{c.data}",
        title=f"A detector's student under two teachers, on {c.data}",
        source="Chen et al. 2017 report gains of 1 to 5 points of mAP on PASCAL, KITTI, ILSVRC and COCO with AlexNet"
        " and VGG backbones; their figures are of other data and networks.",
        command=command("distill_detection", c),
        selection="lengths and rate by trials on validation images, with the student alone; weights are the paper's",
        columns=[
            Column("map", "mAP@0.5 (%)", 1),
            *(Column(f"class_{i}", name, 1) for i, name in enumerate(names)),
            Column("size", "parameters", 0),
        ],
        rows=rows,
        pairs=[("map", name, ALONE) for name in taught] if c.seeds > 1 else (),
        notes=[
            f"{len(room.images) // 4} training images of {room.size[1]} x {room.size[0]}, mirrored both ways at random,"
            f" batches of {room.batch}, {c.epochs} epochs of {room.steps} steps (teachers {c.teacher_epochs}), Adam"
            f" with a cosine from {c.rate:g} to zero.",
            f"Backbones of stride 8 with {c.student}, {c.small_teacher} and {c.large_teacher} channels; anchors of"
            f" {c.sides} pixels, {c.regions} proposals, of which the head learns from {c.sample}. One teacher of each"
            " size, of seed 0; teachers see the student's regions.",
            f"Soft targets weigh {c.soft:g}, labels the rest, background 1.5; the bounded regression {c.bound:g};"
            f" hints {c.hint:g}, through a 1x1 convolution.",
        ],
    )
    return written(result, c, lambda path: bars(path, rows, "map", x_title="mAP@0.5 (%)", title=result.title))


if __name__ == "__main__":
    run_main(main, Config)
