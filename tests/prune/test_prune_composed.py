"""Pruning, fake quantization and distillation in one step, and what is left of it in integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxcompress import compressed, distill, nbytes, prune, quantize, train


@pytest.mark.parametrize("kind", [pytest.param("chain", marks=pytest.mark.slow), "around"])
def test_one_step_of_all_three(kind: str) -> None:
    """On real digits the student learns from the teacher alone, at 80 % sparsity; its int8 form is what was trained."""
    images, labels = (jnp.asarray(x) for x in load_digits(return_X_y=True))
    images = images.astype(jnp.float32) / 16
    teacher, student = (
        nn.Sequential([nn.Dense(96), nn.relu, nn.Dense(10)]),
        nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)]),
    )
    rules = {"kernel$": quantize.Affine(bits=8)}
    apply = quantize.fake(student.apply, rules)

    def trained(params, tx, loss, steps: int):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0])(params)

    def hard(params) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(teacher.apply(params, images), labels).mean()

    taught, _ = trained(jax.jit(teacher.init)(jax.random.key(0), images), optax.adam(1e-2), hard, 100)
    soft = teacher.apply(taught, images)

    def loss(params) -> jax.Array:
        return distill.soft_target_loss(apply(params, images), soft, temperature=2.0).mean()

    pruning = prune.sparsify({"kernel$": 0.8}, prune.polynomial(10, 60, 10))
    tx = optax.chain(optax.adam(1e-2), pruning) if kind == "chain" else prune.around(optax.adam(1e-2), pruning)
    params, state = trained(jax.jit(student.init)(jax.random.key(1), images), tx, loss, 400)
    for name, mask in prune.masks(state).items():
        assert abs(float(mask.mean()) - 0.2) < 0.01, name
    small = quantize.convert(params, rules)
    logits = compressed(student.apply)(small, images)
    np.testing.assert_allclose(logits, apply(params, images), rtol=1e-3, atol=1e-3)
    for name, mask in prune.masks(state).items():
        leaf = small["params"][name.split("/")[0]]["kernel"]
        assert not np.asarray(leaf.codes())[~np.asarray(mask)].any()
    assert float((logits.argmax(-1) == labels).mean()) > 0.9 and nbytes(small) < nbytes(params) / 3.3


def test_straight_through_in_a_training_step() -> None:
    """The masks that the step's own optimizer holds, whether stored as bits (16 columns) or as booleans (10)."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(4, 16)), jnp.float32), "b": jnp.asarray(rng.normal(size=(16, 10)))}
    params["b"], x = params["b"].astype(jnp.float32), jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    tx = optax.chain(optax.sgd(1e-2), prune.sparsify({"": 0.5}, prune.one_shot(), hold=False))

    def value(params, state):
        sparse = prune.straight_through(params, state)
        return jnp.mean((x @ sparse["a"] @ sparse["b"] - 1) ** 2)

    state = train.TrainState.create(params, tx, key=jax.random.key(0))
    step = train.make_step(lambda p, batch, context: (value(p, context.opt_state), {}, context.extras), tx)
    opt_state = tx.init(params)
    for _ in range(3):
        state, _ = step(state, None)
        updates, opt_state = tx.update(jax.grad(value)(params, opt_state), opt_state, params)
        params = optax.apply_updates(params, updates)
    for name, mask in prune.masks(opt_state).items():
        np.testing.assert_array_equal(mask, prune.masks(state.opt_state)[name])
        np.testing.assert_allclose(state.params[name], params[name], atol=1e-6)
        assert prune.sparsity(mask)[""] == 0.5 and prune.sparsity(params[name])[""] == 0
