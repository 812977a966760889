"""Quantization without training: `python -m experiments.quantize_post_training`.

A trained network is quantized to 8, 4, 3 and 2 bits, weights alone and with 8-bit inputs on calibrated ranges, by ways
that round to nearest and ways that round better; and to the formats of hardware and papers. The calibration data are
training examples; nothing is chosen on others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from experiments import _quantizing, _results
from experiments._command import UsageError, run_main
from experiments._pruning import command, write
from experiments._quantizing import Images, keyed, lab_for
from experiments._results import Column, Row
from jaxcompress import nbytes, quantize
from jaxcompress.calibrate import InputObserver
from jaxcompress.quantize import MX, NF4, Affine, Floats


@dataclass(frozen=True)
class Config(_quantizing.Config):
    """Rounding to nearest, GPTQ, AWQ, AdaRound, bias correction and static ranges, without training; and formats."""

    bits: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)
    """Of the weights, symmetric, a scale an output channel."""
    calibration: int = 512
    """How many training examples the inputs are measured on."""
    steps: int = 1000
    """Of AdaRound."""


SHORT = Config(seeds=2, epochs=3, bits=(8, 3), calibration=128, batch_size=64, steps=200)
"""A run of seconds, for tests; its accuracies mean little."""

Method = Callable[["Calibrated", Any, int], Any]


@dataclass(frozen=True)
class Calibrated:
    """What a method needs besides the network: the model, examples to calibrate on, and what measures inputs."""

    lab: Images
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


def _scaled(on: Calibrated, params: Any, bits: int) -> Any:
    """By AWQ, with the pairs that the trace shows."""
    pairs = quantize.pairs(on.lab.apply, params, on.batches[0][:8])
    return quantize.awq(on.lab.apply, params, on.batches, _rules(bits), pairs)


METHODS: dict[str, Method] = {
    "to nearest": lambda on, params, bits: quantize.convert(params, _rules(bits)),
    "to nearest, biases corrected": lambda on, params, bits: quantize.correct_biases(
        on.lab.apply, params, quantize.convert(params, _rules(bits)), on.batches
    ),
    "AWQ": lambda on, params, bits: quantize.convert(_scaled(on, params, bits), _rules(bits)),
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

FORMATS: dict[str, Any] = {
    "bfloat16": Floats("bfloat16"),
    "fp8 e4m3": Floats("float8_e4m3fn"),
    "fp8 e5m2": Floats("float8_e5m2"),
    "mx, 8-bit integers": MX("int8"),
    "mx, fp8 e4m3": MX("float8_e4m3fn"),
    "8 bits": Affine(8),
    "8 bits, one scale a tensor": Affine(8, axes=()),
    "mx, fp4 e2m1": MX("float4_e2m1fn"),
    "nf4, groups of 64": NF4(),
    "4 bits, groups of 64": Affine(4, group=(-2, 64)),
    "4 bits": Affine(4),
    "4 bits, one scale a tensor": Affine(4, axes=()),
}
"""Schemes of the weights alone, rounded to nearest."""


def main(config: Config) -> _results.Result:
    """Trains, quantizes by each method to each number of bits, and writes the two results and the figure."""
    lab = lab_for(config)
    if not 1 <= config.calibration <= len(lab.labels):
        raise UsageError(f"want 1 to {len(lab.labels)} calibration images, got {config.calibration}")
    batches = [lab.images[: config.calibration]]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ("float", *METHODS)}
    formats: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ("float32", *FORMATS)}
    on: Calibrated | None = None
    for seed in range(config.seeds):
        trained = lab.trained(seed)
        if on is None:
            on = Calibrated(
                lab, InputObserver(lab.apply, trained, batches[0], {"kernel$": True}), batches, config.steps
            )
        in_float = lab.tested(f"float, seed {seed}", trained)
        found["float"][seed] = {key: v for bits in config.bits for key, v in keyed(str(bits), in_float).items()}
        formats["float32"][seed] = {**keyed("kept", in_float), "bytes": float(nbytes(trained))}
        for name, method in METHODS.items():
            found[name][seed] = {}
            for bits in config.bits:
                figures = lab.tested(f"{name}, {bits} bits, seed {seed}", method(on, trained, bits))
                found[name][seed].update(keyed(str(bits), figures))
        for name, scheme in FORMATS.items():
            small = quantize.convert(trained, {"kernel$": scheme})
            figures = lab.tested(f"{name} (format), seed {seed}", small)
            formats[name][seed] = {**keyed("kept", figures), "bytes": float(nbytes(small))}
        print(f"seed {seed}: done", flush=True)
    _formats(lab, config, formats)
    rows = [Row.measured(name, by_seed) for name, by_seed in found.items()]
    result = lab.result(
        name=f"quantize_post_training_{config.model}_{config.data}",
        title=f"Quantization without training: {config.model} on {config.data}",
        source=f"{lab.measured} The papers of GPTQ, AWQ and AdaRound have larger models only.",
        command=command("quantize_post_training", config),
        selection="nothing was chosen: rate, lengths, bits and damping were fixed beforehand",
        columns=lab.columns({str(bits): f"{bits} bits" for bits in config.bits}),
        rows=rows,
        notes=[
            lab.setting(),
            f"All kernels, the first and the last too. Inputs are measured on the first {config.calibration} training "
            f"examples; nothing is trained after quantization.",
        ],
    )
    lines = {row.name: [(bits, row.ours[str(bits)].values) for bits in config.bits] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title="bits a weight", log=False)
    return result


def _formats(lab: Images, config: Config, found: dict[str, dict[int, dict[str, float]]]) -> None:
    rows = [Row.measured(name, by_seed) for name, by_seed in found.items()]
    result = lab.result(
        name=f"quantize_formats_{config.model}_{config.data}",
        title=f"Formats of weights: {config.model} on {config.data}",
        source=f"{lab.measured} The papers of nf4 and mx have larger models only.",
        command=command("quantize_post_training", config),
        selection="nothing was chosen",
        columns=[*lab.columns({"kept": "on test data"}), Column("bytes", "bytes of all parameters", 0)],
        rows=rows,
        notes=[
            lab.setting(),
            "All kernels, the first and the last too, rounded to nearest; biases, norms and tables stay in float32.",
        ],
    )
    _results.written(result, config.out)


if __name__ == "__main__":
    run_main(main, Config)
