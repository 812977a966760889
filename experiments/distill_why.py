"""Why distillation works: `python -m experiments.distill_why --data mnist --data-dir DIR`.

`smoothing`: teachers trained with and without label smoothing, their students, and how far each is to be believed
(Müller et al. 2019): accuracy, and calibration as ECE (Guo et al. 2017) with a reliability diagram. `partial`: teachers
that keep one thing of a teacher's outputs each: how to weigh the examples, or which classes are alike; and label
smoothing, which keeps neither (Tang et al. 2020). `targets`: the soft targets of one image at several temperatures.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _distilling, _results
from experiments._command import UsageError, run_main
from experiments._distilling import (
    Lesson,
    Mlp,
    Room,
    accuracy,
    alike,
    bars,
    command,
    gathered,
    guided,
    jittered,
    logits_loss,
    written,
)
from experiments._results import Column
from jaxcompress import distill


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Label smoothing and calibration, partial teachers, soft targets as a figure."""

    parts: tuple[str, ...] = ("smoothing", "partial", "targets")
    """Which of the three."""
    teacher: tuple[int, ...] = (300, 300)
    student: tuple[int, ...] = (20, 20)
    dropout: float = 0.3
    """Of the teachers."""
    jitter: int = 0
    """Pixels by which the teachers' images move."""
    smoothing: float = 0.1
    alpha: float = 0.9
    temperature: float = 4.0
    bins: int = 15
    """Of the calibration error."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 20.0)


SHORT = Config(seeds=1, epochs=8, rate=1e-2, jitter=1, teacher=(24, 24), student=(8,))
"""A run of seconds, for tests; its accuracies mean little."""


class Calibration(NamedTuple):
    """Predictions by confidence: of each bin its share of the examples, mean confidence and accuracy, each `[bins]`."""

    share: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: `sum over bins of share * |accuracy - confidence|` (Guo et al. 2017, eq. 3)."""
        return float(np.sum(self.share * np.abs(self.accuracy - self.confidence)))


def calibration(logits: jax.Array, labels: jax.Array, bins: int = 15) -> Calibration:
    """The calibration of predictions `[examples, classes]`, in bins of equal width; empty ones hold zeros."""
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    sure, right = p.max(axis=1), p.argmax(axis=1) == np.asarray(labels)
    which = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # (low, high], as in the paper
    count = np.bincount(which, minlength=bins)
    mean = [np.bincount(which, weights=x, minlength=bins) / np.maximum(count, 1) for x in (sure, right)]
    return Calibration(count / len(sure), mean[0], mean[1])


HOW = ("hard labels", "smoothed labels")
Known = dict[tuple[float, int], Any]
"""Teachers by smoothing and seed."""


class School:
    """The trainings that the parts share."""

    def __init__(self, config: Config, known: Known) -> None:
        c = config
        self.config, self.room, self._known = c, Room(c), known
        self.teacher, self.student = Mlp(c.teacher, dropout=c.dropout), Mlp(c.student)

        def smoothed(logits: jax.Array, lesson: Lesson) -> jax.Array:
            return distill.label_smoothing_loss(logits, lesson.labels, lesson.knobs)

        move = jittered(c.jitter) if c.jitter else None
        self._teach = self.room.learner(self.teacher, logits_loss(self.teacher, smoothed, move))
        self.smooth = self.room.learner(self.student, logits_loss(self.student, smoothed))
        self.learn = self.room.learner(self.student, logits_loss(self.student, guided))

    @property
    def kind(self) -> str:
        """What the results' names say of the setting: whether the teachers' images move."""
        return "jittered" if self.config.jitter else ""

    @property
    def moved(self) -> str:
        """The same for titles."""
        return ", the teachers' images moving" if self.config.jitter else ""

    @property
    def selection(self) -> str:
        """What was chosen, and by what."""
        return _distilling.TRIED if self.config.jitter else "nothing was chosen"

    def teach(self, smoothing: float, seed: int) -> Any:
        """A teacher, trained once for all parts."""
        if (smoothing, seed) not in self._known:
            what = f"teacher, smoothing {smoothing:g}, seed {seed}"
            self._known[smoothing, seed] = self.room.trained(
                what, self.teacher, lambda: self._teach(what, seed, knobs=smoothing)
            )
        return self._known[smoothing, seed]

    def distilled(self, name: str, seed: int, rows: jax.Array) -> dict[str, Any]:
        """A student of these teacher's logits."""
        c = self.config
        return self.learn(f"{name} {seed}", seed, rows=rows, knobs={"alpha": c.alpha, "temperature": c.temperature})

    def columns(self) -> list[Column]:
        """Accuracy and calibration."""
        return [
            Column("accuracy", "test accuracy (%)"),
            Column("ece", f"calibration error (%, {self.config.bins} bins)"),
            Column("nll", "negative log-likelihood", 3),
        ]


