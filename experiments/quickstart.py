"""The main job, end to end: `python -m experiments.quickstart`.

Trains a teacher on real digits, distils a student from it, prunes the student, fine-tunes it under fake quantization,
converts it to integers, packs it into a file, and evaluates that file in a new process. Prints one table; writes it
with a figure and the data to `--out`. `--seeds 5` repeats it, and compares what should be compared.

Each stage goes on from the one before. The two students differ in nothing but the loss: architecture, initialisation,
batches and their order, steps, and the search for a learning rate are the same. Both see the training images as they
are; the teacher had shifted copies of them, dropout and batch normalisation besides, and what it learned from those is
what distillation can hand on. Pruning and fake quantization go on with the teacher's help: the last stage is a pruning
transformation, a fake-quantizing transform and a distillation loss in one step.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from experiments import _results
from experiments._artefacts import BATCH, accuracy, classifier, load_plain, measure, save_plain
from experiments._command import UsageError, run_main
from experiments._progress import bar
from experiments._results import Column, Row
from experiments._selection import Choice, select
from experiments.data import Dataset, Split, batches, load
from experiments.models import Convnet, describe, initialise
from jaxcompress import compressed, distill, pack, prune, quantize, report, train
from jaxcompress.arrays import Sparse

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """Compresses a digit classifier and proves it."""

    seed: int = 0
    """Of everything random. Two runs with one seed print the same accuracies and sizes."""
    seeds: int = 1
    """How many runs, with seeds from `seed` on; more than one also compare by pairs."""
    data: str = "digits"
    """The data set: digits, or mnist (with --data-dir)."""
    data_dir: Path | None = None
    """Where the data set's files are."""
    out: Path = Path("runs/quickstart")
    """Where files, figure and JSON go."""
    teacher_width: int = 32
    student_width: int = 16
    batch_size: int = 64
    teacher_steps: int = 2500
    student_steps: int = 1200
    tune_steps: int = 800
    """Steps of each of the last two stages."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """The candidates of both students."""
    alpha: float = 0.9
    temperature: float = 8.0
    sparsity: float = 0.5
    bits: int = 4
    activation_bits: int = 8
    timing_rounds: int = 31
    """In which all models are timed in turns."""


SHORT = Config(
    teacher_width=8,
    student_width=6,
    teacher_steps=60,
    student_steps=60,
    tune_steps=30,
    learning_rates=(1e-2,),
    timing_rounds=3,
)
"""A run of seconds, for tests and for a first look; its accuracies mean nothing."""

COLUMNS = (
    report.Column("accuracy", "test accuracy (%)", ".2f"),
    report.Column("noisy_accuracy", "with input noise (%)", ".2f"),
    report.Column("parameters", "parameters"),
    report.Column("nonzeros", "non-zeros"),
    report.Column("bytes", "bytes on disk"),
    report.Column("ratio", "times smaller", ".1f"),
    report.Column("milliseconds", f"ms a batch of {BATCH}", ".2f"),
    report.Column("flops", "FLOPs a batch"),
    report.Column("peak_bytes", "peak bytes"),
)
TEACHER, HALF, SCRATCH, DISTILLED = "teacher", "teacher of half the width", "student from scratch", "student distilled"
PRUNED, QUANTIZED, PACKED = "+ pruned", "+ quantized", "+ packed file"
COMPRESSED = "kernel$"  # which parameters are pruned and quantized


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by up to one pixel each way, zeros moving in."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    starts = jax.random.randint(key, (images.shape[0], 2), 0, 3)
    cut = jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:]))
    return cut(padded, starts)


class Run:
    """One seed's run: its models, its figures, and what was chosen on the way."""

    def __init__(self, config: Config, dataset: Dataset, seed: int, console: Console):
        self.config, self.dataset, self.seed, self.console = config, dataset, seed, console
        self.folder = config.out / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.figures: dict[str, dict[str, float]] = {}
        self.calls: dict[str, Callable[[], Any]] = {}
        self.choices: list[Choice] = []
        self.teacher = Convnet(config.teacher_width, dataset.classes, normalise=True, dropout=0.3)
        self.student = Convnet(config.student_width, dataset.classes)

    def go(self) -> None:
        """All stages, each measured from its file."""
        c = self.config
        teacher = self.trained(TEACHER, self.teacher, c.teacher_steps, self.adam(2e-3, c.teacher_steps))
        self.record(TEACHER, self.teacher, teacher)
        if c.seeds > 1:
            half = self.teacher.clone(width=c.teacher_width // 2)
            self.record(HALF, half, self.trained(HALF, half, c.teacher_steps, self.adam(2e-3, c.teacher_steps)))

        self.record(SCRATCH, self.student, self.searched(SCRATCH, None))
        student = self.searched(DISTILLED, teacher)
        self.record(DISTILLED, self.student, student)

        ramp = prune.polynomial(begin=0, end=c.tune_steps // 2, every=max(1, c.tune_steps // 40))
        pruning = prune.sparsify({COMPRESSED: c.sparsity}, ramp)
        student = self.trained(
            PRUNED, self.student, c.tune_steps, optax.chain(self.adam(3e-3, c.tune_steps), pruning), teacher, student
        )
        self.record(PRUNED, self.student, jax.tree.map(lambda x: Sparse.from_dense(x) if x.ndim > 1 else x, student))

        rules = {COMPRESSED: quantize.Affine(c.bits, activation_bits=c.activation_bits)}
        keep = prune.sparsify({COMPRESSED: c.sparsity}, prune.one_shot())
        tx = optax.chain(self.adam(2e-3, c.tune_steps), keep)
        student = self.trained(QUANTIZED, self.student, c.tune_steps, tx, teacher, student, quantize_rules=rules)
        integers = quantize.convert(student, rules)
        self.record(QUANTIZED, self.student, integers)
        self.record_packed(integers)
        for title, seconds in report.in_turns(self.calls, rounds=c.timing_rounds).items():
            self.figures[title]["milliseconds"] = 1e3 * seconds
            self.figures[title]["ratio"] = self.figures[TEACHER]["bytes"] / self.figures[title]["bytes"]

    def adam(self, rate: float, steps: int) -> optax.GradientTransformation:
        """Adam with decoupled weight decay and a cosine schedule down to zero."""
        return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-4)

    def searched(self, title: str, teacher: Variables | None) -> Variables:
        """A student trained at each learning rate; the best by validation accuracy."""
        candidates = {}
        for rate in self.config.learning_rates:
            steps = self.config.student_steps
            candidates[rate] = self.trained(
                f"{title}, rate {rate:g}", self.student, steps, self.adam(rate, steps), teacher
            )

        def score(rate: float, validation: Split) -> float:
            return accuracy(self.student, candidates[rate], validation)

        what = f"learning rate of the {title}, seed {self.seed}"
        best, choice = select(what, self.config.learning_rates, score, self.dataset.validation)
        self.choices.append(choice)
        return candidates[best]

    def trained(
        self,
        title: str,
        model: nn.Module,
        steps: int,
        tx: optax.GradientTransformation,
        teacher: Variables | None = None,
        start: Variables | None = None,
        quantize_rules: Mapping[str, quantize.Affine] | None = None,
    ) -> Variables:
        """Trains a model for a number of steps fixed beforehand, with the teacher's help where there is one."""
        c = self.config
        variables = start or initialise(model, self.seed, self.dataset.train.images.shape[1:])
        step = train.make_step(self.loss(model, teacher is not None, quantize_rules), tx)
        extras = {name: tree for name, tree in variables.items() if name != "params"}
        state = train.TrainState.create(variables["params"], tx, key=jax.random.key(self.seed), extras=extras)
        data = batches(self.dataset.train, c.batch_size, seed=self.seed)
        with bar(title, steps, self.console) as on_metrics:
            state = train.fit(step, state, data, steps=steps, frozen=teacher, on_metrics=on_metrics, log_every=10)
        return {"params": state.params, **state.extras}

    def loss(
        self, model: nn.Module, distilled: bool, quantize_rules: Mapping[str, quantize.Affine] | None
    ) -> train.LossFn:
        """Cross entropy, or distillation, of the model or of its fake-quantized view."""
        c = self.config
        apply = model.apply if quantize_rules is None else quantize.fake(model.apply, quantize_rules)

        def loss_fn(params: Any, batch: Any, context: train.Context) -> Any:
            images, labels = batch["image"], batch["label"]
            if model.dropout:  # the teachers' recipe
                images = shifted(images, jax.random.fold_in(context.key, 1))
            variables, mutable = {"params": params, **context.extras}, list(context.extras)
            logits, extras = apply(variables, images, train=True, rngs={"dropout": context.key}, mutable=mutable)
            if distilled:
                guidance: Any = self.teacher.apply(context.frozen, images)
                losses = distill.distillation_loss(logits, guidance, labels, alpha=c.alpha, temperature=c.temperature)
            else:
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            right = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
            return jnp.mean(losses), {"accuracy": right}, extras

        return loss_fn

    def record(self, title: str, model: nn.Module, variables: Variables) -> None:
        """Saves a model, reads it back, and measures what came back. Test data are read here, once a model."""
        path = self.folder / f"{title.removeprefix('+ ').replace(' ', '_')}.safetensors"
        size = save_plain(path, variables)
        test = self.dataset.test.read(for_model=f"{title}, seed {self.seed}")
        kept = load_plain(path, variables)
        self.figures[title] = measure(model, kept, test, size)
        self.time(title, model, kept)

    def record_packed(self, variables: Variables) -> None:
        """Packs a model, and has a new process load and measure the file."""
        path = self.folder / "packed.jxc"
        pack.save(path, jax.tree.map(lambda x: x, dict(variables)), metadata=describe(self.student))
        command = [sys.executable, "-m", "experiments.packed", str(path), "--for-model", f"{PACKED}, seed {self.seed}"]
        command += ["--data", self.config.data]
        command += [] if self.config.data_dir is None else ["--data-dir", str(self.config.data_dir)]
        with self.console.status("packed file: evaluating in a new process"):
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=beside())
        if done.returncode != 0:
            raise RuntimeError(f"evaluating {path} in a new process failed:\n{done.stderr}")
        answer = json.loads(done.stdout.splitlines()[-1])
        self.dataset.test.include(_results.Read(**read) for read in answer["reads"])
        self.figures[PACKED] = answer["figures"]
        self.time(PACKED, self.student, pack.load(path))

    def time(self, title: str, model: nn.Module, variables: Variables) -> None:
        """Has a model timed at the end, in turns with the others."""
        images = jnp.asarray(self.dataset.train.inputs()[:BATCH])
        self.calls[title] = partial(jax.jit(compressed(classifier(model))), variables, images)


