"""Penalties against closed forms, against the definition of the proximal step, and inside optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import prune

KERNEL = jax.random.normal(jax.random.key(0), (6, 4))


def moved(tx: optax.GradientTransformation, params, grads):
    @jax.jit
    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step(params, grads)


def by_hand(weight: np.ndarray, groups: list[tuple], t: float) -> np.ndarray:
    """`z * max(1 - t / ||z||, 0)`, group by group, in float64."""
    out = weight.astype(np.float64)
    for index in groups:
        norm = np.linalg.norm(out[index])
        out[index] = out[index] * max(1 - t / norm, 0) if norm else 0.0
    return out


COLUMNS = [(slice(None), j) for j in range(4)]
CONV = jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
KERNELS = [(slice(None), slice(None), i, j) for i in range(2) for j in range(4)]
GROUPED = [
    (KERNEL, prune.GroupLasso(1.0), COLUMNS),
    (KERNEL, prune.GroupLasso(1.0, -2), [(i,) for i in range(6)]),
    (KERNEL, prune.GroupLasso(1.0, ()), [()]),
    (KERNEL, prune.GroupLasso(1.0, prune.vectors(0.5, 4, axis=-2, pad=True, norm="l2")),
     [(rows, j) for rows in (slice(0, 4), slice(4, 6)) for j in range(4)]),
    (CONV, prune.GroupLasso(1.0, prune.kernels(0)), KERNELS),
    (CONV, prune.GroupLasso(1.0, (-2, -1)), KERNELS),
]  # fmt: skip


@pytest.mark.parametrize("weight, term, groups", GROUPED)
def test_group_norms_proximal_step_and_subgradient_by_hand(weight, term, groups):
    params, dense = {"w": weight}, np.asarray(weight, np.float64)
    norms = [np.linalg.norm(dense[g]) for g in groups]
    np.testing.assert_allclose(prune.penalty({"w": term}, params), sum(norms), rtol=1e-6)
    t = float(np.median(norms))  # half of the groups go (if there are several)
    result = moved(prune.proximal({"w": term}, t), params, {"w": jnp.zeros_like(weight)})["w"]
    np.testing.assert_allclose(result, by_hand(dense, groups, t), atol=1e-6)
    added, _ = prune.penalize({"w": term}).update({"w": jnp.ones_like(weight)}, optax.EmptyState(), params)
    for g in groups:
        np.testing.assert_allclose(added["w"][g], 1 + dense[g] / np.linalg.norm(dense[g]), atol=1e-5)


@pytest.mark.parametrize("weight, term, groups", GROUPED)
def test_the_subgradient_is_the_gradient_of_the_penalty(weight, term, groups):
    rules = {"w": prune.GroupLasso(0.3, term.groups, by_size=True)}
    wanted = jax.grad(lambda p: prune.penalty(rules, p))({"w": weight})["w"]
    added, _ = prune.penalize(rules).update({"w": jnp.zeros_like(weight)}, optax.EmptyState(), {"w": weight})
    np.testing.assert_allclose(added["w"], wanted, atol=1e-6)
    sizes = sum(np.sqrt(dense.size) * np.linalg.norm(dense) for dense in (np.asarray(weight)[g] for g in groups))
    np.testing.assert_allclose(prune.penalty(rules, {"w": weight}), 0.3 * sizes, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8), st.floats(0, 3), st.floats(0, 2))
def test_soft_threshold_is_the_proximal_step_of_l1(values, strength, rate):
    """Against the definition: no nearby point has a lower value, and exact zeros where |z| <= t."""
    z = jnp.array(values, jnp.float32)
    tx = prune.proximal({"w": prune.L1(strength)}, rate)
    result = np.asarray(moved(tx, {"w": z}, {"w": jnp.zeros_like(z)})["w"], np.float64)
    t = rate * strength
    np.testing.assert_allclose(result, np.sign(z) * np.maximum(np.abs(z) - t, 0), atol=1e-5)
    np.testing.assert_array_equal(result[np.abs(np.asarray(z)) < 0.999 * t], 0)

    def objective(v: np.ndarray) -> np.ndarray:
        return (v - np.asarray(z, np.float64)) ** 2 / 2 + t * np.abs(v)

    for step in (-0.1, -1e-3, 1e-3, 0.1):
        assert np.all(objective(result) <= objective(result + step) + 1e-5)


def test_l1_subgradient_is_the_sign():
    params = {"scale": jnp.array([-2.0, 0.0, 3.0]), "bias": jnp.ones(3)}
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = prune.penalize({"scale$": prune.L1(0.25)})
    added, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(added["scale"], [-0.25, 0, 0.25])
    np.testing.assert_array_equal(added["bias"], 0)


def test_zero_and_huge_groups_stay_finite():
    weight = jnp.stack([jnp.zeros(3), jnp.full(3, 1e30), jnp.full(3, 1e-30), jnp.array([0.0, 3.0, 4.0])], axis=1)
    params, grads = {"w": weight}, {"w": jnp.zeros_like(weight)}
    for term in (prune.GroupLasso(0.5), prune.GroupLasso(0.5, by_size=True), prune.L1(0.5)):
        tx = prune.penalize({"w": term})
        added, _ = tx.update(grads, tx.init(params), params)
        assert np.all(np.isfinite(added["w"])) and np.all(np.asarray(added["w"])[:, 0] == 0)
        result = np.asarray(moved(prune.proximal({"w": term}, 1.0), params, grads)["w"])
        assert np.all(np.isfinite(result))
        np.testing.assert_array_equal(result[:, [0, 2]], 0)
        np.testing.assert_allclose(result[:, 1], 1e30, rtol=1e-6)


def test_a_nan_stays_visible():
    params = {"w": jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])}
    for term in (prune.GroupLasso(0.5), prune.L1(0.5)):
        result = moved(prune.proximal({"w": term}, 1.0), params, {"w": jnp.zeros((2, 2))})["w"]
        assert np.isnan(result[0, 0]) and np.all(np.isfinite(result[:, 1]))


def test_proximal_gradient_descent_finds_the_lasso():
    """On an orthogonal design the lasso is the soft-thresholded least-squares solution; groups alike."""
    target = jax.random.normal(jax.random.key(2), (5, 4))
    middle = float(np.median(np.linalg.norm(target, axis=0)))
    for term, groups in ((prune.L1(0.7), list(np.ndindex(5, 4))), (prune.GroupLasso(middle), COLUMNS)):
        tx = optax.chain(optax.sgd(0.5), prune.proximal({"w": term}, 0.5))
        params = {"w": jnp.zeros((5, 4))}
        state = tx.init(params)
        for _ in range(60):
            updates, state = tx.update({"w": params["w"] - target}, state, params)
            params = optax.apply_updates(params, updates)
        wanted = by_hand(np.asarray(target), groups, term.strength)
        np.testing.assert_allclose(params["w"], wanted, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(params["w"]) == 0, wanted == 0)
        assert 0 < (wanted == 0).sum() < wanted.size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()])
def test_exact_zeros_with_adam_by_path_and_wrapped(dtype, wrap):
    params = {"a": {"kernel": KERNEL.astype(dtype)}, "b": {"kernel": KERNEL.astype(dtype)}}
    rules = {"a/kernel": prune.GroupLasso(50.0), "b/kernel": None}
    tx = wrap(optax.chain(optax.adam(0.01), prune.proximal(rules, optax.constant_schedule(0.01))))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(30):
        params, state = step(params, state)
    assert params["a"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(params["a"]["kernel"], 0)
    assert np.all(np.asarray(params["b"]["kernel"]) != 0)


@pytest.mark.parametrize("groups", [-1, -2, prune.vectors(0, 2, axis=-2)])
def test_a_mesh_gives_the_same_update(groups):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.device_put(KERNEL, NamedSharding(mesh, PartitionSpec("rows", "columns")))
    middle = 0.8 * float(jnp.median(prune.GroupLasso(1.0, groups).norms(KERNEL)))
    rules = {"w": prune.GroupLasso(middle, groups)}
    tx = optax.chain(prune.penalize(rules), optax.sgd(0.1), prune.proximal(rules, 1.0))
    results = [jax.jit(lambda p: moved(tx, p, p))({"w": x})["w"] for x in (KERNEL, spread)]
    np.testing.assert_allclose(*results, atol=1e-6)
    np.testing.assert_array_equal(*(np.asarray(x) == 0 for x in results))
    assert results[1].sharding.is_equivalent_to(spread.sharding, 2)
    assert 0 < np.mean(np.asarray(results[1]) == 0) < 1


def test_the_schedule_is_followed():
    tx = prune.proximal({"w": prune.L1(1.0)}, lambda step: 0.5 * step)
    params = {"w": jnp.array([10.0])}
    state = tx.init(params)
    seen = []
    for _ in range(4):
        updates, state = tx.update({"w": jnp.zeros(1)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0]))
    assert seen == [10.0, 9.5, 8.5, 7.0]


def test_a_learning_rate_may_be_a_hyperparameter():
    tx = optax.inject_hyperparams(lambda learning_rate: prune.proximal({"w": prune.L1(1.0)}, learning_rate))(0.5)
    params = {"w": jnp.array([10.0, 0.25])}
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(2.0)
    updates, _ = tx.update({"w": jnp.zeros(2)}, state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], [8.0, 0.0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: prune.L1(-1.0), "strength is finite and not negative"),
        (lambda: prune.GroupLasso(float("nan")), "strength is finite"),
        (lambda: prune.proximal({"w": prune.L1(1.0)}, -0.1), "learning rate"),
        (lambda: prune.penalize({"w": 0.1}).init({"w": KERNEL}), "want prune.L1"),
        (lambda: prune.penalize({"x": prune.L1(1.0)}).init({"w": KERNEL}), "matches no path"),
        (lambda: prune.penalize({"w": prune.L1(1.0)}).init({"w": jnp.arange(3)}), "only floating-point"),
        (lambda: prune.penalize({"w": prune.L1(1.0)}).init({"w": 2.5}), "'w' is a float, no array"),
        (lambda: prune.proximal({"w": prune.GroupLasso(1.0, -3)}, 0.1).init({"w": KERNEL}), "'w'.*no such axis"),
        (lambda: prune.penalize({"w": prune.GroupLasso(1.0, prune.kernels(0))}).init({"w": KERNEL}), "'w'.*4 axes"),
        (lambda: prune.penalize({"w": prune.L1(1.0)}).update({"w": KERNEL}, optax.EmptyState()), "params"),
        (lambda: prune.proximal({"w": prune.L1(1.0)}, 0.1).update({"w": KERNEL}, None), "params"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
