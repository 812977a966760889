"""The shared workload of the train-step benchmarks: a 3x1024 MLP under adam, batch 128, in plain JAX.

Inputs [128, 784] and labels [128], three hidden layers of 1024 units with relu, ten classes; float32, about 2.9
million parameters. Data are random: a step takes the same time whatever it learns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

WIDTHS = (784, 1024, 1024, 1024, 10)
BATCH = 128

Params = dict[str, dict[str, jax.Array]]
State = tuple[Params, Any]


def params(seed: int = 0) -> Params:
    """He-initialised parameters, named as Linen would: `Dense_0/kernel` [inputs, outputs], `Dense_0/bias`."""
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    return {
        f"Dense_{i}": {"kernel": jax.random.normal(key, (n, m)) * jnp.sqrt(2 / n), "bias": jnp.zeros(m)}
        for i, (key, n, m) in enumerate(zip(keys, WIDTHS, WIDTHS[1:], strict=False))
    }


def batch(seed: int = 1, size: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Random inputs [size, 784] and labels [size]."""
    inputs_key, labels_key = jax.random.split(jax.random.key(seed))
    return jax.random.normal(inputs_key, (size, WIDTHS[0])), jax.random.randint(labels_key, (size,), 0, WIDTHS[-1])


def apply(params: Params, x: jax.Array) -> jax.Array:
    """Logits [batch, 10]."""
    last = len(params) - 1
    for i in range(len(params)):
        layer = params[f"Dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < last else x
    return x


def init(optimizer: optax.GradientTransformation, seed: int = 0) -> State:
    """The state that `train_step(optimizer)` starts from: (params, optimizer state)."""
    weights = params(seed)
    return weights, optimizer.init(weights)


def train_step(
    optimizer: optax.GradientTransformation, apply: Callable[[Params, jax.Array], jax.Array] = apply
) -> Callable[[State, tuple[jax.Array, jax.Array]], tuple[State, jax.Array]]:
    """A jitted step `(state, (inputs, labels)) -> (state, loss)` that donates its state.

    Hand in the optimizer of the candidate (`optax.chain(optax.adam(1e-3), prune...)`), or its `apply`
    (`quantize.fake(mlp.apply, rules)`); `train_step(optax.adam(1e-3))` is the plain step.
    """

    def loss(weights: Params, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs, labels = data
        return optax.losses.softmax_cross_entropy_with_integer_labels(apply(weights, inputs), labels).mean()

    def step(state: State, data: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        weights, optimizer_state = state
        value, gradient = jax.value_and_grad(loss)(weights, data)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
        return (optax.apply_updates(weights, updates), optimizer_state), value

    return jax.jit(step, donate_argnums=0)
