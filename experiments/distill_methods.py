"""Every classification loss under one recipe: `python -m experiments.distill_methods --data cifar10 --data-dir DIR`.

One teacher and one student of the resnet family, one initialisation and order of images a seed, one optimizer: only
the term beside the labels' cross entropy differs (`_methods.py`). Its weight is that of the literature's code where it
has the method, else 1 or as soft targets have it, times one of `factors`, which validation accuracy after shorter
trainings of seed 0 chooses for all seeds; label smoothing and the teacher-free loss, which are the whole loss, stay as
they are. The teacher has learned from images that move and are mirrored; the student sees them as they are, so the
teacher's logits and maps are computed once.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import _distilling, _results
from experiments._channels import changed
from experiments._command import UsageError, run_main
from experiments._distilling import (
    Learner,
    Lesson,
    Room,
    accuracy,
    bars,
    command,
    gathered,
    hard,
    logits_loss,
    parameters,
    written,
)
from experiments._methods import Method, Pair, Seen, factor_channels, methods, synthetic
from experiments._resnets import Resnet
from experiments._results import Column
from experiments._selection import Choice, select
from experiments._splits import Split
from jaxcompress import distill, linen


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Every single-image classification loss, on one pair of networks."""

    epochs: int = 40
    trial_epochs: int = 12
    """Of the trainings that choose a factor."""
    teacher_epochs: int = 40
    rate: float = 2e-3
    factors: tuple[float, ...] = (10.0, 1.0, 0.1, 0.01)
    """Of the literature's weights, to choose from."""
    shift: int = 4
    """Pixels by which the teacher's images move; every other one is mirrored. 0 leaves them as they are."""
    teacher_blocks: int = 2
    teacher_widths: tuple[int, int, int] = (16, 32, 64)
    student_blocks: int = 1
    student_widths: tuple[int, int, int] = (8, 16, 32)
    stem_stride: int = 2
    methods: tuple[str, ...] = ()
    """Some of the methods; all by default."""


SHORT = Config(
    seeds=1, examples=300, epochs=1, trial_epochs=1, teacher_epochs=2, factors=(1.0, 0.1), shift=1, teacher_blocks=1,
    teacher_widths=(8, 12, 16), student_widths=(4, 6, 8), stem_stride=1,
)  # fmt: skip
"""A run of seconds on digits, for tests; its accuracies mean little."""
ALONE, CONTRASTIVE = "labels alone", "contrastive (CRD)"


