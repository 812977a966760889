"""Activations against sums by hand, penalties over whole units, pictures, and rules of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from channels_models import Maker
from jax import lax
from jax.extend.core import Primitive

from jaxcompress.prune import channels
from jaxcompress.prune.channels._tape import RULES


def mlp():
    m = Maker()
    params = {"a": m(5, 8), "b": m(8, 6), "c": m(6, 3)}
    return lambda p, x: jnp.tanh(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"], params


def batches(n=3):
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.normal(size=(4 + i % 2, 5)), jnp.float32) for i in range(n)]


@pytest.mark.parametrize("statistic", ["mean", "active", "square"])
def test_activations_are_those_that_the_next_product_reads(statistic):
    fn, params = mlp()
    groups = channels.groups(fn, params, batches()[0])
    found = channels.activation(groups, fn, params, batches(), statistic)
    of = {"mean": np.abs, "active": lambda h: h != 0, "square": np.square}[statistic]
    x = np.concatenate(batches())
    h = np.maximum(x @ params["a"], 0)
    np.testing.assert_allclose(found["a[1]"], of(h).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["b[1]"], of(np.tanh(h @ params["b"])).mean(0), rtol=1e-4)
    with pytest.raises(ValueError, match="no batches"):
        channels.activation(groups, fn, params, [])
    with pytest.raises(ValueError, match="statistic must be"):
        channels.activation(groups, fn, params, batches(), "median")


def test_activations_inside_a_scan_with_remat():
    m = Maker()
    params = {"x": m(5, 4), "h": m(4, 4), "out": m(4, 2)}

    def fn(p, xs):
        step = jax.checkpoint(lambda h, x: (jnp.tanh(x @ p["x"] + h @ p["h"]), None))
        return jax.lax.scan(step, jnp.zeros((xs.shape[0], 4)), xs.swapaxes(0, 1))[0] @ p["out"]

    xs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    groups = channels.groups(fn, params, xs)
    found = channels.activation(groups, fn, params, [xs])
    h, read = np.zeros((2, 4)), []
    for t in range(3):
        read.append(np.abs(h).mean(0))
        h = np.tanh(xs[:, t] @ params["x"] + h @ params["h"])
    (group,) = groups
    np.testing.assert_allclose(found[group.name], (np.mean(read, 0) + np.abs(h).mean(0)) / 2, rtol=1e-4)


@pytest.mark.slow
def test_group_lasso_is_the_gradient_of_the_norms_of_whole_units():
    fn, params = mlp()
    params["a"] = params["a"].at[:, 2].set(0)
    params["b"] = params["b"].at[2].set(0)  # one unit is zero as a whole
    groups = channels.groups(fn, params, batches()[0])
    norms = channels.unit_norms(groups, params)
    wanted = np.sqrt((np.asarray(params["a"]) ** 2).sum(0) + (np.asarray(params["b"]) ** 2).sum(1))
    np.testing.assert_allclose(norms["a[1]"], wanted, rtol=1e-5)
    tx = channels.group_lasso(groups, 0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    safe = np.where(wanted > 0, wanted, 1)
    np.testing.assert_allclose(updates["a"], 0.5 * params["a"] / safe, rtol=1e-4)
    assert not np.asarray(updates["a"])[:, 2].any()
    growing = channels.group_lasso(groups, lambda step: 0.1 * step)
    first, state = growing.update(params, growing.init(params), params)
    second, _ = growing.update(params, state, params)
    np.testing.assert_array_equal(first["c"], params["c"])
    assert np.abs(second["c"] - params["c"]).max() > 0
    with pytest.raises(ValueError, match="must not be negative"):
        channels.group_lasso(groups, -1.0)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))


def test_training_under_the_penalty_makes_units_that_cost_nothing_to_cut():
    fn, params = mlp()
    x = jnp.concatenate(batches(8))
    y = jnp.tanh(x[:, :1])  # a target that needs few units

    def head(p, x):
        return fn(p, x)[:, :1]

    groups = channels.groups(head, params, x)
    tx = optax.chain(channels.group_lasso(groups, 0.02), optax.adam(1e-2))

    def step(carry, _):
        p, s = carry
        grads = jax.grad(lambda p: ((head(p, x) - y) ** 2).mean())(p)
        updates, s = tx.update(grads, s, p)
        return (optax.apply_updates(p, updates), s), None

    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=300))((params, tx.init(params)))

    def ratio(p):
        return {k: np.sort(np.asarray(v)) for k, v in channels.unit_norms(groups, p).items()}

    before, after = ratio(params)["a[1]"], ratio(trained)["a[1]"]
    assert after[1] / after[-1] < before[1] / before[-1]


def test_pictures():
    fn, params = mlp()
    groups = channels.groups(fn, params, batches()[0])
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    lines = channels.draw(groups, plan, width=16).splitlines()
    assert "████████░░░░░░░░" in lines[0] and "8 -> 4" in lines[0] and "a[1] out" in lines[0]
    assert channels.draw(groups).count("█") == 32 + 24
    with pytest.raises(ValueError, match="other groups"):
        channels.draw(groups, channels.Plan({}, {}, {"other": (2, 1)}))


def test_a_rule_of_ones_own():
    primitive = Primitive("doubled_for_channels_test")
    primitive.def_impl(lambda x, *, width: 2 * x)
    primitive.def_abstract_eval(lambda x, *, width: x)
    jax.interpreters.mlir.register_lowering(
        primitive, jax.interpreters.mlir.lower_fun(lambda x, *, width: 2 * x, multiple_results=False)
    )
    m = Maker()
    params = {"a": m(5, 8), "b": m(8, 3)}

    def fn(p, x):
        return primitive.bind(x @ p["a"], width=8) @ p["b"]

    x = batches()[0]
    groups = channels.groups(fn, params, x)
    assert len(groups) == 0 and groups.unknown == {primitive.name: 1}
    try:
        channels.register(
            primitive.name,
            lambda shapes, params: channels.Along(agree=[], outputs=[[(0, 0), (0, 1)]]),
            lambda params, ins, outs: {"width": outs[0][1]},
        )
        groups = channels.groups(fn, params, x)
        plan = channels.plan(groups, channels.norm(groups, params), 0.5)
        assert channels.verify(fn, params, plan, x, gradient=False).ok
        with pytest.raises(ValueError, match="replace=True"):
            channels.register(primitive.name, lambda shapes, params: channels.Along([], []))
    finally:
        RULES.pop(primitive.name, None)


def test_what_nobody_reads_decides_nothing():
    @jax.custom_vjp
    def bent(x):
        return jnp.tanh(x), jnp.exp(x).sum()

    bent.defvjp(lambda x: (bent(x), x), lambda x, g: (g[0] / jnp.cosh(x) ** 2 + g[1] * jnp.exp(x),))
    helper = jax.jit(lambda h: (h + 1, jnp.sort(h)))

    def turn(carry, _):
        h, total = carry
        return (jnp.tanh(h), total + jnp.exp(h).sum()), jnp.cumsum(h, axis=1)

    def fn(p, x):
        h, _ = helper(bent(x @ p["a"])[0])
        (h, _), _ = jax.lax.scan(turn, (h, 0.0), length=2)
        jnp.exp(h).sum()
        return jax.nn.relu(h - 9) @ p["b"]

    m = Maker()
    (group,) = channels.groups(fn, {"a": m(5, 8), "b": m(8, 3)}, batches()[0])
    assert (group.size, group.exact) == (8, True)


def test_rows_in_groups_each_with_a_matrix_of_its_own():
    m = Maker()
    params = {"a": m(5, 8), "w": m(3, 8, 6), "v": m(3, 6, 8), "b": m(8, 3)}

    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        wide = jax.nn.relu(jax.lax.ragged_dot(h, p["w"], jnp.argsort(x[:3, 0]) + x.shape[0] // 3 - 1))
        still = jax.lax.stop_gradient(h)  # JAX has no second derivative
        own = jax.grad(lambda w: jax.lax.ragged_dot(still, w, jnp.array([3, 1, 2])).sum())(p["w"])  # rows contracted
        return (h + jax.lax.ragged_dot(wide, p["v"], jnp.array([1, 3, 2]))) @ p["b"] + own.sum((0, 2)) @ p["b"]

    x = jnp.concatenate(batches(2))[:6]
    groups = channels.groups(fn, params, x)
    assert {g.name: (g.size, g.exact) for g in groups} == {"a[1]": (8, True), "w[2]": (6, True)}
    assert "computed sizes" in groups.frozen["w[0]"] and not groups.unknown
    assert channels.flops(groups) == 2 * 6 * (5 * 8 + 2 * 8 * 6 + 6 * 8 + 8 * 3) + 2 * 8 * 3
    plan = channels.from_units(groups, {"a[1]": [1, 2, 6], "w[2]": [0, 5]})
    found = channels.verify(fn, params, plan, x)
    assert found.ok, found
    assert channels.activation(groups, fn, params, [x])["w[2]"].shape == (6,)


@pytest.mark.parametrize("place", [
    lambda h, i: h.at[i].get(mode="fill", fill_value=1.0),
    lambda h, i: h.at[i].apply(jnp.cos),
    lambda h, i: h[:0].prod(0),
    lambda h, i: lax.pad(h, jnp.float32(1), ((1, 0, 0), (0, 0, 0))),
])  # fmt: skip
def test_what_puts_other_numbers_beside_zeros_makes_a_sum_inexact(place):
    def fn(p, x):
        return place(x @ p["a"], 3 + jnp.argsort(x[:, 0])).sum(-1)

    groups = channels.groups(fn, {"a": jnp.ones((5, 8))}, batches()[0])
    assert {g.name: g.exact for g in groups} == {"a[1]": False}


def test_a_lookup_that_is_nan_outside_leaves_a_sum_exact():
    def fn(p, x):
        return jnp.take(p["a"], jnp.argsort(x[:, 0]), axis=0).sum(-1)

    (group,) = channels.groups(fn, {"a": jnp.ones((5, 8))}, batches()[0])
    assert group.exact


@pytest.mark.parametrize(
    "place",
    [
        lambda h: (h / jnp.abs(h) ** 1.5).sum(-1),
        lambda h: (h / jnp.log(1 + jnp.abs(h))).sum(-1),
        lambda h: (h * jax.lax.rsqrt((h * h).mean(0))).sum(-1),
        lambda h: (h / jnp.where(h > 0, 1.0, h)).sum(-1),
        lambda h: (h.sum(0) / (h != 0).sum(0)).sum(),
        lambda h: (jnp.abs(h) * jnp.log(jnp.abs(h))) @ jnp.ones((8, 2)),
        lambda h: jnp.log(lax.optimization_barrier(1 - jnp.cos(h))) @ jnp.ones((8, 2)),
        lambda h: lax.scan(lambda h, _: (h / jnp.abs(h) ** 1.5, None), h, None, length=2)[0].sum(-1),
        lambda h: jax.checkpoint(lambda h: h / jnp.abs(h) ** 1.5)(h).sum(-1),
    ],
)
def test_what_is_not_finite_where_a_unit_is_zero_is_inexact(place):
    params = {"a": Maker()(5, 8)}
    x = batches(1)[0]
    masked = {"a": params["a"].at[:, 0].set(0.0)}
    assert not jnp.isfinite(place(x @ masked["a"])).all()
    (group,) = channels.groups(lambda p, x: place(x @ p["a"]), params, x)
    assert not group.exact
    assert "not finite" in group.notes[0]


@pytest.mark.parametrize(
    "place",
    [
        lambda h: jnp.sqrt(jnp.abs(h)),
        lambda h: jnp.abs(h) ** 0.5,
        lambda h: jnp.sqrt(jnp.abs(h)) ** jnp.arange(1, 9),
        lambda h: jnp.linalg.norm(jnp.stack([h, 2 * h], -1), axis=-1),
        lambda h: jnp.arctan2(h, 2 * h),
        lambda h: jnp.arccos(1 - jnp.abs(jnp.tanh(h))),
    ],
)
def test_what_has_no_finite_derivative_at_zero_is_exact_with_a_note(place):
    m = Maker()
    params, x = {"a": m(5, 6), "b": m(6, 8), "c": m(8, 3)}, batches(1)[0]

    def fn(p, x):
        return place(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    groups = channels.groups(fn, params, x)
    assert [(g.name, g.exact, len(g.notes)) for g in groups] == [("a[1]", True, 0), ("b[1]", True, 1)]
    assert "gradient may not be finite" in groups["b[1]"].notes[0]
    plan = channels.from_units(groups, {"b[1]": [1, 2]})
    assert channels.verify(fn, params, plan, x, gradient=False).ok
    found = channels.verify(fn, params, plan, x)
    assert not found.finite and not found.ok
    gradients = jax.grad(lambda p: channels.shrink(fn, params, plan)(p, x).sum())(plan.apply(params))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    upper = {"b": params["b"][:5], "c": params["c"]}  # here only what is cut has no finite gradient: not compared
    assert channels.verify(
        lambda p, x: place(x @ p["b"]) @ p["c"],
        upper,
        dataclasses.replace(plan, shapes={n: w.shape for n, w in upper.items()}),
        x,
    ).ok


def test_a_tree_that_is_put_on_a_device_at_once_passes_leaf_by_leaf():
    """One call of a primitive with several operands, as JAX's own `cg` has it."""
    m = Maker()
    params, x = {"a": m(5, 8), "b": m(8, 6), "c": m(14, 3)}, batches(1)[0]

    def fn(p, x):
        put = jax.device_put({"narrow": jnp.tanh(x @ p["a"] @ p["b"]), "wide": x @ p["a"], "all": jnp.zeros(8)})
        return jnp.concatenate([put["narrow"], put["wide"] + put["all"]], 1) @ p["c"]

    groups = channels.groups(fn, params, x)
    assert {g.name: (g.size, g.exact) for g in groups} == {"a[1]": (8, True), "b[1]": (6, True)}
    plan = channels.from_units(groups, {"a[1]": [1, 2], "b[1]": [0, 5]})
    assert channels.verify(fn, params, plan, x).ok


