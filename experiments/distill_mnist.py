"""Hinton's MNIST experiments: `python -m experiments.distill_mnist --data mnist --data-dir DIR`.

Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, section 3. A teacher with two layers of
1200 units, dropout and jittered images; students with two layers of 800 without any regularisation, from scratch and
with the teacher's soft targets at temperature 20; a student that never saw a 3, before and after its bias for the 3 is
corrected. Three results: `table`, `temperatures` (narrow students under a sweep) and `ensemble` (ten models into one,
which the paper does with speech).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    bars,
    command,
    curves,
    gathered,
    guided,
    hard,
    jittered,
    logits_loss,
    written,
)
from experiments._results import Column, Row
from experiments._selection import Choice, select
from experiments.data import Split
from jaxcompress import distill

PARTS = ("table", "temperatures", "ensemble")


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Hinton's MNIST table, the sweep of temperatures, and an ensemble in one model."""

    parts: tuple[str, ...] = PARTS
    """Which of the three."""
    teacher_width: int = 1200
    student_width: int = 800
    dropout: float = 0.5
    jitter: int = 2
    """Pixels by which the teacher's images move."""
    alpha: float = 0.9
    temperature: float = 20.0
    narrow: tuple[int, ...] = (30, 300)
    """Widths of the students of the sweep."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 20.0)
    member_width: int = 200
    """Of the ensemble's members, and of the one model that learns from them."""
    members: int = 10
    ensemble_temperature: float = 4.0
    labelled: int = 0
    """If above 0, the members see so many images only, and the one model all of them, by soft targets alone."""


SHORT = Config(
    seeds=1,
    epochs=20,
    rate=1e-2,
    dropout=0.1,
    jitter=1,
    teacher_width=48,
    student_width=32,
    narrow=(8,),
    temperatures=(1.0, 4.0),
    member_width=16,
    members=3,
)
"""A run of seconds, for tests; its accuracies mean little."""

LEFT_OUT = 3
OFFSETS = tuple(float(x) for x in np.arange(0, 15.5, 0.5))
TEACHER, SCRATCH, DISTILLED = "teacher", "student from scratch", "student distilled"
WITHOUT, CORRECTED = "distilled without any 3", "distilled without any 3, bias corrected"
PAPER: dict[str, dict[str, float]] = {
    TEACHER: {"errors": 67},
    SCRATCH: {"errors": 146},
    DISTILLED: {"errors": 74},
    WITHOUT: {"errors": 206, "of_3": 133},
    CORRECTED: {"errors": 109, "of_3": 14, "offset": 3.5},
}


class Teachers:
    """The teacher of each seed, trained when it is first asked for."""

    def __init__(self, room: Room) -> None:
        c: Any = room.config
        self.room, self.model = room, Mlp((c.teacher_width,) * 2, dropout=c.dropout)
        self._learn = room.learner(self.model, logits_loss(self.model, hard, jittered(c.jitter)))
        self._known: dict[int, tuple[Any, jax.Array]] = {}

    def __getitem__(self, seed: int) -> tuple[Any, jax.Array]:
        """Its variables, and its logits of the training images."""
        if seed not in self._known:
            what = f"teacher {seed}"
            variables = self.room.trained(what, self.model, lambda: self._learn(what, seed))
            self._known = {seed: (variables, self.room.logits(self.model, variables))}
            print(f"teacher, seed {seed}: trained", flush=True)
        return self._known[seed]


def wrong(logits: jax.Array, labels: jax.Array) -> dict[str, float]:
    """How many examples a model gets wrong, in all and of the digit that is left out."""
    errors = np.asarray(jnp.argmax(logits, axis=-1) != labels)
    return {"errors": float(errors.sum()), "of_3": float(errors[np.asarray(labels) == LEFT_OUT].sum())}


class Table:
    """The paper's five models, seed by seed."""

    def __init__(self, config: Config) -> None:
        self.config, self.room = config, Room(config)
        self.student = Mlp((config.student_width,) * 2)
        self.learn = self.room.learner(self.student, logits_loss(self.student, guided))
        self.others = np.flatnonzero(np.asarray(self.room.labels) != LEFT_OUT)
        self.figures: list[tuple[str, int, dict[str, float]]] = []
        self.choices: list[Choice] = []

    def go(self, seed: int, teachers: Teachers) -> None:
        """One seed."""
        found = self.room.kept(f"table, seed {seed}", partial(self._measured, seed, teachers))
        self.figures += [(name, seed, figures) for name, figures in found["figures"].items()]
        self.choices.append(Choice(**found["choice"]))
        print(f"table, seed {seed}: done", flush=True)

    def _measured(self, seed: int, teachers: Teachers) -> dict[str, Any]:
        c, room, found = self.config, self.room, dict[str, dict[str, float]]()
        variables, targets = teachers[seed]

        def record(name: str, variables: Any, model: Mlp = self.student, offset: float = 0.0) -> None:
            images, labels = room.test_images(f"{name}, seed {seed}")
            logits = room.logits(model, variables, images).at[:, LEFT_OUT].add(offset)
            found[name] = {**wrong(logits, labels), "offset": offset}

        knobs = {"alpha": c.alpha, "temperature": c.temperature}
        record(TEACHER, variables, teachers.model)
        record(SCRATCH, self.learn(f"scratch {seed}", seed, rows=targets, knobs=knobs | {"alpha": 0.0}))
        record(DISTILLED, self.learn(f"distilled {seed}", seed, rows=targets, knobs=knobs))
        blind = self.learn(f"without 3 {seed}", seed, rows=targets, knobs=knobs, subset=self.others)
        record(WITHOUT, blind)
        seen = room.logits(self.student, blind, room.validation[0])

        def score(offset: float, validation: Split) -> float:
            return accuracy(seen.at[:, LEFT_OUT].add(offset), jnp.asarray(validation.labels))

        what = f"offset of the bias for {LEFT_OUT}, seed {seed}"
        offset, choice = select(what, OFFSETS, score, room.dataset.validation)
        record(CORRECTED, blind, offset=offset)
        return {"figures": found, "choice": dataclasses.asdict(choice)}

    def result(self) -> _results.Result:
        """The table."""
        return table(self.config, self.room, self.figures, self.choices)


