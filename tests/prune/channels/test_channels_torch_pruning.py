"""JAX counterparts of the 31 scripts in Torch-Pruning's test list, by their names; `docs/channels.md` has the table.

The originals mostly run without an exception. Here the smaller model is compared with the zeroed one, outputs and
gradients, or numbers with sums by hand.
"""

import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels_models import Maker, relu
from channels_torch_pruning import IMAGES, MODELS, chain
from channels_zoo import ZOO
from channels_zoo_transformers import _block, _transformer_block
from test_channels_zoo import check

from jaxcompress import paths
from jaxcompress.prune import channels

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "channels.md"


def agrees(build):
    """A case that is a model: any choice of its units agrees with the oracle."""
    return lambda: check(*build(), (IMAGES,))


CASES = {name: agrees(build) for name, build in MODELS.items()}


def case(run):
    """A case that asserts by itself."""
    CASES[run.__name__] = run
    return run


def units_gone(groups, plan):
    """The units of each group that a plan drops."""
    gone = {}
    for group in groups:
        first = group.members[0]
        kept = plan.keep.get(first.path, {}).get(first.axis, np.arange(first.shape[first.axis]))
        gone[group.name] = np.flatnonzero(~np.isin(first.index, kept).any(axis=1))
    return gone


@case
def fully_connected_layers():
    check(*ZOO["mlp"]())


@case
def dependency_graph():
    """The groups of a residual network are those that a look at it gives."""
    fn, params, args = ZOO["resnet_projection"]()
    groups, _ = check(fn, params, args)
    found = {frozenset(f"{m.path}[{m.axis}]" for m in group.members) for group in groups}

    def norm(n):
        return {f"{n}/{part}[0]" for part in ("scale", "bias", "mean", "var")}

    assert found == {
        frozenset({"stem[3]", *norm("n0"), "c1[2]", "short[2]"}),
        frozenset({"c1[3]", *norm("n1"), "c2[2]"}),
        frozenset({"c2[3]", *norm("n2"), "short[3]", "c3[2]", "c4[3]", *norm("n4"), "head[0]"}),
        frozenset({"c3[3]", *norm("n3"), "c4[2]"}),
    }


@case
def customized_layer():
    """Their layer is a plain function here; a primitive of one's own gets a rule."""
    from test_channels_more import test_a_rule_of_ones_own as with_a_rule

    m = Maker()
    p = {"a": m(3, 8), "scale": m(8), "bias": m(8), "fc": m(8, 8), "b": m(8, 2)}

    def fn(p, x):
        x = relu(x.mean((1, 2)) @ p["a"])
        x = x / jnp.sqrt((x**2).sum(1, keepdims=True))
        return ((x * p["scale"] + p["bias"]) @ p["fc"]) @ p["b"]

    check(fn, p, (IMAGES,))
    with_a_rule()


@case
def pruner():
    """Half of each layer in two turns, the shrunk function traced again for the second."""
    fn, params, args = ZOO["resnet_projection"]()
    for widths in ({4: 3, 5: 4, 6: 5, 8: 6}, {3: 3, 4: 3, 5: 4, 6: 5}):
        groups = channels.groups(fn, params, *args)
        plan = channels.plan(groups, channels.norm(groups, params, 2), 0.25)
        assert all(after == widths[before] for before, after in plan.widths.values())
        assert channels.verify(fn, params, plan, *args).ok
        fn, params = channels.shrink(fn, params, plan), plan.apply(params)
    assert fn(params, *args).shape == (2, 3)