@pytest.mark.parametrize(
    "place",
    [
        lambda h: (h / (1e-6 + jnp.abs(h)) ** 1.5).sum(-1),
        lambda h: (h * jax.lax.rsqrt((h * h).mean(0) + 1e-6)).sum(-1),
        lambda h: (h * h / jnp.where(h == 0, 1.0, h)).sum(-1),
        lambda h: (h / jnp.maximum((h * h).mean(0), 1e-12)).sum(-1),
        lambda h: (h / (1 + jnp.exp(h))).sum(-1),
    ],
)
def test_what_is_kept_from_zero_stays_exact(place):
    params = {"a": Maker()(5, 8)}
    x = batches(1)[0]
    groups = channels.groups(lambda p, x: place(x @ p["a"]), params, x)
    plan = channels.plan(groups, channels.norm(groups, params), ratio=0.5)
    assert channels.verify(lambda p, x: place(x @ p["a"]), params, plan, x).ok


def test_caches_written_and_read_at_a_place_an_example_keep_their_channels_free():
    m = Maker()
    params, x = {"a": m(5, 8), "b": m(5, 8), "c": m(8, 3)}, batches(1)[0]

    def fn(p, x, places):
        cache = jnp.stack([x @ p["a"]] * 3, 1)
        write = jax.vmap(lambda cache, row, place: lax.dynamic_update_slice(cache, row[None], (place, 0)))
        read = jax.vmap(lambda cache, place: lax.dynamic_slice(cache, (place, 0), (2, 8)))
        return (read(write(cache, x @ p["b"], places), places[::-1]) @ p["c"]).sum(1)

    places = jnp.array([0, 2, 1, 9])
    groups = channels.groups(fn, params, x, places)
    assert [(g.name, g.size) for g in groups] == [("a[1]", 8)]
    plan = channels.from_units(groups, {"a[1]": [0, 3, 4]})
    assert channels.verify(fn, params, plan, x, places).ok


