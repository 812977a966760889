"""Cutting channels out of a residual network: `python -m experiments.prune_channels --data-dir DIR`.

A ResNet-56 for CIFAR-10 is cut to half its operations, by every score of `prune.channels`, and measured at once, after
fine-tuning, and after fine-tuning under the soft targets of the whole network. Beside it stand what such figures are to
be judged by: the same architecture from random weights, for as many epochs and for as many operations (Liu et al. 2019,
"Rethinking the Value of Network Pruning"), the cut network rewound to an early epoch and trained again, cutting in
rounds, and network slimming from end to end. The defaults are a setting for a GPU; the README has a smaller one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from experiments import _distilling, _results
from experiments._channels import Network, Scores, Variables, drawn_for, whole
from experiments._command import UsageError, run_main
from experiments._distilling import Room, bars, command, gathered, written
from experiments._resnets import Resnet
from experiments._results import Column
from jaxcompress.prune import channels


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Channels cut out of a residual network."""

    data: str = "cifar10"
    examples: int = 50_000
    tests: int = 10_000
    """At most so many test images: the first of the split, which is mixed."""
    batch_size: int = 128
    epochs: int = 160
    rate: float = 0.1
    """The largest learning rate of SGD with momentum, which falls to zero along a cosine."""
    shift: int = 4
    """Pixels by which training images are moved at most; every other one is mirrored. 0: they are shown as they are."""
    blocks: int = 9
    """Of each stage."""
    widths: tuple[int, int, int] = (16, 32, 64)
    """Channels of the stages."""
    stem_stride: int = 1
    flops: float = 0.5
    """The share of operations that is left."""
    tune_epochs: int = 40
    tune_rate: float = 0.02
    scored: int = 1024
    """Training images that gradients and activations are taken from; of squared gradients an eighth."""
    wide: tuple[str, ...] = ("l2", "lamp", "taylor")
    """Scores that are also ranked over all groups together."""
    rewound: tuple[str, ...] = (
        "l1", "l2", "scale", "geometric_median", "taylor", "hessian", "activation", "apoz", "random",
    )  # fmt: skip
    """Scores whose choice is also trained again from an early epoch."""
    rewind: int = 4
    """That epoch."""
    rounds: int = 4
    """Of cutting and tuning in turn, together as long as one fine-tuning."""
    strength: float = 1e-4
    """Of the penalty on scales, for slimming."""


SHORT = Config(
    data="digits", examples=200, tests=200, batch_size=50, epochs=2, shift=0, blocks=1, widths=(4, 6, 8),
    tune_epochs=1, scored=50, wide=("taylor",), rewound=("l1",), rewind=1, rounds=2, seeds=1,
)  # fmt: skip
"""A run of seconds on digits, for tests; its accuracies mean little."""


