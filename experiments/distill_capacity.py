"""Early stopping and capacity: `python -m experiments.distill_capacity --data mnist --data-dir DIR`.

`growing`: one student under teachers of growing size, with distillation to the end, with its term stopped early, and
from teachers that were themselves stopped early (Cho and Hariharan 2019). `shapes`: a shallow student on a deep
teacher's logits (Ba and Caruana 2014), and a thin deep one with hints from the teacher's middle (Romero et al. 2015).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import _distilling, _results
from experiments._command import UsageError, run_main
from experiments._distilling import (
    Learner,
    Lesson,
    Mlp,
    Room,
    bars,
    command,
    curves,
    gathered,
    guided,
    hard,
    jittered,
    logits_loss,
    parameters,
    written,
)
from experiments._results import Column
from jaxcompress import distill, linen


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Students under teachers of growing size; shallow and thin students."""

    parts: tuple[str, ...] = ("growing", "shapes")
    """Which of the two."""
    teachers: tuple[int, ...] = (30, 100, 300, 800)
    """Units of the growing teachers' two hidden layers."""
    student: int = 15
    """Units of their student's two hidden layers."""
    stop: float = 0.5
    """The part of a training after which the soft targets go, and at which an early-stopped teacher stands."""
    alpha: float = 0.9
    temperature: float = 4.0
    deep: tuple[int, ...] = (300, 300, 300)
    """Hidden layers of the teacher of `shapes`."""
    deep_jitter: int = 0
    """Pixels by which that teacher's images move."""
    shallow: tuple[int, ...] = (60,)
    thin: tuple[int, ...] = (30,) * 8
    hints: float = 0.3
    """The part of the training that is given to hints."""


SHORT = Config(
    seeds=1,
    epochs=8,
    rate=1e-2,
    teachers=(8, 16),
    student=6,
    deep=(24, 24, 24),
    deep_jitter=1,
    shallow=(10,),
    thin=(8,) * 5,
)
"""A run of seconds, for tests; its accuracies mean little."""

TEACHER, SCRATCH, SOFT = "deep teacher", "from scratch", "soft targets"
SHALLOW, THIN, LOGITS, HINTS = "shallow", "thin and deep", "logits matched", "hints, then soft targets"


