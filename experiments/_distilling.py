"""What the distillation experiments share: data on the device, trainings whose knobs are arguments, rows and figures.

A `Learner` is one jitted step of `jaxcompress.train` around a loss. What differs from arm to arm (a teacher's outputs,
a temperature, a weight) stands in its arguments, so that one compiled program serves every arm and seed. Where the
training images are shown as they are, a teacher's logits are computed once, as rows of a table, and gathered.
"""

import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pruning, _results
from experiments._artefacts import load_plain, save_plain
from experiments._command import UsageError
from experiments._figures import bars
from experiments._kept import kept, plain
from experiments._lessons import PARAMS, Lesson, Loss, alike, guided, hard, jittered, logits_loss
from experiments._pruning import curves
from experiments._results import Row
from experiments.data import Dataset, load
from jaxcompress import train

__all__ = [
    "PARAMS",
    "Config",
    "Learner",
    "Lesson",
    "Loss",
    "Mlp",
    "Room",
    "accuracy",
    "alike",
    "bars",
    "command",
    "curves",
    "gathered",
    "guided",
    "hard",
    "jittered",
    "logits_loss",
    "parameters",
    "written",
]
T = TypeVar("T")
Variables = Mapping[str, Any]
TRIED = (
    "how far the teachers' images move, the students' widths, T and the length: by a trial of one seed on validation"
    " data, after a setting without moving images had shown no gain"
)
ELSEWHERE = {"data_dir", "out", "log", "resume", "seeds", "parts", "methods"}  # what does not change a figure


@dataclass(frozen=True)
class Config:
    """What every distillation experiment is told."""

    data: str = "digits"
    """The data set: digits, or mnist or cifar10 (with --data-dir)."""
    data_dir: Path | None = None
    """Where the data set's files are."""
    out: Path = Path("runs")
    """Where the result file and the figure go; with experiments/results they take the place of the recorded ones."""
    log: Path | None = None
    """Where each training's metrics go, as JSON lines; by default a folder of the experiment's name in `out`."""
    resume: Path | None = None
    """A folder that keeps what was measured, so that a command that was cut off goes on there."""
    seeds: int = 3
    examples: int = 10_000
    """At most so many training images: the first of the split, which is mixed."""
    batch_size: int = 100
    epochs: int = 20
    """Of each training."""
    rate: float = 1e-3
    """The largest learning rate of Adam, which falls to zero along a cosine."""


