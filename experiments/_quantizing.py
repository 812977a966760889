"""What the quantization experiments share: four models, how each is trained in float, and what is measured of it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pruning
from experiments._artefacts import load_plain, save_plain
from experiments._command import UsageError
from experiments._pruning import LAYERS, Lab, Loss, Strided, Trainer, sgd
from experiments._results import Column
from experiments._shakespeare import CONTEXT, TEXTS, Decoder, load_text, next_characters
from experiments._splits import Split
from experiments.data import load
from jaxcompress import compressed, distill, quantize

MODELS = (*LAYERS, "folded", "decoder")


@dataclass(frozen=True)
class Config(_pruning.Config):
    """What every quantization experiment is told.

    `model` may also be "folded" (three strided convolutions with batch normalisation, folded into them after the float
    training) or "decoder" (a transformer of four layers on characters, with --data shakespeare or pydoc).
    """

    rate: float | None = None
    """Of the float training; by default the model's."""
    tuning_rate: float | None = None
    """Of the training after it; by default the model's."""
    floats: Path | None = None
    """Where the trained float networks are kept, and found again by the other experiments."""


def adam(arguments: Mapping[str, Any]) -> optax.GradientTransformation:
    """Adam, with a cosine from `rate` to zero over `total` steps."""
    rate, total = arguments["rate"], arguments["total"]
    return optax.adam(lambda step: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1))) / 2)


def guarded(arguments: Mapping[str, Any]) -> optax.GradientTransformation:
    """`sgd` that leaves out steps whose gradient is not finite.

    At two bits for weights and inputs a network without norms may diverge until its products overflow; what is left of
    it is measured as it is.
    """
    return optax.apply_if_finite(sgd(arguments), max_consecutive_errors=2**30)


