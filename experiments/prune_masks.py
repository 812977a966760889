"""What matters in a ticket: `python -m experiments.prune_masks --table criteria`, `signs` or `supermasks`.

After Zhou et al. 2019, "Deconstructing Lottery Tickets". `criteria`: masks drawn by other rules than the final
magnitude, trained from the initial values, and evaluated on them without any training. `signs`: masks by the final
magnitude, trained from values that share only their signs, or only their sizes, with the initial ones. `supermasks`:
masks that are learned while the weights stay what they were drawn as (also Ramanujan et al. 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import _pruning, _results
from experiments._command import UsageError, run_main
from experiments._pruning import Lab, command, held, write
from experiments._results import Column, Row
from experiments._selection import Choice
from jaxcompress import prune
from jaxcompress.prune import tickets


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Mask criteria, signs, and supermasks."""

    table: str = "criteria"
    """criteria, signs or supermasks."""
    sparsities: tuple[float, ...] = (0.7, 0.9, 0.97)
    """Of each layer, in the first two tables."""
    rate: float = 0.03
    mask_epochs: int = 10
    """Of learning a supermask."""
    mask_rates: tuple[float, ...] = (0.01, 0.1)
    """The candidates of a supermask's learning rate (Adam)."""


SHORT = Config(seeds=2, epochs=3, sparsities=(0.5, 0.8), batch_size=64, mask_epochs=4, mask_rates=(0.1,))
"""A run of seconds, for tests; its accuracies mean little."""

Figures = dict[str, dict[int, dict[str, float]]]


def key(what: str, sparsity: float) -> str:
    """The column of a figure at a sparsity."""
    return f"{what}_{100 * sparsity:g}"


def ticket_rows(lab: Lab, config: Config) -> Figures:
    """The rows of `criteria` or `signs`."""
    rows: Figures = {}
    trainer, rate = lab.trainer(held), jnp.float32(config.rate)
    by_criterion = config.table == "criteria"
    for seed in range(config.seeds):
        initial = lab.init(jax.random.key(seed))
        ones = jax.tree.map(jnp.ones_like, prune.choose(initial, {"kernel$": config.sparsities[0]}))
        final = trainer(initial, {"masks": ones, "rate": rate}, seed=seed, epochs=config.epochs)
        dense, untrained = lab.test(f"dense, seed {seed}", final), lab.test(f"untrained, seed {seed}", initial)
        for name in ["dense", *([*tickets.CRITERIA, "random"] if by_criterion else tickets.TREATMENTS)]:
            figures = rows.setdefault(name, {}).setdefault(seed, {})
            for s in config.sparsities:
                if name == "dense":
                    figures |= {key("trained", s): dense, key("untrained", s): untrained}
                    figures |= {key("constant", s): untrained} if by_criterion else {}
                    continue
                own = jax.random.key(1000 + seed)
                criterion, treatment = (name, "rewind") if by_criterion else ("large_final", name)
                masks = tickets.by_criterion(criterion, initial, final, {"kernel$": s}, key=own)
                start = tickets.treated(initial, masks, *tickets.TREATMENTS[treatment], key=own, init=lab.init)
                trained = trainer(start, {"masks": masks, "rate": rate}, seed=seed, epochs=config.epochs)
                where = f"{name}, {s:.0%}, seed {seed}"
                figures[key("trained", s)] = lab.test(f"trained, {where}", trained)
                figures[key("untrained", s)] = lab.test(f"untrained, {where}", start)
                if by_criterion:
                    constant = tickets.treated(initial, masks, "constant", "keep")
                    figures[key("constant", s)] = lab.test(f"constant, {where}", constant)
        print(f"{config.table}, seed {seed}: done", flush=True)
    return rows


@dataclass(frozen=True)
class Kind:
    """A way to learn a supermask."""

    popup: bool
    constant: bool
    rescale: bool

    def __str__(self) -> str:
        what = "edge-popup, half of the weights" if self.popup else "learned probabilities"
        weights = "signed constants" if self.constant else "initial weights"
        return f"{what}, {weights}{', rescaled' if self.rescale else ''}"


KINDS = [
    Kind(popup, constant, rescale) for popup in (True, False) for constant in (False, True) for rescale in (False, True)
]
HALF = {"kernel$": 0.5}


def adam(arguments: Any) -> optax.GradientTransformation:
    """Adam with a cosine to zero."""
    rate, total = arguments["rate"], arguments["total"]
    return optax.adam(lambda step: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1))) / 2)


def mask_loss(lab: Lab, kind: Kind) -> Callable[..., Any]:
    """The loss of scores (or logits), for fixed weights in the arguments."""
    popped = tickets.edge_popup(lab.apply, HALF, rescale=kind.rescale)
    drawn = tickets.bernoulli(lab.apply, rescale=kind.rescale)

    def loss(scores: Any, extras: Any, arguments: Any, images: jax.Array, labels: jax.Array, key: Any) -> Any:
        weights = arguments["weights"]
        logits = popped(weights, scores, images) if kind.popup else drawn(weights, scores, key, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), extras

    return loss