@pytest.mark.parametrize(
    ("write", "tied"),
    [
        (lambda h, u: h.at[:, :3].set(0), None),
        (lambda h, u: h.at[..., ::2].add(u), [0, 2, 4, 6]),
        (lambda h, u: h.at[:, 4:].multiply(u), [4, 5, 6, 7]),
        (lambda h, u: h.at[:, np.array([7, 1, 0, 5])].set(u), [7, 1, 0, 5]),
        (lambda h, u: h.at[:, 2].set(0), None),
    ],
    ids=["slice", "strided", "end", "listed", "single"],
)
def test_channels_written_at_places_known_while_tracing_stay_free(write, tied):
    m = Maker()
    params, x = {"a": m(5, 8), "b": m(5, 4), "c": m(8, 3)}, batches(1)[0]

    def fn(p, x):
        return jax.nn.relu(write(x @ p["a"], x @ p["b"])) @ p["c"]

    groups = channels.groups(fn, params, x)
    plan = channels.plan(groups, channels.random(groups, jax.random.key(1)), ratio=0.5)
    kept = plan.keep["a"][1]
    assert len(kept) < 8 and channels.verify(fn, params, plan, x).ok
    if tied is not None:  # what is written goes with its place
        assert [i for i in range(4) if tied[i] in kept] == sorted(plan.keep.get("b", {}).get(1, range(4)))
    elif write(jnp.ones((1, 8)), None)[0, 1]:
        assert 2 in kept


