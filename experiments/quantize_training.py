"""Training under quantization: `python -m experiments.quantize_training`.

A trained network is trained on under fake quantization, from its labels and from its float self, to few bits and to
three and two values a weight; and with steps that are learned, for weights and inputs of few bits. With `--formats` it
is trained on in the formats of hardware and papers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _quantizing, _results, quantize_post_training
from experiments._command import run_main
from experiments._kept import kept
from experiments._pruning import Trainer, command, write
from experiments._quantizing import Images, keyed, lab_for, taught
from experiments._results import Row
from jaxcompress import compressed, quantize
from jaxcompress.quantize import Affine


@dataclass(frozen=True)
class Config(_quantizing.Config):
    """Straight-through training, distillation and learned steps."""

    tuning: int = 4
    """Epochs after the float training."""
    bits: tuple[int, ...] = (4, 3, 2)
    """Of the weights alone; ternary and binary weights come behind."""
    both: tuple[int, ...] = (4, 3, 2)
    """Of weights and inputs alike; may be empty."""
    formats: bool = False
    """Formats of hardware and papers in place of `bits` and `both`."""
    temperature: float = 4.0
    """Of the distillation; the labels have no part in it."""
    resume: Path | None = None
    """A folder that keeps what was measured, so that a command that was cut off, or has other bits, goes on there."""


SHORT = Config(seeds=2, epochs=3, tuning=2, batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""


OWN = quantize.Ternary(axes=(-1,), signed=True)
"""Trained ternary weights: the two values of each output are trained with the weights (Zhu et al. 2017)."""


FORMATS = ("fp8 e5m2", "mx, fp8 e4m3", "mx, fp4 e2m1", "nf4, groups of 64", "4 bits, groups of 64")
"""Those of `quantize_post_training` that lose something when they are rounded to, and the two of 8 bits beside them."""


def of_weights(config: Config) -> dict[str, Any]:
    """Schemes of the weights alone: 2 bits have three even steps, as ternary weights do, but span the largest one."""
    if config.formats:
        return {name: quantize_post_training.FORMATS[name] for name in FORMATS}
    even = {f"{bits} bits": Affine(bits) for bits in config.bits}
    return {**even, "ternary": quantize.Ternary(axes=(-1,)), "ternary, own values": OWN, "binary": quantize.Binary()}


def of_both(config: Config) -> dict[str, Affine]:
    """Schemes of weights and inputs."""
    both = () if config.formats else config.both
    return {f"{bits}/{bits} bits": Affine(bits, symmetric=False, activation_bits=bits) for bits in both}


FORMATS_PAPERS = "The papers of nf4 and mx have larger models only."
PAPERS = (
    "The papers have larger models: ternary weights lose 0.3 points on CIFAR-10 and binary ones 2.7 (Li et al. 2016, "
    "table 2); ternary ones with two learned values gain up to 0.4 (Zhu et al. 2017)."
)


def trainer_for(lab: Images, config: Config, apply: Callable[[Any, jax.Array], jax.Array]) -> Trainer:
    """A training of `apply`, from labels (`share` 0) or from a teacher's logits (`share` 1)."""
    return lab.trainer(lab.optimizer, taught(lab, config.temperature, apply))


