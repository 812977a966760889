"""The literature's pairs under its own recipe: `python -m experiments.distill_pairs --data cifar100 --data-dir DIR`.

One of the eleven pairs of the CIFAR-100 tables (`_cifar100.py`): the teacher, the student from labels alone, and the
student by soft targets, decoupled and by logit standardisation, beside what the tables have. 240 epochs of SGD on moved
and mirrored images, so the teacher looks at each batch anew: a setting for a GPU. With `--data cifar10`, and fewer
epochs and images, the same runs where there is none.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments import _distilling, _results
from experiments._cifar100 import MODELS, PAIRS, Recipe
from experiments._distilling import (
    Learner,
    Lesson,
    Room,
    bars,
    command,
    gathered,
    hard,
    jittered,
    logits_loss,
    parameters,
    written,
)
from experiments._results import Column
from jaxcompress import distill


@dataclass(frozen=True)
class Config(_distilling.Config):
    """A pair of the CIFAR-100 tables under the literature's recipe."""

    data: str = "cifar100"
    examples: int = 50_000
    batch_size: int = 64
    epochs: int = 240
    teacher: str = "resnet56"
    student: str = "resnet20"
    temperature: float = 4.0
    alpha: float = 0.9


SHORT = Config(data="digits", seeds=1, examples=256, epochs=1, teacher="resnet8x4", student="resnet8x4")
"""A run of a minute on digits, for tests; its accuracies mean nothing."""

LABELS, SOFT, DECOUPLED, STANDARD = "labels alone", "soft targets", "decoupled", "standardised logits"


def varied(padding: int) -> Any:
    """Random crops of the padded image, every other one mirrored."""
    move = jittered(padding)

    def augment(images: jax.Array, key: jax.Array) -> jax.Array:
        flip = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(len(images), 1, 1, 1))
        moved = move(images, key)
        return jnp.where(flip, moved[:, :, ::-1], moved)

    return augment


def main(config: Config) -> _results.Result:
    """Trains the teacher and the students, and writes the result and the figure."""
    c = config
    if unknown := {c.teacher, c.student} - set(MODELS):
        raise ValueError(f"no network {', '.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    room = Room(c)
    teacher, student = (MODELS[name]().clone(classes=room.dataset.classes) for name in (c.teacher, c.student))

    def learner(model: Any, name: str, loss: Any) -> Learner:
        recipe = Recipe.of(name, c.epochs)
        return room.learner(model, logits_loss(model, loss, varied(recipe.padding)), tx=recipe.optimizer(room.steps))

    def guidance(lesson: Lesson) -> Any:
        return teacher.apply(lesson.knobs, lesson.images)

    def soft(logits: jax.Array, lesson: Lesson) -> jax.Array:
        return distill.distillation_loss(
            logits, guidance(lesson), lesson.labels, alpha=c.alpha, temperature=c.temperature
        )

    def decoupled(logits: jax.Array, lesson: Lesson) -> jax.Array:
        weight = jnp.minimum(lesson.step / (20 * room.steps), 1)  # the paper's warm-up of 20 epochs
        return hard(logits, lesson) + weight * distill.decoupled_loss(logits, guidance(lesson), lesson.labels)

    def standardised(logits: jax.Array, lesson: Lesson) -> jax.Array:
        apart = distill.standardized_soft_target_loss(logits, guidance(lesson), 2.0)
        return (1 - c.alpha) * hard(logits, lesson) + c.alpha * apart

    learn = learner(teacher, c.teacher, hard)
    variables = room.trained("teacher", teacher, lambda: learn("teacher", 0))
    top = room.kept("teacher", lambda: room.test("teacher", teacher, variables))
    figures = [(f"teacher {c.teacher}", 0, {"accuracy": top, "size": parameters(variables)})]
    size = parameters(room.init(student, 0))
    for name, loss in {LABELS: hard, SOFT: soft, DECOUPLED: decoupled, STANDARD: standardised}.items():
        pupil = learner(student, c.student, loss)

        def measured(seed: int, name: str = name, pupil: Learner = pupil) -> float:
            trained = pupil(f"{name} {seed}", seed, knobs=None if name == LABELS else variables)
            return room.test(f"{name}, seed {seed}", student, trained)

        for seed in range(c.seeds):
            value = room.kept(f"{name}, seed {seed}", partial(measured, seed))
            figures.append((f"{c.student}, {name}", seed, {"accuracy": value, "size": size}))
            print(f"{name}, seed {seed}: done", flush=True)
    published = next((p.published for p in PAIRS if (p.teacher, p.student) == (c.teacher, c.student)), None)
    paper = {}
    if published and c.data == "cifar100":
        names = (f"teacher {c.teacher}", f"{c.student}, {LABELS}", f"{c.student}, {SOFT}")
        paper = {name: {"accuracy": value} for name, value in zip(names, published, strict=True)}
    rows = gathered(figures, paper)
    result = room.result(
        name=f"distill_pairs_{c.teacher}_{c.student}_{c.data}".lower().replace("-", "_"),
        title=f"{c.teacher} teaches {c.student}, on {c.data}",
        source="Tian et al. 2020, tables 1 and 2, on CIFAR-100.",
        command=command("distill_pairs", c),
        selection="nothing was chosen",
        columns=[Column("accuracy", "test accuracy (%)"), Column("size", "parameters", 0)],
        rows=rows,
        pairs=[("accuracy", f"{c.student}, {n}", f"{c.student}, {LABELS}") for n in (SOFT, DECOUPLED, STANDARD)]
        if c.seeds > 1
        else (),
        notes=[
            f"{len(room.labels):,} training images, batches of {room.batch}, {c.epochs} epochs, SGD with momentum 0.9"
            f" and"
            " weight decay 0.0005, three drops of the rate; crops of the padded image, mirrored at random.",
        ],
    )
    return written(
        result, c, lambda path: bars(path, rows, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