def keyed(key: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Figures of a scheme by the keys of their columns, as `Images.columns` names them."""
    return {f"{key}{suffix}": value for suffix, value in figures.items()}


class Images(Lab):
    """LeNet-300-100 or the small convnet, without batch statistics."""

    config: Config
    optimizer: Callable[[Any], optax.GradientTransformation] = staticmethod(sgd)
    algorithm = "SGD with momentum 0.9"
    rates = (0.1, 0.02)
    """Of the float training and of the training after it."""
    figures: ClassVar[Mapping[str, str]] = {"": "{}"}
    """The figures of a network: the suffix of their columns' keys, and the columns' titles."""
    measured = "Test accuracy in %."

    @functools.cached_property
    def rate(self) -> float:
        """Of the float training."""
        return self.rates[0] if self.config.rate is None else self.config.rate

    @functools.cached_property
    def tuning_rate(self) -> float:
        """Of the training after it."""
        return self.rates[1] if self.config.tuning_rate is None else self.config.tuning_rate

    @functools.cached_property
    def drawn_layer(self) -> str:
        """The weights whose centroids a figure shows."""
        return f"{LAYERS[self.config.model][-2]}/kernel"

    def train(self, seed: int) -> Any:
        """Float parameters, trained."""
        trainer: Trainer = self._plain
        return trainer(
            self.init(jax.random.key(seed)), {"rate": jnp.float32(self.rate)}, seed=seed, epochs=self.config.epochs
        )

    @functools.cached_property
    def _plain(self) -> Trainer:
        return self.trainer(self.optimizer)

    def trained(self, seed: int) -> Any:
        """`train`, or what it gave before under the same settings, where that is kept."""
        c = self.config
        if c.floats is None:
            return self.train(seed)
        name = f"{c.model}_{c.data}_{len(self.labels)}_{self.batch}_{c.epochs}_{self.rate:g}_{seed}.safetensors"
        path = c.floats / name
        if path.is_file():
            return load_plain(path, self.init(jax.random.key(seed)))
        params = self.train(seed)
        c.floats.mkdir(parents=True, exist_ok=True)
        save_plain(path, params)
        return params

    def tested(
        self, name: str, params: Any, apply: Callable[[Any, jax.Array], jax.Array] | None = None
    ) -> dict[str, float]:
        """The figures, by suffix, of a network with compressed leaves, which runs on them as they are.

        `apply` is what runs it, where that is another function.
        """
        run = self._measure if apply is None else self._measuring(apply)
        right, bits = (float(x) for x in run(params, *self.test_data(name)))
        return {suffix: value for suffix, value in (("", 100 * right), (" bpc", bits)) if suffix in self.figures}

    @functools.cached_property
    def _measure(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        return self._measuring(compressed(self.apply))

    def _measuring(self, apply: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        def run(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = apply(params, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(jnp.argmax(logits, axis=-1) == labels), jnp.mean(losses) / jnp.log(2.0)

        return jax.jit(run)

    def columns(self, titles: Mapping[str, str]) -> list[Column]:
        """Those of a table whose figures are measured under several schemes, by key."""
        return [
            Column(f"{key}{suffix}", form.format(title), 3 if suffix else 2)
            for suffix, form in self.figures.items()
            for key, title in titles.items()
        ]

    def setting(self) -> str:
        """What a table should say of the float training."""
        return (
            f"{len(self.labels):,} training images, batches of {self.batch}, {self.config.epochs} epochs of "
            f"{self.steps} steps, {self.algorithm} and a cosine from {self.rate:g} to zero, no augmentation."
        )


class Folded(Images):
    """Convolutions trained with batch normalisation; what is quantized has it folded into kernels and biases."""

    optimizer = staticmethod(guarded)
    rates = (0.1, 0.01)
    widths = (16, 32, 64)
    hidden = 64

    def __init__(self, config: Config) -> None:
        dataset = load(config.data, config.data_dir)
        super().__init__(config, Strided(self.widths, self.hidden, dataset.classes), dataset)
        self.normalised = Lab(config, Strided(self.widths, self.hidden, dataset.classes, normalise=True), dataset)
        self._normalised = self.normalised.trainer(sgd, self.normalised.normalised_loss)

    @functools.cached_property
    def drawn_layer(self) -> str:
        """The hidden layer."""
        return "Dense_0/kernel"

    def train(self, seed: int) -> Any:
        """Trained with batch statistics; then each norm's scale goes into its kernel, and its shift becomes a bias."""
        params, extras = self.normalised.begin(seed)
        arguments = {"rate": jnp.float32(self.rate)}
        params, extras = self._normalised(params, arguments, seed=seed, epochs=self.config.epochs, extras=extras)

        def run(variables: Any, images: jax.Array) -> jax.Array:
            logits: Any = self.normalised.model.apply(variables, images)
            return logits

        variables = quantize.fold(run, {"params": params, **extras}, self.images[:100])
        plain = {name: dict(layer) for name, layer in variables["params"].items() if not name.startswith("BatchNorm")}
        for i in range(len(self.widths)):
            norm, seen = variables["params"][f"BatchNorm_{i}"], variables["batch_stats"][f"BatchNorm_{i}"]
            plain[f"Conv_{i}"]["bias"] = norm["bias"] - seen["mean"] * norm["scale"] / jnp.sqrt(seen["var"] + 1e-5)
        return plain

    def setting(self) -> str:
        """What a table should say of the float training."""
        return f"{super().setting()} Batch normalisation is folded into the convolutions before anything is quantized."


class Characters(Images):
    """The decoder: accuracy of the next character, and bits a character."""

    optimizer = staticmethod(adam)
    algorithm = "Adam"
    rates = (3e-3, 5e-4)
    figures: ClassVar[Mapping[str, str]] = {"": "{}, accuracy (%)", " bpc": "{}, bits a character"}
    measured = "Accuracy of the next character in %, and the cross entropy in bits a character, on test text."

    def __init__(self, config: Config) -> None:
        dataset = load_text(config.data, config.data_dir)
        super().__init__(config, Decoder(dataset.classes), dataset)

    @functools.cached_property
    def drawn_layer(self) -> str:
        """The third hidden layer."""
        return "Block_2/up/kernel"

    def arrays(self, split: Split) -> tuple[jax.Array, jax.Array]:
        """Characters and what comes after each, `[windows, context]`."""
        codes = split.images.astype(np.int32)
        return jnp.asarray(codes), jnp.asarray(next_characters(codes, split.labels))

    def setting(self) -> str:
        """What a table should say of the float training."""
        return super().setting().replace("training images", f"training windows of {CONTEXT} characters")


def lab_for(config: Config) -> Images:
    """The model and its data.

    Raises:
      ValueError: no such model, or a model of characters on images or the other way round.
    """
    if config.model not in MODELS:
        raise UsageError(f"no model {config.model!r}: there are {', '.join(MODELS)}")
    if (config.model == "decoder") != (config.data in TEXTS):
        raise UsageError(f"the decoder goes with {' and '.join(TEXTS)} only, got {config.model} on {config.data}")
    if config.model == "decoder":
        return Characters(config)
    return Folded(config) if config.model == "folded" else Images(config)


def taught(lab: Images, temperature: float, apply: Callable[[Any, jax.Array], jax.Array]) -> Loss:
    """The loss of `apply`, from labels or from the float network: `arguments["share"]` is 0 or 1 (or between).

    The float network is `arguments["teacher"]`, and its soft targets are of the given temperature.
    """

    def loss(params: Any, extras: Any, arguments: Any, images: jax.Array, labels: jax.Array, key: Any) -> Any:
        logits, teacher = apply(params, images), lab.apply(arguments["teacher"], images)
        total = distill.distillation_loss(logits, teacher, labels, temperature=temperature, alpha=arguments["share"])
        return jnp.mean(total), extras

    return loss
