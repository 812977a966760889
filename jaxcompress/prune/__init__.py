"""Pruning: set the weights that matter least to zero, and keep them there, while an optimizer trains the rest.

Four small pieces meet in one optax transformation, `sparsify`, which stands last in `optax.chain` and whose updates
leave pruned weights at exactly zero, with no call to remember in the training loop:

* a score says how much each weight matters (`magnitude`);
* a pattern says which weights can go together, and how many (`Unstructured`, `NM`);
* a schedule says when (`one_shot`, `polynomial`);
* rules say, by path, which parameters get which pattern (see `jaxcompress.paths`).

    schedule = prune.polynomial(begin=1000, end=5000, every=100)
    tx = optax.chain(optax.adam(1e-3), prune.sparsify({"head/kernel$": None, "kernel$": 0.9}, schedule))

The masks live in the optimizer's state, so they are sharded, saved and restored with it. `masks` reads them there,
`apply_masks` brings them to parameters that came another way (averages, checkpoints), `sparsity` counts zeros.
"""

from jaxcompress.prune._masks import SparsifyState, apply_masks, check_finite, masks, sparsity
from jaxcompress.prune._patterns import NM, Pattern, Unstructured
from jaxcompress.prune._schedules import Schedule, one_shot, polynomial
from jaxcompress.prune._scores import Score, magnitude
from jaxcompress.prune._sparsify import sparsify

__all__ = [
    "NM",
    "Pattern",
    "Schedule",
    "Score",
    "SparsifyState",
    "Unstructured",
    "apply_masks",
    "check_finite",
    "magnitude",
    "masks",
    "one_shot",
    "polynomial",
    "sparsify",
    "sparsity",
]
