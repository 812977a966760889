"""Ways of teaching, each beside its baseline: `python -m experiments.distill_teaching`.

Ensembles and several teachers at once, assistants of falling size (Mirzadeh et al. 2020), mutual learning, at once and
in turn (Zhang et al. 2018), born-again generations and their ensemble (Furlanello et al. 2018), label refinery
(Bagherinezhad et al. 2018) and an average of the student's own past (Tarvainen & Valpola 2017).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import _distilling, _results
from experiments._command import run_main
from experiments._distilling import (
    Learner,
    Lesson,
    Mlp,
    Room,
    accuracy,
    bars,
    command,
    gathered,
    guided,
    hard,
    jittered,
    logits_loss,
    written,
)
from experiments._results import Column
from jaxcompress import distill


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Ways of teaching, each beside its baseline."""

    seeds: int = 5
    batch_size: int = 64
    epochs: int = 150
    rate: float = 3e-3
    teacher: tuple[int, ...] = (256, 256)
    teacher_epochs: int = 600
    """Of the teachers, which see moved images."""
    assistants: tuple[tuple[int, ...], ...] = ((48, 48), (24, 24))
    """Widths between the teacher's and the student's."""
    student: tuple[int, ...] = (12,)
    alpha: float = 0.9
    temperature: float = 4.0
    teachers: int = 3
    generations: int = 3
    """Born-again networks after the first one."""
    jitter: int = 1
    """Pixels by which the images of the label refinery move."""
    decay: float = 0.98
    """Of the average of a student's own past."""


SHORT = Config(
    seeds=1,
    epochs=6,
    rate=1e-2,
    teacher=(24,),
    teacher_epochs=12,
    assistants=((16,),),
    student=(8,),
    teachers=2,
    generations=1,
)
"""A run of seconds, for tests; its accuracies mean little."""

SCRATCH, ONE = "student from scratch", "one teacher"
MEAN, AT_ONCE, ASSISTED = "ensemble of teachers, mean of probabilities", "several teachers at once", "assistants"
MUTUAL, IN_TURN, PAST = "mutual learning", "mutual learning, in turn", "average of its own past"
CROPS, REFINED = "student on moved images", "label refinery on moved images"
TEACHER, ALL_TEACHERS = "teacher, on moved images", "ensemble of the teachers"
FIRST, BORN, BORN_ALL = "first generation", "born again, last generation", "born again, ensemble of all"
INDEPENDENT = "ensemble of as many first generations"
PAIRS = (
    *((ONE, SCRATCH), (MEAN, ONE), (AT_ONCE, ONE), (ASSISTED, ONE), (MUTUAL, SCRATCH), (IN_TURN, SCRATCH)),
    *((PAST, SCRATCH), (REFINED, CROPS), (BORN, FIRST), (BORN_ALL, FIRST), (BORN_ALL, INDEPENDENT)),
)


