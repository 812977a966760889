"""Two meanings of a normalisation that lost channels: `python -m experiments.prune_norms`.

A function divides a mean over 48 channels by 48. Cut to 24, it can go on dividing by 48, and is then exactly the whole
function with zeroed channels (`channels.shrink`); or divide by 24, as if it were built so small (`rederive=True`). The
statistics of layer and group normalisation differ between the two, and with them all that comes after. Measured on a
small transformer with layer normalisation and a convolutional network with group normalisation.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from experiments import _distilling, _results
from experiments._channels import whole
from experiments._command import run_main
from experiments._distilling import Room, command, curves, gathered, written
from experiments._results import Column
from jaxcompress.prune import channels


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Normalisations with the constants as traced, or with the widths that are left."""

    batch_size: int = 64
    epochs: int = 100
    rate: float = 0.05
    """The largest learning rate of SGD with momentum, which falls to zero along a cosine."""
    shift: int = 0
    """Pixels by which training images are moved at most; every other one is mirrored. 0: they are shown as they are."""
    ratios: tuple[float, ...] = (0.125, 0.25, 0.5)
    """The shares of all groups' units that go."""
    tune_epochs: int = 20
    tune_rate: float = 0.01


SHORT = Config(seeds=1, examples=128, epochs=2, ratios=(0.5,), tune_epochs=1)
"""A run of seconds, for tests; its accuracies mean little."""


class Tokens(nn.Module):
    """A transformer of two layers over patches of 2 x 2 pixels, with layer normalisation before each sublayer."""

    classes: int
    width: int = 48

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`."""
        x = nn.Conv(self.width, (2, 2), strides=2)(images).reshape(len(images), -1, self.width)
        x = x + self.param("place", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(axis=1))


class Grouped(nn.Module):
    """Three convolutions, each with group normalisation in four groups."""

    classes: int
    widths: tuple[int, ...] = (16, 32, 32)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """As `Tokens`."""
        x = images
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(width, (3, 3), strides=2 if i else 1)(x)))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


WAYS = {"as traced": False, "re-derived": True}
MODELS: dict[str, Any] = {"layer normalisation": Tokens, "group normalisation": Grouped}


def main(config: Config) -> _results.Result:
    """Measures every network, ratio and seed in both ways, and writes the result and the figure."""
    room, measured = Room(config), list[Any]()

    def test(name: str, network: Any, variables: Any) -> float:
        return network.accuracy(variables, *room.test_images(name))

    for title, make in MODELS.items():
        model = make(room.dataset.classes)
        network = whole(room, model, config)

        def measure(seed: int, title: str = title, model: Any = model, network: Any = network) -> Any:
            dense = network.trained(room.init(model, seed), seed=seed, epochs=config.epochs, rate=config.rate)
            figures = {"not cut": {"accuracy": test(f"{title}, seed {seed}", network, dense)}}
            scores = channels.norm(network.groups, dense, 2)
            for way, ratio in itertools.product(WAYS, config.ratios):
                small, cut = network.cut(channels.plan(network.groups, scores, ratio), dense, WAYS[way])
                tuned = small.trained(cut, seed=seed, epochs=config.tune_epochs, rate=config.tune_rate)
                where = f"{title}, {way}, {ratio:.1%}, seed {seed}"
                figures.setdefault(way, {})[f"bare_{100 * ratio:g}"] = test(f"{where}, at once", small, cut)
                figures[way][f"tuned_{100 * ratio:g}"] = test(f"{where}, tuned", small, tuned)
            return figures

        for seed in range(config.seeds):
            figures = room.kept(f"{title}, seed {seed}", partial(measure, seed))
            accuracy = figures.pop("not cut")["accuracy"]
            keys = list(next(iter(figures.values())))
            measured.append((f"{title}, not cut", seed, dict.fromkeys(keys, accuracy)))
            measured += [(f"{title}, {way}", seed, each) for way, each in figures.items()]
            print(f"{title}, seed {seed}: done", flush=True)
    rows = gathered(measured)
    columns = []
    for percent in (f"{100 * ratio:g}" for ratio in config.ratios):
        columns += [
            Column(f"bare_{percent}", f"{percent}% cut, at once"),
            Column(f"tuned_{percent}", f"{percent}% cut, fine-tuned"),
        ]
    result = room.result(
        name=f"prune_norms_{config.data}",
        title=f"Normalisations that lost channels: constants as traced or re-derived, on {config.data}",
        source="Test accuracy in %. No paper has this comparison: what modules do that read their sizes from their"
        " arrays is the second way.",
        command=command("prune_norms", config),
        selection="the rates were fixed beforehand; lengths and ratios after a shorter trial run at 50%, in which all"
        " was lost at once",
        columns=columns,
        rows=rows,
        pairs=[(column.key, f"{title}, as traced", f"{title}, re-derived") for title in MODELS for column in columns]
        if config.seeds > 1
        else [],
        notes=[
            f"{len(room.labels):,} training images, batches of {room.batch}, {config.epochs} epochs of SGD with"
            f" momentum 0.9 along a cosine from {config.rate:g}; fine-tuning {config.tune_epochs} epochs from"
            f" {config.tune_rate:g}. Units with the smallest L2 norms go, the same share of every group: channels of"
            " the residual stream, of the hidden layers, heads and their widths.",
        ],
    )
    lines = {
        f"{row.name}{', fine-tuned' if kind == 'tuned' else ''}": [
            (100 - 100 * ratio, row.ours[f"{kind}_{100 * ratio:g}"].values) for ratio in config.ratios
        ]
        for row in rows
        for kind in ("bare", "tuned")
        if "not cut" not in row.name
    }

    def draw(path: Any) -> None:
        curves(path, lines, x_title="units left (%)", y_title="test accuracy (%)", title=result.title, log=False)

    return written(result, config, draw)


if __name__ == "__main__":
    run_main(main, Config)
