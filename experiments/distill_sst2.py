"""TinyBERT's recipe, scaled down: `python -m experiments.distill_sst2 --data-dir DIR` (Jiao et al. 2020).

A teacher of 12 layers learns to guess masked words of SST-2's training sentences, and then their labels, several times,
and is the mean of what comes of it. Its words have vectors for their parts as well: SST-2 is small, and every twelfth
word of its other sentences unknown. A student of 4 narrower layers takes over its layers, first from the teacher that
only guesses words, then from the one that knows the task, and then its predictions; the student from scratch, the
student on soft targets alone, and the recipe with each loss left out stand beside it, and logistic regression on bags
of words. With `--checkpoint DIR` the teacher is a BERT that somebody
else has trained, as Hugging Face keeps it, and sentences are cut into its word pieces.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _bags, _distilling, _results
from experiments._bert import Size
from experiments._command import run_main
from experiments._distilling import (
    PARAMS,
    Learner,
    Lesson,
    bars,
    command,
    gathered,
    hard,
    logits_loss,
    parameters,
    written,
)
from experiments._pieces import load_checkpoint, origin
from experiments._reading import (
    PADDING,
    Reader,
    TextRoom,
    averaged,
    dropped_words,
    layer_tables,
    log_frequencies,
    word_loss,
)
from experiments._results import Column
from experiments._selection import Choice
from jaxcompress import distill

DEEP, SHALLOW = Size(12, 48, 2, 96), Size(4, 24, 2, 48)


@dataclass(frozen=True)
class Config(_distilling.Config):
    """A teacher of 12 layers and its student of 4, on sentences."""

    data: str = "sst2"
    """sst2 (with --data-dir), or descriptions: bundled lines of text."""
    batch_size: int = 64
    tokens: int = 32
    """The first words of a sentence that are read, or with a checkpoint word pieces."""
    at_least: int = 2
    """How often a word of the vocabulary occurs in the training sentences."""
    spelled: bool = True
    """Whether words have the vectors of their parts, of three to six letters, beside their own."""
    checkpoint: Path | None = None
    """A folder with config.json, model.safetensors and vocab.txt, from which the teacher starts; `teacher`, `before`,
    `at_least` and `spelled` then do not count."""
    teacher: Size = DEEP
    student: Size = SHALLOW
    masked_epochs: int = 3
    """Of guessing masked words."""
    labelled_epochs: int = 3
    """Of each of the teacher's trainings on labels alone."""
    epochs: int = 3
    """Of each of the student's last two phases."""
    general_epochs: int = 2
    """Of its first."""
    masked_rate: float = 1e-3
    """The teacher's largest learning rate on masked words, after 100 steps; falls to zero along a cosine."""
    rate: float = 1e-3
    """The same on labels."""
    student_rate: float = 2e-3
    before: bool = True
    """Whether a layer's halves are normalised before and not behind."""
    dropout: float = 0.1
    """Of the teacher, behind its embeddings and each half of a layer; the student has none."""
    average: float = 0.99
    """Of the teacher's weights at a step on labels, the share that the average of those before keeps; the average is
    what has learned."""
    fine_tunings: int = 3
    """How often the teacher learns the labels, in other orders; it is the mean of all their weights."""
    dropped: float = 0.3
    """The share of the words that are masked where labels or predictions are learned."""


SHORT = Config(
    data="descriptions",
    seeds=1,
    batch_size=32,
    tokens=8,
    teacher=Size(2, 8, 2, 16),
    student=Size(1, 4, 2, 8),
    masked_epochs=1,
    labelled_epochs=1,
    epochs=1,
    general_epochs=1,
    average=0.9,
    fine_tunings=2,
)
"""A run of seconds, for tests; its accuracies mean little."""

TEACHER = "teacher"
SCRATCH, SOFT, FULL = "student from scratch", "student, soft targets alone", "student, all phases and losses"
WHOLE = {"embedding": 1.0, "hidden": 1.0, "attention": 1.0}
LEFT_OUT = {f"without the {key} loss": WHOLE | {key: 0.0} for key in WHOLE}
LABELS = "without the prediction loss: labels instead"
NO_TEXT = "General and task text are the same sentences; no text was added, which the paper found to matter most."
SELECTION = {
    "pair": "lengths, rates, the share of masked words of the teacher, that layers are normalised before their halves,"
    " and averages by fourteen trials on validation data before words had parts; that they have, and the mean of the"
    " trainings, by one trial, and eight more changed nothing; the students' were fixed beforehand.",
    "checkpoint": "the teacher's rate and length after one trial of a single epoch; all else was fixed beforehand.",
}