class School:
    """The trainings of all arms, each compiled once."""

    def __init__(self, config: Config) -> None:
        self.config, self.room = config, Room(config)
        room, c = self.room, config
        self.teacher, self.student = Mlp(c.teacher), Mlp(c.student)
        self.models = {widths: Mlp(widths) for widths in (c.teacher, *c.assistants, c.student)}
        self.learn = {w: room.learner(model, logits_loss(model, guided)) for w, model in self.models.items()}
        self.from_mean = room.learner(self.student, logits_loss(self.student, self._mean))
        self.from_several = room.learner(self.student, logits_loss(self.student, self._several))
        self.mutual = Learner(room, self._two, self._each_other)
        adam = optax.adam(optax.cosine_decay_schedule(c.rate, self.mutual.steps))
        self.in_turn = Learner(room, self._two, self._other, tx=distill.alternating(adam), times=2)
        self.past = Learner(room, self._with_past, self._from_past)
        move = jittered(c.jitter)
        self.seers = room.learner(self.teacher, logits_loss(self.teacher, hard, move), epochs=c.teacher_epochs)
        self.crops = room.learner(self.student, logits_loss(self.student, hard, move))
        self.refined = room.learner(self.student, logits_loss(self.student, self._refined, move))

    def _total(self, soft: jax.Array, logits: jax.Array, lesson: Lesson) -> jax.Array:
        return self.config.alpha * soft + (1 - self.config.alpha) * hard(logits, lesson)

    def _mean(self, logits: jax.Array, lesson: Lesson) -> jax.Array:
        """`rows`: logits `[batch, teachers, classes]`."""
        t = self.config.temperature
        targets = distill.ensemble_targets(jnp.moveaxis(lesson.rows, 1, 0), temperature=t)
        return self._total(distill.soft_label_loss(logits, targets, temperature=t), logits, lesson)

    def _several(self, logits: jax.Array, lesson: Lesson) -> jax.Array:
        teachers = jnp.moveaxis(lesson.rows, 1, 0)
        return self._total(
            distill.several_teachers_loss(logits, teachers, temperature=self.config.temperature), logits, lesson
        )

    def _refined(self, logits: jax.Array, lesson: Lesson) -> jax.Array:
        """`knobs`: the teacher's variables; its label of each image as it was moved."""
        # Linen's apply may also return what has changed, which its type says of every call
        labels = distill.refined_labels(lambda x: self.teacher.apply(lesson.knobs, x), lesson.images[:, None])[:, 0]  # type: ignore[arg-type,return-value]
        return distill.soft_label_loss(logits, labels)

    def _two(self, seed: int) -> dict[str, Any]:
        """Two students; the first is the one from scratch at its beginning."""
        return {"params": [self.room.init(self.student, s)["params"] for s in (seed, seed + 500)]}

    def _logits_of(self, networks: Any, lesson: Lesson) -> list[Any]:
        return [self.student.apply({"params": p}, lesson.images) for p in networks]

    def _each_other(self, params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        losses = distill.mutual_learning_loss(self._logits_of(params, lesson), lesson.labels)
        return jnp.mean(jnp.sum(losses, axis=0)), extras

    def _other(self, params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        losses = distill.mutual_learning_loss(self._logits_of(params, lesson), lesson.labels)
        return jnp.mean(losses[lesson.step % 2]), extras

    def _with_past(self, seed: int) -> dict[str, Any]:
        variables = self.room.init(self.student, seed)
        return {**variables, "average": variables["params"]}

    def _from_past(self, params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        c = self.config
        logits: Any = self.student.apply({"params": params}, lesson.images)
        past: Any = self.student.apply({"params": extras["average"]}, lesson.images)
        soft = distill.soft_target_loss(logits, past, temperature=c.temperature)
        average = distill.moving_average(extras["average"], params, c.decay, lesson.step)
        return jnp.mean(hard(logits, lesson) + soft), {"average": jax.lax.stop_gradient(average)}

    def taught(self, widths: tuple[int, ...], seed: int, teacher: Any = None) -> dict[str, Any]:
        """A network of these widths, taught by `(model, variables)`; by labels if there is none."""
        c, room = self.config, self.room
        rows = jnp.zeros((len(room.labels), room.dataset.classes)) if teacher is None else room.logits(*teacher)
        knobs = {"alpha": 0.0 if teacher is None else c.alpha, "temperature": c.temperature}
        return self.learn[widths](
            f"{widths} {'alone' if teacher is None else 'taught'} {seed}", seed, rows=rows, knobs=knobs
        )

    def go(self, seed: int) -> dict[str, float]:
        """Every arm's test accuracy."""
        c, room, found = self.config, self.room, dict[str, float]()

        def record(name: str, variables: Any, model: Mlp = self.student) -> None:
            found[name] = room.test(f"{name}, seed {seed}", model, variables)

        def together(name: str, group: list[Any]) -> None:
            images, labels = room.test_images(f"{name}, seed {seed}")
            logits = jnp.stack([room.logits(self.teacher, v, images) for v in group])
            found[name] = accuracy(distill.ensemble_targets(logits), labels)

        teachers = [self.seers(f"teacher {i} of {seed}", seed + 100 * i) for i in range(c.teachers)]
        guide = (self.teacher, teachers[0])
        record(TEACHER, teachers[0], self.teacher)
        together(ALL_TEACHERS, teachers)
        record(SCRATCH, self.taught(c.student, seed))
        record(ONE, self.taught(c.student, seed, guide))
        rows = jnp.stack([room.logits(self.teacher, v) for v in teachers], axis=1)
        record(MEAN, self.from_mean(f"mean {seed}", seed, rows=rows))
        record(AT_ONCE, self.from_several(f"several {seed}", seed, rows=rows))

        def next_in_chain(widths: tuple[int, ...], teacher: Any) -> Any:
            return self.models[widths], self.taught(widths, seed, teacher)

        record(ASSISTED, distill.teaching_chain(next_in_chain, (*c.assistants, c.student), guide)[-1][1])
        record(MUTUAL, {"params": self.mutual(f"mutual {seed}", seed)["params"][0]})
        record(IN_TURN, {"params": self.in_turn(f"in turn {seed}", seed)["params"][0]})
        record(PAST, {"params": self.past(f"past {seed}", seed)["params"]})
        record(CROPS, self.crops(f"moved {seed}", seed))
        record(REFINED, self.refined(f"refined {seed}", seed, knobs=teachers[0]))

        alone = [self.taught(c.teacher, seed + 100 * i) for i in range(c.generations + 1)]
        record(FIRST, alone[0], self.teacher)
        seeds = iter(range(seed + 1000, seed + 1000 + c.generations))  # each generation begins anew
        born = distill.teaching_chain(
            lambda widths, teacher: (self.teacher, self.taught(widths, next(seeds), teacher)),
            [c.teacher] * c.generations,
            (self.teacher, alone[0]),
        )
        record(BORN, born[-1][1], self.teacher)
        together(BORN_ALL, [alone[0], *(v for _, v in born)])
        together(INDEPENDENT, alone)
        return found


def main(config: Config) -> _results.Result:
    """Runs every seed, and writes the result and the figure."""
    school, figures = School(config), list[tuple[str, int, dict[str, float]]]()
    for seed in range(config.seeds):
        found = school.room.kept(f"seed {seed}", partial(school.go, seed))
        figures += [(name, seed, {"accuracy": value}) for name, value in found.items()]
        print(f"seed {seed}: done", flush=True)
    rows = gathered(figures)
    c = config
    result = school.room.result(
        name=f"distill_teaching_{c.data}",
        title=f"Ways of teaching, on {c.data}",
        source="The papers have other data and networks, so their figures are not repeated here. Each reports that"
        " its way"
        " does better than the baseline that stands below.",
        command=command("distill_teaching", c),
        selection="both lengths and the teachers' width, by the validation accuracy of three seeds; else nothing. Two"
        " runs"
        " came before this one: at 40 epochs distilled students had not converged, and from teachers that had seen no"
        " moved images only the average of its own past was ahead of its baseline by more than the noise",
        columns=[Column("accuracy", "test accuracy (%)")],
        rows=rows,
        pairs=[("accuracy", *pair) for pair in PAIRS] if c.seeds > 1 else (),
        notes=[
            school.room.setting(),
            f"Hidden layers: teacher {c.teacher}, assistants {c.assistants}, student {c.student}; soft targets at"
            f" T = {c.temperature:g} weigh {c.alpha:g}, labels the rest. {c.teachers} teachers; born-again ensembles"
            f" have"
            f" {c.generations + 1} networks. Mutual learning is of two students, at T = 1; the first is measured.",
            f"The teachers saw images moved by up to {c.jitter} pixel each way, another way each time, for"
            f" {c.teacher_epochs} epochs, and so know what the labels of {len(school.room.labels)} images do not say;"
            f" all"
            " students but two see the images as they are. Those two see moved ones: the refinery gives the teacher's"
            " label of each as it was moved, and no other. Born-again networks and the first generation have the"
            " teacher's layers and see the images as they are.",
        ],
    )
    return written(
        result, c, lambda path: bars(path, rows, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


if __name__ == "__main__":
    run_main(main, Config)