def table(config: Config, room: Room, figures: Any, choices: list[Choice]) -> _results.Result:
    """Of all seeds' figures, the result and its figure."""
    rows = gathered(figures, PAPER if config.data == "mnist" else {})
    result = room.result(
        name=f"distill_table_{config.data}",
        title=f"Hinton's MNIST table, on {config.data}",
        source="Hinton, Vinyals & Dean 2015, section 3: trained on all 60,000 images, and for much longer.",
        command=command("distill_mnist", config),
        selection="the offset of the bias by validation accuracy; all else fixed beforehand",
        columns=[
            Column("errors", f"test errors of {len(room.dataset.test):,}", 1),
            Column("of_3", "of these, 3s", 1),
            Column("offset", "added to the bias for 3", 1),
        ],
        rows=rows,
        choices=choices,
        pairs=[("errors", SCRATCH, DISTILLED), ("errors", WITHOUT, CORRECTED)] if config.seeds > 1 else (),
        notes=[
            room.setting(),
            f"Teacher: two layers of {config.teacher_width} units, students: of {config.student_width}."
            f" The teacher has dropout {config.dropout:g} behind both layers, and its images move by up to"
            f" {config.jitter} pixels; soft targets at T = {config.temperature:g} weigh {config.alpha:g}, labels the"
            f" rest.",
            "The paper adds 3.5 to the bias, chosen on the test data; here the validation split chooses.",
        ],
    )
    return written(result, config, lambda path: bars(path, rows, "errors", x_title="test errors", title=result.title))


class Sweep:
    """Narrow students at several temperatures, seed by seed."""

    def __init__(self, config: Config) -> None:
        self.config, self.room = config, Room(config)
        models = {width: Mlp((width,) * 2) for width in config.narrow}
        self.students = {w: (m, self.room.learner(m, logits_loss(m, guided))) for w, m in models.items()}
        self.figures: list[tuple[str, int, dict[str, float]]] = []

    def go(self, seed: int, teachers: Teachers) -> None:
        """One seed."""
        for width in self.students:
            found = self.room.kept(f"sweep 2x{width}, seed {seed}", partial(self._measured, width, seed, teachers))
            self.figures.append((f"2x{width}", seed, found))
        print(f"temperatures, seed {seed}: done", flush=True)

    def _measured(self, width: int, seed: int, teachers: Teachers) -> dict[str, float]:
        c, found, (student, learn) = self.config, dict[str, float](), self.students[width]
        for t in (0.0, *c.temperatures):  # 0: labels alone
            knobs = {"alpha": c.alpha if t else 0.0, "temperature": t or 1.0}
            variables = learn(f"{width} at {t:g}, {seed}", seed, rows=teachers[seed][1], knobs=knobs)
            found[at(t)] = 100 - self.room.test(f"{width} units, T {t:g}, seed {seed}", student, variables)
        return found

    def result(self) -> _results.Result:
        """The table."""
        return sweep(self.config, self.room, self.figures)


def sweep(config: Config, room: Room, figures: Any) -> _results.Result:
    """Of all seeds' figures, the result and its figure."""
    rows = gathered(figures)
    result = room.result(
        name=f"distill_temperatures_{config.data}",
        title=f"The temperature, for students of several widths, on {config.data}",
        source="Test error in %. Hinton, Vinyals & Dean 2015, section 3: with 300 units or more a layer all"
        " temperatures"
        " above 8 gave fairly similar results; with 30, 2.5 to 4 were significantly better than higher or lower ones."
        " The paper has no figures.",
        command=command("distill_mnist", config),
        selection="nothing was chosen",
        columns=[Column(at(0.0), "labels alone"), *(Column(at(t), f"T = {t:g}") for t in config.temperatures)],
        rows=rows,
        notes=[room.setting(), f"Soft targets weigh {config.alpha:g}, labels the rest."],
    )
    lines = {row.name: [(t, row.ours[at(t)].values) for t in config.temperatures] for row in rows}
    return written(
        result, config, lambda path: curves(path, lines, x_title="temperature", y_title="test error (%)",
                                            title=result.title),
    )  # fmt: skip