class School:
    """The teacher, what it makes of the training images, and the student's training under each method."""

    def __init__(self, config: Config) -> None:
        c = config
        self.config, self.room = c, Room(c)
        classes = self.room.dataset.classes
        self.teacher = Resnet(c.teacher_blocks, c.teacher_widths, classes, c.stem_stride)
        self.student = Resnet(c.student_blocks, c.student_widths, classes, c.stem_stride)
        self.captured = linen.capture(self.student, "Stage_[0-9]+$")

    def taught(self) -> tuple[Any, dict[str, Any]]:
        """The teacher, and its rows: logits, maps, and the synthetic teachers' probabilities."""
        c, room = self.config, self.room
        loss = logits_loss(self.teacher, hard, partial(changed, shift=c.shift))
        learn = room.learner(self.teacher, loss, epochs=c.teacher_epochs)
        variables = room.trained("teacher", self.teacher, lambda: learn("teacher", 0))
        see = linen.capture(self.teacher, "Stage_[0-9]+$")

        @jax.jit
        def seen(images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            logits, found = see(variables, images)
            return logits, tuple(found[f"Stage_{i}"] for i in range(3))

        parts = [seen(room.images[i : i + 500]) for i in range(0, len(room.images), 500)]
        logits, maps = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        probabilities = synthetic(logits, room.labels, variables["params"]["Dense_0"]["kernel"])
        return variables, {"logits": logits, "maps": maps} | probabilities

    def factors(self, pair: Pair, last: jax.Array) -> jax.Array:
        """Factor transfer's first phase: the teacher's last map in an autoencoder's factors."""
        coder = distill.paraphraser(pair.teacher[-1][-1], factor_channels(pair))

        def loss(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
            x = nn.relu(lesson.rows)
            return jnp.mean(distill.hint_loss(coder.decode(params, coder.encode(params, x)), x)), extras

        learn = Learner(self.room, lambda seed: {"params": coder.init(jax.random.key(seed))}, loss)
        params = learn("paraphraser", 0, rows=last)["params"]
        encode = jax.jit(coder.encode)
        return jnp.concatenate([encode(params, nn.relu(last[i : i + 500])) for i in range(0, len(last), 500)])

    def pair(self, variables: Any, maps: Any) -> Pair:
        """The shapes, and the margins of the teacher's stages."""
        shown: Any = jax.eval_shape(lambda: self.captured(self.room.init(self.student, 0), self.room.images[:1])[1])
        margins = []
        for i in range(3):
            norms = variables["params"][f"Stage_{i}"][f"Block_{self.config.teacher_blocks - 1}"]["BatchNorm_1"]
            margins.append(distill.expected_margin(norms["scale"], norms["bias"]))
        return Pair(
            tuple(shown[f"Stage_{i}"].shape[1:] for i in range(3)), tuple(x.shape[1:] for x in maps), tuple(margins)
        )

    def learner(self, method: Method, remembers: bool, epochs: int) -> Learner:
        """The student's training by a method, its projectors beside it, a contrast memory in the extras."""
        room = self.room

        def init(seed: int) -> dict[str, Any]:
            variables = room.init(self.student, seed)
            params = {"student": variables["params"], "beside": method.init(jax.random.key(10_000 + seed))}
            memory = distill.contrast_memory(jax.random.key(seed), len(room.labels), 64) if remembers else {}
            return {"params": params, "batch_stats": variables["batch_stats"], "memory": memory}

        def loss(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
            variables = {"params": params["student"], "batch_stats": extras["batch_stats"]}
            (logits, moved), found = self.captured(variables, lesson.images, train=True, mutable=["batch_stats"])
            ours = Seen(logits, tuple(found[f"Stage_{i}"] for i in range(3)))
            theirs = Seen(lesson.rows["logits"], lesson.rows["maps"])
            term = method.term(params["beside"], ours, theirs, lesson._replace(extras=extras))
            term, memory = term if remembers else (term, extras["memory"])
            total = method.hard * jnp.mean(hard(logits, lesson)) + lesson.knobs["weight"] * jnp.mean(term)
            return total, {"batch_stats": moved["batch_stats"], "memory": memory}

        return Learner(room, init, loss, epochs=epochs)


class Arm:
    """One method: its factor, and its students.

    Args:
      school: the teacher and the student.
      name: the method's.
      method: the term and its weight.
      rows: see `School.taught`.
    """

    def __init__(self, school: School, name: str, method: Method, rows: dict[str, Any]) -> None:
        self.school, self.name, self.method, self.rows = school, name, method, rows
        c = school.config
        self.learners = {n: school.learner(method, name == CONTRASTIVE, n) for n in {c.epochs, c.trial_epochs}}
        self.candidates = c.factors if method.hard and method.weight else (1.0,)

    def student(self, factor: float, seed: int, epochs: int | None = None) -> Any:
        """The student's variables after a training, of `Config.epochs` by default."""
        c = self.school.config
        knobs = {"weight": factor * self.method.weight, "examples": len(self.school.room.labels)}
        epochs = epochs or c.epochs
        name = f"{self.name}, {factor:g}, seed {seed}" + ("" if epochs == c.epochs else f", {epochs} epochs")
        trained = self.learners[epochs](name, seed, rows=self.rows, knobs=knobs)
        return {"params": trained["params"]["student"], "batch_stats": trained["batch_stats"]}

    def chosen(self) -> dict[str, Any]:
        """The factor by the validation accuracy of seed 0's trials, and the record of the choice."""
        room, model, epochs = self.school.room, self.school.student, self.school.config.trial_epochs

        def score(factor: float, validation: Split) -> float:
            logits = room.logits(model, self.student(factor, 0, epochs), room.validation[0])
            finite = bool(jnp.all(jnp.isfinite(logits)))
            return accuracy(logits, jnp.asarray(validation.labels)) if finite else float("nan")

        factor, choice = select(f"factor of the weight, {self.name}", self.candidates, score, room.dataset.validation)
        return {"factor": factor, "choice": dataclasses.asdict(choice)}

    def seeds(self) -> tuple[list[dict[str, float]], Choice | None]:
        """Each seed's figures, and the choice, if there was one."""
        room, factor, choice = self.school.room, self.candidates[0], None
        if len(self.candidates) > 1:
            found = room.kept(f"{self.name}, factor", self.chosen)
            factor, choice = found["factor"], Choice(**found["choice"])
        values = [
            room.kept(f"{self.name}, seed {seed}", partial(self._tested, factor, seed))
            for seed in range(self.school.config.seeds)
        ]
        shown = factor if self.method.weight else 0.0
        return [{"accuracy": value, "factor": shown} for value in values], choice

    def _tested(self, factor: float, seed: int) -> float:
        """Test accuracy of a final model."""
        name, model = f"{self.name}, seed {seed}", self.school.student
        return self.school.room.test(name, model, self.student(factor, seed))


def main(config: Config) -> _results.Result:
    """Runs every method and seed, and writes the result and the figure."""
    c, shapes = config, ((8, 8, 4),) * 3
    names = methods(Pair(shapes, shapes, (jnp.zeros(4),) * 3))  # which there are does not depend on the networks
    if unknown := set(c.methods) - set(names):
        raise UsageError(f"no method {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    school = School(config)
    room = school.room
    variables, rows = school.taught()
    pair = school.pair(variables, rows["maps"])
    known = methods(pair)
    chosen = [name for name in known if name in (c.methods or known)]
    if "factor transfer (FT)" in chosen:
        rows["factors"] = school.factors(pair, rows["maps"][-1])
    top = room.kept("teacher", lambda: room.test("teacher", school.teacher, variables))
    alone = Arm(school, ALONE, known[ALONE], rows)
    if "self-training" in chosen:  # the teacher is a student of a seed that is not the table's
        copy = room.trained("student as teacher", school.student, lambda: alone.student(1.0, 1_000))
        rows["itself"] = room.logits(school.student, copy)
    figures: list[tuple[str, int, dict[str, float]]] = []
    choices: list[Choice] = []
    base: list[float] = []
    for name in (ALONE, *(n for n in chosen if n != ALONE)):
        arm = alone if name == ALONE else Arm(school, name, known[name], rows)
        found, choice = arm.seeds()
        base = base or [one["accuracy"] for one in found]
        figures += [(name, i, one | {"gain": one["accuracy"] - base[i]}) for i, one in enumerate(found)]
        choices += [choice] if choice else []
        print(f"{name}: done", flush=True)
    figures.insert(0, ("teacher", 0, {"accuracy": top, "gain": top - base[0], "factor": 0.0}))
    size = parameters(room.init(school.student, 0))
    table = gathered(figures)
    result = room.result(
        name=f"distill_methods_{c.data}",
        title=f"{'Every classification loss' if len(chosen) == len(known) else 'Losses'} under one recipe, on {c.data}",
        source="The literature's tables are of CIFAR-100, 240 epochs and larger networks, so that their figures are not"
        " repeated here.",
        command=command("distill_methods", c),
        selection="each term's weight, as one of the factors on the weight of Tian et al. 2020's code where it has the"
        " method, else on 1 or on what soft targets have: by seed 0's validation accuracy after"
        f" {c.trial_epochs} epochs, for all seeds"
        if choices
        else "nothing was chosen",
        columns=[
            Column("accuracy", "test accuracy (%)"),
            Column("gain", "over labels alone"),
            Column("factor", "factor of the weight"),
        ],
        rows=table,
        choices=choices,
        pairs=[("accuracy", n, ALONE) for n in chosen if n != ALONE] if c.seeds > 1 else (),
        notes=[
            room.setting(),
            f"Teacher: a resnet of {6 * c.teacher_blocks + 2} layers, widths {c.teacher_widths},"
            f" {parameters(variables):,} parameters, one for all seeds, {c.teacher_epochs} epochs of images that move"
            f" by up to {c.shift} pixels and are mirrored at random. Student: {6 * c.student_blocks + 2} layers, widths"
            f" {c.student_widths}, {size:,} parameters. The first convolution has stride {c.stem_stride}.",
            "The loss is the labels' cross entropy, in the literature's share, and the factor times the literature's"
            " weight times the term. Factor 0: no term. Label smoothing and teacher-free are the whole loss and have no"
            " factor to choose. The teacher's gain is over seed 0.",
            "Self-training's teacher is a student of the labels alone, of another seed. Re-weighting keeps the"
            " teacher's probability of each example's label at T = 4, class similarity the cosines of its last weights,"
            " divided by 0.3.",
            "Features are the three stages' maps. Where the channels differ and the method has no projector of its own"
            " (FSP, AB, OFD, ICKD), a learned 1x1 convolution stands before the student's. Methods that their papers"
            " use in a phase before the training (FSP, AB) are a term beside the labels here, like all others.",
        ],
    )
    return written(
        result, c, lambda path: bars(path, table, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


if __name__ == "__main__":
    run_main(main, Config)
