"""Sparse training from the start: what goes, what comes, when, and on how many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import prune

KEY = jax.random.key(1)


def weights(shape: tuple = (40, 24)) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(0), shape)}


def run(tx, params: dict, steps: int, scale: float = 3.0):
    """Masks and parameters before and after each step, with the gradient of that step."""
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        gradient = jax.tree.map(lambda x: jnp.sin(scale * x + jnp.arange(x.size).reshape(x.shape) + i), params)  # noqa: B023
        before = prune.masks(state)["w"]
        updates, state = update(gradient, state, params)
        new = optax.apply_updates(params, updates)
        yield np.asarray(before), np.asarray(prune.masks(state)["w"]), params, new, gradient
        params = new


@pytest.mark.slow
def test_rigl_by_sorting() -> None:
    """The masks of the paper's algorithm, worked out by sorting in NumPy."""
    end, every, fraction = 8, 2, 0.4
    tx = prune.around(optax.sgd(0.1), prune.rewire({"w": 0.8}, key=KEY, end=end, every=every, fraction=fraction))
    for step, (before, after, params, new, gradient) in enumerate(run(tx, weights(), 10)):
        want = before.copy()
        if step % every == 0 and 0 < step < end:
            k = int(before.sum() * fraction * (1 + np.cos(np.pi * step / end)) / 2)
            worth = np.where(before, np.abs(np.asarray(params["w"])), np.inf).ravel()
            stay = before.copy()
            stay.ravel()[np.argsort(worth, kind="stable")[:k]] = False
            wanted = np.where(stay, -np.inf, np.abs(np.asarray(gradient["w"]))).ravel()
            want = stay.copy()
            want.ravel()[np.argsort(-wanted, kind="stable")[:k]] = True
            assert k > 0
        np.testing.assert_array_equal(after, want)
        np.testing.assert_array_equal(np.asarray(new["w"])[~after], 0)
        np.testing.assert_array_equal(np.asarray(new["w"])[after & ~before], 0)


@pytest.mark.slow
def test_random_growth_takes_any() -> None:
    """SET: over many changes every pruned weight is as likely to come in, whatever its gradient."""
    tx = prune.rewire({"w": 0.5}, key=KEY, end=400, every=1, fraction=0.5, grow=prune.at_random)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    gradient = {"w": jnp.arange(64.0).reshape(8, 8)}

    def step(state, _):
        after = tx.update(params, state, params, gradients=gradient)[1]
        return after, prune.masks(after)["w"] & ~prune.masks(state)["w"]

    came = np.asarray(jax.lax.scan(step, tx.init(params), None, 200)[1]).sum(0)
    flat = came.ravel()
    assert came.sum() > 500 and flat[:32].sum() / came.sum() == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_blocks_and_layers_of_a_stack() -> None:
    rules = {"blocks": prune.Blocks(0.75, (4, 4)), "stack": prune.Unstructured(0.9, stack=1)}
    params = {"blocks": weights()["w"], "stack": jax.random.normal(KEY, (3, 20, 10)), "other": jnp.ones(3)}
    tx = prune.around(optax.adam(0.01), prune.rewire(rules, key=KEY, end=9, every=1))
    state = first = tx.init(params)
    for i in range(4):
        updates, state = tx.update(jax.tree.map(lambda x: jnp.cos(9 * x + i), params), state, params)  # noqa: B023
        params = optax.apply_updates(params, updates)
    before, after = prune.masks(first), prune.masks(state)
    blocks = np.asarray(after["blocks"]).reshape(10, 4, 6, 4).transpose(0, 2, 1, 3).reshape(60, 16)
    assert set(blocks.sum(1).tolist()) == {0, 16} and (blocks.sum(1) > 0).sum() == 15
    np.testing.assert_array_equal(np.asarray(after["stack"]).sum((1, 2)), 20)
    assert all((np.asarray(after[name]) != np.asarray(before[name])).any() for name in after)


def test_the_first_masks_are_those_of_static_training() -> None:
    params = weights()
    static = prune.choose(prune.random(params, KEY), {"w": 0.9})
    np.testing.assert_array_equal(prune.masks(prune.rewire({"w": 0.9}, key=KEY, end=5).init(params))["w"], static["w"])


@pytest.mark.parametrize(
    ("kind", "packed"), [(AxisType.Auto, True), pytest.param(AxisType.Explicit, False, marks=pytest.mark.slow)]
)
def test_eight_devices_as_one(kind: AxisType, packed: bool) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    pruning = prune.rewire({"w": 0.8}, key=KEY, end=8, every=1, grow=prune.by_gradient, packed=packed)
    tx = prune.around(optax.sgd(0.1, momentum=0.9), pruning)
    alone = {"w": jnp.round(weights((64, 48))["w"] * 4) + 0.5}  # many ties
    sharded = jax.device_put(alone, NamedSharding(mesh, P("a", "b")))
    step = jax.jit(lambda p, s: tx.update(jax.tree.map(jnp.round, p), s, p))
    one, eight = tx.init(alone), tx.init(sharded)
    for _ in range(3):
        (u, one), (v, eight) = step(alone, one), step(sharded, eight)
        alone, sharded = optax.apply_updates(alone, u), optax.apply_updates(sharded, v)
        np.testing.assert_array_equal(prune.masks(one)["w"], prune.masks(eight)["w"])
        np.testing.assert_array_equal(alone["w"], sharded["w"])
        assert sharded["w"].sharding.is_equivalent_to(NamedSharding(mesh, P("a", "b")), 2)


@pytest.mark.parametrize(
    ("rules", "numbers", "message"),
    [
        ({"w": prune.NM(2, 4)}, {}, "no free choice"),
        ({"w": prune.Below(0.1)}, {}, "no free choice"),
        ({"w": prune.Unstructured(0.5, scope="all")}, {}, "no free choice"),
        ({"w": 0.9999}, {}, "lose all its weights"),
        ({"w": 0.5}, {"end": 0}, "begin < end"),
        ({"w": 0.5}, {"every": 0}, "every >= 1"),
        ({"w": 0.5}, {"fraction": 1.0}, "fraction"),
    ],
)
def test_bad_input(rules: dict, numbers: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune.rewire(rules, key=KEY, **{"end": 5, **numbers}).init(weights())
