"""The counter-experiment: the pruned architecture trained from random weights, and how long that may take."""

import math
from typing import Any

import jax
import numpy as np

from jaxcompress import paths
from jaxcompress.prune.tickets._trees import beside


def multiply_adds(params: Any, masks: Any, positions: paths.Rules[int], *, units: bool = False) -> int:
    """Multiply-adds of a forward pass of one example, counted from masks.

    Two honest counts, which differ a lot. By default each kept weight counts: what a machine that skips every zero at
    no cost would do; for masks of single weights it is a bound that today's dense hardware does not come near. With
    `units=True` a layer counts as the smallest dense layer that holds its kept weights (along each axis, only the
    indices with any weight left): what ordinary hardware gains once whole neurons or filters are cut out
    (`prune.channels`). For single weights it is next to nothing until a layer is very sparse; for a mask of whole
    neurons it needs the masks of the next layer's inputs too, or these count as dense.

    Additions of biases, normalisation and activations are not counted; a training step takes about three times this,
    dense or sparse, so ratios hold for training as well.

    Args:
      params: the weights, for the shapes of layers without a mask.
      masks: concrete bool masks by path, True is kept; `None` for the dense network.
      positions: by path, at how many places a layer's weights are used: 1 for a dense kernel, output height times
        width for a convolution. Parameters that no rule matches (biases) don't count.
      units: see above.
    """
    named = paths.named_leaves(params)
    places = paths.match(positions, [name for name, _ in named], 0)
    total = 0
    for (_, x), mask, used in zip(named, beside(params, masks, "mask"), places, strict=True):
        if mask is None or not used:
            total += used * math.prod(x.shape)
        elif units:
            total += used * _smallest(np.asarray(jax.device_get(mask)))
        else:
            total += used * int(np.count_nonzero(jax.device_get(mask)))
    return total


def scratch_steps(steps: int, dense: int, pruned: int, *, most: float | None = 2.0) -> int:
    """How many steps the pruned network may train for the computation of `steps` of the dense one (scratch-B).

    Liu et al. 2019, "Rethinking the Value of Network Pruning". Scratch-E needs no function: it takes `steps` again.
    What counts as computation decides the answer: say beside a result which count of `multiply_adds` it is.

    Args:
      steps: of the dense training, at least 1.
      dense: multiply-adds of the dense network.
      pruned: of the pruned one, at least 1 and at most `dense`.
      most: the longest training as a multiple of `steps`; theirs is 2, `None` is no limit.

    Returns:
      `steps * dense / pruned`, rounded down, within `most`.

    Raises:
      ValueError: a number is out of its range.
    """
    if steps < 1 or not 1 <= pruned <= dense:
        raise ValueError(f"want steps >= 1 and 1 <= pruned <= dense multiply-adds, got {steps}, {pruned} and {dense}")
    if most is not None and most < 1:
        raise ValueError(f"scratch-B takes at least the steps of scratch-E: most must be 1 or more, got {most}")
    full = steps * dense // pruned
    return full if most is None else min(full, math.floor(steps * most))


def _smallest(mask: np.ndarray) -> int:
    axes = range(mask.ndim)
    return math.prod(int(np.count_nonzero(mask.any(axis=tuple(a for a in axes if a != axis)))) for axis in axes)