def supermask_rows(lab: Lab, config: Config) -> tuple[Figures, list[Choice]]:
    """The rows of `supermasks`."""
    rows: Figures = {}
    choices: list[Choice] = []
    for kind in KINDS:
        trainer = lab.trainer(adam, mask_loss(lab, kind))
        for seed in range(config.seeds):
            weights = lab.init(jax.random.key(seed))
            everything = jax.tree.map(jnp.ones_like, prune.choose(weights, HALF))
            weights = tickets.treated(weights, everything, "constant" if kind.constant else "initial", "keep")
            masked: dict[float, tuple[Any, Any]] = {}
            for rate in config.mask_rates:
                first = (
                    tickets.popup_scores(weights, HALF, jax.random.key(1000 + seed))
                    if kind.popup
                    else tickets.bernoulli_logits(weights, HALF)
                )
                last = trainer(
                    first, {"weights": weights, "rate": jnp.float32(rate)}, seed=seed, epochs=config.mask_epochs
                )
                masks = tickets.popup_masks(weights, last, HALF) if kind.popup else tickets.bernoulli_masks(last)
                masked[rate] = (masks, tickets.masked(weights, masks, rescale=kind.rescale))
            best = config.mask_rates[0]
            if len(masked) > 1:
                scores = {rate: lab.accuracy(network) for rate, (_, network) in masked.items()}
                best, choice = lab.chosen(f"rate of {kind}, seed {seed}", scores)
                choices.append(choice)
            masks, network = masked[best]
            rows.setdefault(str(kind), {})[seed] = {
                "accuracy": lab.test(f"{kind}, seed {seed}", network),
                "left": 100 * (1 - prune.sparsity(masks)[""]),
            }
        print(f"{kind}: done", flush=True)
    trainer = lab.trainer(held)
    for seed in range(config.seeds):
        weights = lab.init(jax.random.key(seed))
        ones = jax.tree.map(jnp.ones_like, prune.choose(weights, HALF))
        arguments = {"masks": ones, "rate": jnp.float32(config.rate)}
        dense = trainer(weights, arguments, seed=seed, epochs=config.epochs)
        for name, params in {"no mask, initial weights": weights, "trained weights, dense": dense}.items():
            rows.setdefault(name, {})[seed] = {"accuracy": lab.test(f"{name}, seed {seed}", params), "left": 100.0}
    return rows, choices


TITLES = {"criteria": "Mask criteria", "signs": "Signs and sizes of a ticket's weights", "supermasks": "Supermasks"}
SOURCES = {
    "criteria": "Zhou et al. 2019 compare these criteria; for masks on untrained weights they report up to about 86%"
    " on MNIST, by `large_final_same_sign` with signed constants, at the best of many sparsities.",
    "signs": "Zhou et al. 2019 report that tickets keep most of their advantage when only the signs are kept, and lose"
    " it when signs are random.",
    "supermasks": "Zhou et al. 2019 report about 95.3% for masks learned as probabilities on MNIST, and 98.0% with"
    " their dynamic rescaling, on all of MNIST with more epochs.",
}


def main(config: Config) -> _results.Result:
    """Runs a table, and writes the result and the figure."""
    if config.table not in TITLES:
        raise UsageError(f"no table {config.table!r}: there are {', '.join(TITLES)}")
    lab, choices = Lab(config), list[Choice]()
    if config.table == "supermasks":
        by_row, choices = supermask_rows(lab, config)
        columns = [Column("accuracy", "accuracy"), Column("left", "weights left (%)", 1)]
    else:
        by_row = ticket_rows(lab, config)
        kinds = {"trained": "trained", "untrained": "not trained", "constant": "not trained, signed constants"}
        if config.table == "signs":
            del kinds["constant"]
        columns = [
            Column(key(what, s), f"{title}, {100 * s:g}% pruned")
            for what, title in kinds.items()
            for s in config.sparsities
        ]
    rows = [Row.measured(name, by_seed) for name, by_seed in by_row.items()]
    result = lab.result(
        name=f"prune_{config.table}_{config.model}_{config.data}",
        title=f"{TITLES[config.table]}: {config.model} on {config.data}",
        source=f"Test accuracy in %. {SOURCES[config.table]}",
        command=command("prune_masks", config),
        selection="learning rates of supermasks by validation accuracy; all else fixed beforehand"
        if choices
        else "nothing was chosen: rate, length and sparsities were fixed beforehand",
        columns=columns,
        rows=rows,
        choices=choices,
        notes=[lab.setting(), NOTES[config.table].format(epochs=config.mask_epochs)],
    )
    if config.table == "supermasks":
        lines = {row.name: [(row.ours["left"].mean, row.ours["accuracy"].values)] for row in rows}
        write(result, config, lines, "test accuracy (%)", x_title="weights left (%)", log=False)
    else:
        left = {s: 100 - 100 * s for s in config.sparsities}
        lines = {row.name: [(left[s], row.ours[key("trained", s)].values) for s in left] for row in rows}
        write(result, config, lines, "test accuracy (%)", x_title="weights left in each layer (%)")
    return result


NOTES = {
    "criteria": "One shot: each mask from the dense network before and after its training; the weights begin at their"
    " initial values.",
    "signs": "One shot, by the final magnitude; `reinitialise` draws biases anew too, all others begin with them as"
    " they were.",
    "supermasks": "Masks are learned for {epochs} epochs by Adam; learned"
    " probabilities are evaluated by the most probable mask. Biases stay at zero.",
}

if __name__ == "__main__":
    run_main(main, Config)