def test_complex_weights_count_by_their_magnitudes():
    rng = np.random.default_rng(0)
    a, c = (rng.normal(size=s) * 0.1 + 1j * rng.normal(size=s) for s in [(5, 8), (8, 3)])
    params = {"a": jnp.asarray(a, jnp.complex64), "c": jnp.asarray(c, jnp.complex64)}
    x = batches(1)[0]

    def fn(p, x):
        return jnp.abs(x @ p["a"] @ p["c"])

    (group,) = groups = channels.groups(fn, params, x)
    found = {
        "norm": (channels.norm(groups, params), np.abs(a).sum(0)),
        "median": (channels.geometric_median(groups, params), [np.linalg.norm(a.T - row, axis=1).sum() for row in a.T]),
        "square": (channels.activation(groups, fn, params, [x], "square"), (np.abs(x @ a) ** 2).mean(0)),
        "units": (channels.unit_norms(groups, params), np.hypot(np.linalg.norm(a, axis=0), np.linalg.norm(c, axis=1))),
        "hessian": (
            channels.hessian(groups, params, jax.tree.map(lambda w: jnp.ones(w.shape), params)),
            ((np.abs(a) ** 2).sum(0) + (np.abs(c) ** 2).sum(1)) / 2,
        ),
    }
    total = jax.jit(lambda p: fn(p, x).sum())
    only = [{"a": params["a"] * (np.arange(8) == i), "c": params["c"] * (np.arange(8) == i)[:, None]} for i in range(8)]
    slopes = [abs(jax.jvp(total, (params,), (unit,))[1]) for unit in only]
    found["taylor"] = (channels.taylor(groups, params, jax.grad(total)(params)), slopes)
    for name, (scores, want) in found.items():
        np.testing.assert_allclose(scores[group.name], want, rtol=1e-3, err_msg=name)
    lasso = channels.group_lasso(groups, 1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = lasso.update(zeros, lasso.init(params), params)
    np.testing.assert_allclose(updates["a"], a / found["units"][1], rtol=1e-4)
    with pytest.raises(ValueError, match="scores are real numbers"):
        channels.from_weights(groups, params)
