"""Quantization without training: `python -m experiments.quantize_post_training`.

A trained network is quantized to 8, 4, 3 and 2 bits, weights alone and with 8-bit inputs on calibrated ranges, by ways
that round to nearest and ways that round better. The calibration data are training images; nothing is chosen on others.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments import _pruning, _results
from experiments._pruning import LAYERS, Lab, command, sgd, write
from experiments._results import Column, Row
from jaxcompress import compressed, quantize
from jaxcompress.calibrate import InputObserver
from jaxcompress.quantize import Affine


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Rounding to nearest, GPTQ, AdaRound, bias correction and static ranges, without training."""

    bits: tuple[int, ...] = (8, 4, 3, 2)
    """Of the weights, symmetric, a scale an output channel."""
    calibration: int = 512
    """How many training images the inputs are measured on."""
    steps: int = 1000
    """Of AdaRound."""
    rate: float = 0.1


SHORT = Config(seeds=2, epochs=3, bits=(8, 3), calibration=128, batch_size=64, steps=200)
"""A run of seconds, for tests; its accuracies mean little."""

Method = Callable[["Calibrated", Any, int], Any]


@dataclass(frozen=True)
class Calibrated:
    """What a method needs besides the network: the model, calibration images and what measures inputs."""

    lab: Lab
    observer: InputObserver
    batches: list[jax.Array]
    steps: int


def _static(how: quantize.MinMax | quantize.Percentile | quantize.LeastSquares | quantize.Entropy) -> Method:
    def method(on: Calibrated, params: Any, bits: int) -> Any:
        rules = {"kernel$": Affine(bits, activation_bits=8)}
        ranges = quantize.input_ranges(on.lab.apply, params, on.batches, rules, how, symmetric=False)
        return quantize.static(quantize.convert(params, rules), ranges)

    return method


def _rules(bits: int) -> dict[str, Affine | None]:
    return {"kernel$": Affine(bits)}


METHODS: dict[str, Method] = {
    "to nearest": lambda on, params, bits: quantize.convert(params, _rules(bits)),
    "to nearest, biases corrected": lambda on, params, bits: quantize.correct_biases(
        on.lab.apply, params, quantize.convert(params, _rules(bits)), on.batches
    ),
    "GPTQ": lambda on, params, bits: quantize.gptq(on.observer, params, on.batches, _rules(bits)),
    "AdaRound": lambda on, params, bits: quantize.adaround(
        on.observer, params, on.batches, _rules(bits), steps=on.steps
    ),
    "8-bit inputs, dynamic": lambda on, params, bits: quantize.convert(
        params, {"kernel$": Affine(bits, activation_bits=8)}
    ),
    "8-bit inputs, static, whole range": _static(quantize.MinMax()),
    "8-bit inputs, static, least squares": _static(quantize.LeastSquares()),
    "8-bit inputs, static, entropy": _static(quantize.Entropy()),
}
"""Of what measures a network's inputs, the network and the bits: the quantized network."""


def main(config: Config) -> _results.Result:
    """Trains, quantizes by each method to each number of bits, and writes the result and the figure."""
    lab = Lab(config)
    if not 1 <= config.calibration <= len(lab.labels):
        raise ValueError(f"want 1 to {len(lab.labels)} calibration images, got {config.calibration}")
    trainer = lab.trainer(sgd)
    batches = [lab.images[: config.calibration]]
    columns = [str(bits) for bits in config.bits]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ("float", *METHODS)}
    on: Calibrated | None = None
    for seed in range(config.seeds):
        start = lab.init(jax.random.key(seed))
        trained = trainer(start, {"rate": jnp.float32(config.rate)}, seed=seed, epochs=config.epochs)
        if on is None:
            on = Calibrated(
                lab, InputObserver(lab.apply, trained, batches[0], {"kernel$": True}), batches, config.steps
            )
        found["float"][seed] = dict.fromkeys(columns, lab.test(f"float, seed {seed}", trained))
        for name, method in METHODS.items():
            found[name][seed] = {
                str(bits): tested(lab, f"{name}, {bits} bits, seed {seed}", method(on, trained, bits))
                for bits in config.bits
            }
        print(f"seed {seed}: done", flush=True)
    rows = [Row.measured(name, by_seed) for name, by_seed in found.items()]
    result = lab.result(
        name=f"quantize_post_training_{config.model}_{config.data}",
        title=f"Quantization without training: {config.model} on {config.data}",
        source="Test accuracy in %. The papers of GPTQ and AdaRound have larger models only.",
        command=command("quantize_post_training", config),
        selection="nothing was chosen: rate, lengths, bits and damping were fixed beforehand",
        columns=[Column(key, f"{key} bits") for key in columns],
        rows=rows,
        notes=[
            lab.setting(),
            f"All {len(LAYERS[config.model])} layers, the first and the last too. Inputs are measured on the first "
            f"{config.calibration} training images; nothing is trained after quantization.",
        ],
    )
    lines = {row.name: [(bits, row.ours[str(bits)].values) for bits in config.bits] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title="bits a weight", log=False)
    return result


def tested(lab: Lab, name: str, params: Any) -> float:
    """`lab.test` of a network with compressed leaves, which runs on them as they are."""
    split = lab.dataset.test.read(for_model=name)
    logits = _compiled(lab)(params, jnp.asarray(split.inputs()))
    return 100 * float(jnp.mean(jnp.argmax(logits, axis=-1) == jnp.asarray(split.labels)))


@functools.cache
def _compiled(lab: Lab) -> Callable[[Any, jax.Array], jax.Array]:
    return jax.jit(compressed(lab.apply))


if __name__ == "__main__":
    main(tyro.cli(Config))
