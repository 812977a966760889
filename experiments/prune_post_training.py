"""One-shot pruning without training: `python -m experiments.prune_post_training`.

A trained network is pruned once, to the same sparsity in every layer, by magnitude, Wanda and SparseGPT, and evaluated
as it then is. The calibration data are training images; nothing is chosen on any other data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _pruning, _results
from experiments._command import UsageError, run_main
from experiments._pruning import LAYERS, Lab, command, sgd, write
from experiments._results import Column, Row
from jaxcompress import prune
from jaxcompress.calibrate import InputObserver


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Magnitude, Wanda and SparseGPT, without training."""

    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    """The parts of each layer's weights that are pruned; 2:4 comes besides."""
    calibration: int = 512
    """How many training images the inputs are measured on."""
    rate: float = 0.1


SHORT = Config(seeds=2, epochs=3, sparsities=(0.5, 0.8), calibration=128, batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""

Method = Callable[[InputObserver, Any, list[jax.Array], Any], Any]


def by_magnitude(observer: InputObserver, params: Any, batches: list[jax.Array], rules: Any) -> Any:
    """The smallest weights of each layer, whatever they meet."""
    return prune.apply_masks(params, prune.choose(jax.tree.map(prune.magnitude, params), rules))


METHODS: dict[str, Method] = {
    "magnitude": by_magnitude,
    "Wanda": lambda *arguments: prune.wanda_one_shot(*arguments).params,
    "Wanda, one ranking a layer": lambda *arguments: prune.wanda_one_shot(*arguments, per_output=False).params,
    "SparseGPT": lambda *arguments: prune.sparsegpt(*arguments).params,
    "SparseGPT, layer by layer": lambda *arguments: prune.sparsegpt(*arguments, sequential=True).params,
}
"""Of what measures a network's inputs, the network, calibration batches and rules: the pruned network."""


def settings(config: Config) -> dict[str, dict[str, Any]]:
    """Rules by column. A convolution of the image itself has one input channel: 2:4 leaves it dense."""
    rules: dict[str, dict[str, Any]] = {f"{100 * s:g}": {"kernel$": s} for s in config.sparsities}
    first = {"Conv_0/kernel$": None} if "Conv_0" in LAYERS[config.model] else {}
    return rules | {"2:4": {**first, "kernel$": prune.NM(2, 4)}}


def main(config: Config) -> _results.Result:
    """Trains, prunes by each method to each sparsity, and writes the result and the figure."""
    lab = Lab(config)
    if not 1 <= config.calibration <= len(lab.labels):
        raise UsageError(f"want 1 to {len(lab.labels)} calibration images, got {config.calibration}")
    trainer, columns = lab.trainer(sgd), settings(config)
    batches = [lab.images[: config.calibration]]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ("dense", *METHODS)}
    observer = None
    for seed in range(config.seeds):
        start = lab.init(jax.random.key(seed))
        trained = trainer(start, {"rate": jnp.float32(config.rate)}, seed=seed, epochs=config.epochs)
        observer = observer or InputObserver(lab.apply, trained, batches[0], {"kernel$": True})
        dense = lab.test(f"dense, seed {seed}", trained)
        found["dense"][seed] = dict.fromkeys(columns, dense)
        for name, method in METHODS.items():
            found[name][seed] = {
                key: lab.test(f"{name}, {key}, seed {seed}", method(observer, trained, batches, rules))
                for key, rules in columns.items()
            }
        print(f"seed {seed}: done", flush=True)
    rows = [Row.measured(name, by_seed) for name, by_seed in found.items()]
    titles = {key: "2:4" if key == "2:4" else f"{key}% of weights pruned" for key in columns}
    result = lab.result(
        name=f"prune_post_training_{config.model}_{config.data}",
        title=f"One-shot pruning without training: {config.model} on {config.data}",
        source="Test accuracy in %. The papers of Wanda and SparseGPT have language models only.",
        command=command("prune_post_training", config),
        selection="nothing was chosen: rate, lengths, sparsities and damping were fixed beforehand",
        columns=[Column(key, title) for key, title in titles.items()],
        rows=rows,
        notes=[
            lab.setting(),
            f"Inputs are measured on the first {config.calibration} training images; nothing is trained after pruning.",
        ],
    )
    lines = {row.name: [(100 - 100 * s, row.ours[f"{100 * s:g}"].values) for s in config.sparsities] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title="weights left in each layer (%)")
    return result


if __name__ == "__main__":
    run_main(main, Config)
