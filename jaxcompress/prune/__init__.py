"""Pruning: set the weights that matter least to zero, and keep them there, while an optimizer trains the rest.

Four small pieces meet in one optax transformation, `sparsify`, which stands last in `optax.chain` and whose updates
leave pruned weights at exactly zero, with no call to remember in the training loop:

* a score says how much each weight matters (`magnitude`);
* a pattern says which weights can go together, and how many (`Unstructured`, `NM`, `Blocks`);
* a schedule says when (`one_shot`, `polynomial`, `cosine`, `iterative`, `periodic`);
* rules say, by path, which parameters get which pattern (see `jaxcompress.paths`; `erk` makes some).

    schedule = prune.polynomial(begin=1000, end=5000, every=100)
    tx = optax.chain(optax.adam(1e-3), prune.sparsify({"head/kernel$": None, "kernel$": 0.9}, schedule))

Scores that need gradients, activations or a second checkpoint (`saliency`, `wanda`, `CRITERIA`, ...) become masks by
`choose`, which `fixed` holds through a training.

The masks live in the optimizer's state, so they are sharded, saved and restored with it. `masks` reads them there,
`apply_masks` brings them to parameters that came another way (averages, checkpoints), `to_sparse` stores the pruned
weights as bits and kept values, `sparsity` counts zeros, `threshold` is the exact quantile of a whole model's scores.
"""

from jaxcompress.prune._distributions import erk
from jaxcompress.prune._fixed import choose, fixed
from jaxcompress.prune._masks import SparsifyState, apply_masks, check_finite, masks, sparsity, threshold, to_sparse
from jaxcompress.prune._patterns import NM, Blocks, Pattern, Unstructured, filters, kernels, vectors
from jaxcompress.prune._schedules import Schedule, cosine, iterative, one_shot, periodic, polynomial
from jaxcompress.prune._scores import (
    CRITERIA,
    Score,
    active,
    fisher,
    geometric_median,
    magnitude,
    saliency,
    wanda,
)
from jaxcompress.prune._sparsify import sparsify

__all__ = [
    "CRITERIA",
    "NM",
    "Blocks",
    "Pattern",
    "Schedule",
    "Score",
    "SparsifyState",
    "Unstructured",
    "active",
    "apply_masks",
    "check_finite",
    "choose",
    "cosine",
    "erk",
    "filters",
    "fisher",
    "fixed",
    "geometric_median",
    "iterative",
    "kernels",
    "magnitude",
    "masks",
    "one_shot",
    "periodic",
    "polynomial",
    "saliency",
    "sparsify",
    "sparsity",
    "threshold",
    "to_sparse",
    "vectors",
    "wanda",
]
