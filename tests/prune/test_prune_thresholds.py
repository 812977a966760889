"""Where a threshold comes from: a common ranking, a number, the layer's deviation, or training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import prune


def weights() -> dict[str, jax.Array]:
    """Three layers of different scale, the last with hardly a chance in a common ranking."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes, scales = ((20, 16), (16, 8), (8, 5)), (1.0, 0.3, 1e-4)
    return {
        f"w{i}": s * jax.random.normal(k, shape)
        for i, (k, shape, s) in enumerate(zip(keys, shapes, scales, strict=True))
    }


def test_a_scope_is_ranked_as_one_layer() -> None:
    """Against a sort of all weights; the layer that would be emptied keeps its best weight."""
    params = weights()
    masks = prune.choose(jax.tree.map(jnp.abs, params), {"": prune.Unstructured(0.8, scope="all")})
    scores = np.concatenate([np.abs(np.asarray(x)).ravel() for x in params.values()])
    sizes = [x.size for x in params.values()]
    k = sum(int(0.8 * n + 0.5) for n in sizes)
    want = np.split(scores > np.sort(scores)[k - 1], np.cumsum(sizes)[:-1])
    emptied = []
    for (name, mask), kept in zip(masks.items(), want, strict=True):
        if not kept.any():
            emptied.append(name)
            kept[np.argmax(np.abs(np.asarray(params[name])).ravel())] = True
        np.testing.assert_array_equal(np.asarray(mask).ravel(), kept)
    assert emptied == ["w1", "w2"]


def test_a_scope_may_empty_a_layer_if_asked() -> None:
    scores = jax.tree.map(jnp.abs, weights())
    masks = prune.choose(scores, {"": prune.Unstructured(0.8, scope="all")}, allow_empty=True)
    assert not masks["w2"].any()


@pytest.mark.slow
def test_two_scopes_and_a_layer_alone() -> None:
    params = weights() | {"x": 100 * weights()["w0"], "y": 1e-3 * weights()["w0"]}
    rules = {"w": prune.Unstructured(0.5, scope="w"), "x": prune.Unstructured(0.25, scope="x"), "y": 0.75}
    tx = optax.chain(optax.sgd(0.0), prune.sparsify(rules, prune.polynomial(0, 2, 1)))
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    found = prune.sparsity(prune.masks(state))
    assert found["x"] == 0.25 and found["y"] == 0.75
    masks = prune.masks(state)
    assert sum(int((~masks[f"w{i}"]).sum()) for i in range(3)) == 160 + 64 + 20 - 1  # w2 keeps one


def test_a_scope_over_eight_devices() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    scores = {f"w{i}": jnp.round(4 * jax.random.normal(jax.random.key(i), (32, 16))) for i in range(3)}
    spread = jax.device_put(scores, NamedSharding(mesh, P("a")))
    rules = {"": prune.Unstructured(0.7, scope="all")}
    one, eight = prune.choose(scores, rules), prune.choose(spread, rules)
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    assert sum(int((~m).sum()) for m in eight.values()) == 3 * 358
    assert all(m.sharding.is_equivalent_to(NamedSharding(mesh, P("a")), 2) for m in eight.values())


def test_a_threshold_by_hand() -> None:
    params = weights()
    masks = prune.choose(jax.tree.map(jnp.abs, params), {"w[01]": prune.Below(0.5)})
    for name in ("w0", "w1"):
        np.testing.assert_array_equal(masks[name], np.abs(np.asarray(params[name])) >= np.float32(0.5))
    assert masks["w2"] is None


def test_a_threshold_of_deviations_ramps() -> None:
    """Han et al.: at the end of the ramp all weights below the multiple are gone, half way those below half of it."""
    params = {"w": weights()["w0"]}
    tx = prune.sparsify({"w": prune.Below(1.5, deviations=True)}, prune.polynomial(0, 2, 1, power=1))
    state, w = tx.init(params), np.asarray(params["w"], np.float64)
    for share in (0, 0.5, 1):
        _, state = tx.update(params, state, params)
        np.testing.assert_array_equal(prune.masks(state)["w"], np.abs(w) >= 1.5 * share * w.std())


