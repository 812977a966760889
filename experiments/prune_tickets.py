"""Winning tickets beside other ways to train the same masks: `python -m experiments.prune_tickets`.

Iterative magnitude pruning with rewinding to the initialisation, at a small and a large learning rate. At each level
the mask that it found is trained again from other weights: drawn anew for as many epochs (the random
re-initialisation of Frankle & Carbin 2019, which is scratch-E of Liu et al. 2019), drawn anew for as much computation
(scratch-B), and from the trained weights (fine-tuning). `--structured` prunes whole neurons and filters.

Two claims are tested: that tickets win only at a small learning rate, and that they win for single weights but not
for whole units (Liu et al. 2019, section 6).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _pruning, _results
from experiments._command import run_main
from experiments._pruning import LAYERS, Lab, Trainer, command, completed, coupled, held, write
from experiments._results import Column, Row
from experiments._statistics import paired_difference
from jaxcompress import prune
from jaxcompress.prune import tickets


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Winning tickets against random re-initialisation, fine-tuning and scratch-B."""

    structured: bool = False
    """Prune whole neurons and filters instead of single weights."""
    rates: tuple[float, ...] = (0.01, 0.1)
    """The small and the large learning rate."""
    prune_rate: float = 0.4
    """The part of what is left that a round prunes."""
    rounds: int = 9


