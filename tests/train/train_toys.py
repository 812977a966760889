"""A small student with batch norm and dropout under a bfloat16 teacher, and data with a position: for these tests."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import train

CLASSES, SIZE = 4, 8


class Student(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, training: bool = True) -> jax.Array:
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not training)(x))
        x = nn.Dense(32)(x.reshape(len(x), -1))
        x = nn.Dropout(0.3, deterministic=not training)(nn.relu(x))
        return nn.Dense(CLASSES)(x)


def teach(variables: Any, x: jax.Array) -> jax.Array:
    """The teacher's logits, computed in the dtype that its variables have."""
    dense, out = variables["params"]["Dense_0"], variables["params"]["Dense_1"]
    x = jax.nn.relu(x.reshape(len(x), -1).astype(dense["kernel"].dtype) @ dense["kernel"] + dense["bias"])
    return x @ out["kernel"] + out["bias"]


def draw(shapes: Any, seed: int) -> Any:
    """Variables drawn by NumPy: Flax's initialisers take seconds to compile."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: Any) -> np.ndarray:
        if path[-1].key == "kernel":
            return (rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype(np.float32)
        return np.full(x.shape, path[-1].key in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def teacher_variables(dtype: Any = jnp.bfloat16) -> Any:
    shapes = {
        "Dense_0": {"kernel": np.empty((SIZE * SIZE, 64)), "bias": np.empty(64)},
        "Dense_1": {"kernel": np.empty((64, CLASSES)), "bias": np.empty(CLASSES)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), {"params": draw(shapes, 7)})


@functools.cache
def _shapes() -> Any:
    return jax.eval_shape(lambda: Student().init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 1)), training=False))


def create(tx: optax.GradientTransformation) -> train.TrainState:
    variables = draw(_shapes(), 1)
    extras = {"batch_stats": variables["batch_stats"]}
    return train.TrainState.create(variables["params"], tx, extras=extras, key=jax.random.key(2))


def loss_fn(params: Any, batch: Any, context: train.Context) -> Any:
    logits, extras = Student().apply(
        {"params": params, **context.extras}, batch["image"], rngs={"dropout": context.key}, mutable=["batch_stats"]
    )
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    if context.frozen is None:
        return hard.mean(), {}, extras
    soft = jax.nn.softmax(teach(context.frozen, batch["image"]).astype(jnp.float32) / 2)
    loss = (hard + 4 * optax.losses.softmax_cross_entropy(logits / 2, soft)).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}, extras


def examples(count: int = 96) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=count)
    images = rng.normal(size=(count, SIZE, SIZE, 1)) + labels[:, None, None, None] / CLASSES
    return [{"image": x.astype(np.float32), "label": np.int32(y)} for x, y in zip(images, labels, strict=True)]


def dataset(batch: int = 16, host: int = 0, hosts: int = 1) -> grain.MapDataset:
    """Shuffled anew in each of endless epochs; a host's part of the global batch of `batch` rows."""
    data = grain.MapDataset.source(examples()).seed(3).shuffle().repeat()
    return data[host::hosts].batch(batch // hosts)


def batches(batch: int = 16) -> Iterator[Any]:
    return iter(dataset(batch).to_iter_dataset())


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Every leaf by path, as numbers that can be compared."""
    leaves = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        leaves[jax.tree_util.keystr(path)] = np.asarray(jax.random.key_data(x) if is_key else x)
    return leaves


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit."""
    a, b = flat(one), flat(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def assert_close(one: Any, other: Any, atol: float = 2e-6, rtol: float = 2e-5) -> None:
    a, b = flat(one), flat(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=rtol, err_msg=name)
