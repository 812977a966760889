"""Sparse training from the start: `python -m experiments.prune_rewire --data cifar10 --data-dir DIR`.

RigL (Evci et al. 2020), SET (Mocanu et al. 2018) and static masks, which hold the sparsity from the first step to the
last, beside gradual magnitude pruning, which begins dense, and the dense network. All spread their weights over the
layers by Erdos-Renyi-Kernel. The convolutions are batch-normalised, as the papers' are: without it the signal of a very
sparse network dies out from layer to layer, and most seeds do not train at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import _pruning, _results
from experiments._command import run_main
from experiments._pruning import Lab, Strided, command, held, sgd, write
from experiments._results import Column, Row
from experiments.data import load
from jaxcompress import prune
from jaxcompress.paths import match, named_leaves, with_leaves


@dataclass(frozen=True)
class Config(_pruning.Config):
    """RigL, SET, static masks and magnitude pruning at high sparsities."""

    model: str = "convnet"
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the convolutions."""
    hidden: int = 64
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    rate: float = 0.1
    every: int = 20
    """Steps between two changes of the masks."""
    fraction: float = 0.3
    """Of the weights in use, how many are replaced at first."""


SHORT = Config(seeds=2, epochs=3, sparsities=(0.8,), widths=(6, 8), hidden=16, every=5, batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""

DENSE, STATIC, SET, RIGL, MAGNITUDE = "dense", "static", "SET", "RigL", "magnitude, gradual"


def rewired(config: Config, rules: Any, steps: int, grow: Any) -> Callable[[Any], optax.GradientTransformation]:
    """Masks that change until three quarters of the training; the key is an argument, so all seeds share a program."""
    return lambda a: prune.around(
        sgd(a),
        prune.rewire(
            rules,
            key=a["key"],
            end=3 * steps // 4,
            every=config.every,
            fraction=config.fraction,
            grow=grow,
            packed=False,
        ),
    )


def gradual(config: Config, rules: Any, steps: int) -> Callable[[Any], optax.GradientTransformation]:
    """Magnitude pruning along the polynomial, over the same part of the training."""
    schedule = prune.polynomial(steps // 10, 3 * steps // 4, config.every)
    return lambda a: optax.chain(sgd(a), prune.sparsify(rules, schedule, packed=False))


def scaled(params: Any, rules: Any) -> Any:
    """Initial weights over the root of their layer's density: the spread that is right for the inputs that are left.

    It matters where no batch normalisation follows: in the hidden layer (Evci et al. 2022, "Gradient Flow in Sparse
    Neural Networks").
    """
    named = named_leaves(params)
    found = match(rules, [name for name, _ in named], None)
    leaves = [x if p is None else x / (1 - p.sparsity) ** 0.5 for (_, x), p in zip(named, found, strict=True)]
    return with_leaves(params, leaves)


def main(config: Config) -> _results.Result:
    """Runs every arm, sparsity and seed, and writes the result and the figure."""
    classes = load(config.data, config.data_dir).classes
    lab = Lab(config, Strided(config.widths, config.hidden, classes, normalise=True))
    steps, rate = config.epochs * lab.steps, jnp.float32(config.rate)
    shapes = jax.eval_shape(lab.init, jax.random.key(0))
    by_row: dict[str, dict[int, dict[str, float]]] = {}
    fixed, seeds = lab.trainer(held, lab.normalised_loss), range(config.seeds)
    for seed in seeds:
        params, stats = lab.begin(seed)
        ones = jax.tree.map(jnp.ones_like, prune.choose(params, {"kernel$": 0.5}))
        trained = fixed(params, {"masks": ones, "rate": rate}, seed=seed, epochs=config.epochs, extras=stats)
        accuracy = lab.test(f"{DENSE}, seed {seed}", *trained)
        by_row.setdefault(DENSE, {})[seed] = {f"{100 * s:g}": accuracy for s in config.sparsities}
    for s in config.sparsities:
        rules = prune.erk(shapes, {"kernel$": True}, s)
        trainers = {
            STATIC: fixed,
            SET: lab.trainer(rewired(config, rules, steps, prune.at_random), lab.normalised_loss),
            RIGL: lab.trainer(rewired(config, rules, steps, prune.by_gradient), lab.normalised_loss),
            MAGNITUDE: lab.trainer(gradual(config, rules, steps), lab.normalised_loss),
        }
        for name, trainer in trainers.items():
            for seed in seeds:
                (params, stats), key = lab.begin(seed), jax.random.key(1000 + seed)
                arguments: dict[str, Any] = {"rate": rate}
                params = params if name == MAGNITUDE else scaled(params, rules)
                if name == STATIC:
                    masks = prune.choose(prune.random(params, key), rules)  # those that rewiring begins with
                    every = jax.tree.map(jnp.ones_like, prune.choose(params, {"kernel$": 0.5}))
                    arguments["masks"] = _pruning.completed(masks, every)
                elif name in (SET, RIGL):
                    arguments["key"] = key
                trained = trainer(params, arguments, seed=seed, epochs=config.epochs, extras=stats)
                accuracy = lab.test(f"{name}, {s:.0%}, seed {seed}", *trained)
                by_row.setdefault(name, {}).setdefault(seed, {})[f"{100 * s:g}"] = accuracy
        print(f"{s:.0%}: done", flush=True)
    rows = [Row.measured(name, by_seed) for name, by_seed in by_row.items()]
    keys = [f"{100 * s:g}" for s in config.sparsities]
    pairs = [(key, RIGL, STATIC) for key in keys] + [(key, SET, STATIC) for key in keys]
    result = lab.result(
        name=f"prune_rewire_{config.data}",
        title=f"Sparse training from the start: convnet on {config.data}",
        source="Test accuracy in %. Evci et al. 2020 report, for ResNet-50 on ImageNet at 80% and 90%, uniform: static"
        " 70.6 and 65.8, SET 72.9 and 69.6, RigL 74.6 and 72.0, gradual magnitude pruning 75.6 and 73.9, dense 76.8.",
        command=command("prune_rewire", config),
        selection="rates, lengths and sparsities were fixed beforehand; batch normalisation and the initial weights'"
        " spread after first runs without them, in which the sparsest networks did not train",
        columns=[Column(key, f"{key}% pruned") for key in keys],
        rows=rows,
        pairs=pairs if config.seeds > 1 else [],
        notes=[
            lab.setting(),
            f"Convolutions of {config.widths} channels with batch normalisation, hidden layer of {config.hidden}. Masks"
            f" change every {config.every} steps until three quarters of the training; at first {config.fraction:.0%}"
            " of the weights in use are replaced. Static masks are those that RigL and SET begin with; initial weights"
            " of all three are divided by the root of their layer's density.",
        ],
    )
    lines = {row.name: [(100 - float(key), row.ours[key].values) for key in keys] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title="weights left (%)")
    return result


if __name__ == "__main__":
    run_main(main, Config)
