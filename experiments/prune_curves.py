"""Sparsity against accuracy: `python -m experiments.prune_curves --table scores`, `units` or `schedules`.

`scores` and `units` prune a trained network once, by each score, and fine-tune it: one schedule, all scores, for single
weights and for whole neurons and filters. `schedules` prunes by magnitude while the network is trained: one score, all
schedules. Every network sees the same number of epochs in all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import _pruning, _results
from experiments._command import UsageError, run_main
from experiments._pruning import LAYERS, Lab, Trainer, all_kept, command, completed, coupled, held, sgd, write
from experiments._results import Column, Row
from jaxcompress import prune


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Sparsity-accuracy curves of scores and schedules."""

    table: str = "scores"
    """scores, units or schedules."""
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    """The parts of each layer's weights (or units) that are pruned."""
    tune_epochs: int = 3
    """Of fine-tuning, after `epochs` of dense training."""
    rate: float = 0.1
    tune_rate: float = 0.02


SHORT = Config(seeds=2, epochs=3, tune_epochs=1, sparsities=(0.5, 0.9), batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""


def gathering(score: prune.Accumulated) -> optax.GradientTransformation:
    """Passes gradients on, and keeps the score's statistic of every weight as its state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, jax.tree.map(score.observe, state, params, updates)

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def after(first: optax.GradientTransformation) -> Callable[[Any], optax.GradientTransformation]:
    """SGD after a transformation."""
    return lambda arguments: optax.chain(first, sgd(arguments))


def before(last: optax.GradientTransformation) -> Callable[[Any], optax.GradientTransformation]:
    """SGD before a transformation."""
    return lambda arguments: optax.chain(sgd(arguments), last)


class Measured:
    """What a trained network was seen to do: its weights, statistics of an epoch, and activations."""

    def __init__(
        self,
        lab: Lab,
        params: Any,
        initial: Any,
        gatherers: Mapping[str, tuple[Trainer, prune.Accumulated]],
        config: Config,
        seed: int,
    ):
        self.lab, self.params, self.initial, self.seed = lab, params, initial, seed
        self.inputs: dict[str, jax.Array] = {}
        self.outputs: dict[str, jax.Array] = {}
        self._watch(lab.images[:500])
        self.gathered = {}
        for name, (trainer, score) in gatherers.items():
            moved = trainer(params, {"rate": jnp.float32(config.tune_rate)}, seed=seed, epochs=1)
            self.gathered[name] = jax.tree.map(score.score, moved, trainer.state[0])

    def _watch(self, images: jax.Array) -> None:
        def note(function: Any, arguments: Any, options: Any, context: Any) -> Any:
            out = function(*arguments, **options)
            if isinstance(context.module, nn.Dense | nn.Conv):
                name = str(context.module.name)
                self.inputs[name], self.outputs[name] = arguments[0], nn.relu(out)
            return out

        with nn.intercept_methods(note):
            self.lab.apply(self.params, images)

    def kernels(self, score: Callable[[str, jax.Array], jax.Array]) -> Any:
        """Scores of every kernel from `(layer, kernel)`; other leaves are not looked at."""
        return {
            layer: {key: score(layer, x) if key == "kernel" else x for key, x in leaves.items()}
            for layer, leaves in self.params.items()
        }

    def input_norms(self, layer: str) -> jax.Array:
        """Of each input of a layer, the norm over examples and places."""
        x = self.inputs[layer]
        return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(x.ndim - 1))))


def wanda_masks(m: Measured, sparsity: float) -> Any:
    """The weights of each output ranked among themselves."""
    scores = m.kernels(lambda layer, w: jnp.moveaxis(prune.wanda(w, m.input_norms(layer)), -1, 0))
    chosen = prune.choose(scores, {"kernel$": prune.Unstructured(sparsity, stack=1)})
    return jax.tree.map(lambda mask: jnp.moveaxis(mask, 0, -1), chosen)


def random_masks(m: Measured, rules: Any) -> Any:
    """Any weights."""
    return prune.choose(prune.random(m.params, jax.random.key(m.seed)), rules)


def snip_masks(m: Measured, sparsity: float) -> Any:
    """Saliency at the initialisation, on 1,000 training images."""

    def loss(params: Any) -> jax.Array:
        return m.lab.loss(params, None, None, m.lab.images[:1000], m.lab.labels[:1000], None)[0]

    return prune.choose(jax.tree.map(prune.saliency, m.initial, jax.grad(loss)(m.initial)), {"kernel$": sparsity})


def magnitudes(m: Measured, rules: Any) -> Any:
    """By magnitude."""
    return prune.choose(jax.tree.map(prune.magnitude, m.params), rules)


SNIP = "SNIP (at initialisation)"
SCORES: dict[str, Callable[[Measured, float], Any]] = {
    "magnitude": lambda m, s: magnitudes(m, {"kernel$": s}),
    "magnitude, one threshold": lambda m, s: magnitudes(m, {"kernel$": prune.Unstructured(s, scope="all")}),
    "magnitude, ERK": lambda m, s: magnitudes(m, prune.erk(m.params, {"kernel$": True}, s)),
    "first-order Taylor": lambda m, s: prune.choose(m.gathered["taylor"], {"kernel$": s}),
    "Fisher": lambda m, s: prune.choose(m.gathered["fisher"], {"kernel$": s}),
    "movement": lambda m, s: prune.choose(m.gathered["movement"], {"kernel$": s}),
    "Wanda": wanda_masks,
    SNIP: snip_masks,
    "random": lambda m, s: random_masks(m, {"kernel$": s}),
}
"""Of a measured network and a sparsity, masks of single weights."""


def unit_rules(layers: tuple[str, ...], sparsity: float, norm: str = "l1") -> dict[str, Any]:
    """Whole neurons and filters of all layers but the last."""
    rules: dict[str, Any] = {
        f"{layers[-1]}/kernel": None,
        "Dense_.*/kernel": prune.vectors(sparsity, axis=-2, norm=norm),
    }
    return {"Conv_.*/kernel": prune.filters(sparsity, norm=norm), **rules} if "Conv_0" in layers else rules


UNIT_SCORES: dict[str, Callable[[Measured, Any], Any]] = {
    "L1 norm": magnitudes,
    "L2 norm": magnitudes,
    "geometric median (FPGM)": lambda m, rules: prune.choose(
        m.kernels(lambda layer, w: prune.geometric_median(w)), rules
    ),
    "zero activations (APoZ)": lambda m, rules: prune.choose(
        m.kernels(lambda layer, w: jnp.broadcast_to(prune.active(m.outputs[layer]), w.shape)), rules
    ),
    "first-order Taylor": lambda m, rules: prune.choose(m.gathered["taylor"], rules),
    "random": random_masks,
}
"""Of a measured network and rules, masks of whole units."""


def schedules(total: int, sparsity: float) -> dict[str, prune.Schedule]:
    """All schedules, with their changes between 20 % and 70 % of the training."""
    begin, end = total // 5, 7 * total // 10
    every = max(1, (end - begin) // 10)
    return {
        "one shot, at 20 %": prune.one_shot(begin),
        "one shot, at 70 %": prune.one_shot(end),
        "iterative": prune.iterative(sparsity, 1 - (1 - sparsity) ** 0.1, begin, every),
        "polynomial": prune.polynomial(begin, end, every),
        "cosine": prune.cosine(begin, end, every),
        "periodic (AC/DC)": prune.periodic(begin, end, every, every),
    }


def by_score(lab: Lab, config: Config) -> dict[str, dict[int, dict[str, float]]]:
    """The rows of `scores` and `units`."""
    layers, rows = LAYERS[config.model], dict[str, dict[int, dict[str, float]]]()
    units = config.table == "units"
    trainer = lab.trainer(held)
    wanted = {"taylor": prune.taylor(0.9)}
    wanted |= {} if units else {"fisher": prune.empirical_fisher(0.9), "movement": prune.movement()}
    gatherers = {name: (lab.trainer(after(gathering(score))), score) for name, score in wanted.items()}
    for seed in range(config.seeds):
        initial = lab.init(jax.random.key(seed))
        full, tuning = {"masks": all_kept(initial), "rate": jnp.float32(config.rate)}, jnp.float32(config.tune_rate)
        trained = trainer(initial, full, seed=seed, epochs=config.epochs)
        dense = trainer(trained, full | {"rate": tuning}, seed=seed + 1000, epochs=config.tune_epochs)
        accuracy = lab.test(f"dense, seed {seed}", dense)
        rows.setdefault("dense", {})[seed] = {key(s): accuracy for s in config.sparsities}
        measured = Measured(lab, trained, initial, gatherers, config, seed)
        for name in UNIT_SCORES if units else SCORES:
            figures = {}
            for s in config.sparsities:
                if units:
                    chosen = UNIT_SCORES[name](measured, unit_rules(layers, s, "l2" if name == "L2 norm" else "l1"))
                    chosen = coupled(completed(chosen, initial), layers)
                else:
                    chosen = completed(SCORES[name](measured, s), initial)
                start = trained
                if name == SNIP:  # chosen before the training, so trained with it
                    start = trainer(initial, full | {"masks": chosen}, seed=seed, epochs=config.epochs)
                tuned = trainer(start, {"masks": chosen, "rate": tuning}, seed=seed + 1000, epochs=config.tune_epochs)
                figures[key(s)] = lab.test(f"{name}, {s:.1%}, seed {seed}", tuned)
            rows.setdefault(name, {})[seed] = figures
        print(f"{config.table}, seed {seed}: done", flush=True)
    return rows


def by_schedule(lab: Lab, config: Config) -> dict[str, dict[int, dict[str, float]]]:
    """The rows of `schedules`; rules are part of the program, so each sparsity compiles its own."""
    rows: dict[str, dict[int, dict[str, float]]] = {}
    epochs = config.epochs + config.tune_epochs
    plain, arguments = lab.trainer(sgd), {"rate": jnp.float32(config.rate)}
    for seed in range(config.seeds):
        params = plain(lab.init(jax.random.key(seed)), arguments, seed=seed, epochs=epochs)
        accuracy = lab.test(f"dense, seed {seed}", params)
        rows.setdefault("dense", {})[seed] = {key(s): accuracy for s in config.sparsities}
    for s in config.sparsities:
        for name, schedule in schedules(epochs * lab.steps, s).items():
            pruning = prune.sparsify({"kernel$": s}, schedule, packed=False)
            trainer = lab.trainer(before(pruning))
            for seed in range(config.seeds):
                params = trainer(lab.init(jax.random.key(seed)), arguments, seed=seed, epochs=epochs)
                accuracy = lab.test(f"{name}, {s:.1%}, seed {seed}", params)
                rows.setdefault(name, {}).setdefault(seed, {})[key(s)] = accuracy
        print(f"schedules, {s:.1%}: done", flush=True)
    return rows


def key(sparsity: float) -> str:
    """The column of a sparsity."""
    return f"{100 * sparsity:g}"


TITLES = {
    "scores": "All scores at one schedule",
    "units": "All scores of whole units at one schedule",
    "schedules": "All schedules at magnitude",
}
NOTES = {
    "scores": "The dense network is pruned once, to the same sparsity in every layer unless said otherwise, and"
    " fine-tuned for {tune} epochs; SNIP's masks are held from the initialisation on. Taylor, Fisher and movement are"
    " gathered over one more epoch of fine-tuning.",
    "units": "The dense network loses the same part of the neurons or filters in every layer but the last, with their"
    " biases and the next layer's inputs from them, and is fine-tuned for {tune} epochs.",
    "schedules": "{total} epochs from the initialisation in all; masks change between 20% and 70% of them.",
}


def main(config: Config) -> _results.Result:
    """Runs a table, and writes the result and the figure."""
    if config.table not in TITLES:
        raise UsageError(f"no table {config.table!r}: there are {', '.join(TITLES)}")
    lab = Lab(config)
    rows_by_name = by_schedule(lab, config) if config.table == "schedules" else by_score(lab, config)
    rows = [Row.measured(name, by_seed) for name, by_seed in rows_by_name.items()]
    what = "units" if config.table == "units" else "weights"
    result = lab.result(
        name=f"prune_{config.table}_{config.model}_{config.data}",
        title=f"{TITLES[config.table]}: {config.model} on {config.data}",
        source="Test accuracy in %. No single paper has this comparison.",
        command=command("prune_curves", config),
        selection="nothing was chosen: rates, lengths and sparsities were fixed beforehand",
        columns=[Column(key(s), f"{key(s)}% of {what} pruned") for s in config.sparsities],
        rows=rows,
        notes=[
            lab.setting(),
            NOTES[config.table].format(tune=config.tune_epochs, total=config.epochs + config.tune_epochs),
        ],
    )
    lines = {row.name: [(100 - 100 * s, row.ours[key(s)].values) for s in config.sparsities] for row in rows}
    write(result, config, lines, "test accuracy (%)", x_title=f"{what} left in each layer (%)")
    return result


if __name__ == "__main__":
    run_main(main, Config)