@case
def group_prune():
    """Units by number: what is left of each parameter is what deleting by hand leaves."""
    fn, params, args = ZOO["resnet_projection"]()
    groups = channels.groups(fn, params, *args)
    found = channels.from_units(groups, {"c1[3]": [2, 4]}).apply(params)
    wanted = dict(params, c1=np.delete(params["c1"], [2, 4], 3), c2=np.delete(params["c2"], [2, 4], 2))
    wanted["n1"] = {name: np.delete(x, [2, 4]) for name, x in params["n1"].items()}
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@case
def interactive_pruner():
    """A plan is a proposal: what it drops of each group can be read, refused, and changed."""
    fn, params, args = ZOO["resnet_projection"]()
    groups = channels.groups(fn, params, *args)
    scores = channels.norm(groups, params)
    proposed = units_gone(groups, channels.plan(groups, scores, 0.5))
    for name, gone in proposed.items():
        np.testing.assert_array_equal(gone, np.sort(np.argsort(scores[name])[: len(scores[name]) // 2]))
    refused = proposed.pop("c1[3]")
    taken = channels.from_units(groups, {**proposed, "c3[3]": proposed["c3[3]"][:1]})
    assert taken.widths["c1[3]"] == (6, 6) and taken.widths["c3[3]"] == (5, 4) and len(refused) == 3
    assert channels.verify(fn, params, taken, *args).ok


@case
def isomorphic():
    """Layers of one kind are ranked together: on two blocks of a transformer, by hand."""
    m = Maker()
    params = {"in": m(3, 6), "blocks": [_block(m), _block(m)], "head": m(6, 3)}

    def fn(p, x):
        x = x.reshape(x.shape[0], -1, 3) @ p["in"]
        for block in p["blocks"]:
            x = _transformer_block(block, x)
        return x.mean(1) @ p["head"]

    groups = channels.groups(fn, params, IMAGES)
    scores = channels.norm(groups, params)
    hidden = [f"blocks/{i}/up[1]" for i in range(2)]
    by_hand = [np.abs(np.asarray(block["up"])).sum(0) for block in params["blocks"]]
    for name, wanted in zip(hidden, by_hand, strict=True):
        np.testing.assert_allclose(scores[name], wanted, rtol=1e-5)
    plan = channels.plan(groups, scores, 0.4, scope="isomorphic")
    gone = units_gone(groups, plan)
    kinds = {}  # by what the blocks' groups are called without the block's number
    for group in groups:
        kinds.setdefault(re.sub("blocks/[01]/", "", group.name), []).append(group.name)
    assert sorted(map(len, kinds.values())) == [1, 2, 2, 2, 2]  # the residual sum; heads, their widths, hidden units
    for names in kinds.values():
        of = [(s, name, unit) for name in names for unit, s in enumerate(scores[name])]
        worst = {(name, unit) for _, name, unit in sorted(of)[: int(0.4 * len(of))]}
        assert {(name, int(unit)) for name in names for unit in gone[name]} == worst
    assert len(gone[hidden[0]]) != len(gone[hidden[1]])  # otherwise local ranking would do the same
    assert channels.verify(fn, params, plan, IMAGES).ok


@case
def soft_pruning():
    """Zeroed and not removed: the shapes stay, and cutting later changes nothing."""
    fn, params, args = ZOO["resnet_projection"]()
    groups = channels.groups(fn, params, *args)
    plan = channels.plan(groups, channels.norm(groups, params, 2), 0.5, scope="global", normalize="mean")
    soft = plan.mask(params)
    assert jax.tree.map(jnp.shape, soft) == jax.tree.map(jnp.shape, params)
    gone, leaves = units_gone(groups, plan), dict(paths.named_leaves(soft))
    for group in groups:
        for m in group.members:
            leaf = np.asarray(leaves[m.path])
            assert not np.take(leaf, m.index[gone[group.name]].ravel(), m.axis).any()
    jax.tree.map(np.testing.assert_array_equal, plan.apply(soft), plan.apply(params))
    small = jax.jit(channels.shrink(fn, params, plan))(plan.apply(soft), *args)
    np.testing.assert_allclose(fn(soft, *args), small, rtol=1e-4, atol=1e-5)


@case
def regularization():
    from test_channels_more import test_group_lasso_is_the_gradient_of_the_norms_of_whole_units as by_hand

    by_hand()


@case
def taylor_importance():
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    grads = jax.grad(lambda p: (fn(p, IMAGES) ** 2).mean())(params)
    found = channels.taylor(groups, params, grads)
    params, grads = jax.device_get((params, grads))
    wanted = [sum(np.sum(np.take(params[n] * grads[n], j, a)) for n, a in UNIT) for j in range(8)]
    np.testing.assert_allclose(found["a[3]"], np.abs(wanted), rtol=1e-3)


UNIT = (("a", 3), ("bias", 0), ("b", 2))  # what a filter of `chain` owns


@case
def hessian_importance():
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    params = jax.device_get(params)
    square = {name: np.cos(w) ** 2 for name, w in params.items()}
    found = channels.hessian(groups, params, square)
    wanted = [sum(np.sum(np.take(params[n] ** 2 * square[n], j, a)) for n, a in UNIT) / 2 for j in range(8)]
    np.testing.assert_allclose(found["a[3]"], wanted, rtol=1e-4)


@case
def importance_reduction():
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    params = jax.device_get(params)
    norms = np.array([[np.sum(np.take(params[n], j, a) ** 2) ** 0.5 for j in range(8)] for n, a in UNIT])
    by_hand = {
        "sum": norms.sum(0),
        "mean": norms.mean(0),
        "max": norms.max(0),
        "prod": norms.prod(0),
        "geometric": norms.prod(0) ** (1 / 3),
        "first": norms[[n for n, _ in UNIT].index(groups[0].members[0].path)],
    }
    for reduce, wanted in by_hand.items():
        found = channels.norm(groups, params, 2, roles=None, reduce=reduce)
        np.testing.assert_allclose(found["a[3]"], wanted, rtol=1e-4, err_msg=reduce)


@case
def score_normalization():
    """Scores divided by a group's mean or largest, before all are ranked together."""
    fn, params, args = ZOO["mlp"]()
    groups = channels.groups(fn, params, *args)
    scores = {"a[1]": np.arange(1.0, 9), "b[1]": 100 * np.arange(1.0, 7)}
    for how, of in (("mean", np.mean), ("max", np.max)):
        gone = units_gone(groups, channels.plan(groups, scores, 0.5, scope="global", normalize=how))
        ranked = sorted((s / of(v), name, j) for name, v in scores.items() for j, s in enumerate(v))
        assert {(name, j) for name in gone for j in gone[name]} == {(name, j) for _, name, j in ranked[:7]}
    gone = units_gone(groups, channels.plan(groups, scores, 0.5, scope="global"))
    assert len(gone["a[1]"]) == 7 and not len(gone["b[1]"])  # as they are, the smaller scale goes first


@case
def serialization():
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    again = channels.Plan.from_json(plan.to_json())
    jax.tree.map(np.testing.assert_array_equal, plan.apply(params), again.apply(params))
    assert again.widths == plan.widths


@case
def load():
    """The small arrays and the plan as text are all that another process needs, with the function and its shapes."""
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    file = io.BytesIO()
    np.savez(file, plan=plan.to_json(), **plan.apply(params))
    file.seek(0)
    read = dict(np.load(file))
    restored = channels.Plan.from_json(str(read.pop("plan")))
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in restored.shapes.items()}
    found = jax.jit(channels.shrink(fn, shapes, restored))({n: jnp.asarray(x) for n, x in read.items()}, IMAGES)
    np.testing.assert_allclose(found, fn(plan.mask(params), IMAGES), rtol=1e-4, atol=1e-5)


@case
def flops():
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    plan = channels.from_units(groups, {"a[3]": [0, 1, 2]})

    def of(n):
        return 2 * 2 * 36 * 9 * (3 * n + n * 2)  # batch, pixels, kernel, channels

    assert (channels.flops(groups), channels.flops(groups, plan)) == (of(8), of(5))
    assert plan.parameters == (9 * (3 * 8 + 8 * 2) + 8, 9 * (3 * 5 + 5 * 2) + 5)


@case
def benchmark():
    """What XLA says of the two compiled programs; times are measured by the benchmark `channels.speed`."""
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    uncut = channels.shrink(fn, params, channels.from_units(groups, {}))  # written in the same forms
    whole = jax.jit(uncut).lower(params, IMAGES).compile()
    small = jax.jit(channels.shrink(fn, params, plan)).lower(plan.apply(params), IMAGES).compile()
    costs = [each.cost_analysis()["flops"] for each in (whole, small)]
    assert abs(costs[1] / costs[0] - channels.flops(groups, plan) / channels.flops(groups)) < 0.1
    sizes = [each.memory_analysis().argument_size_in_bytes for each in (whole, small)]
    before, after = plan.parameters
    assert sizes[0] - sizes[1] == 4 * (before - after)


@case
def print_tool():
    fn, params = chain()
    groups = channels.groups(fn, params, IMAGES)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    assert "8 -> 4" in str(plan) and "8 -> 4" in channels.draw(groups, plan)
    assert "a[3]: 8 units of 46 parameters" in str(groups)


@case
def pruning_fn():
    """They cut one layer's filters, and the next layer's inputs by a second call; here one plan does both."""
    fn, params = chain()
    gone = [0, 1, 3, 4]
    small = channels.from_units(channels.groups(fn, params, IMAGES), {"a[3]": gone}).apply(params)
    for name, axis in UNIT:
        np.testing.assert_array_equal(small[name], np.delete(params[name], gone, axis))


FAST = ("group_prune", "importance_reduction", "score_normalization", "flops", "print_tool", "pruning_fn")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_counterpart(name):
    CASES[name]()


def test_the_guide_has_a_row_for_each_case():
    section = GUIDE.read_text(encoding="utf-8").split("## Beside Torch-Pruning's test list")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (pass|fail) \|", section, re.M)
    assert len(rows) == 31
    assert [name for name, _ in rows] == list(CASES)
    assert all(found == "pass" for _, found in rows)


def test_one_unit_is_never_cut():
    fn, params = MODELS["single_channel_output"]()
    groups = channels.groups(fn, params, IMAGES)
    assert sorted(group.size for group in groups) == [4, 4]
