"""A pair of networks under augmentation: what each makes of a moved batch, so that every method can compare the two.

Where images move, a teacher's logits and maps cannot be kept: it looks at each batch anew, inside the student's step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments._cifar100 import EMBEDDING, Staged
from experiments._methods import Pair, Seen
from jaxcompress import linen
from jaxcompress.prune import channels

STATE = "batch_stats"
Shape = tuple[int, int, int]


class Standard(NamedTuple):
    """The training images' mean and standard deviation, a channel."""

    mean: jax.Array
    deviation: jax.Array

    @classmethod
    def of(cls, images: jax.Array) -> "Standard":
        """Those of images `[examples, height, width, channels]`; a constant channel keeps its size."""
        deviation = jnp.std(images, axis=(0, 1, 2))
        return cls(jnp.mean(images, axis=(0, 1, 2)), jnp.where(deviation > 0, deviation, 1))


class Network:
    """A Linen network with batch normalisation on standardised images; `init` and `apply` are as a Linen module's.

    Args:
      model: it names its stages `Stage_0`, `Stage_1`, ...
      standard: of the images.
    """

    def __init__(self, model: nn.Module, standard: Standard) -> None:
        patterns = ["Stage_[0-9]+$", *([f"^{EMBEDDING}$"] if isinstance(model, Staged) else [])]
        see = linen.capture(model, patterns)

        def evaluate(variables: Any, images: jax.Array) -> Any:
            return see(variables, (images - standard.mean) / standard.deviation)

        def training(variables: Any, images: jax.Array) -> Any:
            images = (images - standard.mean) / standard.deviation
            return see(variables, images, train=True, mutable=[STATE])

        self.model, self._evaluate, self._training = model, evaluate, training

    def init(self, key: jax.Array, images: jax.Array) -> Any:
        """Fresh variables."""
        return self.model.init(key, images)

    def apply(self, variables: Any, images: jax.Array) -> jax.Array:
        """Logits `[batch, classes]` in evaluation mode."""
        logits: jax.Array = self._evaluate(variables, images)[0]
        return logits

    def seen(self, variables: Any, images: jax.Array) -> Seen:
        """The logits and all stages' maps in evaluation mode."""
        return _seen(*self._evaluate(variables, images))

    def trained(self, variables: Any, images: jax.Array) -> tuple[Seen, Any]:
        """The logits and all stages' maps in training, and the new batch statistics."""
        (logits, moved), found = self._training(variables, images)
        return _seen(logits, found), moved[STATE]


class Pruned(Network):
    """What is left of a network when the channels of the smallest L2 norm are cut.

    Args:
      whole: the network.
      variables: its trained variables.
      images: one or more, to trace it with.
      left: the share of its parameters to be left.
    """

    def __init__(self, whole: Network, variables: Any, images: jax.Array, left: float) -> None:
        groups = channels.groups(whole.apply, variables, images)
        self.plan = channels.plan(groups, channels.norm(groups, variables), parameters=left)
        self.variables = self.plan.apply(variables)

        def freed(*outputs: str) -> channels.Plan:
            return dataclasses.replace(self.plan, free_out=outputs)

        self.model = whole.model
        self._evaluate = channels.shrink(whole._evaluate, variables, freed("^1/"))
        self._training = channels.shrink(whole._training, variables, freed(f"^0/1/{STATE}", "^1/"))

    def init(self, key: jax.Array, images: jax.Array) -> Any:
        """The variables that are left, copied."""
        return jax.tree.map(jnp.copy, self.variables)


def _seen(logits: jax.Array, found: dict[str, jax.Array]) -> Seen:
    stages = sorted((name for name in found if name != EMBEDDING), key=lambda name: int(name.rpartition("_")[2]))
    return Seen(logits, tuple(found[name] for name in stages), found.get(EMBEDDING))


def comparable(student: Sequence[Shape], teacher: Sequence[Shape]) -> tuple[list[int], list[int]]:
    """Which stages of each to compare: the last of every size that both have, of three sizes at most.

    Raises:
      ValueError: there are less than two.
    """
    ends = [{shape[:2]: i for i, shape in enumerate(shapes)} for shapes in (student, teacher)]
    sizes = sorted(ends[0].keys() & ends[1].keys(), reverse=True)[-3:]
    if len(sizes) < 2:
        raise ValueError(f"want two sizes of maps that both networks have, got {list(student)} and {list(teacher)}")
    ours, theirs = ([end[size] for size in sizes] for end in ends)
    return ours, theirs


def chosen(seen: Seen, stages: Sequence[int]) -> Seen:
    """With some stages' maps alone; the embedding is the last stage's mean where the network names none."""
    return Seen(seen.logits, tuple(seen.maps[i] for i in stages), seen.pooled)


def pair_of(student: Seen, teacher: Seen) -> Pair:
    """The shapes of what is compared; the margins are the means of the teacher's negative values, a channel."""
    margins = []
    for x in teacher.maps:
        below = jnp.sum(x < 0, axis=(0, 1, 2))
        margins.append(jnp.sum(jnp.minimum(x, 0), axis=(0, 1, 2)) / jnp.maximum(below, 1))
    shapes = [tuple((x.shape[1], x.shape[2], x.shape[3]) for x in seen.maps) for seen in (student, teacher)]
    return Pair(shapes[0], shapes[1], tuple(margins), (student.pooled.shape[-1], teacher.pooled.shape[-1]))
