"""What the pruning experiments share: two small models, one jitted training step for all arms, rows and figures.

Masks, learning rate and length of a training are arguments of the step, so that one compiled program serves every
arm, sparsity and seed of an experiment. The loop is Python's: XLA's CPU convolutions are several times slower inside
a compiled loop.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _results
from experiments._command import UsageError
from experiments._selection import Choice, select
from experiments._splits import Split
from experiments.data import Dataset, load
from jaxcompress import prune
from jaxcompress.paths import named_leaves, with_leaves

T = TypeVar("T")
Params = Any
Loss = Callable[..., tuple[jax.Array, Any]]
"""`(params, extras, arguments, images, labels, key) -> (loss, extras)`; `extras` are batch statistics or nothing."""


class Lenet(nn.Module):
    """LeNet-300-100: two hidden layers of 300 and 100 units (LeCun et al. 1998)."""

    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`."""
        x = images.reshape(images.shape[0], -1)
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class Strided(nn.Module):
    """3x3 convolutions of stride 2, a hidden layer, and the classes.

    Attributes:
      widths: channels of the convolutions.
      hidden: units of the hidden layer.
      classes: outputs.
      normalise: batch normalisation behind each convolution.
    """

    widths: tuple[int, ...] = (8, 16)
    hidden: int = 32
    classes: int = 10
    normalise: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`."""
        x = images
        for width in self.widths:
            x = nn.Conv(width, (3, 3), strides=2, use_bias=not self.normalise)(x)
            if self.normalise:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


LAYERS = {"lenet": ("Dense_0", "Dense_1", "Dense_2"), "convnet": ("Conv_0", "Conv_1", "Dense_0", "Dense_1")}
"""The layers of each model in the order of the data."""


@dataclass(frozen=True)
class Config:
    """What every pruning experiment is told."""

    model: str = "lenet"
    """lenet (LeNet-300-100) or convnet (two strided convolutions, a hidden layer)."""
    data: str = "digits"
    """The data set: digits, or mnist (with --data-dir)."""
    data_dir: Path | None = None
    """Where the data set's files are."""
    out: Path = Path("runs")
    """Where the result file and the figure go; with experiments/results they take the place of the recorded ones."""
    seeds: int = 3
    examples: int = 10_000
    """At most so many training images: the first of the split, which is mixed."""
    batch_size: int = 100
    epochs: int = 8
    """Of each training from an initialisation."""


class Lab:
    """A model and its data on the device."""

    def __init__(self, config: Config, model: nn.Module | None = None, dataset: Dataset | None = None) -> None:
        self.config = config
        self.dataset = dataset or load(config.data, config.data_dir)
        if model is None:
            if config.model not in LAYERS:
                raise UsageError(f"no model {config.model!r}: there are {', '.join(LAYERS)}")
            classes = self.dataset.classes
            model = Lenet(classes) if config.model == "lenet" else Strided(classes=classes)
        self.model = model
        if config.seeds < 1 or config.epochs < 1:
            raise UsageError(f"want 1 seed and 1 epoch or more, got {config.seeds} and {config.epochs}")
        images, labels = self.arrays(self.dataset.train)
        self.images, self.labels = images[: config.examples], labels[: config.examples]
        self.validation = self.arrays(self.dataset.validation)
        self.glance = (self.validation[0][:1000], self.validation[1][:1000])  # for curves during training
        self._test: tuple[jax.Array, jax.Array] | None = None
        self.batch = min(config.batch_size, len(self.labels))
        self.steps = len(self.labels) // self.batch  # an epoch
        self._right = jax.jit(self._rightly)
        self.init = jax.jit(lambda key: self.model.init(key, self.images[:1])["params"])

    def arrays(self, split: Split) -> tuple[jax.Array, jax.Array]:
        """A split's examples as the model takes them, and their labels."""
        return jnp.asarray(split.inputs()), jnp.asarray(split.labels)

    def apply(self, params: Params, images: jax.Array) -> jax.Array:
        """Logits of a model without batch statistics."""
        logits: Any = self.model.apply({"params": params}, images)
        return logits

    def loss(self, params: Params, extras: Any, arguments: Any, images: jax.Array, labels: jax.Array, key: Any) -> Any:
        """Mean cross entropy, as a `Loss`."""
        losses = optax.softmax_cross_entropy_with_integer_labels(self.apply(params, images), labels)
        return jnp.mean(losses), extras

    def normalised_loss(
        self, params: Params, extras: Any, arguments: Any, images: jax.Array, labels: jax.Array, key: Any
    ) -> Any:
        """Mean cross entropy in training mode, as a `Loss` whose extras are the batch statistics."""
        logits, new = self.model.apply({"params": params, **extras}, images, train=True, mutable=["batch_stats"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), dict(new)

    def begin(self, seed: int) -> tuple[Params, Any]:
        """Initial parameters and batch statistics of a model that has these."""
        variables = self.model.init(jax.random.key(seed), self.images[:1])
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def accuracy(self, params: Params, on: tuple[jax.Array, jax.Array] | None = None, extras: Any = None) -> float:
        """Per cent classified rightly, of the validation split if nothing else is given."""
        images, labels = self.validation if on is None else on
        return 100 * float(self._right(params, extras or {}, images, labels))

    def _rightly(self, params: Params, extras: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = self.model.apply({"params": params, **extras}, images)
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    def test(self, name: str, params: Params, extras: Any = None) -> float:
        """Per cent of the test split, which is read once for each final model."""
        return self.accuracy(params, self.test_data(name), extras)

    def test_data(self, name: str) -> tuple[jax.Array, jax.Array]:
        """The test split, which is read once for each final model."""
        split = self.dataset.test.read(for_model=name)
        if self._test is None:
            self._test = self.arrays(split)
        return self._test

    def positions(self, layers: Sequence[str]) -> dict[str, int]:
        """At how many places the weights of each layer are used, for `tickets.multiply_adds`."""
        size, places = self.images.shape[1], {}
        for layer in layers:
            size = -(-size // 2)
            places[f"{layer}/kernel"] = size * size if layer.startswith("Conv") else 1
        return places

    def setting(self) -> str:
        """What a table should say of the training."""
        c = self.config
        return (
            f"{len(self.labels):,} training images, batches of {self.batch}, {c.epochs} epochs of {self.steps} steps,"
            f" SGD with momentum 0.9 and a cosine to zero, no augmentation."
        )

    def result(self, **fields: Any) -> _results.Result:
        """`_results.result` of this data set."""
        return _results.result(self.dataset, **fields)

    def chosen(self, what: str, scores: Mapping[T, float]) -> tuple[T, Choice]:
        """The candidate of the best accuracy on the validation split, and the record of the choice."""
        return select(what, scores, lambda candidate, _: scores[candidate], self.dataset.validation)

    def trainer(self, tx_for: Callable[[Any], optax.GradientTransformation], loss: Loss | None = None) -> "Trainer":
        """A training around an optimizer that is made of traced arguments (masks, rate, total steps)."""
        return Trainer(self, tx_for, loss or self.loss)


class Trainer:
    """`trainer(params, arguments, seed=..., epochs=...)` trains; all calls share one compiled step."""

    def __init__(self, lab: Lab, tx_for: Callable[[Any], optax.GradientTransformation], loss: Loss) -> None:
        self.lab = lab
        self._begin = jax.jit(lambda params, arguments: tx_for(arguments).init(params))

        def step(params: Params, extras: Any, state: Any, arguments: Any, images: Any, labels: Any, at: Any) -> Any:
            index, key = at
            gradients, extras = jax.grad(loss, has_aux=True)(
                params, extras, arguments, images[index], labels[index], key
            )
            updates, state = tx_for(arguments).update(gradients, state, params)
            return optax.apply_updates(params, updates), extras, state

        self._step = jax.jit(step, donate_argnums=(1, 2))

    def __call__(
        self,
        params: Params,
        arguments: Mapping[str, Any],
        *,
        seed: int,
        epochs: int,
        extras: Any = None,
        curve: list[float] | None = None,
    ) -> Any:
        """Trained parameters, or `(parameters, extras)` if extras are given; the optimizer's state in `self.state`.

        Args:
          params: to begin with.
          arguments: what `tx_for` and the loss take; the step adds `total`, the steps of this training.
          seed: of the order of the examples.
          epochs: how long.
          extras: batch statistics.
          curve: takes the accuracy on 1,000 validation images after each epoch.
        """
        lab, order, key = self.lab, np.random.default_rng(seed), jax.random.key(seed)
        arguments = {**arguments, "total": jnp.float32(epochs * lab.steps)}
        state, own = self._begin(params, arguments), extras or {}
        count = itertools.count()
        for _ in range(epochs):
            for index in order.permutation(len(lab.labels))[: lab.steps * lab.batch].reshape(lab.steps, lab.batch):
                at = (index, jax.random.fold_in(key, next(count)))
                params, own, state = self._step(params, own, state, arguments, lab.images, lab.labels, at)
            if curve is not None:
                curve.append(lab.accuracy(params, lab.glance, own))
        self.state = state
        return params if extras is None else (params, own)


def sgd(arguments: Mapping[str, Any]) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and a cosine from `rate` to zero over `total` steps."""
    rate, total = arguments["rate"], arguments["total"]
    return optax.sgd(lambda step: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1))) / 2, momentum=0.9)


def held(arguments: Mapping[str, Any]) -> optax.GradientTransformation:
    """`sgd` under the masks in the arguments."""
    return optax.chain(sgd(arguments), prune.fixed(arguments["masks"], packed=False))


def all_kept(params: Params) -> Any:
    """Masks that prune nothing, of every parameter."""
    return jax.tree.map(lambda x: jnp.ones(jnp.shape(x), bool), params)


def completed(masks: Any, params: Params) -> Any:
    """Masks of every parameter: True where none was chosen, so that all arms have one structure."""
    given = dict(named_leaves(masks))
    leaves = [given.get(name, jnp.ones(x.shape, bool)) for name, x in named_leaves(params)]
    return with_leaves(params, leaves)


def coupled(masks: Any, layers: Sequence[str]) -> Any:
    """Masks of whole units, with the units' biases and the next layer's inputs from them."""
    own = {layer: dict(masks[layer]) for layer in layers}
    for layer, following in itertools.pairwise(layers):
        kernel = own[layer]["kernel"]
        if kernel is None:
            continue
        alive = jnp.any(kernel, axis=tuple(range(kernel.ndim - 1)))
        if "bias" in own[layer]:
            own[layer]["bias"] = alive
        rows = own[following]["kernel"]
        inputs = jnp.tile(alive, rows.shape[-2] // alive.size)  # a flattened image has its channels last
        own[following]["kernel"] = rows & inputs[:, None]
    return own


def command(module: str, config: Any) -> str:
    """The command line that gives this result again: what differs from the defaults, but for folders."""
    changed = [
        argument
        for field in dataclasses.fields(config)
        if field.name not in ("data_dir", "out", "floats", "resume")
        for argument in _arguments(field.name.replace("_", "-"), getattr(config, field.name), field.default)
    ]
    data = [] if config.data in ("digits", "pydoc") else ["--data-dir DIR"]
    return " ".join([f"python -m experiments.{module}", *changed, *data])


def _arguments(name: str, value: Any, default: Any) -> list[str]:
    """How an option is given that is not as by default; one with named parts part by part."""
    if value == default:
        return []
    if hasattr(value, "_fields"):
        parts = zip(value._fields, value, default, strict=True)
        return [argument for part, own, usual in parts for argument in _arguments(f"{name}.{part}", own, usual)]
    if value is True:
        return [f"--{name}"]  # a flag: the option's name says it
    return [f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"]


Lines = Mapping[str, Sequence[tuple[float, Sequence[float]]]]


def write(
    result: _results.Result, config: Config, lines: Lines, y_title: str, *, x_title: str, log: bool = True
) -> None:
    """Writes `NAME.json` and its figure `NAME.png`, and says so."""
    draw = partial(curves, lines=lines, x_title=x_title, y_title=y_title, title=result.title, log=log)
    _results.written(result, config.out, draw)


def curves(
    path: Path,
    lines: Lines,
    *,
    x_title: str,
    y_title: str,
    title: str = "",
    log: bool = True,
) -> None:
    """Draws a line for each name: points of an x and the values of all seeds, with their spread as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no plotting on import, and no global state
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(8, 5), layout="constrained"))
    axes = canvas.figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):
        xs, means = [x for x, _ in points], [float(np.mean(values)) for _, values in points]
        spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for _, values in points]
        style = ("-", "--", ":", "-.")[i // 10 % 4]
        axes.errorbar(xs, means, spreads, label=name, marker="o", markersize=3, capsize=2, linestyle=style)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=120)
