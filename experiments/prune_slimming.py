"""Network slimming: `python -m experiments.prune_slimming`.

Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming": the scales of batch
normalisation are trained under an L1 penalty, the channels with the smallest scales of the whole network go, and the
rest is fine-tuned. Beside a network without the penalty, cut in the same way; and beside the proximal step, which
takes the same penalty to exact zeros where the subgradient hovers around them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import _pruning, _results
from experiments._command import run_main
from experiments._pruning import Lab, Strided, Trainer, command, completed, coupled, held, sgd, write
from experiments._results import Column, Row
from experiments.data import load
from jaxcompress import prune
from jaxcompress.prune import tickets

LAYERS = ("Conv_0", "Conv_1", "Dense_0", "Dense_1")
SCALES = "BatchNorm_.*/scale"
MOMENTUM = 0.9


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Network slimming with the subgradient and with the proximal step."""

    model: str = "convnet"
    widths: tuple[int, ...] = (16, 32)
    """Channels of the convolutions."""
    strengths: tuple[float, ...] = (0.02, 0.08)
    """Of the penalty."""
    fractions: tuple[float, ...] = (0.4, 0.6, 0.8)
    """The parts of all channels that are cut."""
    rate: float = 0.1
    tune_epochs: int = 4
    tune_rate: float = 0.02


SHORT = Config(seeds=2, epochs=6, tune_epochs=2, strengths=(0.02,), fractions=(0.5,), widths=(6, 8), batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""


def arms(config: Config) -> dict[str, Callable[[Any], optax.GradientTransformation]]:
    """By name, the optimizer of each arm."""
    made: dict[str, Callable[[Any], optax.GradientTransformation]] = {"no penalty": sgd}
    for strength in config.strengths:
        rules = {SCALES: prune.L1(strength)}
        made[f"subgradient, {strength:g}"] = subgradient(rules)
        made[f"proximal, {strength:g}"] = proximal(rules)
    return made


def subgradient(rules: Any) -> Callable[[Any], optax.GradientTransformation]:
    """The penalty before the optimizer."""
    return lambda arguments: optax.chain(prune.penalize(rules), sgd(arguments))


def proximal(rules: Any) -> Callable[[Any], optax.GradientTransformation]:
    """The proximal step after it. In the long run SGD with momentum moves by `rate / (1 - momentum)` a gradient."""

    def tx_for(arguments: Any) -> optax.GradientTransformation:
        def rate(step: jax.Array) -> jax.Array:
            wave = (1 + jnp.cos(jnp.pi * jnp.minimum(step / arguments["total"], 1))) / 2
            return arguments["rate"] * wave / (1 - MOMENTUM)

        return optax.chain(sgd(arguments), prune.proximal(rules, rate))

    return tx_for


def cut(params: Any, fraction: float) -> Any:
    """Masks without the channels of the least scales in the whole network; every layer keeps one."""
    scales = jax.tree.map(jnp.abs, params)
    chosen = prune.choose(scales, {SCALES: prune.Unstructured(fraction, scope="channels")})
    masks = completed(chosen, params)
    for layer in ("0", "1"):
        alive = masks[f"BatchNorm_{layer}"]["scale"]
        masks[f"BatchNorm_{layer}"]["bias"] = alive
        masks[f"Conv_{layer}"]["kernel"] &= alive
    return coupled({name: masks[name] for name in LAYERS}, LAYERS) | {n: masks[n] for n in masks if n not in LAYERS}


def figures_of(name: str, lab: Lab, config: Config, trainer: Trainer, tuner: Trainer, seed: int) -> dict[str, float]:
    """One network of an arm: trained, cut at each fraction, fine-tuned."""
    first, stats = lab.begin(seed)
    params, stats = trainer(first, {"rate": jnp.float32(config.rate)}, seed=seed, epochs=config.epochs, extras=stats)
    scales = jnp.concatenate([params[f"BatchNorm_{i}"]["scale"] for i in (0, 1)])
    figures = {
        "dense": lab.test(f"{name}, seed {seed}", params, stats),
        "zero": 100 * float(jnp.mean(scales == 0)),
        "small": 100 * float(jnp.mean(jnp.abs(scales) < 0.01)),
    }
    positions = lab.positions(LAYERS)
    for fraction in config.fractions:
        masks = cut(params, fraction)
        bare = tickets.masked(params, masks)
        arguments = {"masks": masks, "rate": jnp.float32(config.tune_rate)}
        tuned, own = tuner(
            bare, arguments, seed=1000 + seed, epochs=config.tune_epochs, extras=jax.tree.map(jnp.array, stats)
        )
        left, whole = (tickets.multiply_adds(params, m, positions, units=True) for m in (masks, None))
        where = f"{name}, {fraction:.0%} cut, seed {seed}"
        figures |= {
            f"bare_{100 * fraction:g}": lab.test(f"not tuned, {where}", bare, stats),
            f"tuned_{100 * fraction:g}": lab.test(f"tuned, {where}", tuned, own),
            f"left_{100 * fraction:g}": 100 * left / whole,
        }
    return figures


def main(config: Config) -> _results.Result:
    """Runs every arm and seed, and writes the result and the figure."""
    classes = load(config.data, config.data_dir).classes
    lab = Lab(config, Strided(config.widths, classes=classes, normalise=True))
    tuner, by_row = lab.trainer(held, lab.normalised_loss), dict[str, dict[int, dict[str, float]]]()
    for name, tx_for in arms(config).items():
        trainer = lab.trainer(tx_for, lab.normalised_loss)
        for seed in range(config.seeds):
            by_row.setdefault(name, {})[seed] = figures_of(name, lab, config, trainer, tuner, seed)
        print(f"{name}: done", flush=True)
    rows = [Row.measured(name, by_seed) for name, by_seed in by_row.items()]
    columns = [
        Column("dense", "before the cut"), Column("zero", "scales at zero (%)", 1),
        Column("small", "scales below 0.01 (%)", 1),
    ]  # fmt: skip
    for percent in (f"{100 * fraction:g}" for fraction in config.fractions):
        columns += [
            Column(f"bare_{percent}", f"{percent}% of channels cut"), Column(f"tuned_{percent}", "fine-tuned"),
            Column(f"left_{percent}", "multiply-adds left (%)", 1),
        ]  # fmt: skip
    result = lab.result(
        name=f"prune_slimming_{config.data}",
        title=f"Network slimming: convnet with batch normalisation on {config.data}",
        source="Test accuracy in %. Liu et al. 2017 cut 70% of VGG's channels on CIFAR-10 without loss after"
        " fine-tuning; their networks are other ones, so their figures are not repeated here.",
        command=command("prune_slimming", config),
        selection="fractions, rates and lengths were fixed beforehand; the strengths after a trial run, in which 0.001"
        " and 0.005 left no scale below 0.01",
        columns=columns,
        rows=rows,
        notes=[
            lab.setting(),
            f"Channels {config.widths}; cut by one threshold for all layers, of which each keeps a channel at least;"
            f" then {config.tune_epochs} epochs without the penalty. Multiply-adds are those of the smaller network."
            f" Both ways have the same strengths; the proximal step takes the rate over one minus the momentum.",
        ],
    )
    lines = {
        f"{row.name}{', fine-tuned' if kind == 'tuned' else ''}": [
            (100 - 100 * f, row.ours[f"{kind}_{100 * f:g}"].values) for f in config.fractions
        ]
        for kind in ("bare", "tuned")
        for row in rows
    }
    write(result, config, lines, "test accuracy (%)", x_title="channels left (%)", log=False)
    return result


if __name__ == "__main__":
    run_main(main, Config)
