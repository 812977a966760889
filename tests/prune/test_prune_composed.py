"""Pruning, fake quantization and distillation in one step, and what is left of it in integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxcompress import compressed, distill, nbytes, prune, quantize


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