def growing(config: Config) -> _results.Result:
    """One student, teachers of growing size."""
    c, room = config, Room(config)
    student = Mlp((c.student,) * 2)
    learn = room.learner(student, logits_loss(student, guided))
    stop = max(1, round(c.stop * learn.steps))

    def stopping(logits: jax.Array, lesson: Lesson) -> jax.Array:
        alpha = distill.early_stopped(c.alpha, stop)(lesson.step)
        return distill.distillation_loss(logits, lesson.rows, lesson.labels, alpha=alpha, temperature=c.temperature)

    learn_stopping = room.learner(student, logits_loss(student, stopping))
    knobs = {"alpha": c.alpha, "temperature": c.temperature}
    nothing = jnp.zeros((len(room.labels), room.dataset.classes))
    figures = []

    def alone(seed: int) -> float:
        variables = learn(f"scratch {seed}", seed, rows=nothing, knobs=knobs | {"alpha": 0.0})
        return room.test(f"student from scratch, seed {seed}", student, variables)

    scratch = [room.kept(f"growing, scratch, seed {seed}", partial(alone, seed)) for seed in range(c.seeds)]
    for width in c.teachers:
        teacher = Mlp((width,) * 2)
        teach = room.learner(teacher, logits_loss(teacher, hard))
        half = room.learner(teacher, logits_loss(teacher, hard), epochs=max(1, round(c.stop * c.epochs)))

        def measured(
            seed: int, width: int = width, teacher: Mlp = teacher, teach: Learner = teach, half: Learner = half
        ) -> dict[str, float]:
            who = f"2x{width}, seed {seed}"
            full, early = teach(f"teacher {who}", seed), half(f"early teacher {who}", seed)
            rows, early_rows = room.logits(teacher, full), room.logits(teacher, early)
            found = {
                "teacher": room.test(f"teacher {who}", teacher, full),
                "early_teacher": room.test(f"early-stopped teacher {who}", teacher, early),
            }
            for key, trained in {
                "distilled": learn(f"distilled from {who}", seed, rows=rows, knobs=knobs),
                "stopped": learn_stopping(f"stopped, from {who}", seed, rows=rows),
                "from_early": learn(f"distilled from early {who}", seed, rows=early_rows, knobs=knobs),
            }.items():
                found[key] = room.test(f"student {key}, teacher {who}", student, trained)
            return found

        for seed in range(c.seeds):
            found = room.kept(f"growing, {width}, seed {seed}", partial(measured, seed))
            figures.append((f"teacher 2x{width}", seed, found | {"scratch": scratch[seed]}))
        print(f"growing, teacher 2x{width}: done", flush=True)
    arms = {
        "scratch": "student from scratch",
        "distilled": "distilled to the end",
        "stopped": "soft targets stopped early",
        "from_early": "from the early-stopped teacher",
    }
    rows = gathered(figures)
    result = room.result(
        name=f"distill_growing_{c.data}",
        title=f"A student of one size under growing teachers, on {c.data}",
        source="Test accuracy in %. Cho & Hariharan 2019 report, on CIFAR-10 and ImageNet, that larger teachers make"
        " worse"
        " teachers for a small student, and that stopping the distillation or the teacher early helps; their figures"
        " are"
        " of other data and networks.",
        command=command("distill_capacity", c),
        selection="nothing was chosen",
        columns=[
            Column("teacher", "teacher"),
            Column("early_teacher", "early-stopped teacher"),
            *(Column(key, title) for key, title in arms.items()),
        ],
        rows=rows,
        notes=[
            room.setting(),
            f"Student: 2x{c.student}; soft targets at T = {c.temperature:g} weigh {c.alpha:g}, labels the rest. Early"
            f" is"
            f" after {c.stop:.0%} of the training; an early-stopped teacher's learning rate falls to zero in that"
            f" time.",
        ],
    )
    lines = {
        title: [(width, row.ours[key].values) for width, row in zip(c.teachers, rows, strict=True)]
        for key, title in arms.items()
    }
    return written(
        result,
        c,
        lambda path: curves(
            path, lines, x_title="units a hidden layer of the teacher", y_title="test accuracy (%)", title=result.title
        ),
    )


