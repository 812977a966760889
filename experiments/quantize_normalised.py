"""Two and three values a weight beside the papers: `python -m experiments.quantize_normalised`.

The papers of ternary and binary weights leave batch normalisation in and train for long. Here convolutions with batch
normalisation are trained in float, then once more as long under fake quantization, from the labels, or half from their
float selves; the statistics of the norms are those of the rounded network. `quantize_training` has a short training of
a network whose norms were folded away.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _pruning, _results
from experiments._command import run_main
from experiments._kept import kept
from experiments._pruning import Lab, Strided, command, sgd, write
from experiments._results import Column, Row
from experiments.data import load
from experiments.quantize_training import OWN
from jaxcompress import compressed, distill, quantize
from jaxcompress.quantize import Affine


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Batch normalisation stays, and the second training is as long as the first."""

    model: str = "normalised"
    """Three strided convolutions with batch normalisation, a hidden layer, and the classes: no other."""
    examples: int = 45_000
    epochs: int = 12
    """Of each of the two trainings."""
    rate: float = 0.05
    """Of both."""
    widths: tuple[int, ...] = (32, 64, 128)
    hidden: int = 128
    temperature: float = 2.0
    """Of the distillation, half of whose loss is from the labels."""
    resume: Path | None = None
    """A folder that keeps what was measured, so that a command that was cut off goes on there."""


