"""What is measured is what lies on the disk: models saved to files, read back, and evaluated."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from experiments._splits import Split
from jaxcompress import report
from jaxcompress.arrays import compressed
from jaxcompress.paths import named_leaves, with_leaves

BATCH = 128  # that costs are of
NOISE = 0.2  # standard deviation of the Gaussian noise on inputs in [0, 1], for robustness


def save_plain(path: Path, variables: Any) -> int:
    """Writes a tree's arrays, those of compressed leaves too, side by side and uncoded; returns the file's bytes.

    safetensors: what the weights take on the disk today without a coder, with a header of a few hundred bytes.
    """
    save_file({name: np.asarray(x) for name, x in named_leaves(variables)}, path)
    return os.path.getsize(path)


def load_plain(path: Path, like: Any) -> Any:
    """The tree that `save_plain` wrote, in the structure of `like`."""
    arrays = load_file(path)
    return with_leaves(like, [jnp.asarray(arrays[name]) for name, _ in named_leaves(like)])


def classifier(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """`(variables, images) -> logits` in evaluation mode."""
    apply: Any = model.apply
    return lambda variables, images: apply(variables, images)


def accuracy(model: nn.Module, variables: Any, split: Split) -> float:
    """The share of a split's examples that a model, compressed or not, classifies rightly."""
    return next(accuracies(model, variables, split, [0.0]))


def accuracies(model: nn.Module, variables: Any, split: Split, noises: Sequence[float]) -> Iterator[float]:
    """`accuracy` under Gaussian noise on the images, from a fixed key, for each of some standard deviations."""
    run = jax.jit(compressed(classifier(model)))
    images = jnp.asarray(split.inputs())
    for noise in noises:
        logits = run(variables, images + noise * jax.random.normal(jax.random.key(0), images.shape))
        yield float(jnp.mean(jnp.argmax(logits, axis=-1) == split.labels))


def measure(model: nn.Module, variables: Any, test: Split, size: int) -> dict[str, float]:
    """A model's line of figures: accuracies in per cent on test data, and what it costs for a batch of them.

    Without the time: `report.in_turns` compares models that are timed together.
    """
    images = jnp.asarray(test.inputs()[:BATCH])
    cost = report.cost(classifier(model), variables, images, rounds=1)._asdict()
    del cost["latency"]
    clean, noisy = accuracies(model, variables, test, [0.0, NOISE])
    return {
        "accuracy": 100 * clean,
        "noisy_accuracy": 100 * noisy,
        "bytes": size,
        **{name: float(value) for name, value in cost.items()},
    }
