"""The literature's pairs under its own recipe: `python -m experiments.distill_pairs --data cifar100 --data-dir DIR`.

One of the eleven pairs of the CIFAR-100 tables (`_cifar100.py`): the teacher, the student from labels alone, and the
student by any of the methods of `_methods.py` (`--methods all`), each at the literature's weight, beside what the
tables have. 240 epochs of SGD on moved and mirrored images, so the teacher looks at each batch anew: a setting for a
GPU. Nothing is chosen, so that the validation split is trained on too. With `--data cifar10`, and fewer epochs and
images, the same runs where there is none. `--student pruned` is the teacher itself with whole channels cut out, trained
on under what it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    parameters,
    written,
)
from experiments._methods import Method, Pair, Seen, T, factor_channels, methods
from experiments._pairs import STATE, Network, Pruned, Standard, chosen, comparable, pair_of
from experiments._results import Column
from jaxcompress import distill

PRUNED, ALL = "pruned", "all"
ALONE, SOFT, DECOUPLED, CONTRASTIVE = "labels alone", "soft targets (KD)", "decoupled (DKD)", "contrastive (CRD)"
SELF, FACTORS, SYNTHETIC = "self-training", "factor transfer (FT)", ("re-weighting alone", "class similarity alone")


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
    beta: float = 8.0
    """The weight of the other classes in decoupled distillation."""
    methods: tuple[str, ...] = (ALONE, SOFT, DECOUPLED, "standardised logits")
    """Some of the methods, or all."""


SHORT = Config(
    data="digits", seeds=1, examples=128, epochs=1, teacher="resnet20", student=PRUNED,
    methods=(ALONE, SOFT, "hint (FitNet)"),
)  # fmt: skip
"""A run of a minute on digits, for tests; its accuracies mean nothing."""


def varied(padding: int) -> Any:
    """Random crops of the padded image, every other one mirrored."""
    move = jittered(padding)

    def augment(images: jax.Array, key: jax.Array) -> jax.Array:
        flip = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(len(images), 1, 1, 1))
        moved = move(images, key)
        return jnp.where(flip, moved[:, :, ::-1], moved)

    return augment


class Course:
    """The two networks, what of them is compared, and the trainings under the recipe.

    Args:
      config: the experiment's.
    """

    def __init__(self, config: Config) -> None:
        c = self.config = config
        self.room = room = Room(c, whole=True)
        standard = Standard.of(room.images)

        def network(name: str) -> Any:  # as a Linen module to the room
            return Network(MODELS[name]().clone(classes=room.dataset.classes), standard)

        self.teacher = network(c.teacher)
        self.variables = room.trained("teacher", self.teacher, lambda: self._alone(self.teacher, c.teacher, 0))
        self.student = network(c.student) if c.student != PRUNED else self._pruned()
        shown: Any = jax.eval_shape(lambda: self.student.seen(room.init(self.student, 0), room.images[:1]))
        seen = jax.jit(self.teacher.seen)(self.variables, room.images[:500])
        self.stages = comparable([x.shape[1:] for x in shown.maps], [x.shape[1:] for x in seen.maps])
        ours: Any = jax.eval_shape(partial(chosen, stages=self.stages[0]), shown)
        self.pair = pair_of(ours, chosen(seen, self.stages[1]))
        self.methods = methods(self.pair, c.beta)
        self.coder = distill.paraphraser(self.pair.teacher[-1][-1], factor_channels(self.pair))

    def students(self, name: str) -> Callable[[int], Any]:
        """From a seed to the variables of a student taught by this method; all seeds share one compiled step."""
        learn = self._learner(self.student, self.config.student, self.methods[name], name)
        knobs = self._knobs(name)
        return lambda seed: _network(learn(f"{name} {seed}", seed, knobs=knobs))

    def _alone(self, network: Any, name: str, seed: int) -> Any:
        """A network's variables after a training by labels alone."""
        learn = self._learner(network, name, Method(lambda p, s, t, lesson: jnp.zeros(()), 0.0))
        return _network(learn(f"{name}, {ALONE} {seed}", seed))

    def _pruned(self) -> Any:
        return Pruned(self.teacher, self.variables, self.room.images[:1], self.config.left)

    def _knobs(self, name: str) -> dict[str, Any]:
        """The teacher, and what else a method's step is told."""
        room, knobs = self.room, {"teacher": self.variables, "examples": len(self.room.labels)}
        if name in SYNTHETIC:
            p = distill.temperature_softmax(room.logits(self.teacher, self.variables), T)
            knobs["sure"] = jnp.take_along_axis(p, room.labels[:, None], axis=1).mean()
        if name == SELF:  # the teacher is a student of a seed that is not the table's
            knobs["itself"] = room.trained(
                "student as teacher", self.student, lambda: self._alone(self.student, self.config.student, 1_000)
            )
        if name == FACTORS:
            knobs["paraphraser"] = self._paraphraser()
        return knobs

    def _paraphraser(self) -> Any:
        """Factor transfer's first phase: an autoencoder of the teacher's last map, on moved images as well."""
        move = varied(Recipe().padding)

        def loss(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
            images = move(lesson.images, jax.random.fold_in(lesson.key, 1))
            x = chosen(self.teacher.seen(lesson.knobs, images), self.stages[1]).active[-1]
            return jnp.mean(distill.hint_loss(self.coder.decode(params, self.coder.encode(params, x)), x)), extras

        epochs = min(30, self.config.epochs)
        learn = Learner(self.room, lambda seed: {"params": self.coder.init(jax.random.key(seed))}, loss, epochs=epochs)
        return learn("paraphraser", 0, knobs=self.variables)["params"]

    def _learner(self, network: Any, of: str, method: Method, name: str | None = None) -> Learner:
        """The training of `network` under the recipe of the name `of`; the name of no method means no teacher."""
        room, recipe = self.room, Recipe.of(of, self.config.epochs)
        move, ramp = varied(recipe.padding), 20 * room.steps if name == DECOUPLED else 0  # the paper's warm-up

        def init(seed: int) -> dict[str, Any]:
            variables = room.init(network, seed)
            params = {"student": variables["params"], "beside": method.init(jax.random.key(10_000 + seed))}
            memory = distill.contrast_memory(jax.random.key(seed), len(room.labels), 64) if name == CONTRASTIVE else {}
            return {"params": params, STATE: variables[STATE], "memory": memory}

        def loss(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
            images = move(lesson.images, jax.random.fold_in(lesson.key, 1))
            seen, state = network.trained({"params": params["student"], STATE: extras[STATE]}, images)
            total, memory = method.hard * jnp.mean(hard(seen.logits, lesson)), extras["memory"]
            if name is not None:  # what a method does not use is not computed
                lesson = lesson._replace(images=images, extras=extras)
                theirs = self.teacher.seen(lesson.knobs["teacher"], images)
                lesson = lesson._replace(rows=self._rows(theirs, lesson))
                ours, theirs = chosen(seen, self.stages[0]), chosen(theirs, self.stages[1])
                term = method.term(params["beside"], ours, theirs, lesson)
                term, memory = term if name == CONTRASTIVE else (term, memory)
                weight = method.weight * (jnp.minimum(lesson.step / ramp, 1) if ramp else 1)
                total += weight * jnp.mean(term)
            return total, {STATE: state, "memory": memory}

        return Learner(room, init, loss, tx=recipe.optimizer(room.steps))

    def _rows(self, theirs: Seen, lesson: Lesson) -> dict[str, jax.Array]:
        """What methods look up of a batch: the synthetic teachers, a copy of the student, the factors."""
        knobs, rows = lesson.knobs, {}
        if "sure" in knobs:
            rows["weighing"] = distill.reweighting_teacher(distill.temperature_softmax(theirs.logits, T), lesson.labels)
            kernel = knobs["teacher"]["params"]["Dense_0"]["kernel"]
            rows["alike"] = distill.class_similarity_teacher(
                kernel, lesson.labels, sharpness=1 / 0.3, confidence=knobs["sure"]
            )
        if "itself" in knobs:
            rows["itself"] = self.student.apply(knobs["itself"], lesson.images)
        if "paraphraser" in knobs:
            last = chosen(theirs, self.stages[1]).active[-1]
            rows["factors"] = self.coder.encode(knobs["paraphraser"], last)
        return rows


def _network(trained: Any) -> dict[str, Any]:
    """A student's variables, without what learned beside it."""
    return {"params": trained["params"]["student"], STATE: trained[STATE]}


def main(config: Config) -> _results.Result:
    """Trains the teacher and the students, and writes the result and the figure."""
    c, shapes = config, ((8, 8, 4),) * 3
    known = tuple(methods(Pair(shapes, shapes, (jnp.zeros(4),) * 3)))  # which there are does not depend on the networks
    names = known if c.methods == (ALL,) else c.methods
    if unknown := {c.teacher, c.student} - {*MODELS, PRUNED} | {c.teacher} & {PRUNED}:
        raise UsageError(f"no network {', '.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    if unknown := set(names) - set(known):
        raise UsageError(f"no method {', '.join(sorted(unknown))}: there are {', '.join(known)}, or {ALL}")
    course = Course(c)
    room = course.room
    top = room.kept("teacher", lambda: room.test("teacher", course.teacher, course.variables))
    figures = [(f"teacher {c.teacher}", 0, {"accuracy": top, "size": parameters(course.variables)})]
    size = parameters(room.init(course.student, 0))
    for name in names:
        students = course.students(name)

        def measured(seed: int, name: str = name, students: Callable[[int], Any] = students) -> float:
            return room.test(f"{name}, seed {seed}", course.student, students(seed))

        for seed in range(c.seeds):
            value = room.kept(f"{name}, seed {seed}", partial(measured, seed))
            figures.append((f"{c.student}, {name}", seed, {"accuracy": value, "size": size}))
            print(f"{name}, seed {seed}: done", flush=True)
    published = next((p.published for p in PAIRS if (p.teacher, p.student) == (c.teacher, c.student)), None)
    paper = {}
    if published and c.data == "cifar100":
        their = (f"teacher {c.teacher}", f"{c.student}, {ALONE}", f"{c.student}, {SOFT}")
        paper = {name: {"accuracy": value} for name, value in zip(their, published, strict=True)}
    rows = gathered(figures, paper)
    row_names, alone = [row.name for row in rows], f"{c.student}, {ALONE}"
    others = [name for name in row_names[1:] if name != alone]
    result = room.result(
        name=f"distill_pairs_{c.teacher}_{c.student}_{c.data}".lower().replace("-", "_"),
        title=f"{c.teacher} teaches {c.student}, on {c.data}",
        source="Tian et al. 2020, tables 1 and 2, on CIFAR-100.",
        command=command("distill_pairs", c),
        selection="nothing was chosen",
        columns=[Column("accuracy", "test accuracy (%)"), Column("size", "parameters", 0)],
        rows=rows,
        pairs=[("accuracy", name, alone) for name in others] if c.seeds > 1 and alone in row_names else (),
        notes=notes(course),
    )
    return written(
        result, c, lambda path: bars(path, rows, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


def notes(course: Course) -> list[str]:
    """What a table should say of the training."""
    c, room = course.config, course.room
    both = len(room.labels) > len(room.dataset.train)
    found = [
        f"{len(room.labels):,} training images{', those of the validation split among them' if both else ''}, batches"
        f" of {room.batch}, {c.epochs} epochs, SGD with momentum 0.9 and weight decay 0.0005, three drops of the rate;"
        " images are standardised, crops of the padded image, mirrored at random.",
        "Each term has the literature's weight beside the labels' cross entropy. Maps that are compared: stages"
        f" {', '.join(map(str, course.stages[0]))} of the student with {', '.join(map(str, course.stages[1]))} of the"
        " teacher.",
    ]
    if c.student == PRUNED:
        found.append(
            f"Pruned: the channels of the smallest L2 norm are cut, {c.left:.0%} of the parameters are left and trained"
            " on with the same recipe."
        )
    return found


if __name__ == "__main__":
    run_main(main, Config)