def test_no_layer_is_emptied_by_a_threshold() -> None:
    scores = {"w": jnp.abs(weights()["w0"]), "same": jnp.ones((3, 4))}
    masks = prune.choose(scores, {"": prune.Below(1e3)})
    assert int(masks["w"].sum()) == 1 and bool(masks["w"].ravel()[jnp.argmax(scores["w"])])
    np.testing.assert_array_equal(masks["same"].ravel(), [True] + [False] * 11)
    assert not prune.choose(scores, {"": prune.Below(1e3)}, allow_empty=True)["w"].any()


def test_learned_thresholds_find_a_sparsity() -> None:
    """STR on a regression of which 5 of 40 inputs matter: most others are exactly zero; decay raises the threshold."""
    x = jax.random.normal(jax.random.key(0), (200, 40))
    true = jnp.zeros(40).at[:5].set(jnp.array([2.0, -1.5, 1.0, 3.0, -2.5]))
    y = x @ true + 0.1 * jax.random.normal(jax.random.key(1), (200,))
    params = {"w": jnp.zeros(40) + 0.1}
    start = {"params": params, "thresholds": prune.learned_thresholds(params, {"w": -4.0})}

    def loss(t: dict) -> jax.Array:
        w = prune.thresholded(t["params"], t["thresholds"])["w"]
        return jnp.mean((x @ w - y) ** 2)

    @jax.jit
    def trained(decay: jax.Array) -> dict:
        def step(both: dict, _: None) -> tuple[dict, None]:
            return jax.tree.map(lambda p, g: p - 5e-2 * (g + decay * p), both, jax.grad(loss)(both)), None

        return jax.lax.scan(step, start, None, 600)[0]

    found = []
    for decay in (0.0, 0.02, 0.1):
        both = trained(jnp.float32(decay))
        kept = np.asarray(prune.thresholded(both["params"], both["thresholds"])["w"] != 0)
        assert kept[:5].all() and (~kept[5:]).sum() >= 20
        found.append(float(both["thresholds"]["w"]))
    assert found == sorted(found) and found[0] < -4.0 + 0.01 < -3.5 < found[2], found


def test_soft_threshold_closed_form() -> None:
    w = jnp.array([-2.0, -0.5, 0.0, 0.4, 3.0])
    np.testing.assert_allclose(prune.soft_threshold(w, 0.5), [-1.5, 0, 0, 0, 2.5])
    slope = jax.grad(lambda t: prune.soft_threshold(w, t).sum())(0.45)
    np.testing.assert_allclose(slope, 1 + 1 - 1)  # -2 and -0.5 move up, 3 moves down


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune.Below(0.0), "positive number"),
        (lambda: prune.Below(float("nan")), "positive number"),
        (lambda: prune.Unstructured(0.5, stack=1, scope="all"), "stack or scope"),
        (lambda: prune.thresholded({"w": jnp.ones(3)}, {"v": jnp.zeros(())}), "no parameter for the threshold of 'v'"),
        (lambda: prune.learned_thresholds({"w": jnp.ones(3)}, {"v": 1.0}), "v"),
        (lambda: prune.taylor(decay=1.0), "decay"),
        (lambda: prune.batch_norm_scale(jnp.ones((3, 4)), jnp.ones(3)), "one scale an output"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_floats_of_one_byte_are_ranked_beside_wider_ones() -> None:
    """JAX promotes them to no dtype by itself."""
    values = jnp.array([0.5, -1.0, 2.0, 4.0, -8.0, 0.25, 3.0, 1.5])
    small = {"a": values.astype(jnp.float8_e4m3fn), "b": (2.0 * values).astype(jnp.bfloat16)}
    tx = prune.sparsify({".": prune.Unstructured(0.5, scope="all")}, prune.one_shot())
    _, state = tx.update(jax.tree.map(jnp.zeros_like, small), tx.init(small), small)
    order = np.abs(np.concatenate([values, 2 * values]))
    kept = np.concatenate([prune.masks(state)[name] for name in "ab"])
    assert kept.sum() == 8 and order[kept].min() >= order[~kept].max()
    assert float(prune.threshold(small, 0.5)) == np.sort(order)[7]