def layer_losses(
    student: distill.LayerOutputs, teacher: distill.LayerOutputs, project: Callable[[Any], Any], where: jax.Array
) -> dict[str, jax.Array]:
    """The three parts of `distill.intermediate_loss`, each summed over the layers, `[batch]`.

    The teacher's outputs are those of the layers that the student's learn from.
    """
    hidden = [
        distill.hidden_state_loss(project(s), t, where=where)
        for s, t in zip(student.hidden, teacher.hidden, strict=True)
    ]
    attention = [
        distill.attention_matrix_loss(s, t, where=where)
        for s, t in zip(student.attention, teacher.attention, strict=True)
    ]
    return {"embedding": hidden[0], "hidden": sum(hidden[2:], hidden[1]), "attention": sum(attention[1:], attention[0])}


def predicted(logits: jax.Array, lesson: Lesson) -> jax.Array:
    """The teacher's probabilities in `rows`, weighed by `knobs`, and the labels."""
    said = distill.soft_label_loss(logits, lesson.rows)
    return lesson.knobs * said + (1 - lesson.knobs) * hard(logits, lesson)


class Pupil:
    """The student's phases, each a `Learner` whose arms share a program."""

    def __init__(
        self, room: TextRoom, config: Config, model: Reader, width: int, guides: Mapping[str, Any], soft: Any
    ) -> None:
        c = self.config = config
        self.room, self.model, self.guides, self.soft = room, model, guides, soft
        self.project = distill.dense_projector(c.student.hidden, width)
        augment = dropped_words(c.dropped)

        def learner(init: Any, loss: Any, epochs: int) -> Learner:
            return Learner(room, init, loss, epochs=epochs, tx=optimizer(c.student_rate, epochs * room.steps))

        phases = {"pretrained": c.general_epochs, "fine-tuned": c.epochs}
        self.layers = {who: learner(self.init, self.loss, epochs) for who, epochs in phases.items()}
        make = partial(room.init, model)
        self.predict = learner(make, logits_loss(model, predicted, augment), c.epochs)
        self.straight = learner(make, logits_loss(model, predicted, augment), c.general_epochs + 2 * c.epochs)

    def init(self, seed: int) -> dict[str, Any]:
        """The student, and its projection to the teacher's width beside it."""
        own = self.room.init(self.model, seed)[PARAMS]
        return {PARAMS: {"student": own, "project": self.project.init(jax.random.key(10_000 + seed))}}

    def loss(self, params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        """The weighted parts of the layers' loss; `rows` are the teacher's layers, `knobs` the weights."""
        own: Any = self.model.apply({PARAMS: params["student"]}, lesson.images, method=Reader.layers)
        project = partial(self.project.apply, params["project"])
        parts = layer_losses(own, lesson.rows, project, lesson.images[..., 0] != PADDING)
        weighed = (jnp.mean(lesson.knobs[key] * part) for key, part in parts.items())
        return sum(weighed, jnp.zeros(())), extras

    def from_layers(self, name: str, seed: int, weights: Mapping[str, float]) -> Any:
        """Parameters after the phases that have an intermediate loss."""
        state = None
        for phase in distill.TINYBERT_PHASES:
            if phase.intermediate_weight:
                rows = self.guides[phase.teacher]
                state = self.layers[phase.teacher](f"{name} {phase.name}", seed, rows=rows, knobs=weights, start=state)
        assert state is not None
        return {PARAMS: state[PARAMS]["student"]}

    def predicting(self, name: str, seed: int, start: Any, share: float = 1.0) -> Any:
        """The last phase: the teacher's predictions, or with `share` 0 the labels."""
        return self.predict(name, seed, rows=self.soft, knobs=share, start=jax.tree.map(jnp.copy, start))

    def alone(self, name: str, seed: int, share: float) -> Any:
        """As long as all phases, from a fresh network."""
        return self.straight(name, seed, rows=self.soft, knobs=share)


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine to zero."""
    warm = min(100, steps // 4)
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, warm, steps), weight_decay=0.01)


def sized(size: Size, room: TextRoom) -> Size:
    """Such an encoder for the room's words."""
    words = room.vocabulary
    return size._replace(vocabulary=len(words), positions=room.tokens, parts=len(words.parts) and 1 + len(words.parts))


def opened(c: Config) -> tuple[TextRoom, Reader, dict[str, Any]]:
    """The sentences, and the teacher with its first variables: fresh ones, or a checkpoint's below a fresh head."""
    if c.checkpoint is None:
        room = TextRoom(c, c.tokens, c.at_least, c.spelled)
        size = sized(c.teacher, room)
        model = Reader(size, c.dropout, room.dataset.classes, c.before)
        return room, model, room.init(model, 0)
    pieces, size, params = load_checkpoint(c.checkpoint, c.tokens)
    room = TextRoom(c, c.tokens, c.at_least, vocabulary=pieces)
    model = Reader(size, c.dropout, room.dataset.classes)
    return room, model, {PARAMS: {**room.init(model, 0)[PARAMS], "bert": params}}


def taught(room: TextRoom, c: Config, model: Reader, start: Any) -> dict[str, Any]:
    """The teacher that guesses words, and the same after it learned the labels.

    It learns them several times from there, in other orders. The mean of the weights is nearly as good as the mean of
    the predictions (Wortsman et al., "Model soups", 2022).
    """

    def copied(variables: Any) -> Any:
        return jax.tree.map(jnp.copy, variables)

    def guess() -> Any:
        tx = optimizer(c.masked_rate, c.masked_epochs * room.steps)
        learn = room.learner(model, word_loss(model), epochs=c.masked_epochs, tx=tx)
        bias = log_frequencies(room.images, len(room.vocabulary))
        return learn("teacher, masked words", 0, knobs=bias, start=copied(start))

    pretrained = room.trained("teacher, masked words", model, guess) if c.masked_epochs else start
    loss = logits_loss(model, hard, dropped_words(c.dropped))
    loss = averaged(loss, c.average) if c.average else loss
    learn = room.learner(model, loss, epochs=c.labelled_epochs, tx=optimizer(c.rate, c.labelled_epochs * room.steps))

    def label(name: str, seed: int) -> Any:
        first = copied({PARAMS: pretrained[PARAMS]} | ({"average": pretrained[PARAMS]} if c.average else {}))
        return {PARAMS: learn(f"teacher, {name}", seed, start=first)["average" if c.average else PARAMS]}

    names = [f"labels, seed {seed}" for seed in range(c.fine_tunings)]
    found = [room.trained(f"teacher, {n}", model, partial(label, n, seed)) for seed, n in enumerate(names)]
    return {"pretrained": pretrained, "fine-tuned": jax.tree.map(lambda *each: sum(each) / len(each), *found)}


def main(config: Config) -> _results.Result:
    """Trains the teacher and the students, and writes the result and the figure."""
    c = config
    room, teacher, start = opened(c)
    size = sized(c.student, room)
    student = Reader(size, classes=room.dataset.classes, before=teacher.before)
    figures: list[tuple[str, int, dict[str, float]]] = []

    def measured(name: str, seed: int, model: Reader, learn: Callable[[], Any]) -> None:
        def measure() -> dict[str, float]:
            variables = learn()
            valid = _distilling.accuracy(room.logits(model, variables, room.validation[0]), room.validation[1])
            right = room.test(f"{name}, seed {seed}", model, variables)
            return {"accuracy": right, "validation": valid, "size": parameters(variables)}

        figures.append((name, seed, room.kept(f"{name}, seed {seed}", measure)))
        print(f"{name}, seed {seed}: {figures[-1][2]['validation']:.2f} on validation data", flush=True)

    bags = {_bags.WORDS: _bags.measured(room), _bags.PARTS: _bags.measured(room, parts=True)}
    figures += [(name, 0, found) for name, (found, _) in bags.items()]
    teachers = taught(room, c, teacher, start)
    measured(TEACHER, 0, teacher, lambda: teachers["fine-tuned"])
    layer_map = distill.uniform_layer_map(size.layers, teacher.size.layers)
    guides = {who: layer_tables(room, teacher, variables, layer_map) for who, variables in teachers.items()}
    soft = jax.nn.softmax(room.logits(teacher, teachers["fine-tuned"]))
    pupil = Pupil(room, c, student, teacher.size.hidden, guides, soft)
    for seed in range(c.seeds):
        measured(SCRATCH, seed, student, partial(pupil.alone, f"{SCRATCH} {seed}", seed, 0.0))
        measured(SOFT, seed, student, partial(pupil.alone, f"{SOFT} {seed}", seed, 1.0))
        reached: dict[str, Any] = {}

        def both(name: str, weights: Any, share: float = 1.0, seed: int = seed, reached: Any = reached) -> Any:
            key = str(weights)
            if key not in reached:
                reached[key] = pupil.from_layers(f"{name} {seed}", seed, weights)
            return pupil.predicting(f"{name} {seed}", seed, reached[key], share)

        measured(FULL, seed, student, partial(both, FULL, WHOLE))
        measured(LABELS, seed, student, partial(both, LABELS, WHOLE, 0.0))
        for name, weights in LEFT_OUT.items():
            measured(name, seed, student, partial(both, name, weights))
    return reported(c, room, teacher, figures, [choice for _, choice in bags.values()])


def reported(config: Config, room: TextRoom, teacher: Reader, figures: Any, choices: list[Choice]) -> _results.Result:
    """The result, its table and its figure."""
    c, rows, size = config, gathered(figures), teacher.size
    students = (SOFT, FULL, LABELS, *LEFT_OUT)
    lengths = np.sum(np.asarray(room.images[..., 0]) != PADDING, axis=1)
    vocabulary = f"{len(room.vocabulary):,} " + (
        "word pieces" if c.checkpoint else f"words that occur {c.at_least} times or more"
    )
    result = room.result(
        name=_distilling.named(f"distill_tinybert_{'checkpoint' if c.checkpoint else 'pair'}", c.data),
        title=f"TinyBERT's recipe with {'a trained checkpoint' if c.checkpoint else 'a small pair'}, on {c.data}",
        source="Test accuracy in %. Jiao et al. 2020, table 6, report that without any of the losses the student is"
        " worse, most without the layers'; their pair learned from Wikipedia and GLUE.",
        command=command("distill_sst2", replace(c, checkpoint=Path("DIR")) if c.checkpoint else c),
        selection=SELECTION["checkpoint" if c.checkpoint else "pair"],
        choices=choices,
        columns=[
            Column("accuracy", "test accuracy (%)"),
            Column("validation", "validation accuracy (%)"),
            Column("size", "parameters", 0),
        ],
        rows=rows,
        pairs=[*(("accuracy", name, SCRATCH) for name in students), *(("accuracy", FULL, n) for n in students[:1])]
        if c.seeds > 1
        else (),
        notes=[
            f"Teacher {size.layers} layers of {size.hidden}, student {c.student.layers} of {c.student.hidden},"
            f" {size.heads} and {c.student.heads} heads; {vocabulary}, the first {c.tokens} of a sentence (mean"
            f" {lengths.mean():.1f}); the head stands on the mean of the last layer; a layer's halves are normalised"
            f" {'before' if teacher.before else 'behind'}. Logistic regression sees the whole sentence.",
            f"{len(room.labels):,} sentences, batches of {room.batch}: the teacher guesses masked words for"
            f" {c.masked_epochs} epochs and learns labels for {c.labelled_epochs}; students learn from layers for"
            f" {c.general_epochs} and {c.epochs} epochs and from predictions for {c.epochs}; those without layers learn"
            f" for as long. AdamW, largest rates {c.masked_rate:g}, {c.rate:g} and {c.student_rate:g}. Where labels or"
            f" predictions are learned, {c.dropped:.0%} of the words are masked; the teacher has dropout {c.dropout:g}."
            + (f" On labels its weights are averaged, {c.average:g} being kept a step." if c.average else "")
            + (f" It is the mean of {c.fine_tunings} such trainings." if c.fine_tunings > 1 else "")
            + (
                f" Words have the vectors of their parts too, of three to six letters: {len(room.vocabulary.parts):,}"
                " that two or more of the training sentences' words have."
                if room.vocabulary.parts
                else ""
            ),
            f"One teacher for all seeds. {origin(c.checkpoint) if c.checkpoint else NO_TEXT} Without a loss means in"
            " both phases of the layers.",
        ],
    )
    return written(
        result, c, lambda path: bars(path, rows, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


if __name__ == "__main__":
    run_main(main, Config)
