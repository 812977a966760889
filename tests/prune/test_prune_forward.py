"""Sparse in the forward pass only: values, gradients, and masks that follow weights under them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxcompress import prune

WEIGHTS = {"w": jnp.array([[3.0, -1.0, 0.5, 2.0], [0.1, 4.0, -5.0, 0.2]]), "b": jnp.ones(4)}


def test_values_and_gradients() -> None:
    masks = prune.choose({"w": jnp.abs(WEIGHTS["w"])}, {"w": 0.5})

    def loss(tree: dict, decay: float) -> jax.Array:
        sparse = prune.straight_through(tree, masks, decay=decay)
        return jnp.sum(sparse["w"] * jnp.arange(8.0).reshape(2, 4)) + sparse["b"].sum()

    kept = np.asarray(masks["w"])
    np.testing.assert_array_equal(prune.straight_through(WEIGHTS, masks)["w"], np.where(kept, WEIGHTS["w"], 0))
    plain = np.arange(8.0).reshape(2, 4)
    np.testing.assert_allclose(jax.grad(loss)(WEIGHTS, 0.0)["w"], plain)
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss), static_argnums=1)(WEIGHTS, 0.1)["w"],
        plain + 0.1 * np.where(kept, 0, WEIGHTS["w"]),
        rtol=1e-6,
    )


def test_the_decay_may_be_traced() -> None:
    masks = prune.choose({"w": jnp.abs(WEIGHTS["w"])}, {"w": 0.5})

    def gradient(decay: jax.Array) -> jax.Array:
        return jax.grad(lambda tree: prune.straight_through(tree, masks, decay=decay)["w"].sum())(WEIGHTS)["w"]

    found = jax.jit(jax.vmap(gradient))(jnp.array([0.1, 0.0]))
    np.testing.assert_allclose(found[0], 1 + 0.1 * np.where(masks["w"], 0, WEIGHTS["w"]), rtol=1e-6)
    np.testing.assert_array_equal(found[1], 1)


def test_a_weight_under_the_mask_comes_back() -> None:
    """A pruned weight that the loss wants grows underneath, and takes another's place; held, it could not."""
    target = jnp.array([0.0, 0.0, 5.0, 4.0])
    found = {}
    for hold in (False, True):
        params = {"w": jnp.array([2.0, 1.5, 0.5, 0.1])}
        tx = optax.chain(optax.sgd(0.1), prune.sparsify({"w": 0.5}, prune.polynomial(0, 60, 1, initial=0.5), hold=hold))
        state = tx.init(params)

        @jax.jit
        def step(params, state, tx=tx):
            def loss(p):
                return jnp.sum((prune.straight_through(p, state)["w"] - target) ** 2)

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(60):
            params, state = step(params, state)
        found[hold] = np.asarray(prune.apply_masks(params, state)["w"])
    np.testing.assert_allclose(found[False], target, atol=1e-2)
    assert (found[True] == 0).sum() == 2 and not np.allclose(found[True], target, atol=1)


def test_movement_over_straight_through() -> None:
    """The paper's movement pruning: magnitudes are equal, and what moves to zero goes."""
    params = {"w": jnp.array([1.0, 1.0, -1.0, -1.0])}
    pull = {"w": jnp.array([0.01, -0.01, 0.01, -0.01])}  # the first and the last shrink under descent
    pruning = prune.sparsify({"w": 0.5}, prune.one_shot(5), score=prune.movement(), hold=False)
    tx = prune.around(optax.sgd(0.1), pruning, mask_gradients=False)
    state = tx.init(params)
    for _ in range(6):
        updates, state = tx.update(pull, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(prune.masks(state)["w"], [False, True, True, False])


@pytest.mark.parametrize("packed", [True, False])
def test_masks_are_stored_and_restored(packed: bool, tmp_path) -> None:
    """Through orbax, as a bit or as a boolean a weight, with the statistic of a gathered score."""
    params = {"w": jax.random.normal(jax.random.key(0), (12, 16)), "odd": jax.random.normal(jax.random.key(1), (5, 7))}
    pruning = prune.sparsify({"": 0.5}, prune.one_shot(), score=prune.taylor(), packed=packed)
    tx = prune.around(optax.adam(0.1), pruning)
    _, state = tx.update(params, tx.init(params), params)
    kept = state.pruning.masks
    assert kept["w"].nbytes == (12 * 2 if packed else 12 * 16) and kept["odd"].nbytes == 35
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    jax.tree.map(np.testing.assert_array_equal, state, restored)
    assert jax.tree.structure(state) == jax.tree.structure(restored)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no leaf for the mask of 'v'"):
        prune.straight_through(WEIGHTS, {"v": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="no pruning state"):
        prune.straight_through(WEIGHTS, WEIGHTS)