def scores_of(network: Network, variables: Variables, config: Config, seed: int) -> dict[str, Callable[[], Scores]]:
    """By name, how units are scored. Residual streams are made by several layers, whose scores are added up."""
    groups, n, images = network.groups, config.scored, network.room.images
    batches = [images[i : i + 64] for i in range(0, min(n, len(images)) - 63, 64)] or [images[:n]]

    def activation(statistic: str) -> Scores:
        return channels.activation(groups, network.evaluate, variables, batches, statistic)

    return {
        "l1": lambda: channels.norm(groups, variables),
        "l2": lambda: channels.norm(groups, variables, 2),
        "scale": lambda: channels.scale(groups, variables, "scale$"),
        "geometric_median": lambda: channels.geometric_median(groups, variables),
        "taylor": lambda: channels.taylor(groups, variables, network.gradients(variables, n)),
        "hessian": lambda: channels.hessian(groups, variables, network.squared_gradients(variables, n // 8)),
        "lamp": lambda: channels.lamp(groups, variables),
        "activation": lambda: activation("mean"),
        "apoz": lambda: activation("active"),
        "random": lambda: channels.random(groups, jax.random.key(100 + seed)),
    }


def together(name: str) -> str:
    """The row of a score that ranks all layers together."""
    return f"{name}, all layers together"


class Bench:
    """The network of an experiment, its cuts, and what is measured of them."""

    def __init__(self, config: Config) -> None:
        self.config, self.room = config, Room(config)
        classes = self.room.dataset.classes
        self.model = Resnet(config.blocks, config.widths, classes, config.stem_stride)
        self.network = whole(self.room, self.model, config)
        self.operations = channels.flops(self.network.groups)

    def test(self, name: str, network: Network, variables: Variables) -> float:
        """Per cent of the test images, which are read once for each final model."""
        images, labels = self.room.test_images(name)
        return network.accuracy(variables, images[: self.config.tests], labels[: self.config.tests])

    def first(self, seed: int) -> Variables:
        """Initial variables."""
        return self.room.init(self.model, seed)

    def dense(self, seed: int, stop: int | None = None) -> Variables:
        """The whole network, trained; or as it was after so many epochs."""
        what = f"whole, seed {seed}" + ("" if stop is None else f", epoch {stop}")
        return self.room.trained(what, self.model, lambda: self._full(self.network, self.first(seed), seed, stop=stop))

    def slim(self, seed: int, stop: int | None = None) -> Variables:
        """The whole network, trained under the penalty on scales; or as it was after so many epochs."""
        penalty = self._penalty()
        what = f"slimmed, seed {seed}" + ("" if stop is None else f", epoch {stop}")
        return self.room.trained(
            what, self.model, lambda: self._full(self.network, self.first(seed), seed, penalty=penalty, stop=stop)
        )

    def _penalty(self) -> Any:
        if not hasattr(self, "_made"):  # made once, so that all seeds share a program
            self._made = channels.slimming(self.network.groups, self.config.strength, "scale$")
        return self._made

    def _full(self, network: Network, variables: Variables, seed: int, epochs: int = 0, **options: Any) -> Variables:
        c = self.config
        return network.trained(variables, seed=seed, epochs=epochs or c.epochs, rate=c.rate, **options)

    def tuned(self, network: Network, variables: Variables, seed: int, epochs: int = 0, teacher: Any = None) -> Any:
        """Fine-tuned, by labels or by a teacher."""
        c = self.config
        return network.trained(
            variables, seed=1000 + seed, epochs=epochs or c.tune_epochs, rate=c.tune_rate, teacher=teacher
        )

    def plan(self, network: Network, scores: Scores, share: float, scope: Any = "local", normal: Any = None) -> Any:
        """To a share of the operations."""
        return channels.plan(network.groups, scores, flops=share, scope=scope, normalize=normal)

    def local(self, name: str, seed: int) -> channels.Plan:
        """The cut by a score, each group losing the same share."""
        return self.plan(self.network, self._scores(name, seed), self.config.flops)

    def together(self, name: str, seed: int) -> channels.Plan:
        """The cut by a score that ranks all layers together."""
        normal = "mean" if name in ("l1", "l2") else None
        return self.plan(self.network, self._scores(name, seed), self.config.flops, "global", normal)

    def _scores(self, name: str, seed: int) -> Scores:
        return scores_of(self.network, self.dense(seed), self.config, seed)[name]()

    def size(self, network: Network) -> dict[str, float]:
        """What is left, in per cent."""
        return {
            "flops": 100 * channels.flops(network.groups) / self.operations,
            "parameters": 100 * network.parameters / self.network.parameters,
        }

    def by_score(self, seed: int) -> list[tuple[str, int, Mapping[str, float]]]:
        """Each score's cut: at once, fine-tuned, distilled."""
        dense, rows = self.dense(seed), []
        named = scores_of(self.network, dense, self.config, seed)
        plans = {name: partial(self.local, name, seed) for name in named if name != "lamp"}  # it ranks as L2 does there
        plans |= {together(name): partial(self.together, name, seed) for name in self.config.wide}
        for title, plan in plans.items():

            def measure(title: str = title, plan: Any = plan) -> Any:
                network, cut = self.network.cut(plan(), dense)
                where = f"{title}, seed {seed}"
                return {
                    "at_once": self.test(f"{where}, at once", network, cut),
                    "tuned": self.test(f"{where}, tuned", network, self.tuned(network, cut, seed)),
                    "distilled": self.test(
                        f"{where}, distilled",
                        network,
                        self.tuned(network, cut, seed, teacher=(self.network, dense)),
                    ),
                    **self.size(network),
                }

            rows.append((title, seed, self.room.kept(f"{title}, seed {seed}", measure)))
        return rows

    def beside(self, seed: int, tuned: Mapping[str, float]) -> list[tuple[str, int, Mapping[str, float]]]:
        """What fine-tuned networks are to be judged by. `tuned`: accuracies by score, from `by_score`."""
        c, dense, rows = self.config, self.dense(seed), list[tuple[str, int, Mapping[str, float]]]()

        def row(name: str, before: float, of_cut: float, measure: Callable[[], tuple[Network, Variables]]) -> None:
            """A row whose training took epochs of the whole network and of the cut one."""

            def measured() -> dict[str, float]:
                network, variables = measure()
                return {"accuracy": self.test(f"{name}, seed {seed}", network, variables), **self.size(network)}

            figures = self.room.kept(f"{name}, seed {seed}", measured)
            rows.append((name, seed, {**figures, "epochs": before + of_cut * figures["flops"] / 100}))

        def rewound(title: str, plan: channels.Plan, early: Variables) -> None:
            small = self.network.smaller(plan)
            row(f"{title}, rewound to epoch {c.rewind}, trained again", c.epochs, c.epochs,
                lambda: (small, self._full(small, plan.apply(early), seed)))  # fmt: skip

        def from_random(title: str, plan: channels.Plan) -> None:
            small, fresh = self.network.smaller(plan), drawn_for(self.first(2000 + seed), plan)
            longer = round(100 * c.epochs / self.size(small)["flops"])
            row(f"{title}random weights, same epochs", 0, c.epochs, lambda: (small, self._full(small, fresh, seed)))
            row(f"{title}random weights, same operations", 0, longer,
                lambda: (small, self._full(small, fresh, seed, epochs=longer)))  # fmt: skip

        def fine_tuned(title: str, size: Mapping[str, float]) -> None:
            epochs = c.epochs + c.tune_epochs * size["flops"] / 100
            rows.append((f"{title}, fine-tuned", seed, {"accuracy": tuned[title], **size, "epochs": epochs}))

        row("not cut", c.epochs, 0, lambda: (self.network, dense))
        uniform, early = self.local("l1", seed), self.dense(seed, c.rewind)
        for name in c.rewound:
            fine_tuned(name, self.size(self.network.smaller(uniform)))
        row(f"l1 in {c.rounds} rounds, fine-tuned", c.epochs, c.tune_epochs, lambda: self.in_rounds(dense, seed))
        for name in c.rewound:
            rewound(name, self.local(name, seed), early)
        from_random("", uniform)  # every score leaves the same widths
        for name in c.wide:
            title, plan = together(name), self.together(name, seed)
            fine_tuned(title, self.size(self.network.smaller(plan)))
            rewound(title, plan, early)
            from_random(f"{title}: its architecture, ", plan)
        slim = self.slim(seed)
        row("slimming, not cut", c.epochs, 0, lambda: (self.network, slim))
        plan = self.plan(self.network, channels.scale(self.network.groups, slim, "scale$"), c.flops, "global")
        small, cut = self.network.cut(plan, slim)
        row("slimming, cut", c.epochs, 0, lambda: (small, cut))
        row("slimming, cut, fine-tuned", c.epochs, c.tune_epochs, lambda: (small, self.tuned(small, cut, seed)))
        rewound("slimming", plan, self.slim(seed, c.rewind))
        from_random("slimming: its architecture, ", plan)
        return rows

    def in_rounds(self, dense: Variables, seed: int) -> tuple[Network, Variables]:
        """Cut and tuned in turn, each time by the norms that the tuning left."""
        c, network, variables = self.config, self.network, dense
        for turn in range(c.rounds):
            left = self.operations * c.flops ** ((turn + 1) / c.rounds)
            share = left / channels.flops(network.groups)
            plan = self.plan(network, channels.norm(network.groups, variables), min(share, 1.0))
            network, variables = network.cut(plan, variables)
            variables = self.tuned(network, variables, seed + 100 * turn, max(1, c.tune_epochs // c.rounds))
        return network, variables


def main(config: Config) -> tuple[_results.Result, _results.Result]:
    """Measures every arm and seed, and writes the results and their figures."""
    bench, scores, others = Bench(config), list[Any](), list[Any]()
    known = scores_of(bench.network, {}, config, 0)
    if unknown := {*config.wide, *config.rewound} - set(known) | {*config.rewound} & {"lamp"}:
        raise UsageError(f"no score {', '.join(sorted(unknown))}: there are {', '.join(known)} (lamp in --wide alone)")
    for seed in range(config.seeds):
        scores += bench.by_score(seed)
        print(f"scores, seed {seed}: done", flush=True)
        tuned = {name: figures["tuned"] for name, at, figures in scores if at == seed}
        others += bench.beside(seed, tuned)
        print(f"beside, seed {seed}: done", flush=True)
    c, room = config, bench.room
    network = f"ResNet-{6 * c.blocks + 2} of {c.widths} channels"
    ways = (
        f"{min(c.examples, len(room.labels)):,} training images"
        f"{f', moved by up to {c.shift} pixels and mirrored' if c.shift else ''}, batches of"
        f" {room.batch}, {c.epochs} epochs of SGD with momentum 0.9 along a cosine from {c.rate:g}; fine-tuning"
        f" {c.tune_epochs} epochs from {c.tune_rate:g}; soft targets at temperature 4 with weight 0.9. The first"
        f" {min(c.tests, len(room.dataset.test)):,} test images. First convolution with stride {c.stem_stride}."
    )
    shared = {
        "command": command("prune_channels", config),
        "selection": "rates, lengths, sizes and the penalty were fixed beforehand",
    }
    sizes = [Column("flops", "operations left (%)", 1), Column("parameters", "parameters left (%)", 1)]
    pairs = [("tuned", name, "random") for name in ("l1", "taylor")] if c.seeds > 1 else []
    first = room.result(
        name=f"prune_channels_scores_{c.data}",
        title=f"Channels cut by every score: {network} on {c.data}",
        source="Test accuracy in %. Li et al. 2017 cut 27.6% of ResNet-56's operations on CIFAR-10 (93.04 to 93.06);"
        " Torch-Pruning's table has 93.53 to 93.77 at 2.13 times fewer.",
        columns=[
            Column("at_once", "at once"),
            Column("tuned", "fine-tuned"),
            Column("distilled", "fine-tuned with soft targets"),
            *sizes,
        ],
        rows=gathered(scores),
        pairs=pairs + ([("distilled", "l1", "random")] if pairs else []),
        notes=[
            ways,
            "All groups lose the same share, but where all layers are ranked together (norms over their layer's mean)."
            " The channels of a residual stream are a group too: they go from every layer of the stage.",
        ],
        **shared,
    )
    where = f"{network}, {c.data}"
    rewound = f"rewound to epoch {c.rewind}, trained again"
    second = room.result(
        name=f"prune_channels_beside_{c.data}",
        title=f"What a cut network is to be judged by: {network} on {c.data}",
        source="Test accuracy in %. Liu et al. 2019 find, for ResNet-56 cut as Li et al. do, that random weights reach"
        " the fine-tuned network's accuracy, and do better with as many operations of training.",
        columns=[
            Column("accuracy", "accuracy"),
            Column("epochs", "training, in epochs of the whole network", 1),
            *sizes,
        ],
        rows=gathered(others),
        pairs=[
            ("accuracy", "random weights, same epochs", "l1, fine-tuned"),
            ("accuracy", "random weights, same operations", "l1, fine-tuned"),
            ("accuracy", f"l1, {rewound}", "random weights, same epochs"),
            ("accuracy", "slimming, cut, fine-tuned", "l1, fine-tuned"),
            ("accuracy", "slimming: its architecture, random weights, same operations", "slimming, cut, fine-tuned"),
            ("accuracy", f"slimming, {rewound}", "slimming, cut, fine-tuned"),
        ]
        if c.seeds > 1 and "l1" in c.rewound
        else [],
        notes=[
            ways,
            f"Random weights are drawn as for a network of these widths; rewound ones are those of epoch {c.rewind} of"
            " the whole network's training, for slimming under the penalty. Both are trained along the whole training's"
            " schedule; `same operations` has as many epochs more as an epoch is cheaper. Slimming: an L1 penalty of"
            f" {c.strength:g} on all scales that channels pass, cut by the scales of all layers together.",
        ],
        **shared,
    )
    written(first, c, lambda path: bars(path, first.rows, "tuned", x_title="accuracy, fine-tuned (%)", title=where))
    written(second, c, lambda path: bars(path, second.rows, "accuracy", x_title="accuracy (%)", title=where))
    return first, second


if __name__ == "__main__":
    run_main(main, Config)
