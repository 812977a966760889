"""A teacher's outputs computed once and kept: full or top-k, in float32 or bfloat16, in array_record files.

    kept = targets.build("targets", predict, batches, teacher=targets.fingerprint(teacher), data=dataset_hash)
    kept = targets.TargetCache("targets", teacher=targets.fingerprint(teacher), data=dataset_hash)
    batch["teacher"] = kept.logits(batch["index"], seeds=epoch % 8)       # [batch, classes], for any loss on logits

A target belongs to an example *and* to the seed of its augmentation: what a teacher says of one crop is wrong for
another. It also belongs to one teacher and one data set, whose hashes stand in the header; a cache of others is
refused. Logits are kept without a temperature, so one store serves all (of top-k targets, the tail's weight is kept at
each temperature that was asked for).

How exact. Full float32: bit for bit what `predict` gave, so training on it gives the parameters of the live run, if
the live run computes the teacher on batches of the same shape. bfloat16: each row's largest logit is kept in float32
and the others as their distance to it, each of which is off by at most `2^-8` of itself; `rounding_bound` says what
that means for a loss. Top-k: the loss with its tail falls short of the full one by
`T^2 tail KL(teacher's rest || student's rest)`, and its gradient differs by at most `2 T tail` in the L1 norm.

Files: `header.json`, and parts of some thousand records each, the last record of a part being its keys. Each is
written under another name and renamed when whole, so a build that is cut off leaves whole parts only, and the same
call goes on after them. One process at a time may build; any number may read. Needs the `array_record` package.
"""

from jaxcompress.targets._cache import TargetCache, build, fingerprint
from jaxcompress.targets._header import TargetMismatchError
from jaxcompress.targets._records import rounding_bound

__all__ = ["TargetCache", "TargetMismatchError", "build", "fingerprint", "rounding_bound"]
