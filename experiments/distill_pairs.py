"""The literature's pairs under its own recipe: `python -m experiments.distill_pairs --data cifar100 --data-dir DIR`.

One of the eleven pairs of the CIFAR-100 tables (`_cifar100.py`): the teacher, the student from labels alone, and the
student by soft targets, decoupled and by logit standardisation, beside what the tables have. 240 epochs of SGD on moved
and mirrored images, so the teacher looks at each batch anew: a setting for a GPU. With `--data cifar10`, and fewer
epochs and images, the same runs where there is none. `--student pruned` is the teacher itself with whole channels cut
out, trained on under what it was.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import _distilling, _results
from experiments._cifar100 import MODELS, PAIRS, Recipe
from experiments._command import UsageError, run_main
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
from jaxcompress.prune import channels


@dataclass(frozen=True)
class Config(_distilling.Config):
    """A pair of the CIFAR-100 tables under the literature's recipe."""

    data: str = "cifar100"
    examples: int = 50_000
    batch_size: int = 64
    epochs: int = 240
    teacher: str = "resnet56"
    student: str = "resnet20"
    """A network of the tables, or pruned: what is left of the teacher."""
    left: float = 0.3
    """The share of the teacher's parameters that the pruned student has."""
    temperature: float = 4.0
    alpha: float = 0.9
    methods: tuple[str, ...] = ()
    """Some of the four; all by default."""


LABELS, SOFT, DECOUPLED, STANDARD = "labels alone", "soft targets", "decoupled", "standardised logits"
PRUNED, STATE = "pruned", "batch_stats"
SHORT = Config(
    data="digits", seeds=1, examples=128, epochs=1, teacher="resnet20", student=PRUNED, methods=(LABELS, SOFT)
)
"""A run of a minute on digits, for tests; its accuracies mean nothing."""


class Pruned:
    """What is left of a network when the channels of the smallest L2 norm are cut; `apply` is as a Linen module's.

    Args:
      model: the network, with batch normalisation.
      variables: its trained variables.
      images: one or more, to trace it with.
      left: the share of its parameters to be left.
    """

    def __init__(self, model: nn.Module, variables: Any, images: jax.Array, left: float) -> None:
        def training(variables: Any, images: jax.Array) -> Any:
            return model.apply(variables, images, train=True, mutable=[STATE])

        groups = channels.groups(model.apply, variables, images)
        self.plan = channels.plan(groups, channels.norm(groups, variables), parameters=left)
        self.variables = self.plan.apply(variables)
        freed = dataclasses.replace(self.plan, free_out=(f"^1/{STATE}",))
        self._evaluate = channels.shrink(model.apply, variables, self.plan)
        self._train = channels.shrink(training, variables, freed)

    def apply(
        self, variables: Any, images: jax.Array, train: bool = False, *, rngs: Any = None, mutable: Any = None
    ) -> Any:
        """Logits `[batch, classes]`; in training also the new batch statistics."""
        return self._train(variables, images) if train else self._evaluate(variables, images)

    def init(self, key: jax.Array, images: jax.Array) -> Any:
        """The variables that are left, copied."""
        return jax.tree.map(jnp.copy, self.variables)


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
    if unknown := {c.teacher, c.student} - {*MODELS, PRUNED} | {c.teacher} & {PRUNED}:
        raise UsageError(f"no network {', '.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    if unknown := set(c.methods) - {LABELS, SOFT, DECOUPLED, STANDARD}:
        raise UsageError(f"no method {', '.join(sorted(unknown))}: there are {LABELS}, {SOFT}, {DECOUPLED}, {STANDARD}")
    room = Room(c)
    teacher = MODELS[c.teacher]().clone(classes=room.dataset.classes)

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
        apart = distill.standardized_soft_target_loss(logits, guidance(lesson), temperature=2.0)
        return (1 - c.alpha) * hard(logits, lesson) + c.alpha * apart

    learn = learner(teacher, c.teacher, hard)
    variables = room.trained("teacher", teacher, lambda: learn("teacher", 0))
    top = room.kept("teacher", lambda: room.test("teacher", teacher, variables))
    figures = [(f"teacher {c.teacher}", 0, {"accuracy": top, "size": parameters(variables)})]
    student: Any
    if c.student == PRUNED:
        student = Pruned(teacher, variables, room.images[:1], c.left)
    else:
        student = MODELS[c.student]().clone(classes=room.dataset.classes)
    size = parameters(room.init(student, 0))
    losses = {LABELS: hard, SOFT: soft, DECOUPLED: decoupled, STANDARD: standardised}
    for name, loss in losses.items():
        if c.methods and name not in c.methods:
            continue
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
        their = (f"teacher {c.teacher}", f"{c.student}, {LABELS}", f"{c.student}, {SOFT}")
        paper = {name: {"accuracy": value} for name, value in zip(their, published, strict=True)}
    rows = gathered(figures, paper)
    names, alone = [row.name for row in rows], f"{c.student}, {LABELS}"
    others = [name for name in names[1:] if name != alone]
    result = room.result(
        name=f"distill_pairs_{c.teacher}_{c.student}_{c.data}".lower().replace("-", "_"),
        title=f"{c.teacher} teaches {c.student}, on {c.data}",
        source="Tian et al. 2020, tables 1 and 2, on CIFAR-100.",
        command=command("distill_pairs", c),
        selection="nothing was chosen",
        columns=[Column("accuracy", "test accuracy (%)"), Column("size", "parameters", 0)],
        rows=rows,
        pairs=[("accuracy", name, alone) for name in others] if c.seeds > 1 and alone in names else (),
        notes=[
            f"{len(room.labels):,} training images, batches of {room.batch}, {c.epochs} epochs, SGD with momentum 0.9"
            f" and"
            " weight decay 0.0005, three drops of the rate; crops of the padded image, mirrored at random.",
            *(
                [
                    f"Pruned: the channels of the smallest L2 norm are cut, {c.left:.0%} of the parameters are left and"
                    " trained on with the same recipe."
                ]
                if c.student == PRUNED
                else []
            ),
        ],
    )
    return written(
        result, c, lambda path: bars(path, rows, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


if __name__ == "__main__":
    run_main(main, Config)