class Hinted:
    """The thin student with a regressor from its middle to the teacher's: FitNet's two stages."""

    def __init__(self, room: Room, config: Config, teacher: nn.Module, student: nn.Module) -> None:
        self.config, self.student = config, student
        guided_at, hint_at = (f"Dense_{(len(widths) - 1) // 2}" for widths in (config.thin, config.deep))
        self.of_student = linen.capture(student, f"{guided_at}$")
        self.of_teacher = linen.capture(teacher, f"{hint_at}$")
        self.guided_at, self.hint_at = guided_at, hint_at
        self.regressor = distill.dense_projector(config.thin[0], config.deep[0])
        self.learn = Learner(room, lambda seed: self.init(room, seed), self.loss)
        self.weights = distill.hints_first(round(config.hints * self.learn.steps))

    def init(self, room: Room, seed: int) -> dict[str, Any]:
        """The student, and its regressor beside it."""
        return {
            "params": {
                "student": room.init(self.student, seed)["params"],
                "regressor": self.regressor.init(jax.random.key(10_000 + seed)),
            }
        }

    def loss(self, params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        """Hints alone at first, then soft targets and labels; `knobs` has the teacher."""
        logits, found = self.of_student({"params": params["student"]}, lesson.images)
        guidance, hints = self.of_teacher(lesson.knobs["teacher"], lesson.images)
        guess = self.regressor.apply(params["regressor"], nn.relu(found[self.guided_at]))
        hint = distill.hint_loss(guess, nn.relu(hints[self.hint_at]))
        soft = guided(logits, lesson._replace(rows=guidance))
        weights = self.weights(lesson.step)
        return jnp.mean(weights.hint * hint + weights.soft_target * soft), extras


def shapes(config: Config) -> _results.Result:
    """A shallow and a thin deep student of one deep teacher."""
    c, room = config, Room(config)
    teacher, shallow, thin = Mlp(c.deep), Mlp(c.shallow), Mlp(c.thin)
    teach = room.learner(teacher, logits_loss(teacher, hard, jittered(c.deep_jitter) if c.deep_jitter else None))

    def matched(logits: jax.Array, lesson: Lesson) -> jax.Array:
        return distill.logit_matching_loss(logits, lesson.rows)

    learn = {name: room.learner(m, logits_loss(m, guided)) for name, m in ((SHALLOW, shallow), (THIN, thin))}
    match = room.learner(shallow, logits_loss(shallow, matched))
    hinted = Hinted(room, c, teacher, thin)
    knobs = {"alpha": c.alpha, "temperature": c.temperature}
    figures = []

    def measured(seed: int) -> dict[str, dict[str, float]]:
        found = {}

        def record(name: str, model: Mlp, variables: Any) -> None:
            right = room.test(f"{name}, seed {seed}", model, variables)
            found[name] = {"accuracy": right, "size": parameters(variables)}

        guide = teach(f"deep {seed}", seed)
        record(TEACHER, teacher, guide)
        rows = room.logits(teacher, guide)
        for name, model in ((SHALLOW, shallow), (THIN, thin)):
            for arm, alpha in ((SCRATCH, 0.0), (SOFT, c.alpha)):
                trained = learn[name](f"{name} {arm} {seed}", seed, rows=rows, knobs=knobs | {"alpha": alpha})
                record(f"{name}, {arm}", model, trained)
            if model is shallow:
                record(f"{name}, {LOGITS}", model, match(f"{name} {LOGITS} {seed}", seed, rows=rows))
        both = hinted.learn(f"{THIN} {HINTS} {seed}", seed, knobs=knobs | {"teacher": guide})
        record(f"{THIN}, {HINTS}", thin, {"params": both["params"]["student"]})
        return found

    for seed in range(c.seeds):
        found = room.kept(f"shapes, seed {seed}", partial(measured, seed))
        figures += [(name, seed, ours) for name, ours in found.items()]
        print(f"shapes, seed {seed}: done", flush=True)
    rows_ = gathered(figures)
    pairs = [
        (f"{SHALLOW}, {SOFT}", f"{SHALLOW}, {SCRATCH}"),
        (f"{SHALLOW}, {LOGITS}", f"{SHALLOW}, {SCRATCH}"),
        (f"{SHALLOW}, {LOGITS}", f"{SHALLOW}, {SOFT}"),
        (f"{THIN}, {HINTS}", f"{THIN}, {SCRATCH}"),
        (f"{THIN}, {HINTS}", f"{THIN}, {SOFT}"),
        (f"{THIN}, {HINTS}", TEACHER),
    ]
    result = room.result(
        name=_distilling.named("distill_shapes", c.data, "jittered" if c.deep_jitter else ""),
        title=f"Shallow, and thin and deep students, on {c.data}"
        + (", the teacher's images moving" if c.deep_jitter else ""),
        source="Ba & Caruana 2014 report shallow students that come close to deep teachers on TIMIT and CIFAR-10 when"
        " they"
        " match logits; Romero et al. 2015 a thin deep student that, by hints, beats its teacher on CIFAR-10 with fewer"
        " parameters. Both are of other data and networks.",
        command=command("distill_capacity", c),
        selection=_distilling.TRIED if c.deep_jitter else "nothing was chosen",
        columns=[Column("accuracy", "test accuracy (%)"), Column("size", "parameters", 0)],
        rows=rows_,
        pairs=[("accuracy", *pair) for pair in pairs] if c.seeds > 1 else (),
        notes=[
            room.setting(),
            f"The teacher's images moved by up to {c.deep_jitter} pixels. Hidden layers: teacher {c.deep}, shallow"
            f" {c.shallow}, thin {c.thin}. Logits are matched without labels;"
            f" soft"
            f" targets at T = {c.temperature:g} weigh {c.alpha:g}, labels the rest. Hints guide the student's middle"
            f" layer to"
            f" the teacher's, through a dense regressor, for the first {c.hints:.0%} of the training.",
        ],
    )
    return written(
        result, c, lambda path: bars(path, rows_, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


def main(config: Config) -> list[_results.Result]:
    """Runs the parts."""
    run = {"growing": growing, "shapes": shapes}
    if not config.parts or set(config.parts) - set(run):
        raise UsageError(f"parts are {', '.join(run)}; got {', '.join(config.parts) or 'none'}")
    return [run[part](config) for part in config.parts]


if __name__ == "__main__":
    run_main(main, Config)
