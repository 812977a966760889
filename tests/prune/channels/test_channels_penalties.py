"""Slimming and growing regularisation on the units found: against closed forms, and zeros that can be cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress.prune import channels

RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"a": (5, 8), "scale": (8,), "b": (8, 6), "gain": (6,), "c": (6, 3), "last": (3,)}.items()
}


def net(p, x):
    """Two hidden layers with scales that their units pass, and one that an output has."""
    h = jax.nn.relu(x @ p["a"]) * p["scale"]
    return jnp.tanh(h @ p["b"] * p["gain"]) @ p["c"] * p["last"]


GROUPS = channels.groups(net, PARAMS, X)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def steps(tx, params, n, gradients=ZEROS):
    """The updates of each of `n` steps at the same parameters."""
    state, found = tx.init(params), []
    for _ in range(n):
        updates, state = tx.update(gradients, state, params)
        found.append(updates)
    return found


def test_slimming_is_the_sign_of_the_scales_that_units_pass():
    (updates,) = steps(channels.slimming(GROUPS, 0.3), PARAMS, 1)
    for name, update in updates.items():
        wanted = 0.3 * np.sign(PARAMS[name]) if name in ("scale", "gain") else 0 * PARAMS[name]
        np.testing.assert_allclose(update, wanted, atol=1e-7, err_msg=name)
    (only,) = steps(channels.slimming(GROUPS, 0.3, "^scale"), PARAMS, 1)
    assert not np.asarray(only["gain"]).any() and np.asarray(only["scale"]).all()


def test_slimming_by_the_proximal_step_is_the_soft_threshold():
    tx = channels.slimming(GROUPS, 2.0, learning_rate=0.25)
    (updates,) = steps(tx, PARAMS, 1)
    for name in ("scale", "gain"):
        w = np.asarray(PARAMS[name])
        wanted = np.sign(w) * np.maximum(np.abs(w) - 0.5, 0)
        np.testing.assert_allclose(w + updates[name], wanted, atol=1e-6)
        assert ((w + updates[name]) == 0).sum() == (np.abs(w) <= 0.5).sum() > 0
    assert not any(np.asarray(updates[name]).any() for name in ("a", "b", "c", "last"))


def test_scales_at_zero_are_cut_at_no_cost():
    """Network slimming end to end: proximal descent makes scales zero, and `scale` ranks those first."""
    y = jnp.tanh(X[:, :1]) * jnp.ones((1, 3))  # a target that needs few units
    tx = optax.chain(optax.sgd(0.05), channels.slimming(GROUPS, 0.1, learning_rate=0.05))

    def step(carry, _):
        p, s = carry
        updates, s = tx.update(jax.grad(lambda p: ((net(p, X) - y) ** 2).mean())(p), s, p)
        return (optax.apply_updates(p, updates), s), None

    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=300))((PARAMS, tx.init(PARAMS)))
    zeros = {"a[1]": int((trained["scale"] == 0).sum()), "b[1]": int((trained["gain"] == 0).sum())}
    assert sum(zeros.values()) >= 2
    scores = channels.scale(GROUPS, trained)
    plan = channels.from_units(GROUPS, {name: np.argsort(scores[name])[: min(n, 4)] for name, n in zeros.items()})
    small = channels.shrink(net, trained, plan)
    np.testing.assert_allclose(small(plan.apply(trained), X), net(trained, X), atol=1e-5)


def test_growing_decay_of_what_a_plan_drops():
    """The strength at step t is min(growth * (t // every), ceiling), on dropped units alone."""
    plan = channels.from_units(GROUPS, {"a[1]": np.array([1, 6]), "b[1]": np.array([0])})
    gone = jax.tree.map(lambda x: 1 - x, plan.mask(jax.tree.map(jnp.ones_like, PARAMS)))
    tx = channels.growing(plan, growth=0.1, every=2, ceiling=0.15)
    for t, updates in enumerate(steps(tx, PARAMS, 5)):
        strength = min(0.1 * (t // 2), 0.15)
        for name, update in updates.items():
            np.testing.assert_allclose(update, strength * gone[name] * PARAMS[name], atol=1e-6, err_msg=f"{name} {t}")


def test_growing_decay_of_all_units_and_what_it_leads_to():
    """GReg-2, with SGD and no other gradient: weights that units own fall by the product of (1 - rate * strength)."""
    tx = optax.chain(channels.growing(GROUPS, growth=0.2, every=1, ceiling=10.0), optax.sgd(0.5))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        updates, state = tx.update(ZEROS, state, params)
        params = optax.apply_updates(params, updates)
    factor = np.prod([1 - 0.5 * 0.2 * t for t in range(4)])
    for name in PARAMS:
        wanted = PARAMS[name] * (1.0 if name == "last" else factor)
        np.testing.assert_allclose(params[name], wanted, rtol=1e-5, err_msg=name)


def test_state_that_no_optimizer_trains_is_passed_over():
    """Batch statistics are in the tree that is cut, and not among the parameters."""
    variables = {"params": {"a": PARAMS["a"], "c": PARAMS["c"]}, "stats": {"mean": PARAMS["gain"]}}
    variables["params"]["a"] = PARAMS["a"][:, :6]

    def fn(v, x):
        return (x @ v["params"]["a"] - v["stats"]["mean"]) @ v["params"]["c"]

    groups = channels.groups(fn, variables, X)
    plan = channels.from_units(groups, {groups[0].name: np.array([2])})
    params = variables["params"]
    for tx in (channels.growing(plan, 0.1, 1), channels.group_lasso(groups, 0.1)):
        first, second = steps(tx, params, 2, jax.tree.map(jnp.zeros_like, params))
        assert np.asarray(second["a"])[:, 2].all() and jax.tree.structure(first) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: channels.growing(GROUPS, growth=-1.0), "want growth >= 0"),
        (lambda: channels.growing(GROUPS, every=0), "every >= 1"),
        (lambda: channels.growing(channels.from_units(GROUPS, {})), "nothing to decay"),
        (lambda: channels.growing(GROUPS).init({"a": jnp.ones((5, 9))}), "of another tree: want 'a'"),
        (lambda: channels.growing(GROUPS).init({"z": jnp.ones(3)}), "it is not there"),
        (lambda: channels.growing(GROUPS).update(ZEROS, channels.growing(GROUPS).init(PARAMS)), "params"),
        (lambda: channels.slimming(GROUPS, 0.1, "nothing"), "no unit passes a scale whose path matches 'nothing'"),
        (lambda: channels.slimming(GROUPS, -0.1), "strength is finite and not negative"),
        (lambda: channels.slimming(GROUPS, 0.1).init(PARAMS | {"scale": jnp.ones(9)}), "'scale'.* another tree"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