def at(temperature: float) -> str:
    """The column of a temperature."""
    return f"t{temperature:g}"


TRANSFER_TRIED = "T and the number of labelled images: by a trial of one seed on validation data"


def ensemble(config: Config) -> _results.Result:
    """Ten models, their mean, and one model of their size that learned from it."""
    room, member, few = Room(config), Mlp((config.member_width,) * 2), config.labelled
    alone = room.learner(member, logits_loss(member, hard))

    def from_targets(logits: jax.Array, lesson: Lesson) -> jax.Array:
        soft = distill.soft_label_loss(logits, lesson.rows, temperature=lesson.knobs)
        return soft if few else (soft + distill.hard_label_loss(logits, lesson.labels)) / 2

    taught = room.learner(member, logits_loss(member, from_targets))
    figures, t = [], config.ensemble_temperature
    single, together, distilled = "one of the members", f"ensemble of {config.members}", "distilled from the ensemble"
    from_one = "distilled from one member"

    def measured(seed: int) -> dict[str, float]:
        numbers = [1000 * seed + i for i in range(config.members)]
        seen = np.arange(few) if few else None
        trained = [alone(f"member {number}", number, subset=seen) for number in numbers]
        rows = jnp.stack([room.logits(member, v) for v in trained])
        teachers = {distilled: rows} | ({from_one: rows[:1]} if few else {})  # what the further images do by themselves
        students = {
            name: taught(f"{name} {seed}", 1000 * seed + 999, rows=distill.ensemble_targets(z, temperature=t), knobs=t)
            for name, z in teachers.items()
        }
        images, labels = room.test_images(f"members and their ensemble, seed {seed}")
        logits = jnp.stack([room.logits(member, v, images) for v in trained])
        return {
            single: float(np.mean([accuracy(z, labels) for z in logits])),
            together: accuracy(distill.ensemble_targets(logits), labels),
            **{name: room.test(f"{name}, seed {seed}", member, v) for name, v in students.items()},
        }

    for seed in range(config.seeds):
        found = room.kept(f"ensemble, seed {seed}", partial(measured, seed))
        gain = found[together] - found[single]
        for name, value in found.items():
            kept = 100 * (value - found[single]) / gain if gain else 0.0
            figures.append((name, seed, {"accuracy": value, "kept": kept}))
        print(f"ensemble, seed {seed}: done", flush=True)
    paper = {single: {"kept": 0.0}, together: {"kept": 100.0}, distilled: {"kept": 86.0}}
    rows: list[Row] = gathered(figures, paper)
    pairs = [("accuracy", distilled, single), ("accuracy", together, distilled)]
    pairs += [("accuracy", distilled, from_one)] if few else []
    result = room.result(
        name=_distilling.named("distill_ensemble", config.data, "transfer" if few else ""),
        title=f"Ten models in one, on {config.data}" + (", by images without labels" if few else ""),
        source="Hinton, Vinyals & Dean 2015, section 4: a speech model of the members' size keeps 86% of what ten of"
        " them"
        " together gain (frame accuracies 58.9, 61.1 and 60.8%).",
        command=command("distill_mnist", config),
        selection=TRANSFER_TRIED if few else "nothing was chosen",
        columns=[Column("accuracy", "test accuracy (%)"), Column("kept", "share of the ensemble's gain (%)", 0)],
        rows=rows,
        pairs=pairs if config.seeds > 1 else (),
        notes=[
            room.setting(),
            f"Members differ in initialisation and in the order of the images: 2x{config.member_width} units, no"
            f" regularisation. Soft targets are the mean of the members' probabilities at T = {t:g};"
            f" {'no labels beside them' if few else 'labels weigh half, as in the paper'}. One member's accuracy is the"
            " mean of all.",
            *(
                [f"Members see the first {few:,} images only, for as many steps; the one model sees all."]
                if few
                else []
            ),
        ],
    )
    return written(
        result, config, lambda path: bars(path, rows, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


def main(config: Config) -> list[_results.Result]:
    """Runs the parts; a seed's teacher is trained once for both of those that ask for it."""
    if not config.parts or set(config.parts) - set(PARTS):
        raise UsageError(f"parts are {', '.join(PARTS)}; got {', '.join(config.parts) or 'none'}")
    taught: list[Table | Sweep] = [Table(config)] if "table" in config.parts else []
    taught += [Sweep(config)] if "temperatures" in config.parts else []
    if taught:
        teachers = Teachers(taught[0].room)
        for seed in range(config.seeds):
            for part in taught:
                part.go(seed, teachers)
    return [*(part.result() for part in taught), *([ensemble(config)] if "ensemble" in config.parts else [])]


if __name__ == "__main__":
    run_main(main, Config)