SHORT = Config(seeds=2, epochs=2, rates=(0.1,), rounds=2, batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""

ARMS = {
    "ticket": "ticket",
    "scratch_e": "re-initialised (scratch-E)",
    "scratch_b": "scratch-B",
    "tuned": "fine-tuned",
}
COLUMNS = (
    Column("left", "multiply-adds left (%)", 1),
    Column("dense", "dense"),
    *(Column(key, title) for key, title in ARMS.items()),
    Column("gain", "ticket - re-initialised"),
    Column("early_dense", "dense after epoch 1"),
    Column("early_ticket", "ticket after epoch 1"),
    Column("early_scratch_e", "re-initialised after epoch 1"),
    Column("epochs_b", "epochs of scratch-B", 0),
)


def levels(config: Config, layers: tuple[str, ...]) -> list[Any]:
    """The rules of each round: the last layer loses half as much (Frankle & Carbin 2019), and no units."""
    rate, last = config.prune_rate, f"{layers[-1]}/kernel"
    if not config.structured:
        return list(tickets.levels({last: rate / 2, "kernel$": rate}, config.rounds))
    neurons = tickets.levels({"Dense_.*/kernel": rate}, config.rounds, lambda s: prune.vectors(s, axis=-2))
    filters = tickets.levels({"Conv_.*/kernel": rate}, config.rounds, prune.filters)
    return [
        {last: None, **(of_conv if "Conv_0" in layers else {}), **of_dense}
        for of_conv, of_dense in zip(filters, neurons, strict=True)
    ]


class Run:
    """One seed at one learning rate."""

    def __init__(self, lab: Lab, trainer: Trainer, config: Config, seed: int, rate: float) -> None:
        self.lab, self.trainer, self.config, self.seed, self.rate = lab, trainer, config, seed, rate
        self.layers = LAYERS[config.model]
        self.initial = lab.init(jax.random.key(seed))
        self.positions = lab.positions(self.layers)

    def go(self) -> dict[str, dict[str, float]]:
        """The figures of each level, by its name."""
        c, found, rows = self.config, None, {}
        early: dict[int, float] = {}

        def train(params: Any, masks: Any, number: int) -> Any:
            params, early[number] = self.trained(params, masks, c.epochs)
            return params

        for now in tickets.search(train, self.initial, levels(c, self.layers)):
            if found is None:
                dense = self.test("dense", now.params)
            else:
                part = 100 * (1 - c.prune_rate) ** now.number
                name = f"rate {self.rate:g}, {part:.1f} % of {'units' if c.structured else 'weights'}"
                rows[name] = {
                    "dense": dense, "early_dense": early[0], "early_ticket": early[now.number],
                    **self.level(name, now, found.params),
                }  # fmt: skip
            found = now
        return rows

    def level(self, name: str, now: tickets.Round, before: Any) -> dict[str, float]:
        """The figures of one mask, trained from every start."""
        c, masks = self.config, self.full(now.masks)
        left, whole = (
            tickets.multiply_adds(self.initial, m, self.positions, units=c.structured) for m in (masks, None)
        )
        longer = tickets.scratch_steps(c.epochs, whole, left)
        fresh = tickets.treated(
            self.initial, now.masks, "resample", "own", key=jax.random.key(1000 + self.seed), init=self.lab.init
        )
        drawn, early = self.trained(fresh, now.masks, c.epochs)
        tuned, _ = self.trained(tickets.treated(before, now.masks), now.masks, c.epochs)
        figures = {
            "left": 100 * left / whole,
            "epochs_b": float(longer),
            "early_scratch_e": early,
            "ticket": self.test(f"ticket, {name}", now.params),
            "scratch_e": self.test(f"re-initialised, {name}", drawn),
            "tuned": self.test(f"fine-tuned, {name}", tuned),
        }
        figures["scratch_b"] = figures["scratch_e"]  # where the same computation is the same length
        if longer > c.epochs:
            figures["scratch_b"] = self.test(f"scratch-B, {name}", self.trained(fresh, now.masks, longer)[0])
        return {**figures, "gain": figures["ticket"] - figures["scratch_e"]}

    def full(self, masks: Any) -> Any:
        """The masks that are trained under: those of units take their biases and followers along."""
        return coupled(completed(masks, self.initial), self.layers) if self.config.structured else masks

    def trained(self, params: Any, masks: Any, epochs: int) -> tuple[Any, float]:
        """Trained parameters, and the accuracy after the first epoch on 1,000 validation images.

        The order of the examples is the same for every arm of a seed.
        """
        curve: list[float] = []
        arguments = {"masks": self.full(masks), "rate": jnp.float32(self.rate)}
        params = self.trainer(params, arguments, seed=self.seed, epochs=epochs, curve=curve)
        return params, curve[0]

    def test(self, what: str, params: Any) -> float:
        """Test accuracy of a final model."""
        return self.lab.test(f"{what}, rate {self.rate:g}, seed {self.seed}", params)


def main(config: Config) -> _results.Result:
    """Runs every seed and rate, and writes the result and the figure."""
    lab = Lab(config)
    trainer = lab.trainer(held)
    by_row: dict[str, dict[int, dict[str, float]]] = {}
    for rate in config.rates:
        for seed in range(config.seeds):
            for name, figures in Run(lab, trainer, config, seed, rate).go().items():
                by_row.setdefault(name, {})[seed] = figures
            print(f"rate {rate:g}, seed {seed}: done", flush=True)
    rows = [Row.measured(name, by_seed) for name, by_seed in by_row.items()]
    kind = "units" if config.structured else "weights"
    result = lab.result(
        name=f"prune_tickets_{kind}_{config.model}_{config.data}",
        title=f"Winning tickets, pruning {kind}: {config.model} on {config.data}",
        source="Test accuracy in %. Frankle & Carbin 2019 report LeNet-300-100 tickets that match the dense network"
        " down to 3.6% of the weights and learn faster, and re-initialised ones that do worse; Liu et al. 2019 that"
        " tickets do better than random weights at a small learning rate only, and only for single weights. Their"
        " figures are not repeated here: other lengths and subsets of the data.",
        command=command("prune_tickets", config),
        selection="nothing was chosen: both learning rates, all lengths and levels were fixed beforehand",
        columns=COLUMNS,
        rows=rows,
        notes=[lab.setting(), *verdicts(rows, config), COUNTS[config.structured], TUNED],
    )
    lines = {name: line for key in ("dense", *ARMS) for name, line in points(rows, key).items()}
    write(result, config, lines, "test accuracy (%)", x_title="multiply-adds left (%)")
    return result


COUNTS = {
    True: "Multiply-adds are those of the smaller dense network that is left once the units are cut out.",
    False: "Multiply-adds count each weight that is left, as a machine that skips zeros would; on dense hardware a mask"
    " of single weights saves nothing, and scratch-B is scratch-E.",
}


TUNED = (
    "Fine-tuned weights begin where the round before ended, so they have been trained for longer than all others."
    " Weights drawn anew have the dense network's distribution. Accuracies after epoch 1 are of 1,000 validation images"
    " (or as many as there are)."
)


def verdicts(rows: list[Row], config: Config) -> list[str]:
    """The difference between ticket and re-initialisation at each rate, over all levels, paired by seed."""
    notes = []
    for rate in config.rates:
        gains = [row.ours["gain"].values for row in rows if row.name.startswith(f"rate {rate:g},")]
        per_seed = [sum(values) / len(values) for values in zip(*gains, strict=True)]
        if len(per_seed) > 1:
            d = paired_difference(per_seed, [0.0] * len(per_seed))
            notes.append(
                f"Ticket minus re-initialised at rate {rate:g}, mean over all levels: {d.mean:+.2f} points,"
                f" 95% interval [{d.low:+.2f}, {d.high:+.2f}] ({d.count} seeds)."
            )
    return notes


def points(rows: list[Row], key: str) -> dict[str, list[tuple[float, tuple[float, ...]]]]:
    """For the figure: of each rate, the values of a column against what is left."""
    lines: dict[str, list[tuple[float, tuple[float, ...]]]] = {}
    for row in rows:
        rate = row.name.split(",")[0]
        lines.setdefault(f"{ARMS.get(key, key)}, {rate}", []).append((row.ours["left"].mean, row.ours[key].values))
    return lines


if __name__ == "__main__":
    run_main(main, Config)
