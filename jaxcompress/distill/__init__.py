"""Knowledge distillation: a student network learns from what a teacher network knows.

Every loss here is a pure function on arrays, with one convention. The student's array comes first, the teacher's
second, and no gradient flows into the teacher's. A loss on examples returns one value an example, as in
`optax.losses`, and takes `where=`, the mask of the examples (or tokens) that count; average with `masked_mean`. A
loss on the relations within a batch returns a scalar. Half-precision inputs are computed in float32. Values and
gradients are finite on every finite input: zeros, duplicates, a batch of one, logits up to 1e30.

    losses = distill.distillation_loss(student(x), teacher(x), labels, alpha=0.9, temperature=4.0)
    loss = losses.mean()
"""

from jaxcompress.distill._inputs import masked_mean
from jaxcompress.distill._softmax import (
    distillation_loss,
    hard_label_loss,
    soft_cross_entropy_loss,
    soft_target_loss,
    temperature_log_softmax,
    temperature_softmax,
    weighted_distillation_loss,
)

__all__ = [
    "distillation_loss",
    "hard_label_loss",
    "masked_mean",
    "soft_cross_entropy_loss",
    "soft_target_loss",
    "temperature_log_softmax",
    "temperature_softmax",
    "weighted_distillation_loss",
]