class Mlp(nn.Module):
    """A network of dense layers with ReLU.

    Attributes:
      widths: units of each hidden layer.
      classes: outputs.
      dropout: the rate behind each hidden layer, in training.
    """

    widths: tuple[int, ...]
    classes: int = 10
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`."""
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


class Room:
    """A data set on the device, and what is measured on it.

    Args:
      config: the experiment's.
      whole: train on the validation split too, where nothing is chosen.
    """

    def __init__(self, config: Config, whole: bool = False) -> None:
        if config.seeds < 1 or config.epochs < 1:
            raise UsageError(f"want 1 seed and 1 epoch or more, got {config.seeds} and {config.epochs}")
        self.config = config
        self.dataset: Dataset = load(config.data, config.data_dir)
        validation = self.dataset.validation
        splits = [self.dataset.train, *([validation] if whole else [])]
        self.images, self.labels = (
            jnp.concatenate([jnp.asarray(split.inputs()) for split in splits])[: config.examples],
            jnp.concatenate([jnp.asarray(split.labels) for split in splits])[: config.examples],
        )
        self.validation = (jnp.asarray(validation.inputs()), jnp.asarray(validation.labels))
        self.batch = min(config.batch_size, len(self.labels))
        self.steps = len(self.labels) // self.batch  # an epoch
        self._test: tuple[jax.Array, jax.Array] | None = None
        self._forward: dict[nn.Module, Any] = {}
        self._init: dict[nn.Module, Any] = {}

    def init(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Fresh variables."""
        run = self._init.setdefault(model, jax.jit(model.init))
        return dict(run(jax.random.key(seed), self.images[:1]))

    def logits(self, model: nn.Module, variables: Variables, images: jax.Array | None = None) -> jax.Array:
        """Logits `[examples, classes]` in evaluation mode, of the training images if no others are given."""
        images = self.images if images is None else images
        run = self._forward.setdefault(model, jax.jit(lambda v, x: model.apply(v, x)))
        return jnp.concatenate([run(variables, images[i : i + 1000]) for i in range(0, len(images), 1000)])

    def test_images(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Images and labels of the test split, which is read once for each final model."""
        split = self.dataset.test.read(for_model=name)
        if self._test is None:
            self._test = jnp.asarray(split.inputs()), jnp.asarray(split.labels)
        return self._test

    def test(self, name: str, model: nn.Module, variables: Variables) -> float:
        """Per cent of the test split that a final model gets right."""
        images, labels = self.test_images(name)
        return accuracy(self.logits(model, variables, images), labels)

    def learner(self, model: nn.Module, loss: Loss, **options: Any) -> "Learner":
        """A training of fresh copies of a model."""
        return Learner(self, lambda seed: self.init(model, seed), loss, **options)

    def metrics(self, name: str) -> train.JsonLines:
        """The file of a training's metrics, a line an epoch."""
        config = self.config
        folder = config.log or config.out / Path(inspect.getfile(type(config))).stem
        return train.JsonLines(folder / config.data / f"{plain(name)}.jsonl")

    def setting(self) -> str:
        """What a table should say of the training."""
        c = self.config
        return (
            f"{len(self.labels):,} training images, batches of {self.batch}, {c.epochs} epochs of {self.steps} steps,"
            f" Adam with a cosine from {c.rate:g} to zero; students see the images as they are."
        )

    def kept(self, what: str, measure: Callable[[], T]) -> T:
        """What `measure` returns (JSON types), or what it returned when this experiment was cut off.

        The test reads that it made are kept with it.

        Raises:
          ValueError: what is kept is of other settings.
        """
        return kept(self.config.resume, what, self._setting(), self.dataset.test, measure)

    def trained(self, what: str, model: nn.Module, learn: Callable[[], Variables]) -> Variables:
        """The variables that `learn` returns, or that it returned when this experiment was cut off."""
        if self.config.resume is None:
            return learn()
        mark = hashlib.sha256(self._setting().encode()).hexdigest()[:12]
        path = self.config.resume / f"{plain(what)}_{mark}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_plain(path.with_suffix(".tmp"), learn())
            path.with_suffix(".tmp").replace(path)
        return load_plain(path, self.init(model, 0))

    def _setting(self) -> str:
        elsewhere: dict[str, Any] = dict.fromkeys(ELSEWHERE & vars(self.config).keys())
        return repr(dataclasses.replace(self.config, **elsewhere))

    def result(self, **fields: Any) -> _results.Result:
        """`_results.result` of this data set."""
        return _results.result(self.dataset, **fields)


class Learner:
    """`learner(name, seed, rows=..., knobs=...)` trains; all calls share one compiled step.

    Args:
      room: the data.
      init: from a seed to fresh variables, `{"params": ..., **extras}`.
      loss: see `Loss`.
      epochs: how long; by default as configured.
      tx: another optimizer than Adam with a cosine from `Config.rate` to zero.
      times: how often each batch is given in turn, for networks that take turns.
    """

    def __init__(
        self,
        room: Room,
        init: Callable[[int], Variables],
        loss: Loss,
        *,
        epochs: int | None = None,
        tx: optax.GradientTransformation | None = None,
        times: int = 1,
    ) -> None:
        self.room, self.init, self.times = room, init, times
        self.steps = (epochs or room.config.epochs) * room.steps
        self.tx = tx or optax.adam(optax.cosine_decay_schedule(room.config.rate, self.steps))

        def loss_fn(params: Any, batch: Any, context: train.Context) -> Any:
            given, index = context.frozen, batch["index"]
            rows = jax.tree.map(lambda table: table[index], given["rows"])
            images, labels = given["images"][index], given["labels"][index]
            lesson = Lesson(images, labels, rows, given["knobs"], context.key, context.step, index)
            value, extras = loss(params, context.extras, lesson)
            return value, {}, extras

        self.step = train.make_step(loss_fn, self.tx)

    def __call__(
        self,
        name: str,
        seed: int,
        *,
        rows: Any = None,
        knobs: Any = None,
        subset: np.ndarray | None = None,
        start: Variables | None = None,
    ) -> dict[str, Any]:
        """Trained variables.

        Args:
          name: of the training, for its file of metrics.
          seed: of the initialisation, the order of the examples and dropout.
          rows: tables with a row for each training image; the loss gets the batch's.
          knobs: scalars and trees that the loss gets as they are.
          subset: the training images that may be shown; all by default. The number of steps stays.
          start: variables to begin with instead of fresh ones.
        """
        room, variables = self.room, self.init(seed) if start is None else start
        extras = {key: tree for key, tree in variables.items() if key != PARAMS}
        state = train.TrainState.create(variables[PARAMS], self.tx, key=jax.random.key(seed), extras=extras)
        frozen = {"images": room.images, "labels": room.labels, "rows": rows, "knobs": jax.tree.map(strong, knobs)}
        state = train.fit(
            self.step,
            state,
            self._batches(seed, subset),
            steps=self.steps * self.times,
            frozen=frozen,
            on_metrics=room.metrics(name),
            log_every=room.steps,
        )
        return {PARAMS: state.params, **state.extras}

    def _batches(self, seed: int, subset: np.ndarray | None) -> Iterator[dict[str, np.ndarray]]:
        """Indices, epoch after epoch in new orders; a last short batch is left out."""
        order, size = np.random.default_rng(seed), self.room.batch
        chosen = np.arange(len(self.room.labels)) if subset is None else np.asarray(subset)
        if len(chosen) < size:
            raise UsageError(f"{len(chosen)} training images do not fill a batch of {size}")
        while True:
            mixed = order.permutation(chosen).astype(np.int32)
            for begin in range(0, len(mixed) - size + 1, size):
                yield from itertools.repeat({"index": mixed[begin : begin + size]}, self.times)


def strong(x: Any) -> jax.Array:
    """An array with a dtype of its own, so that 4 and 4.0 share a compiled program."""
    return jnp.asarray(x, jnp.float32) if isinstance(x, int | float) else jnp.asarray(x)


def named(*parts: str) -> str:
    """A result's name, of the parts that are not empty."""
    return "_".join(part for part in parts if part)


def command(module: str, config: Config) -> str:
    """The command line that gives a result again."""
    return _pruning.command(module, dataclasses.replace(config, log=None, resume=None))


def accuracy(logits: jax.Array, labels: jax.Array) -> float:
    """Per cent of the rows whose largest logit is the label's."""
    return 100 * float(jnp.mean(jnp.argmax(logits, axis=-1) == labels))


def parameters(variables: Variables) -> int:
    """How many numbers are trained."""
    return sum(x.size for x in jax.tree.leaves(variables[PARAMS]))


def gathered(rows: Iterable[tuple[str, int, Mapping[str, float]]], paper: Mapping[str, Any] | None = None) -> list[Row]:
    """Rows from `(name, seed, figures)`, in the order in which names come first."""
    by_name: dict[str, dict[int, Mapping[str, float]]] = {}
    for name, seed, figures in rows:
        by_name.setdefault(name, {})[seed] = figures
    return [Row.measured(name, by_seed, (paper or {}).get(name)) for name, by_seed in by_name.items()]


def written(result: _results.Result, config: Config, draw: Callable[[Path], None]) -> _results.Result:
    """Writes `NAME.json` and its figure `NAME.png`, and says so."""
    return _results.written(result, config.out, draw)