def quantized(
    lab: Images, config: Config, trainers: dict[str, Trainer], key: str, scheme: Any, trained: Any, seed: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """How the float network is quantized by one scheme, in each way: the row's name, and what does it."""
    rules = {"kernel$": scheme}
    arguments = {"rate": jnp.float32(lab.tuning_rate), "teacher": trained}

    def tuned(trainer: Trainer, params: Any, share: float) -> Any:
        return trainer(params, {**arguments, "share": jnp.float32(share)}, seed=100 + seed, epochs=config.tuning)

    def learned(share: float, **options: Any) -> Any:
        return quantize.settle(tuned(trainers["learned"], quantize.learn(trained, rules, **options), share))

    def converted(share: float) -> Any:
        return quantize.convert(tuned(trainers[key], trained, share), rules)

    if scheme == OWN:
        yield "rounded", lambda: quantize.settle(quantize.learn(trained, rules))
        yield "trained", lambda: learned(0.0)
        yield "distilled", lambda: learned(1.0)
        return
    yield "rounded", lambda: quantize.convert(trained, rules)
    yield "trained", lambda: converted(0.0)
    yield "distilled", lambda: converted(1.0)
    if isinstance(scheme, Affine) and scheme.activation_bits is not None:
        how = quantize.LeastSquares()
        ranges = quantize.input_ranges(lab.apply, trained, [lab.images[:512]], rules, how, symmetric=False)
        calibrated = trainer_for(lab, config, quantize.fake(lab.apply, rules, ranges))
        yield CALIBRATED, lambda: quantize.static(quantize.convert(tuned(calibrated, trained, 0.0), rules), ranges)
        yield "learned steps", lambda: learned(0.0, ranges=ranges)
        yield "learned steps, distilled", lambda: learned(1.0, ranges=ranges)
        yield "learned steps, inputs by PACT", lambda: learned(0.0, ranges=ranges, inputs="pact")


CALIBRATED = "trained, calibrated ranges"
"""Straight through, with one range for all inputs of a layer, found beforehand; in "trained" each row has its own."""
LEARNED = ("learned steps", "learned steps, distilled", "learned steps, inputs by PACT")
ROWS = ("rounded", "trained", "distilled", CALIBRATED, *LEARNED)
"""What `quantized` makes: of the weights alone, the first three."""


def main(config: Config) -> _results.Result:
    """Trains, quantizes, trains on, and writes the two results and their figures."""
    lab, chosen = lab_for(config), of_weights(config) | of_both(config)
    trainers = {
        key: trainer_for(lab, config, quantize.fake(lab.apply, {"kernel$": scheme}))
        for key, scheme in chosen.items()
        if scheme != OWN
    }
    trainers["learned"] = trainer_for(lab, config, compressed(lab.apply))  # compiled anew for each kind of leaf
    elsewhere = dataclasses.replace(config, data_dir=None, out=Path(), floats=None, resume=None, seeds=0)
    setting = repr(dataclasses.replace(elsewhere, bits=(), both=()))  # of one figure, whatever else the table has

    def keep(what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        return kept(config.resume, what, setting, lab.dataset.test, measure)

    def made_and_tested(what: str, make: Callable[[], Any]) -> dict[str, float]:
        return lab.tested(what, make())

    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ("float", *ROWS)}
    for seed in range(config.seeds):
        trained = lab.trained(seed)
        in_float = keep(f"float, seed {seed}", partial(lab.tested, f"float, seed {seed}", trained))
        found["float"][seed] = {k: v for key in chosen for k, v in keyed(key, in_float).items()}
        for key, scheme in chosen.items():
            for name, make in quantized(lab, config, trainers, key, scheme, trained, seed):
                what = f"{name}, {key}, seed {seed}"
                figures = keep(what, partial(made_and_tested, what, make))
                print(f"{what}: {figures}", flush=True)
                found[name].setdefault(seed, {}).update(keyed(key, figures))
        print(f"seed {seed}: done", flush=True)
    if both := of_both(config):
        _result(lab, config, found, "quantize_steps", "Few bits a weight and input", both, ROWS)
    name, title = ("trained_formats", "Formats of weights") if config.formats else ("training", "Few bits a weight")
    return _result(lab, config, found, f"quantize_{name}", title, of_weights(config), ROWS[:3])


def _result(
    lab: Images, config: Config, found: Any, name: str, title: str, keys: Iterable[str], names: tuple[str, ...]
) -> _results.Result:
    keys = list(keys)
    columns = lab.columns({key: key for key in keys})
    rows = [
        Row.measured(row, {s: {c.key: figures[c.key] for c in columns} for s, figures in found[row].items()})
        for row in ("float", *names)
    ]
    result = lab.result(
        name=f"{name}_{config.model}_{config.data}",
        title=f"{title}, with and without training: {config.model} on {config.data}",
        source=f"{lab.measured} {FORMATS_PAPERS if config.formats else PAPERS}",
        command=command("quantize_training", config),
        selection="nothing was chosen: rates, lengths, schemes and temperature were fixed beforehand",
        columns=columns,
        rows=rows,
        notes=[
            lab.setting(),
            f"All kernels are quantized, the first and the last too, and trained on for {config.tuning} epochs at a "
            f"rate of {lab.tuning_rate:g}; distilled from the float network alone, "
            f"at temperature {config.temperature:g}.",
        ],
    )
    lines = {row.name: [(i, row.ours[key].values) for i, key in enumerate(keys)] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title=", ".join(keys), log=False)
    return result


if __name__ == "__main__":
    run_main(main, Config)
