"""Masks on other trees: averages, schedule-free evaluation, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import prune
from jaxcompress.arrays import Sparse, dense, nbytes
from jaxcompress.prune._masks import check_finite

PARAMS = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (32, 16)), "bias": jnp.ones(16)}}
RAMP = prune.polynomial(0, 8, 2)
SPARSIFY = prune.sparsify({"kernel$": 0.8}, RAMP)


def trained(tx: optax.GradientTransformation, steps: int = 10):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state, average = PARAMS, tx.init(PARAMS), PARAMS
    for _ in range(steps):
        params, state = step(params, state)
        average = optax.incremental_update(params, average, 0.1)
    return params, state, average


def zeros(tree) -> np.ndarray:
    return np.asarray(tree["Dense_0"]["kernel"] == 0)


def test_an_average_keeps_old_values_until_it_is_masked() -> None:
    params, state, average = trained(optax.chain(optax.adam(1e-2), SPARSIFY))
    assert zeros(average).mean() < 0.1
    masked = prune.apply_masks(average, state)
    np.testing.assert_array_equal(zeros(masked), zeros(params))
    np.testing.assert_array_equal(masked["Dense_0"]["bias"], average["Dense_0"]["bias"])
    np.testing.assert_array_equal(
        masked["Dense_0"]["kernel"], jnp.where(zeros(params), 0, average["Dense_0"]["kernel"])
    )


def test_schedule_free_evaluation() -> None:
    tx = optax.chain(optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1, b1=0.9), SPARSIFY)
    params, state, _ = trained(tx)
    evaluated = optax.contrib.schedule_free_eval_params(state[0], params)
    assert zeros(evaluated).mean() < 0.8
    np.testing.assert_array_equal(zeros(prune.apply_masks(evaluated, state)), zeros(params))
    assert zeros(params).mean() == pytest.approx(0.8, abs=1 / 512)


def test_paths_bring_masks_to_a_tree_with_wrappers() -> None:
    _, state, _ = trained(SPARSIFY)
    masked = prune.apply_masks({"params": PARAMS}, state)
    np.testing.assert_array_equal(zeros(masked["params"]), ~prune.masks(state)["Dense_0/kernel"])


def test_sparsity_counts_zeros() -> None:
    tree = {"a": jnp.array([0.0, 1, 0, 2]), "b": {"c": jnp.zeros((2, 3)), "d": jnp.array(-0.0)}}
    assert prune.sparsity(tree) == {"a": 0.5, "b/c": 1.0, "b/d": 1.0, "": 9 / 11}
    assert prune.sparsity({}) == {"": 0.0}


def test_no_pruning_state() -> None:
    with pytest.raises(ValueError, match=r"no pruning state in this tuple: .* prune\.sparsify"):
        prune.apply_masks(PARAMS, optax.adam(1e-2).init(PARAMS))


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"Dense_1": PARAMS["Dense_0"]}, "no leaf for the mask of 'Dense_0/kernel'"),
        ({"Dense_0": {"kernel": jnp.ones((16, 32))}}, r"shape \(32, 16\), but the tree's leaf has \(16, 32\)"),
    ],
)
def test_masks_of_another_tree(tree, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune.apply_masks(tree, SPARSIFY.init(PARAMS))


def test_two_states_for_one_parameter() -> None:
    with pytest.raises(ValueError, match="two pruning states have a mask for 'Dense_0/kernel'"):
        prune.masks(optax.chain(SPARSIFY, SPARSIFY).init(PARAMS))


def test_check_finite_names_the_leaf() -> None:
    with pytest.raises(ValueError, match=r"not finite .* 'b/c'"):
        check_finite({"a": jnp.ones(2), "b": {"c": jnp.array([0, jnp.inf])}, "d": jnp.arange(3)})
    check_finite(PARAMS)


def test_orbax_restores_masks_with_their_sharding(tmp_path) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("model"))
    params = jax.device_put(PARAMS, sharding)
    tx = optax.chain(optax.adam(1e-2), SPARSIFY)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    _, state = jax.jit(tx.update)(params, state, params)
    _, state = jax.jit(tx.update)(params, state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    want, got = prune.masks(state)["Dense_0/kernel"], prune.masks(restored)["Dense_0/kernel"]
    np.testing.assert_array_equal(want, got)
    assert 0 < (~got).sum() < got.size and got.dtype == bool and got.sharding.is_equivalent_to(sharding, 2)
    assert int(restored[1].step) == 3


@pytest.mark.slow
def test_sparse_leaves_hold_the_kept_weights() -> None:
    params, state, _ = trained(optax.chain(optax.adam(1e-2), SPARSIFY))
    sparse = prune.to_sparse(params, state)
    assert isinstance(sparse["Dense_0"]["kernel"], Sparse) and not isinstance(sparse["Dense_0"]["bias"], Sparse)
    jax.tree.map(np.testing.assert_array_equal, dense(sparse), params)
    assert nbytes(sparse) < nbytes(params) / 3
    stacked = {"k": jnp.ones((3, 8, 8))}
    tx = prune.sparsify({"k": prune.Unstructured(0.75, stack=1)}, prune.one_shot())
    _, state = tx.update(stacked, tx.init(stacked), stacked)
    assert prune.to_sparse(stacked, state, {"k": 1})["k"].values.shape == (3, 16)


@pytest.mark.parametrize("part", [0.001, 0.5, 0.9, 1.0])
def test_threshold_is_the_quantile_over_all_leaves(part: float) -> None:
    tree = {"a": jax.random.normal(jax.random.key(0), (30, 40)), "b": [jnp.ones(50) * 0.5], "ids": jnp.arange(9)}
    ordered = np.sort(np.abs(np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"][0])])))
    assert float(prune.threshold(tree, part)) == ordered[max(1, round(part * 1250)) - 1]


@pytest.mark.parametrize(
    "tree, part", [({"a": jnp.ones(3)}, 0.0), ({"a": jnp.ones(3)}, 1.1), ({"a": jnp.arange(3)}, 0.5)]
)
def test_threshold_of_nothing(tree, part: float) -> None:
    with pytest.raises(ValueError, match=r"part of them in \(0, 1\]"):
        prune.threshold(tree, part)
