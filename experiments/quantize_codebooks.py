"""Codebooks and where they begin: `python -m experiments.quantize_codebooks`.

The experiment of Han et al. 2016 (section 5.2): the weights of a trained network share a few values a layer, found by
k-means from Forgy's, density-based and linear centroids (and the optimal ones); then the values are trained, from the
labels or from the float network's logits. A figure shows the centroids of one layer over the histogram of its weights,
before and after.
"""

from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from experiments import _quantizing, _results
from experiments._command import run_main
from experiments._pruning import command, write
from experiments._quantizing import adam, keyed, lab_for, taught
from experiments._results import Row
from jaxcompress import compressed, quantize
from jaxcompress.arrays import is_leaf
from jaxcompress.paths import named_leaves

STARTS = ("forgy", "density", "linear", "optimal")
TUNED = {", trained": 0.0, ", distilled": 1.0}
"""How the values are trained, and the share of the float network's logits in it."""


@dataclass(frozen=True)
class Config(_quantizing.Config):
    """Forgy's, density-based, linear and optimal centroids, before and after training them."""

    centroids: tuple[int, ...] = field(default=(16, 8, 4, 2))
    """Values a layer: 4, 3, 2 and 1 bits a weight."""
    tuning: int = 4
    """Epochs of training the values."""
    values_rate: float = 0.001
    """Of the values, by Adam: each gets the gradients of its whole cluster, and clusters differ in size."""
    temperature: float = 4.0
    """Of the distillation; the labels have no part in it."""


SHORT = Config(seeds=2, epochs=3, tuning=1, centroids=(8, 2), batch_size=64)
"""A run of seconds, for tests; its accuracies mean little."""


def main(config: Config) -> _results.Result:
    """Trains, shares weights, trains the values, and writes the result and the figures."""
    lab = lab_for(config)

    of_whole = taught(lab, config.temperature, compressed(lab.apply))

    def loss(params: Any, extras: Any, arguments: Any, *batch: Any) -> Any:
        return of_whole(eqx.combine(params, arguments["indices"]), extras, arguments, *batch)

    tuner = lab.trainer(adam, loss)
    names = ["float", *(f"{start}{after}" for start in STARTS for after in ("", *TUNED))]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    layer = lab.drawn_layer
    drawn: dict[str, tuple[np.ndarray, ...]] = {}
    weights = np.zeros(0)
    for seed in range(config.seeds):
        trained = lab.trained(seed)
        in_float = lab.tested(f"float, seed {seed}", trained)
        found["float"][seed] = {key: v for k in config.centroids for key, v in keyed(str(k), in_float).items()}
        for start in STARTS:
            for k in config.centroids:
                small = quantize.convert(trained, {"kernel$": quantize.KMeans(k, start=start, seed=seed)})
                values, indices = eqx.partition(small, eqx.is_inexact_array)
                arguments = {"rate": jnp.float32(config.values_rate), "indices": indices, "teacher": trained}
                ways = {"": small}
                for after, share in TUNED.items():
                    given = {**arguments, "share": jnp.float32(share)}
                    tuned = tuner(values, given, seed=100 + seed, epochs=config.tuning)
                    ways[after] = eqx.combine(tuned, indices)
                for after, params in ways.items():
                    figures = lab.tested(f"{start}{after}, {k}, seed {seed}", params)
                    found[f"{start}{after}"].setdefault(seed, {}).update(keyed(str(k), figures))
                if seed == 0 and k == config.centroids[0]:
                    drawn[start] = tuple(
                        np.sort(np.ravel(dict(named_leaves(ways[way], is_leaf))[layer].centroids))
                        for way in ("", ", trained")
                    )
                    weights = np.ravel(dict(named_leaves(trained))[layer])
        print(f"seed {seed}: done", flush=True)
    result = lab.result(
        name=f"quantize_codebooks_{config.model}_{config.data}",
        title=f"Weights that share a few values: {config.model} on {config.data}",
        source=f"{lab.measured} Han et al. 2016, section 5.2, has AlexNet: linear beginnings were best there.",
        command=command("quantize_codebooks", config),
        selection="nothing was chosen: rates, lengths and numbers of values were fixed beforehand",
        columns=lab.columns({str(k): f"{k} values a layer" for k in config.centroids}),
        rows=[Row.measured(name, by_seed) for name, by_seed in found.items()],
        notes=[
            lab.setting(),
            f"Then {config.tuning} epochs for the values and the biases, the indices staying. All layers share values. "
            f"Distilled: from the float network alone, at temperature {config.temperature:g}.",
        ],
    )
    lines = {row.name: [(k, row.ours[str(k)].values) for k in config.centroids] for row in result.rows}
    write(result, config, lines, "test accuracy (%)", x_title="values a layer")
    centroid_figure(config, f"{result.name}_centroids", weights, drawn, layer)
    return result


def centroid_figure(
    config: Config, name: str, weights: np.ndarray, drawn: dict[str, tuple[np.ndarray, ...]], layer: str
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
    run_main(main, Config)