SHORT = Config(seeds=2, epochs=3, widths=(16, 32), hidden=32, batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""

SCHEMES: dict[str, Any] = {
    "2 bits": Affine(2),
    "ternary": quantize.Ternary(axes=(-1,)),
    "ternary, own values": OWN,
    "binary": quantize.Binary(),
}
"""Of all kernels, the first and the last too."""

PAPERS = (
    "The papers have larger models, more passes and crops: on CIFAR-10 ternary weights lose 0.3 points and binary ones "
    "2.7 (Li et al. 2016, table 2); ternary ones with two learned values gain up to 0.4 (Zhu et al. 2017)."
)

Run = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
"""Of parameters, batch statistics and images, in training: the logits and the new statistics."""


def mirrored(images: jax.Array, key: jax.Array) -> jax.Array:
    """Half of the images, left and right exchanged."""
    turned = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(turned, images[:, :, ::-1], images)


class Normalised(Lab):
    """The network, its two trainings, and what tests it."""

    config: Config

    def __init__(self, config: Config) -> None:
        dataset = load(config.data, config.data_dir)
        super().__init__(config, Strided(config.widths, config.hidden, dataset.classes, normalise=True), dataset)
        self.tested = jax.jit(self._tested)

    def run(self, params: Any, extras: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        """A `Run`."""
        logits, new = self.model.apply({"params": params, **extras}, images, train=True, mutable=["batch_stats"])
        return logits, dict(new)

    def evaluate(self, params: Any, extras: Any, images: jax.Array) -> jax.Array:
        """Logits by the running statistics."""
        logits: Any = self.model.apply({"params": params, **extras}, images)
        return logits

    def _tested(self, params: Any, extras: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = compressed(self.evaluate)(params, extras, images)
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    def training(self, run: Run, *, taught: bool = False) -> Callable[..., tuple[Any, Any]]:
        """`train(params, extras, seed, teacher)`: from the labels, or half from a teacher's logits."""

        def loss(params: Any, extras: Any, arguments: Any, images: jax.Array, labels: jax.Array, key: Any) -> Any:
            images = mirrored(images, key)
            logits, new = run(params, extras, images)
            teacher = jnp.zeros_like(logits)
            if taught:
                theirs, seen = arguments["teacher"]
                teacher = self.evaluate(theirs, seen, images)
            losses = distill.distillation_loss(
                logits, teacher, labels, temperature=self.config.temperature, alpha=taught / 2
            )
            return jnp.mean(losses), new

        trainer = self.trainer(sgd, loss)

        def train(params: Any, extras: Any, seed: int, teacher: Any = None) -> tuple[Any, Any]:
            arguments = {"rate": jnp.float32(self.config.rate), "teacher": teacher if taught else None}
            own = jax.tree.map(jnp.copy, extras)  # the step reuses the memory of those it is given
            trained, seen = trainer(params, arguments, seed=seed, epochs=self.config.epochs, extras=own)
            return trained, seen

        return train


Way = Callable[[Any, Any, int], tuple[Any, Any]]
"""Of the float network's parameters and statistics and a seed: the quantized network's."""


def ways(lab: Normalised, scheme: Any) -> dict[str, Way]:
    """The table's rows for one scheme."""
    rules = {"kernel$": scheme}

    def rounded(params: Any, extras: Any, seed: int) -> tuple[Any, Any]:
        small = quantize.settle(quantize.learn(params, rules)) if scheme == OWN else quantize.convert(params, rules)
        return small, extras

    def tuned(taught: bool) -> Way:
        run = compressed(lab.run) if scheme == OWN else quantize.fake(lab.run, rules)
        train = lab.training(run, taught=taught)

        def way(params: Any, extras: Any, seed: int) -> tuple[Any, Any]:
            begun = quantize.learn(params, rules) if scheme == OWN else params
            trained, seen = train(begun, extras, 100 + seed, (params, extras))
            return quantize.settle(trained) if scheme == OWN else quantize.convert(trained, rules), seen

        return way

    return {"rounded": rounded, "trained": tuned(False), "distilled": tuned(True)}


def main(config: Config) -> _results.Result:
    """Trains, trains on under each scheme, and writes the result and its figure."""
    lab = Normalised(config)
    in_float = lab.training(lab.run)
    chosen = {key: ways(lab, scheme) for key, scheme in SCHEMES.items()}
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ROWS}
    setting = repr({name: value for name, value in vars(config).items() if name in OF_A_FIGURE})

    def measured(what: str, make: Callable[[], Any]) -> float:
        def measure() -> float:
            return float(lab.tested(*make(), *lab.test_data(what)))

        figure = kept(config.resume, what, setting, lab.dataset.test, measure)
        print(f"{what}: {figure:.2f}", flush=True)
        return figure

    for seed in range(config.seeds):
        params, extras = in_float(*lab.begin(seed), seed)
        again = partial(in_float, params, extras, 100 + seed)
        for name, make in (("float", partial(tuple, (params, extras))), (ON, again)):
            figure = measured(f"{name}, seed {seed}", make)
            found[name][seed] = dict.fromkeys(SCHEMES, figure)
        for key, by_name in chosen.items():
            for name, way in by_name.items():
                figure = measured(f"{name}, {key}, seed {seed}", partial(way, params, extras, seed))
                found[name].setdefault(seed, {})[key] = figure
    return _result(lab, found)


ON = "float, trained on"
ROWS = ("float", ON, "rounded", "trained", "distilled")
OF_A_FIGURE = ("data", "examples", "batch_size", "epochs", "rate", "widths", "hidden", "temperature")
"""The settings that change what is measured."""


def _result(lab: Normalised, found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> _results.Result:
    config = lab.config
    rows = [Row.measured(name, by_seed) for name, by_seed in found.items()]
    better = [(key, name, ON) for key in SCHEMES for name in ("trained", "distilled")] if config.seeds > 1 else []
    result = lab.result(
        name=f"quantize_normalised_{config.data}",
        title=f"Few values a weight, with the norms left in: {config.data}",
        source=f"Test accuracy in %. {PAPERS}",
        command=command("quantize_normalised", config),
        selection="by trials of seed 0 on validation images: the rate (0.1 and 0.05, binary weights), the length (12 "
        "and 20 epochs), temperature and share of the distillation (4 with and without labels, 2 with them, two bits), "
        "after a first run at a temperature of 4 without labels, which a test figure of 17% at two bits had stopped",
        columns=[Column(key, key) for key in SCHEMES],
        rows=rows,
        pairs=better,
        notes=[
            f"{len(lab.labels):,} training images, mirrored at random, batches of {lab.batch}, twice {config.epochs} "
            f"epochs of {lab.steps} steps, each SGD with momentum 0.9 and a cosine from {config.rate:g} to zero. "
            f"Convolutions of {config.widths} channels and a hidden layer of {config.hidden}.",
            "All kernels are quantized, the first and the last too; norms and biases stay in float32. Distilled: half "
            f"of the loss is from the float network, at temperature {config.temperature:g}.",
        ],
    )
    lines = {row.name: [(i, row.ours[key].values) for i, key in enumerate(SCHEMES)] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title=", ".join(SCHEMES), log=False)
    return result


if __name__ == "__main__":
    run_main(main, Config)
