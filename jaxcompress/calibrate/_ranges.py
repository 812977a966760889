"""The values of a weight's inputs: their range and their histogram, over batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxcompress.calibrate._watched import Watcher, chosen_weights, measured
from jaxcompress.paths import Rules


@dataclass(frozen=True)
class InputValues:
    """What values the inputs of one weight had. `*stacked` are the leading axes of weights that `scan` slices.

    Attributes:
      low: the smallest, float32 `[*stacked]`, of each batch: `[batches, *stacked]`.
      high: the largest, of each batch.
      bounds: of the histogram, `[*stacked, 2]`: the smallest and the largest of all, and zero.
      counts: the histogram, int64 `[*stacked, bins]`, of equally wide bins between the bounds; `None` without bins.
    """

    low: Float[np.ndarray, " batches *stacked"]
    high: Float[np.ndarray, " batches *stacked"]
    bounds: Float[np.ndarray, "*stacked 2"]
    counts: Int[np.ndarray, "*stacked bins"] | None


def input_values(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules[Any],
    *,
    bins: int = 0,
    symmetric: bool = False,
) -> dict[str, InputValues]:
    """For each weight that `rules` choose, the range of the inputs that meet it in `fn`, and their histogram.

    A weight meets an input in a product or as the kernel of a convolution, as in `input_statistics`; `fn` may use
    `jit`, `scan`, `jax.checkpoint` and `cond`, and here also what has no derivative. The batches may be sharded.

    Args:
      fn: `fn(params, batch)`.
      params: a tree of arrays and compressed leaves.
      batches: what `fn` takes; read twice if there are bins.
      rules: by path, whether a weight's inputs are measured: a value that is neither None nor False.
      bins: of the histogram; 0 for none.
      symmetric: histograms between minus and plus the largest magnitude.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError: no batches, or an iterator that can't be read twice; a weight that meets no input, or meets it where
        its values can't be had (a `while_loop`, some branches of a `cond`); values that are not finite.
    """
    names = chosen_weights(params, rules)
    if bins and iter(batches) is batches:
        raise ValueError("histograms read the batches twice: hand in a list of them, not an iterator")
    seen = measured(Watcher(fn, names, "range"), params, batches)
    found: dict[str, InputValues] = {}
    for name in names:
        ends = np.stack([batch[name] for batch in seen])
        if not np.all(np.isfinite(ends)):
            raise ValueError(f"the inputs of {name!r} are not finite, or there are none")
        low, high = np.minimum(ends[..., 0].min(0), 0), np.maximum(ends[..., 1].max(0), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        found[name] = InputValues(ends[..., 0], ends[..., 1], np.stack([low, high], axis=-1), None)
    if not bins:
        return found
    bounds = {name: jnp.asarray(values.bounds) for name, values in found.items()}
    counts = measured(Watcher(fn, names, "counts", bins), params, batches, bounds=bounds)
    return {
        name: replace(values, counts=np.asarray(sum(c[name].astype(np.int64) for c in counts)))
        for name, values in found.items()
    }
