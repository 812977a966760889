"""Groups, scores and plans: sizes by the closed formulas, choices by hand, text and back, and clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from channels_zoo import ZOO

from jaxcompress import prune
from jaxcompress.arrays import Sparse
from jaxcompress.paths import UnmatchedRuleError
from jaxcompress.prune import channels


def dense(p, x):
    return jax.nn.relu(x @ p["w1"]) @ p["w2"]


def setting(a=5, b=8, c=3):
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(size=(a, b)), jnp.float32),
        "w2": jnp.asarray(rng.normal(size=(b, c)), jnp.float32),
    }
    return params, jnp.ones((2, a))


def convolutions(p, x):
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return conv(jax.nn.relu(conv(x, p["w1"])), p["w2"])


def test_a_neuron_takes_a_plus_c_parameters_and_a_filter_k_squared_as_many():
    params, x = setting(5, 8, 3)
    (group,) = channels.groups(dense, params, x)
    assert (group.size, group.unit_size) == (8, 5 + 3)
    kernels = {"w1": jnp.ones((3, 3, 5, 8)), "w2": jnp.ones((3, 3, 8, 4))}
    (group,) = channels.groups(convolutions, kernels, jnp.ones((1, 6, 6, 5)))
    assert (group.size, group.unit_size) == (8, (5 + 4) * 9)
    plan = channels.from_units(channels.groups(convolutions, kernels, jnp.ones((1, 6, 6, 5))), {group.name: [0, 7]})
    assert plan.parameters[0] - plan.parameters[1] == 2 * group.unit_size


def test_flops_by_hand_before_and_after():
    params, x = setting(5, 8, 3)
    groups = channels.groups(dense, params, x)
    assert channels.flops(groups) == 2 * 2 * (5 * 8 + 8 * 3)
    assert channels.flops(groups, channels.from_units(groups, {"w1[1]": [0, 1, 2, 3]})) == 2 * 2 * (5 * 4 + 4 * 3)
    stacked = {"w": jnp.ones((3, 4, 4))}

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]

    assert channels.flops(channels.groups(fn, stacked, jnp.ones((2, 4)))) == 3 * 2 * 2 * 16


def test_heads_and_widths_of_the_same_number_are_groups_of_their_own():
    params = {"qkv": jnp.ones((6, 3 * 16)), "o": jnp.ones((16, 6))}

    def fn(p, x):
        q, k, v = (z.reshape(*z.shape[:2], 4, 4) for z in jnp.split(x @ p["qkv"], 3, -1))
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", a, v).reshape(*x.shape[:2], 16) @ p["o"]

    groups = channels.groups(fn, params, jnp.ones((1, 3, 6)))
    assert sorted(group.size for group in groups) == [4, 4, 4]
    assert sorted(m.index.shape[1] for group in groups for m in group.members if m.path == "qkv") == [4, 8, 12]


def test_scores_by_hand():
    params, x = setting()
    groups = channels.groups(dense, params, x)
    (name,) = (group.name for group in groups)
    w1, w2 = np.asarray(params["w1"], np.float64), np.asarray(params["w2"], np.float64)
    g = jax.tree.map(lambda w: jnp.cos(7 * w), params)
    g1, g2 = np.asarray(g["w1"], np.float64), np.asarray(g["w2"], np.float64)
    l1, l2 = np.abs(w1).sum(0), np.linalg.norm(w1, axis=0)
    apart = [sum(np.linalg.norm(w1[:, i] - w1[:, j]) for j in range(8)) for i in range(8)]
    order = np.argsort(l2)
    lamp = np.empty(8)
    for i, j in enumerate(order):
        lamp[j] = l2[j] ** 2 / sum(l2[k] ** 2 for k in order[i:])
    both = np.abs((w1 * g1).sum(0) + (w2 * g2).sum(1))
    cases = {
        "l1": (channels.norm(groups, params), l1),
        "l2": (channels.norm(groups, params, 2), l2),
        "l2 of all": (
            channels.norm(groups, params, 2, roles=None, reduce="max"),
            np.maximum(l2, np.linalg.norm(w2, axis=1)),
        ),
        "fpgm": (channels.geometric_median(groups, params), apart),
        "taylor": (channels.taylor(groups, params, g), both),
        "unsigned": (channels.taylor(groups, params, g, signed=False), np.abs(w1 * g1).sum(0) + np.abs(w2 * g2).sum(1)),
        "hessian": (channels.hessian(groups, params, g), (w1**2 * g1).sum(0) / 2 + (w2**2 * g2).sum(1) / 2),
        "lamp": (channels.lamp(groups, params), lamp),
        "weights": (channels.from_weights(groups, jax.tree.map(prune.magnitude, params), ("in",)), np.abs(w2).sum(1)),
    }
    for what, (found, wanted) in cases.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, err_msg=what)
    assert channels.random(groups, jax.random.key(0))[name].shape == (8,)


@pytest.mark.parametrize("score", [channels.norm, channels.lamp, channels.geometric_median, channels.from_weights])
@pytest.mark.parametrize("roles", ["out", ("outputs",)])
def test_a_role_that_there_is_not_is_refused(score, roles):
    params, x = setting()
    with pytest.raises(ValueError, match=r"roles are a tuple of some of in, out, scale, shift"):
        score(channels.groups(dense, params, x), params, roles=roles)


def test_slimming_ranks_scales_of_all_layers_together_and_leaves_the_rest():
    fn, params, args = ZOO["resnet_projection"]()
    groups = channels.groups(fn, params, *args)
    scores = channels.scale(groups, params)
    assert len(scores) == len(groups)
    wanted = np.abs(np.asarray(params["n1"]["scale"]))
    np.testing.assert_allclose(scores["c1[3]"], wanted, rtol=1e-6)
    plan = channels.plan(groups, {k: v for k, v in scores.items() if k in ("c1[3]", "c3[3]")}, 0.4, scope="global")
    both = np.concatenate([scores["c1[3]"], scores["c3[3]"]])
    cut = np.sort(both)[int(0.4 * len(both))]
    np.testing.assert_array_equal(plan.keep["c1"][3], np.flatnonzero(scores["c1[3]"] >= cut))
    assert plan.widths["short[3]" if "short[3]" in plan.widths else "c2[3]"][0] == 8


def test_local_ratio_rounding_minimum_and_rules():
    params, x = setting(5, 16, 3)
    groups = channels.groups(dense, params, x)
    scores = {"w1[1]": np.arange(16.0)[::-1]}
    plan = channels.plan(groups, scores, 0.5)
    np.testing.assert_array_equal(plan.keep["w1"][1], np.arange(8))
    assert channels.plan(groups, scores, 0.6, round_to=4).widths["w1[1]"] == (16, 8)
    assert channels.plan(groups, scores, 0.99, minimum=3).widths["w1[1]"] == (16, 3)
    assert channels.plan(groups, scores, {"w1": 0.25}).widths["w1[1]"] == (16, 12)
    assert channels.plan(groups, scores, 0.9, scope="global", max_ratio=0.5).widths["w1[1]"] == (16, 8)


def test_keys_among_the_parameters_are_no_units():
    params, x = setting()
    params["keys"] = jax.random.split(jax.random.key(0), 8)

    def noisy(params, x):
        return dense(params, x + jax.random.normal(params["keys"][0], x.shape))

    groups = channels.groups(noisy, params, x)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    assert "keys" not in plan.keep and plan.keep
    assert channels.shrink(noisy, params, plan)(plan.apply(params), x).shape == noisy(params, x).shape


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_targets_are_reached_and_hardly_overshot(scope):
    fn, params, args = ZOO["vit"]()
    groups = channels.groups(fn, params, *args)
    scores = channels.norm(groups, params)
    plan = channels.plan(groups, scores, parameters=0.6, scope=scope, normalize="mean")
    before, after = plan.parameters
    assert 0.4 * before < after <= 0.6 * before
    plan = channels.plan(groups, scores, flops=0.6, scope=scope, normalize="mean")
    assert 0.35 < channels.flops(groups, plan) / channels.flops(groups) <= 0.6


def test_any_target_is_reached_by_the_smallest_ratio():
    params, x = setting(5, 16, 3)
    groups = channels.groups(dense, params, x)
    asked = []

    def small_enough(plan):
        asked.append(plan.parameters[1])
        return plan.parameters[1] <= 11 * 8

    plan = channels.plan(groups, channels.norm(groups, params), until=small_enough)
    assert plan.widths["w1[1]"] == (16, 11) and len(asked) == 7
    with pytest.raises(ValueError, match="until cannot be met"):
        channels.plan(groups, channels.norm(groups, params), until=lambda plan: False)


def test_plan_as_text_gives_the_same_plan():
    params, x = setting()
    plan = channels.from_units(channels.groups(dense, params, x), {"w1[1]": [1, 4]})
    again = channels.Plan.from_json(plan.to_json())
    jax.tree.map(np.testing.assert_array_equal, plan.apply(params), again.apply(params))
    assert (again.widths, again.shapes, again.free_out) == (plan.widths, plan.shapes, plan.free_out)
    text = plan.to_json()
    changed = [text.replace("[0, 2", "[9, 2"), text.replace("[0, 2", "[0.5, 2"), text.replace('"1": [', '"-1": [')]
    for text in ("{}", "[1]", "no", *changed):
        with pytest.raises(ValueError, match="not a plan"):
            channels.Plan.from_json(text)


def test_optimizer_state_is_cut_like_its_parameters():
    params, x = setting()
    plan = channels.from_units(channels.groups(dense, params, x), {"w1[1]": [1, 4]})
    state = optax.adam(1e-3).init(params)
    state = jax.tree.map(lambda s: s + 1.0 if s.ndim else s, state)
    small = plan.apply_like(state)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, optax.adam(1e-3).init(plan.apply(params)))
    with pytest.raises(ValueError, match="other leaves"):
        plan.apply_like(state, fresh=optax.sgd(1e-3).init(params))


def test_state_of_a_whole_parameter_is_not_cut_like_one_whose_path_ends_its_own():
    def model(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"] + jnp.sort(x @ params["sub"]["w"], -1)

    params = {"w": jnp.ones((6, 6)), "v": jnp.ones((6, 6)), "sub": {"w": jnp.ones((6, 6))}}
    plan = channels.from_units(channels.groups(model, params, jnp.ones((2, 6))), {"w[1]": [1, 4]})
    small = plan.apply_like(optax.adam(1e-3).init(params))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, optax.adam(1e-3).init(plan.apply(params)))


def test_packed_masks_are_cut_like_their_weights():
    def fn(p, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]), -1)

    params = {"w1": jnp.arange(1.0, 65).reshape(4, 16), "w2": -jnp.arange(1.0, 257).reshape(16, 16)}
    plan = channels.from_units(channels.groups(fn, params, jnp.ones((2, 4))), {"w1[1]": [1, 4, 5], "w2[1]": range(8)})
    tx = optax.chain(optax.sgd(0.0), prune.sparsify({"w": 0.5}, prune.one_shot()))
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    small = plan.apply_like(state)
    for name, mask in prune.masks(small).items():
        np.testing.assert_array_equal(mask, plan.apply(prune.masks(state))[name])
    fresh = tx.init(plan.apply(params))  # of 13 columns a boolean a weight, of 8 a bit
    assert jax.tree.map(lambda x: (x.shape, x.dtype), small) == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)


def test_state_of_a_bare_array_is_cut_like_it():
    weight = jnp.ones((4, 8))
    groups = channels.groups(lambda w, x: jnp.tanh(x @ w).sum(-1), weight, jnp.ones((2, 4)))
    plan = channels.from_units(groups, {groups[0].name: [1, 4]})
    small = plan.apply_like(optax.adam(1e-3).init(weight))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, optax.adam(1e-3).init(plan.apply(weight)))


def test_moments_of_rows_and_columns_begin_anew():
    params, x = setting()
    plan = channels.from_units(channels.groups(dense, params, x), {"w1[1]": [1, 4, 5, 6]})
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=5)
    state = jax.tree.map(lambda s: s + 1, optimizer.init(params))  # shapes are factored that will not be, when cut
    with pytest.raises(ValueError, match=r"pass fresh=optimizer.init\(plan.apply\(params\)\)"):
        plan.apply_like(state)
    fresh = optimizer.init(plan.apply(params))
    small = plan.apply_like(state, fresh)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, fresh)
    assert small.count == 1


def test_state_beneath_a_parameter_begins_anew():
    params, x = setting()
    plan = channels.from_units(channels.groups(dense, params, x), {"w1[1]": [1, 4, 5, 6]})
    optimizer = optax.sm3(1e-2)  # a vector an axis: mu/w1/0, mu/w1/1
    with pytest.raises(ValueError, match=r"'0/mu/\w+/\d'.*pass fresh="):
        plan.apply_like(optimizer.init(params))
    small_params = plan.apply(params)
    small = plan.apply_like(optimizer.init(params), optimizer.init(small_params))
    optimizer.update(jax.tree.map(jnp.ones_like, small_params), small, small_params)


def test_sharded_parameters_stay_sharded():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = setting()
    placed = jax.NamedSharding(mesh, jax.P(None, "x"))
    params["w1"] = jax.device_put(params["w1"], placed)
    groups = channels.groups(dense, params, x)
    small = channels.from_units(groups, {"w1[1]": [1, 4]}).apply(params)
    assert small["w1"].sharding.is_equivalent_to(placed, 2)
    whole = channels.from_units(groups, {"w1[1]": [1]}).apply(params)
    assert whole["w1"].shape == (5, 7) and len(whole["w1"].sharding.device_set) == 2
    explicit = jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P(None, "x"))
    params["w1"] = jax.device_put(params["w1"], explicit)
    found = channels.from_units(groups, {"w1[1]": [1, 4]})
    np.testing.assert_array_equal(found.apply(params)["w1"], small["w1"])
    assert found.apply(params)["w1"].sharding.is_equivalent_to(explicit, 2)
    np.testing.assert_array_equal(np.asarray(found.mask(params)["w1"])[:, 4], 0)


def test_errors_say_what_is_wrong():
    params, x = setting()
    groups = channels.groups(dense, params, x)
    scores = channels.norm(groups, params)
    plan = channels.plan(groups, scores, 0.5)
    small = plan.apply(params)
    for wrong, message in [
        (lambda: channels.plan(groups, scores, 1.0), "would empty every layer"),
        (lambda: channels.plan(groups, scores), "exactly one of"),
        (lambda: channels.plan(groups, scores, 0.5, flops=0.5), "exactly one of"),
        (lambda: channels.plan(groups, {"w1[1]": np.ones(3)}, 0.5), "wants 8 scores"),
        (lambda: channels.plan(groups, {"w1[1]": np.full(8, np.nan)}, 0.5), "not finite"),
        (lambda: channels.plan(groups, {"other": np.ones(8)}, 0.5), "no group"),
        (lambda: channels.plan(groups, scores, flops=0.01, minimum=4), "cannot bring flops down"),
        (lambda: channels.plan(groups, scores, 0.5, round_to=0), "round_to >= 1"),
        (lambda: channels.plan(groups, scores, 0.5, round_to=2.5), "round_to must be an integer, got 2.5"),
        (lambda: channels.plan(groups, scores, 0.5, max_ratio="0.5"), "max_ratio must be a number"),
        (lambda: channels.norm(groups, params, p="l1"), "p must be a number, got 'l1'"),
        (lambda: channels.from_units(groups, {"w1[1]": range(8)}), "keep at least one"),
        (lambda: channels.from_units(groups, {"w1[1]": [8]}), "units 0 to 7"),
        (lambda: plan.apply({"w1": params["w1"]}), "another tree: it has 'w2'"),
        (lambda: plan.apply(small), "cut already"),
        (lambda: channels.shrink(dense, params, plan)(params, x), "what plan.apply"),
        (lambda: channels.shrink(lambda p, x: dense(p, x) + p["w1"].sum(0)[:3], params, plan)(small, x), "must stay"),
        (lambda: channels.groups(dense, {}, x), "no arrays"),
        (lambda: channels.groups(dense, {**params, "w1": Sparse.from_dense(params["w1"])}, x), "compressed"),
        (lambda: channels.norm(groups, {"w1": params["w1"]}), "of another tree"),
        (lambda: channels.from_weights(groups, params, reduce="median"), "reduce must be"),
        (lambda: channels.plan(groups, scores, 0.5, scope="global", normalize="sum"), "normalize must be"),
        (lambda: channels.plan(groups, scores["w1[1]"], 0.5), "scores are a dict"),
        (lambda: channels.from_units(groups, {"w1[1]": np.arange(8) < 4}), "np.flatnonzero"),
        (lambda: channels.from_units(groups, {"w1[1]": [0.5]}), "whole numbers"),
        (lambda: channels.flops(channels.groups(channels.shrink(dense, params, plan), small, x), plan), "other groups"),
        (lambda: channels.plan(groups, scores, {"w1": None}), "ratio must be a number"),
        (lambda: channels.activation(groups, dense, small, [x]), "of another tree"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()
    with pytest.raises(UnmatchedRuleError):
        channels.plan(groups, scores, {"typo": 0.5})
    with pytest.raises(UnmatchedRuleError):
        channels.groups(dense, params, x, free_out=["stats"])
    with pytest.raises(KeyError, match="there are w1"):
        groups["other"]


def test_outputs_stay_whole_unless_they_may_shrink():
    params, x = setting()

    def with_features(p, x):
        h = jax.nn.relu(x @ p["w1"])
        return {"logits": h @ p["w2"], "features": h}

    groups = channels.groups(with_features, params, x)
    assert len(groups) == 0 and "free_out" in groups.frozen["w1[1]"]
    with pytest.raises(ValueError, match="no groups to choose from"):
        channels.plan(groups, {}, 0.5)
    groups = channels.groups(with_features, params, x, free_out=["features"])
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    out = channels.shrink(with_features, params, plan)(plan.apply(params), x)
    assert out["features"].shape == (2, 4)
    assert channels.verify(with_features, params, plan, x).ok


def test_symbolic_sizes_are_refused():
    (n,) = jax.export.symbolic_shape("n")
    params, _ = setting()
    with pytest.raises(ValueError, match="symbolic"):
        channels.groups(dense, params, jax.ShapeDtypeStruct((n, 5), jnp.float32))


def test_closed_over_parameters_are_constants_that_are_cut_where_they_are_used():
    params, x = setting()

    def fn(p, x):
        return jax.nn.relu(x @ p["w1"]) @ params["w2"]

    groups = channels.groups(fn, {"w1": params["w1"]}, x)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    out = channels.shrink(fn, {"w1": params["w1"]}, plan)({"w1": plan.apply({"w1": params["w1"]})["w1"]}, x)
    np.testing.assert_allclose(out, fn(plan.mask({"w1": params["w1"]}), x), rtol=1e-5)