def smoothing(config: Config, known: Known) -> _results.Result:
    """Teachers with and without label smoothing, and their students."""
    c, school = config, School(config, known)
    room, figures = school.room, []
    seen: dict[str, list[Calibration]] = {}

    def measured(seed: int) -> dict[str, dict[str, Any]]:
        measures = {}

        def record(name: str, model: Mlp, variables: Any) -> None:
            images, labels = room.test_images(f"{name}, seed {seed}")
            logits = room.logits(model, variables, images)
            bins = [x.tolist() for x in calibration(logits, labels, c.bins)]
            nll = float(jnp.mean(distill.hard_label_loss(logits, labels)))
            measures[name] = {"accuracy": accuracy(logits, labels), "nll": nll, "bins": bins}

        for name, epsilon in zip(HOW, (0.0, c.smoothing), strict=True):
            teacher = school.teach(epsilon, seed)
            record(f"teacher, {name}", school.teacher, teacher)
            record(f"student, {name}", school.student, school.smooth(f"student {name} {seed}", seed, knobs=epsilon))
            pupil = school.distilled(name, seed, room.logits(school.teacher, teacher))
            record(f"student of the teacher with {name}", school.student, pupil)
        return measures

    for seed in range(c.seeds):
        for name, ours in room.kept(f"smoothing, seed {seed}", partial(measured, seed)).items():
            found = Calibration(*(np.asarray(x) for x in ours["bins"]))
            seen.setdefault(name, []).append(found)
            figures.append((name, seed, {"ece": 100 * found.error, "accuracy": ours["accuracy"], "nll": ours["nll"]}))
        print(f"smoothing, seed {seed}: done", flush=True)
    rows_ = sorted(gathered(figures), key=lambda row: row.name, reverse=True)
    students = [f"student of the teacher with {how}" for how in reversed(HOW)]
    result = room.result(
        name=_distilling.named("distill_smoothing", c.data, school.kind),
        title=f"Teachers with and without label smoothing, on {c.data}{school.moved}",
        source="Müller et al. 2019 report that label smoothing makes teachers better calibrated and no less accurate,"
        " and"
        " their students worse than those of teachers without it; their figures are of other data and networks.",
        command=command("distill_why", c),
        selection=school.selection,
        columns=school.columns(),
        rows=rows_,
        pairs=[*(("accuracy", f"student of the teacher with {how}", f"student, {how}") for how in HOW),
               ("accuracy", *students), ("accuracy", "teacher, smoothed labels", "teacher, hard labels"),
               ("ece", "teacher, smoothed labels", "teacher, hard labels")] if c.seeds > 1 else (),
        notes=[
            room.setting(),
            f"Teacher {c.teacher} with dropout {c.dropout:g} and images moved by up to {c.jitter} pixels, student"
            f" {c.student}; smoothing {c.smoothing:g}; soft"
            f" targets at"
            f" T = {c.temperature:g} weigh {c.alpha:g}, labels the rest.",
            "Calibration error: Guo et al. 2017, equation 3, bins of equal width. The figure has the mean over seeds.",
        ],
    )  # fmt: skip
    return written(result, c, lambda path: reliability(path, seen))


