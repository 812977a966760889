"""Codebooks and where they begin: `python -m experiments.quantize_codebooks`.

The experiment of Han et al. 2016 (section 5.2): the weights of a trained network share a few values a layer, found by
k-means from Forgy's, density-based and linear centroids (and the optimal ones); then the values are trained. A figure
shows the centroids of one layer over the histogram of its weights, before and after.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import _pruning, _results
from experiments._pruning import LAYERS, Lab, command, sgd, write
from experiments._results import Column, Row
from experiments.quantize_post_training import tested
from jaxcompress import compressed, quantize

STARTS = ("forgy", "density", "linear", "optimal")


@dataclass(frozen=True)
class Config(_pruning.Config):
    """Forgy's, density-based, linear and optimal centroids, before and after training them."""

    centroids: tuple[int, ...] = field(default=(16, 8, 4, 2))
    """Values a layer: 4, 3, 2 and 1 bits a weight."""
    tuning: int = 4
    """Epochs of training the values."""
    rate: float = 0.1
    tuning_rate: float = 0.001
    """Of the values, by Adam: each gets the gradients of its whole cluster, and clusters differ in size."""


SHORT = Config(seeds=2, epochs=3, tuning=1, centroids=(8, 2), batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""


def adam(arguments: Mapping[str, Any]) -> optax.GradientTransformation:
    """Adam, with a cosine from `rate` to zero over `total` steps."""
    rate, total = arguments["rate"], arguments["total"]
    return optax.adam(lambda step: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1))) / 2)


def main(config: Config) -> _results.Result:
    """Trains, shares weights, trains the values, and writes the result and the figures."""
    lab = Lab(config)
    plain = lab.trainer(sgd)

    def loss(params: Any, extras: Any, arguments: Any, images: jax.Array, labels: jax.Array, key: Any) -> Any:
        whole = eqx.combine(params, arguments["indices"])
        return compressed(lambda p: lab.loss(p, extras, arguments, images, labels, key)[0])(whole), extras

    tuner = lab.trainer(adam, loss)
    names = ["float", *(f"{start}{after}" for start in STARTS for after in ("", ", trained"))]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    layer = LAYERS[config.model][-2]
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    weights = np.zeros(0)
    for seed in range(config.seeds):
        begin = lab.init(jax.random.key(seed))
        trained = plain(begin, {"rate": jnp.float32(config.rate)}, seed=seed, epochs=config.epochs)
        found["float"][seed] = dict.fromkeys(map(str, config.centroids), lab.test(f"float, seed {seed}", trained))
        for start in STARTS:
            for k in config.centroids:
                small = quantize.convert(trained, {"kernel$": quantize.KMeans(k, start=start, seed=seed)})
                values, indices = eqx.partition(small, eqx.is_inexact_array)
                arguments = {"rate": jnp.float32(config.tuning_rate), "indices": indices}
                tuned = eqx.combine(tuner(values, arguments, seed=100 + seed, epochs=config.tuning), indices)
                for name, params in ((start, small), (f"{start}, trained", tuned)):
                    found[name].setdefault(seed, {})[str(k)] = tested(lab, f"{name}, {k}, seed {seed}", params)
                if seed == 0 and k == config.centroids[0]:
                    before, after = (np.sort(np.ravel(p[layer]["kernel"].centroids)) for p in (small, tuned))
                    drawn[start] = before, after
                    weights = np.ravel(trained[layer]["kernel"])
        print(f"seed {seed}: done", flush=True)
    result = lab.result(
        name=f"quantize_codebooks_{config.model}_{config.data}",
        title=f"Weights that share a few values: {config.model} on {config.data}",
        source="Test accuracy in %. Han et al. 2016, section 5.2, has AlexNet: linear beginnings were best there.",
        command=command("quantize_codebooks", config),
        selection="nothing was chosen: rates, lengths and numbers of values were fixed beforehand",
        columns=[Column(str(k), f"{k} values a layer") for k in config.centroids],
        rows=[Row.measured(name, by_seed) for name, by_seed in found.items()],
        notes=[
            lab.setting(),
            f"Then {config.tuning} epochs for the values and the biases, the indices staying. All layers share values.",
        ],
    )
    lines = {row.name: [(k, row.ours[str(k)].values) for k in config.centroids] for row in result.rows}
    write(result, config, lines, "test accuracy (%)", x_title="values a layer")
    centroid_figure(config, f"{result.name}_centroids", weights, drawn, layer)
    return result


def centroid_figure(
    config: Config, name: str, weights: np.ndarray, drawn: dict[str, tuple[np.ndarray, np.ndarray]], layer: str
) -> None:
    """The histogram of a layer's weights; below it each beginning's centroids, before (o) and after training (x)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no plotting on import, and no global state
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(8, 5), layout="constrained"))
    top, below = canvas.figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.hist(weights, bins=200, color="0.7")
    top.set_ylabel("weights")
    top.set_title(f"{layer} of {config.model} on {config.data}, seed 0: {config.centroids[0]} values")
    for i, (before, after) in enumerate(drawn.values()):
        below.plot(before, np.full(before.shape, -i + 0.12), "o", markersize=4, fillstyle="none", color=f"C{i}")
        below.plot(after, np.full(after.shape, -i - 0.12), "x", markersize=4, color=f"C{i}")
    below.set_yticks([-i for i in range(len(drawn))], list(drawn))
    below.set_xlabel("weight (o: k-means, x: trained)")
    path = config.out / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=120)
    print(f"written: {path}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
