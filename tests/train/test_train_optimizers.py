"""The step with optimizers that ask for more than gradients, and what they may keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import train


def ascend(params, batch, context):
    return -params, {}, context.extras


def test_an_optimizer_that_keeps_the_parameters_can_be_donated():
    """A buffer must not stand in a donated state twice, and this average begins as the parameters themselves."""
    average = optax.GradientTransformation(
        lambda params: params,
        lambda updates, mean, params: (updates, jax.tree.map(lambda m, p: (m + p) / 2, mean, params)),
    )
    tx = optax.chain(average, optax.sgd(1.0))
    state, step = train.TrainState.create(jnp.zeros(()), tx, key=jax.random.key(0)), train.make_step(ascend, tx)
    for _ in range(3):
        state, _ = step(state, None)
    assert (float(state.params), float(state.opt_state[0])) == (3, (0 / 8) + 0 / 4 + 1 / 4 + 2 / 2)


def test_gradients_are_accumulated_inside_multisteps():
    inner = optax.sgd(0.1, momentum=0.9)
    rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

    def loss(params, batch, context):
        return jnp.mean((batch @ params) ** 2), {}, context.extras

    def trained(tx, parts):
        state = train.TrainState.create(jnp.ones(3), tx, key=jax.random.key(0))
        step = train.make_step(loss, tx)
        for part in parts:
            state, _ = step(state, part)
        return state.params

    whole = trained(inner, [rows, rows])
    in_parts = trained(optax.MultiSteps(inner, 4), [rows[i : i + 2] for i in (0, 2, 4, 6)] * 2)
    np.testing.assert_allclose(whole, in_parts, rtol=1e-6)


def test_an_injected_learning_rate_follows_its_schedule():
    tx = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 4))
    state = train.TrainState.create(jnp.zeros(()), tx, key=jax.random.key(0))
    step, path = train.make_step(lambda p, b, c: (p, {}, c.extras), tx), []
    for _ in range(5):
        state, _ = step(state, None)
        path.append(float(state.params))
    np.testing.assert_allclose(path, -np.cumsum([1, 0.75, 0.5, 0.25, 0]), rtol=1e-6)


def test_transformations_that_ask_for_the_loss_get_it():
    """L-BFGS with its line search finds the minimum of a quadratic, which no fixed step finds in six."""
    tx = optax.lbfgs()
    scale = jnp.array([1.0, 30.0, 900.0])
    state = train.TrainState.create(jnp.ones(3), tx, key=jax.random.key(0))
    step = train.make_step(lambda p, b, c: (jnp.sum(scale * (p - 2) ** 2), {}, c.extras), tx)
    for _ in range(12):
        state, _ = step(state, None)
    np.testing.assert_allclose(state.params, 2, atol=1e-4)


def test_the_loss_reaches_what_multisteps_wraps():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1)
    tx = optax.MultiSteps(optax.chain(optax.sgd(1.0), plateau), 2)
    state = train.TrainState.create(jnp.ones(2), tx, key=jax.random.key(0))
    step = train.make_step(lambda p, b, c: (jnp.sum(p * 0) + 1, {}, c.extras), tx)
    for _ in range(6):
        state, _ = step(state, None)
    assert float(optax.tree.get(state.opt_state, "scale")) < 1


def test_complex_parameters_descend():
    """JAX's derivative by a complex number is the conjugate of the direction of ascent."""
    tx, goal = optax.sgd(0.1), jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    state = train.TrainState.create(jnp.zeros(2, jnp.complex64), tx, key=jax.random.key(0))
    step = train.make_step(lambda p, b, c: (jnp.sum(jnp.abs(p - goal) ** 2), {}, c.extras), tx)
    for _ in range(60):
        state, _ = step(state, None)
    np.testing.assert_allclose(state.params, goal, atol=1e-4)
