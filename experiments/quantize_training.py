"""Training under quantization: `python -m experiments.quantize_training`.

A trained network is trained on under fake quantization, from its labels and from its float self, to few bits and to
three and two values a weight; and with steps that are learned, for weights and inputs of few bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments import _pruning, _results
from experiments._pruning import Lab, Trainer, command, sgd, write
from experiments._results import Column, Row
from experiments.quantize_post_training import tested
from jaxcompress import compressed, distill, quantize
from jaxcompress.quantize import Affine


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Straight-through training, distillation and learned steps."""

    tuning: int = 4
    """Epochs after the float training."""
    rate: float = 0.1
    tuning_rate: float = 0.02
    temperature: float = 4.0
    """Of the distillation; the labels have no part in it."""


SHORT = Config(seeds=2, epochs=3, tuning=2, batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""

WEIGHTS: dict[str, Any] = {
    "4 bits": Affine(4),
    "3 bits": Affine(3),
    "2 bits": Affine(2),
    "ternary": quantize.Ternary(axes=(-1,)),
    "binary": quantize.Binary(),
}
"""Of the weights alone: 2 bits have three even steps, as ternary weights do, but span the largest weight."""

BOTH = {f"{bits}/{bits} bits": Affine(bits, symmetric=False, activation_bits=bits) for bits in (4, 3, 2)}
"""Of weights and inputs."""


def trainer_for(lab: Lab, config: Config, apply: Callable[[Any, jax.Array], jax.Array]) -> Trainer:
    """A training of `apply`, from labels (`share` 0) or from a teacher's logits (`share` 1)."""

    def loss(params: Any, extras: Any, arguments: Any, images: jax.Array, labels: jax.Array, key: Any) -> Any:
        logits, teacher = apply(params, images), lab.apply(arguments["teacher"], images)
        total = distill.distillation_loss(
            logits, teacher, labels, temperature=config.temperature, alpha=arguments["share"]
        )
        return jnp.mean(total), extras

    return lab.trainer(sgd, loss)


def quantized(lab: Lab, config: Config, trainers: dict[str, Trainer], key: str, trained: Any, seed: int) -> Any:
    """The float network quantized by one scheme in each way, by the row's name."""
    scheme = (WEIGHTS | BOTH)[key]
    rules = {"kernel$": scheme}
    arguments = {"rate": jnp.float32(config.tuning_rate), "teacher": trained}

    def tuned(trainer: Trainer, params: Any, share: float) -> Any:
        return trainer(params, {**arguments, "share": jnp.float32(share)}, seed=100 + seed, epochs=config.tuning)

    found = {
        "rounded": quantize.convert(trained, rules),
        "trained": quantize.convert(tuned(trainers[key], trained, 0.0), rules),
        "distilled": quantize.convert(tuned(trainers[key], trained, 1.0), rules),
    }
    if key in BOTH:
        how = quantize.LeastSquares()
        ranges = quantize.input_ranges(lab.apply, trained, [lab.images[:512]], rules, how, symmetric=False)
        learned = quantize.learn(trained, rules, ranges)
        found["learned steps"] = quantize.settle(tuned(trainers["learned"], learned, 0.0))
        found["learned steps, distilled"] = quantize.settle(tuned(trainers["learned"], learned, 1.0))
    return found


def main(config: Config) -> _results.Result:
    """Trains, quantizes, trains on, and writes the two results and their figures."""
    lab = Lab(config)
    plain = lab.trainer(sgd)
    trainers = {
        key: trainer_for(lab, config, quantize.fake(lab.apply, {"kernel$": scheme}))
        for key, scheme in (WEIGHTS | BOTH).items()
    }
    trainers["learned"] = trainer_for(lab, config, compressed(lab.apply))  # compiled anew for each kind of leaf
    names = ["float", "rounded", "trained", "distilled", "learned steps", "learned steps, distilled"]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for seed in range(config.seeds):
        start = lab.init(jax.random.key(seed))
        trained = plain(start, {"rate": jnp.float32(config.rate)}, seed=seed, epochs=config.epochs)
        found["float"][seed] = dict.fromkeys(WEIGHTS | BOTH, lab.test(f"float, seed {seed}", trained))
        for key in WEIGHTS | BOTH:
            for name, params in quantized(lab, config, trainers, key, trained, seed).items():
                found[name].setdefault(seed, {})[key] = tested(lab, f"{name}, {key}, seed {seed}", params)
        print(f"seed {seed}: done", flush=True)
    _result(lab, config, found, "quantize_steps", "Few bits a weight and input", BOTH, names)
    return _result(lab, config, found, "quantize_training", "Few bits a weight", WEIGHTS, names[:4])


def _result(
    lab: Lab, config: Config, found: Any, name: str, title: str, keys: dict[str, Any], names: list[str]
) -> _results.Result:
    rows = [
        Row.measured(row, {seed: {key: figures[key] for key in keys} for seed, figures in found[row].items()})
        for row in names
    ]
    result = lab.result(
        name=f"{name}_{config.model}_{config.data}",
        title=f"{title}, with and without training: {config.model} on {config.data}",
        source="Test accuracy in %. The papers have larger models only.",
        command=command("quantize_training", config),
        selection="nothing was chosen: rates, lengths, schemes and temperature were fixed beforehand",
        columns=[Column(key, key) for key in keys],
        rows=rows,
        notes=[
            lab.setting(),
            f"All layers are quantized, the first and the last too, and trained on for {config.tuning} epochs; "
            f"distilled from the float network alone, at temperature {config.temperature:g}.",
        ],
    )
    lines = {row.name: [(i, row.ours[key].values) for i, key in enumerate(keys)] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title=", ".join(keys), log=False)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
