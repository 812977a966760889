"""Bad input: what can't be done says what is wrong and how to get there; what can, never empties anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels_models import Maker
from channels_zoo import ZOO
from jax.extend.core import Primitive

from jaxcompress.prune import channels
from jaxcompress.prune.channels._shrink import dropped_atoms, largest
from jaxcompress.prune.channels._tape import RULES

X = jnp.ones((2, 5))


def mlp():
    m = Maker()
    return lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": m(5, 8), "b": m(8, 3)}


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("name", ["shufflenet", "densenet", "vit"])
def test_the_highest_ratio_leaves_a_unit_of_every_group_and_of_every_part_that_is_used(name, scope):
    fn, params, args = ZOO[name]()
    groups = channels.groups(fn, params, *args)
    plan = channels.plan(groups, channels.norm(groups, params), 0.999, scope=scope)
    assert all(after >= 1 for _, after in plan.widths.values())
    assert sum(after for _, after in plan.widths.values()) <= len(groups) + (0.001 * plan.parameters[0])
    dropped_atoms(groups.traced, plan)  # raises where a part of an axis would be empty
    assert min(min(x.shape) for x in jax.tree.leaves(plan.apply(params)) if x.ndim) >= 1


def test_a_part_that_is_used_by_itself_is_not_emptied():
    """Not by a plan of whole groups, and one that is made by hand is told."""
    _, params = mlp()
    params["b"] = params["b"][:4]
    halves = lambda p, x: sum(h @ p["b"] for h in jnp.split(jnp.tanh(x @ p["a"]), 2, -1))  # noqa: E731
    groups = channels.groups(halves, params, X)
    assert channels.plan(groups, channels.norm(groups, params), 0.99).keep["b"][0].size == 1
    whole = channels.groups(lambda p, x: x @ p["a"], {"a": params["a"]}, X, free_out=[""])
    by_hand = channels.Plan({"a": {1: np.arange(4)}}, dict(whole.shapes), {}, ("",))

    def parts(p, x):
        return jnp.split(x @ p["a"], 2, -1)

    with pytest.raises(ValueError, match="nothing of a part of an axis"):
        channels.shrink(parts, {"a": params["a"]}, by_hand)({"a": params["a"][:, :4]}, X)


def test_outputs_that_may_not_shrink_name_the_way():
    def features(p, x):
        return jnp.tanh(x @ p["a"])

    params = {"a": Maker()(5, 8)}
    groups = channels.groups(features, params, X)
    assert not len(groups) and "free_out names outputs that may shrink" in groups.frozen["a[1]"]
    with pytest.raises(ValueError, match=r"no groups to choose from(.|\n)*free_out"):
        channels.plan(groups, {}, 0.5)
    free = channels.groups(features, params, X, free_out="")
    plan = channels.from_units(free, {"a[1]": [0]})
    assert channels.shrink(features, params, plan)(plan.apply(params), X).shape == (2, 7)


def test_a_plan_of_a_freer_function_does_not_fit():
    fn, params = mlp()
    plan = channels.from_units(channels.groups(fn, params, X), {"a[1]": [0, 3]})
    small = plan.apply(params)
    with pytest.raises(ValueError, match=r"drops 2 indices of a\[1\] that must stay: it is sorted along"):
        channels.shrink(lambda p, x: jnp.sort(x @ p["a"]) @ p["b"], params, plan)(small, X)
    with pytest.raises(ValueError, match="must stay"):
        channels.shrink(lambda p, x: jnp.tanh(x @ p["a"])[:, ::-1] @ p["b"], params, plan)(small, X)
    with pytest.raises(ValueError, match="another tree"):
        channels.shrink(fn, {"a": params["a"]}, plan)


def test_symbolic_sizes_are_refused_by_the_smaller_function_too():
    fn, params = mlp()
    plan = channels.from_units(channels.groups(fn, params, X), {"a[1]": [0]})
    (n,) = jax.export.symbolic_shape("n")
    small = jax.jit(channels.shrink(fn, params, plan))
    with pytest.raises(ValueError, match=r"symbolic size n.*trace with integers"):
        jax.export.export(small)(plan.apply(params), jax.ShapeDtypeStruct((n, 5), jnp.float32))
    fixed = jax.export.export(small)(plan.apply(params), X)
    np.testing.assert_allclose(fixed.call(plan.apply(params), X), fn(plan.mask(params), X), rtol=1e-5)


def test_parameters_that_are_all_closed_over():
    fn, params = mlp()
    with pytest.raises(ValueError, match="first argument"):
        channels.groups(lambda p, x: fn(params, x), (), X)
    twice = {"a": params["a"], "a/b": jnp.ones(2), "a_": {"b": jnp.ones(2)}}
    assert channels.groups(lambda p, x: x @ p["a"], twice, X) is not None


def test_inputs_that_give_no_numbers_are_told():
    fn, params = mlp()
    plan = channels.from_units(channels.groups(fn, params, X), {"a[1]": [0]})
    found = channels.verify(fn, params, plan, X * jnp.nan, gradient=False)
    assert not found.finite and not found.ok


def test_no_number_hides_behind_a_small_difference():
    assert np.isnan(largest([1e-7, float("nan"), 1e-8])) and largest([]) == 0


def test_a_rule_of_ones_own_that_cannot_be_is_told():
    primitive = Primitive("misruled_for_channels_test")
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    params = {"a": Maker()(5, 8), "b": Maker()(8, 3)}

    def fn(p, x):
        return primitive.bind(x @ p["a"]) @ p["b"]

    try:
        for agree, outputs, message in [
            ([], [[(0, 0)]], r"outputs of \[1\] axes; it gave the shapes \[\(2, 8\)\]"),
            ([], [[(0, 0), (0, 2)]], "axis 2 of operand 0"),
            ([], [[(0, 0), (1, 0)]], "axis 0 of operand 1"),
            ([[(0, 0), (0, 1)]], [[(0, 0), (0, 1)]], r"sizes are \[2, 8\]"),
            ([], [[(0, 1), (0, 0)]], "of size 8, for an output axis of 2"),
        ]:
            told = channels.Along(agree, outputs)
            channels.register(primitive.name, lambda shapes, params, told=told: told, replace=True)
            with pytest.raises(ValueError, match=message):
                channels.groups(fn, params, X)
    finally:
        RULES.pop(primitive.name, None)


def test_nothing_to_choose_from_is_told():
    fn, params = mlp()
    turned = channels.groups(lambda p, x: (lambda h: h + jnp.roll(h, 3, 1))(jnp.tanh(x @ p["a"])) @ p["b"], params, X)
    assert not len(turned) and "as one unit" in turned.frozen["a[1]"]
    with pytest.raises(ValueError, match="there are no scores"):
        channels.plan(channels.groups(fn, params, X), {}, 0.5)
    spread = channels.groups(lambda p, x: (x @ p["a"]).var(1, keepdims=True) * (x @ p["a"]) @ p["b"], params, X)
    with pytest.raises(ValueError, match=r"a\[1\] are inexact, which stay whole without inexact=True"):
        channels.plan(spread, channels.norm(spread, params), 0.5)
    half = channels.plan(spread, channels.norm(spread, params), np.float32(0.5), inexact=True)
    assert half.widths == {"a[1]": (8, 4)}