def beside() -> dict[str, str]:
    """The environment of a process that runs while this one holds the device: a TPU is one process's, and of a GPU's
    memory most is taken."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return os.environ | shared | ({"JAX_PLATFORMS": "cpu"} if jax.default_backend() == "tpu" else {})


def main(config: Config) -> _results.Result:
    """Runs every seed, prints the table, and writes the figure and the JSON.

    Raises:
      ValueError: no seeds, or a data set or split that isn't there.
    """
    if config.seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {config.seeds}")
    console = Console()
    dataset = load(config.data, config.data_dir)
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        if config.seeds > 1:
            console.rule(f"seed {seed}")
        runs.append(Run(config, dataset, seed, console))
        runs[-1].go()
    result = collected(config, dataset, runs)
    result.write(config.out / "quickstart.json")
    shown = [report.Row(row.name, {key: figure.mean for key, figure in row.ours.items()}) for row in result.rows]
    report.figure(config.out / "quickstart.png", shown, x_title="bytes on disk", y_title="test accuracy (%)")
    print(report.table(shown, COLUMNS))
    for stated in result.comparisons:
        d = stated.difference
        interval = f"95% interval [{d.low:+.2f}, {d.high:+.2f}], {d.count} seeds"
        print(f"{stated.first} - {stated.second}: {d.mean:+.2f} points of test accuracy, {interval}")
    print(f"written: {config.out}/quickstart.json, {config.out}/quickstart.png, {config.out}/seed*/")
    return result


def collected(config: Config, dataset: Dataset, runs: list[Run]) -> _results.Result:
    """All runs as one result."""
    rows = [Row.measured(title, {run.seed: run.figures[title] for run in runs}) for title in runs[0].figures]
    pairs = [(DISTILLED, SCRATCH), (TEACHER, HALF), (PACKED, TEACHER)] if len(runs) > 1 else []
    changed = [
        f"--{field.name.replace('_', '-')} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default and field.name not in ("data_dir", "out")
    ]
    return _results.result(
        dataset,
        name="quickstart",
        title="One command compresses a model",
        source="no paper: each stage beside the one before",
        command=" ".join(["python -m experiments.quickstart", *changed]),
        selection="learning rates of both students by validation accuracy from one grid; all else fixed beforehand",
        columns=[
            Column(c.key, c.title, int(c.form[1]) if c.form[0] == "." else 0)
            for c in (*COLUMNS, report.Column("nbytes", "bytes in memory"))
        ],
        rows=rows,
        choices=[choice for run in runs for choice in run.choices],
        pairs=[("accuracy", first, second) for first, second in pairs],
    )


if __name__ == "__main__":
    run_main(main, Config)
