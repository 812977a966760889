"""Pruning: set the weights that matter least to zero, and keep them there, while an optimizer trains the rest.

Four small pieces meet in one optax transformation, `sparsify`, which stands last in `optax.chain` and whose updates
leave pruned weights at exactly zero, with no call to remember in the training loop:

* a score says how much each weight matters (`magnitude`; gathered from gradients: `movement`, `taylor`);
* a pattern says which weights can go together, and how many (`Unstructured`, `NM`, `Blocks`, `Below` a threshold);
* a schedule says when (`one_shot`, `polynomial`, `cosine`, `iterative`, `periodic`);
* rules say, by path, which parameters get which pattern (see `jaxcompress.paths`; `erk` makes some).

    schedule = prune.polynomial(begin=1000, end=5000, every=100)
    tx = optax.chain(optax.adam(1e-3), prune.sparsify({"head/kernel$": None, "kernel$": 0.9}, schedule))

`around` puts pruning around an optimizer instead, where it also sees the gradients: `rewire` trains a sparse network
from the start there (RigL, SET). Scores that need something measured (`saliency`, `wanda`, `CRITERIA`, ...) become
masks by `choose`, which `fixed` holds through a training. `straight_through` keeps the weights under a mask alive.

A model that is trained, and is not to be trained again, is pruned once from calibration batches: by `sparsegpt`, which
lets the kept weights make up for the pruned ones, or by `wanda_one_shot`.

`penalize` and `proximal` make weights, or whole groups of them, small or exactly zero while they are trained (network
slimming, group lasso). `tickets` finds sparse networks round by round, and takes them apart: lottery tickets and
supermasks. `channels` cuts whole units out, so that what is left is smaller and faster.

The masks live in the optimizer's state, so they are sharded, saved and restored with it. `masks` reads them there,
`apply_masks` brings them to parameters that came another way (averages, checkpoints), `to_sparse` stores the pruned
weights as bits and kept values, `sparsity` counts zeros, `threshold` is the exact quantile of a whole model's scores.
"""

from jaxcompress.prune import channels, tickets
from jaxcompress.prune._around import AroundState, around
from jaxcompress.prune._distributions import erk
from jaxcompress.prune._fixed import choose, fixed
from jaxcompress.prune._forward import learned_thresholds, soft_threshold, straight_through, thresholded
from jaxcompress.prune._masks import SparsifyState, apply_masks, masks, sparsity, threshold, to_sparse
from jaxcompress.prune._patterns import NM, Below, Blocks, Pattern, Unstructured, filters, kernels, vectors
from jaxcompress.prune._penalties import L1, GroupLasso, Penalty, ProximalState, penalize, penalty, proximal
from jaxcompress.prune._post_training import Pruned, sparsegpt, wanda_one_shot
from jaxcompress.prune._rewire import RewireState, at_random, by_gradient, rewire
from jaxcompress.prune._schedules import Schedule, cosine, iterative, one_shot, periodic, polynomial
from jaxcompress.prune._scores import (
    CRITERIA,
    Accumulated,
    Score,
    active,
    batch_norm_scale,
    empirical_fisher,
    fisher,
    geometric_median,
    magnitude,
    movement,
    random,
    saliency,
    taylor,
    wanda,
)
from jaxcompress.prune._sparsify import sparsify

__all__ = [
    "CRITERIA",
    "L1",
    "NM",
    "Accumulated",
    "AroundState",
    "Below",
    "Blocks",
    "GroupLasso",
    "Pattern",
    "Penalty",
    "ProximalState",
    "Pruned",
    "RewireState",
    "Schedule",
    "Score",
    "SparsifyState",
    "Unstructured",
    "active",
    "apply_masks",
    "around",
    "at_random",
    "batch_norm_scale",
    "by_gradient",
    "channels",
    "choose",
    "cosine",
    "empirical_fisher",
    "erk",
    "filters",
    "fisher",
    "fixed",
    "geometric_median",
    "iterative",
    "kernels",
    "learned_thresholds",
    "magnitude",
    "masks",
    "movement",
    "one_shot",
    "penalize",
    "penalty",
    "periodic",
    "polynomial",
    "proximal",
    "random",
    "rewire",
    "saliency",
    "soft_threshold",
    "sparsegpt",
    "sparsify",
    "sparsity",
    "straight_through",
    "taylor",
    "threshold",
    "thresholded",
    "tickets",
    "to_sparse",
    "vectors",
    "wanda",
    "wanda_one_shot",
]
