"""What a training's loss may look at in the distillation experiments, and the losses that several of them use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress import distill

PARAMS = "params"


class Lesson(NamedTuple):
    """What a loss may look at beside the network: the batch, what a teacher said of it, and the arm's knobs."""

    images: jax.Array
    """`[batch, height, width, channels]`"""
    labels: jax.Array
    """`[batch]`"""
    rows: Any
    """The batch's rows of the tables that were handed in, such as a teacher's logits `[batch, classes]`."""
    knobs: Any
    """Handed in as they are: a temperature, a weight, a teacher's variables."""
    key: jax.Array
    step: jax.Array
    places: jax.Array
    """`[batch]`: where the images stand in the training data."""
    extras: Any = None
    """What goes from step to step, where a loss hands its lesson on."""


Loss = Callable[[Any, Any, Lesson], tuple[jax.Array, Any]]
"""`(params, extras, lesson) -> (loss, extras)`: a scalar, and batch statistics or what else goes along."""


def logits_loss(
    model: nn.Module,
    loss: Callable[[jax.Array, Lesson], jax.Array],
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Loss:
    """A `Loss` of a model's logits `[batch, classes]`.

    Args:
      model: the network.
      loss: from logits and the lesson to one value an example.
      augment: from images and a key to changed images; the loss sees those in its lesson.
    """

    def of_params(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        if augment is not None:
            lesson = lesson._replace(images=augment(lesson.images, jax.random.fold_in(lesson.key, 1)))
        logits, extras = model.apply(
            {PARAMS: params, **extras}, lesson.images, train=True, rngs={"dropout": lesson.key}, mutable=list(extras)
        )
        return jnp.mean(loss(logits, lesson)), extras

    return of_params


def hard(logits: jax.Array, lesson: Lesson) -> jax.Array:
    """Cross entropy with the labels."""
    return distill.hard_label_loss(logits, lesson.labels)


def guided(logits: jax.Array, lesson: Lesson) -> jax.Array:
    """Soft targets with weight `alpha`, labels with the rest; `rows` are the teacher's logits. Alpha 0 is `hard`."""
    alpha, temperature = lesson.knobs["alpha"], lesson.knobs["temperature"]
    return distill.distillation_loss(logits, lesson.rows, lesson.labels, alpha=alpha, temperature=temperature)


def alike(probabilities: jax.Array, labels: jax.Array, kernel: jax.Array) -> jax.Array:
    """Soft targets `[examples, classes]` of class similarity alone, as sure on average as a teacher (Tang et al. 2020).

    Args:
      probabilities: the teacher's, `[examples, classes]`.
      labels: `[examples]`.
      kernel: of the teacher's last layer, `[features, classes]`.
    """
    sure = float(jnp.take_along_axis(probabilities, labels[:, None], axis=1).mean())
    return distill.class_similarity_teacher(kernel, labels, sharpness=1 / 0.3, confidence=sure)


def jittered(by: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Moves each image by up to `by` pixels each way, zeros moving in."""

    def augment(images: jax.Array, key: jax.Array) -> jax.Array:
        padded = jnp.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
        starts = jax.random.randint(key, (images.shape[0], 2), 0, 2 * by + 1)
        cut = jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:]))
        return cut(padded, starts)

    return augment