def partly(config: Config, known: Known) -> _results.Result:
    """Teachers of which one effect is left."""
    c, school = config, School(config, known)
    room, labels = school.room, school.room.labels
    classes = room.dataset.classes

    def to_targets(logits: jax.Array, lesson: Lesson) -> jax.Array:
        soft = distill.soft_label_loss(logits, lesson.rows, temperature=c.temperature)
        return c.alpha * soft + (1 - c.alpha) * distill.hard_label_loss(logits, lesson.labels)

    learn, figures = room.learner(school.student, logits_loss(school.student, to_targets)), []

    def measured(seed: int) -> dict[str, float]:
        teacher = school.teach(0.0, seed)
        p = distill.temperature_softmax(room.logits(school.teacher, teacher), c.temperature)
        correct = jnp.take_along_axis(p, labels[:, None], axis=1)
        similar = alike(p, labels, teacher["params"][f"Dense_{len(c.teacher)}"]["kernel"])
        others = similar * (1 - jax.nn.one_hot(labels, classes))
        both = correct * jax.nn.one_hot(labels, classes) + (1 - correct) * others / others.sum(1, keepdims=True)
        spread = distill.smooth_labels(labels, classes, 1 - correct.mean(), onto_wrong_only=True)
        arms = {
            "distilled": p,
            "re-weighting alone": distill.reweighting_teacher(p, labels),
            "class similarity alone": similar,
            "re-weighting and class similarity": both,
            "smoothing at the teacher's mean confidence": spread,
        }
        plain = {"labels alone": 0.0, "label smoothing": c.smoothing}
        trained = {name: school.smooth(f"{name} {seed}", seed, knobs=knob) for name, knob in plain.items()}
        trained |= {name: learn(f"{name} {seed}", seed, rows=rows) for name, rows in arms.items()}
        found = {"teacher": room.test(f"teacher, seed {seed}", school.teacher, teacher)}
        return found | {name: room.test(f"{name}, seed {seed}", school.student, v) for name, v in trained.items()}

    for seed in range(c.seeds):
        found = room.kept(f"partial, seed {seed}", partial(measured, seed))
        figures += [(name, seed, {"accuracy": value}) for name, value in found.items()]
        print(f"partial, seed {seed}: done", flush=True)
    rows_ = gathered(figures)
    result = room.result(
        name=_distilling.named("distill_partial", c.data, school.kind),
        title=f"What is left of distillation with one effect at a time, on {c.data}{school.moved}",
        source="Tang et al. 2020 report, on CIFAR-100 and ImageNet, that re-weighting the examples and the similarity"
        " of"
        " classes each help, beyond label smoothing, and together come close to distillation; their figures are of"
        " other"
        " data and networks.",
        command=command("distill_why", c),
        selection=school.selection,
        columns=[Column("accuracy", "test accuracy (%)")],
        rows=rows_,
        pairs=[("accuracy", row.name, "labels alone") for row in rows_ if row.name not in ("teacher", "labels alone")]
        if c.seeds > 1
        else (),
        notes=[
            room.setting(),
            f"Teacher {c.teacher} with dropout {c.dropout:g} and images moved by up to {c.jitter} pixels, student"
            f" {c.student}. Targets are those of T ="
            f" {c.temperature:g}"
            f" and weigh {c.alpha:g}, labels the rest; only the targets differ. Re-weighting keeps each example's"
            f" probability"
            " of its label; class similarity is the cosine of the teacher's last weights, divided by 0.3, with the"
            f" teacher's mean confidence on the label. Label smoothing is {c.smoothing:g} in the plain cross entropy.",
        ],
    )
    return written(
        result, c, lambda path: bars(path, rows_, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


def targets(config: Config, known: Known) -> _results.Result:
    """What a teacher says of one image, at several temperatures."""
    c, school = config, School(config, known)
    room, figures = school.room, []
    images, labels = room.validation
    chosen, shown = 0, dict[float, list[np.ndarray]]()
    for seed in range(c.seeds):
        teacher = school.teach(0.0, seed)
        logits = room.logits(school.teacher, teacher, images)
        if seed == 0:  # the least sure of those that it gets right
            sure = jnp.where(jnp.argmax(logits, axis=-1) == labels, jnp.max(jax.nn.softmax(logits), axis=-1), jnp.inf)
            chosen = int(jnp.argmin(sure))
        right = room.test(f"teacher, seed {seed}", school.teacher, teacher)
        for t in c.temperatures:
            q = 100 * distill.temperature_softmax(logits[chosen], t)
            figures.append((f"T = {t:g}", seed, {f"class{k}": float(x) for k, x in enumerate(q)} | {"teacher": right}))
            shown.setdefault(t, []).append(np.asarray(q))
    result = room.result(
        name=_distilling.named("distill_targets", c.data, school.kind),
        title=f"The soft targets of one image, on {c.data}{school.moved}",
        source="In %. Hinton, Vinyals & Dean 2015, equation 1; the paper has no such figure of a digit.",
        command=command("distill_why", c),
        selection="the validation image that the first seed's teacher gets right with the least confidence",
        columns=[
            *(Column(f"class{k}", str(k), 1) for k in range(room.dataset.classes)),
            Column("teacher", "the teacher's test accuracy"),
        ],
        rows=gathered(figures),
        notes=[room.setting(), f"Validation image {chosen}, a {int(labels[chosen])}."],
    )
    means = {t: np.mean(values, axis=0) for t, values in shown.items()}
    return written(result, c, lambda path: shown_targets(path, np.asarray(images[chosen]), int(labels[chosen]), means))


def reliability(path: Path, seen: dict[str, list[Calibration]]) -> None:
    """Accuracy against confidence, a panel for each model; a bar's width is fixed, its colour the share of examples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3
    canvas = FigureCanvasAgg(Figure(figsize=(10, 3.4 * -(-len(seen) // columns)), layout="constrained"))
    panels = canvas.figure.subplots(-(-len(seen) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, found) in zip(panels.flat, sorted(seen.items(), reverse=True), strict=False):
        share = np.mean([x.share for x in found], axis=0)
        weight = np.maximum(np.sum([x.share for x in found], axis=0), 1e-12)
        right, sure = (
            np.sum([x.share * getattr(x, what) for x in found], axis=0) / weight for what in ("accuracy", "confidence")
        )
        held = share > 0
        axes.bar(np.arange(len(share)) / len(share), np.where(held, right, 0), 1 / len(share), align="edge",
                 color="tab:blue", alpha=0.5, edgecolor="tab:blue")  # fmt: skip
        axes.plot(sure[held], right[held], "k.", markersize=4)
        axes.plot([0, 1], [0, 1], "k--", linewidth=0.8)
        axes.set_title(f"{name}\nECE {100 * np.mean([x.error for x in found]):.2f}%", fontsize=8)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=120)


def shown_targets(path: Path, image: np.ndarray, label: int, means: dict[float, np.ndarray]) -> None:
    """The image, and a panel of bars for each temperature."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(2.2 * (1 + len(means)), 2.6), layout="constrained"))
    first, *panels = canvas.figure.subplots(1, 1 + len(means))
    first.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray_r")
    first.set_title(f"a {label}", fontsize=9)
    first.set_axis_off()
    for axes, (t, mean) in zip(panels, means.items(), strict=True):
        axes.bar(range(len(mean)), mean)
        axes.set_ylim(0, 100)
        axes.set_title(f"T = {t:g}", fontsize=9)
        axes.set_xlabel("class")
    panels[0].set_ylabel("soft target (%)")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=120)


def main(config: Config) -> list[_results.Result]:
    """Runs the parts."""
    run = {"smoothing": smoothing, "partial": partly, "targets": targets}
    if not config.parts or set(config.parts) - set(run):
        raise UsageError(f"parts are {', '.join(run)}; got {', '.join(config.parts) or 'none'}")
    known: Known = {}
    return [run[part](config, known) for part in config.parts]


if __name__ == "__main__":
    run_main(main, Config)
