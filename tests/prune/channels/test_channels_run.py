"""The smaller function under every transformation, both meanings of a mean, and what composes with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels_models import Maker, layer_norm
from channels_zoo import ZOO

from jaxcompress import compressed, dense, nbytes, quantize
from jaxcompress.prune import channels


def halved(name):
    fn, params, args = ZOO[name]()
    groups = channels.groups(fn, params, *args)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    return fn, params, args, plan, channels.shrink(fn, params, plan)


def test_transformations_and_other_batch_sizes():
    fn, params, (x,), plan, small = halved("mlp")
    masked, cut = plan.mask(params), plan.apply(params)
    wanted = fn(masked, x)
    np.testing.assert_allclose(jax.jit(small)(cut, x[:1]), wanted[:1], rtol=1e-5, atol=1e-6)
    mapped = jax.jit(jax.vmap(small, (None, 0)))(cut, x[:, None])[:, 0]
    np.testing.assert_allclose(mapped, wanted, rtol=1e-5, atol=1e-6)
    _, seen = jax.lax.scan(lambda c, x: (c, jax.checkpoint(small)(cut, x[None])[0]), 0, x)
    np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-6)

    def loss(run, p):
        return (run(p, x) ** 2).sum()

    def gradients(m, c):
        return jax.grad(lambda p: loss(fn, p))(m), jax.grad(lambda p: loss(small, p))(c)

    of_mask, of_small = jax.jit(gradients)(masked, cut)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plan.apply(of_mask), of_small)
    hessian = jax.jit(lambda c: jax.jvp(jax.grad(lambda p: loss(small, p)), (c,), (c,))[1])(cut)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(hessian))


@pytest.mark.parametrize("how", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_derivatives_along_a_direction_through_a_while_loop(how):
    """JAX has no others there."""
    m = Maker()
    params, x = {"a": m(5, 8), "b": m(8, 8), "c": m(8, 3)}, jnp.asarray(np.eye(4, 5), jnp.float32)

    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        turned = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["b"]) + h), (0, h))
        return turned[1] @ p["c"]

    plan = channels.plan(groups := channels.groups(fn, params, x), channels.norm(groups, params), 0.5)
    assert plan.widths == {"a[1]": (8, 4)}
    masked, cut = plan.mask(params), plan.apply(params)
    small = channels.shrink(fn, params, plan)
    wanted = how(lambda p: jax.jvp(lambda p: fn(p, x), (p,), (p,)))(masked)
    found = how(lambda p: jax.jvp(lambda p: small(p, x), (p,), (p,)))(cut)
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_cut_again_and_quantized():
    fn, params, (x,), plan, small = halved("mlp")
    cut = plan.apply(params)
    groups = channels.groups(small, cut, x)
    assert {g.name: g.size for g in groups} == {name: after for name, (_, after) in plan.widths.items()}
    again = channels.plan(groups, channels.norm(groups, cut), 0.5)
    assert channels.verify(small, cut, again, x).ok
    twice = channels.shrink(small, cut, again)(again.apply(cut), x)
    assert twice.shape == fn(params, x).shape
    rounded = quantize.convert(cut, [("^[abc]$", quantize.Affine(8))])
    found = jax.jit(compressed(small))(rounded, x)
    np.testing.assert_allclose(found, small(dense(rounded), x), rtol=1e-4, atol=1e-5)
    assert nbytes(rounded) < nbytes(cut) < nbytes(params)


def test_means_as_traced_or_over_the_widths_that_are_left():
    m = Maker()
    params = {"a": m(5, 8), "n": {"scale": m(8, positive=True), "bias": m(8)}, "b": m(8, 3)}

    def fn(p, x):
        return layer_norm(p["n"], x @ p["a"]) @ p["b"]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    groups = channels.groups(fn, params, x)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    cut = plan.apply(params)
    np.testing.assert_allclose(
        channels.shrink(fn, params, plan)(cut, x), fn(plan.mask(params), x), rtol=1e-5, atol=1e-6
    )
    rederived = channels.shrink(fn, params, plan, rederive=True)(cut, x)
    np.testing.assert_allclose(rederived, fn(cut, x), rtol=1e-5, atol=1e-6)  # the function itself, built so small
    assert np.abs(rederived - fn(plan.mask(params), x)).max() > 1e-2


def test_sums_over_what_is_not_zero_are_marked():
    m = Maker()
    params = {"a": m(5, 8), "b": m(8, 3)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)

    def two_pass(p, x):
        h = x @ p["a"]
        return ((h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-3)) @ p["b"]

    def normalised(p, x):
        h = jnp.exp(x @ p["a"])
        return (h / h.sum(-1, keepdims=True)) @ p["b"]

    def padded_with_ones(p, x):
        h = jnp.pad(x @ p["a"], ((1, 0), (0, 0)), constant_values=1)
        return (h @ h.T)[:, :4] @ (x @ p["a"] @ p["b"])

    for fn in (two_pass, normalised, padded_with_ones):
        (group,) = channels.groups(fn, params, x)
        assert not group.exact and "not zero" in group.notes[0]
        groups = channels.groups(fn, params, x)
        with pytest.raises(ValueError, match="inexact, which stay whole"):
            channels.plan(groups, channels.norm(groups, params), 0.5)
        plan = channels.plan(groups, channels.norm(groups, params), 0.5, inexact=True)
        assert not channels.verify(fn, params, plan, x).ok
        small = channels.shrink(fn, params, plan, rederive=True)(plan.apply(params), x)
        np.testing.assert_allclose(small, fn(plan.apply(params), x), rtol=1e-4, atol=1e-5)


def test_what_has_no_rule_stays_whole_and_is_reported():
    m = Maker()
    params = {"a": m(4, 4), "b": m(4, 6), "c": m(6, 3)}

    def fn(p, x):
        return jax.nn.relu(x @ jnp.linalg.cholesky(p["a"] @ p["a"].T + jnp.eye(4)) @ p["b"]) @ p["c"]

    x = jnp.ones((2, 4))
    groups = channels.groups(fn, params, x)
    assert [group.name for group in groups] == ["a[1]", "b[1]"]  # a is contracted with itself along its axis 1
    assert groups.unknown == {"cholesky": 1} and "'cholesky' has no rule" in groups.frozen["a[0]"]
    assert "cholesky" in str(groups)
    assert channels.verify(fn, params, channels.plan(groups, channels.norm(groups, params), 0.5), x).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa_scanned_remat", "lstm", "mixture_of_experts"])
def test_eager_equals_jitted(name):
    fn, params, args, plan, small = halved(name)
    cut = plan.apply(params)
    np.testing.assert_allclose(small(cut, *args), jax.jit(small)(cut, *args), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small(cut, *args), fn(plan.mask(params), *args), rtol=1e-4, atol=1e-5)


def test_arrays_read_in_another_order_than_they_lie():
    """`jax.vmap` of convolutions and `order="F"` give reshapes that transpose."""
    m = Maker()
    params = {"a": m(2, 3, 5, 8), "c": m(2, 3, 8, 6), "b": m(6, 8), "g": m(8), "d": m(8, 3)}

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    def fn(p, x):
        h = jax.vmap(lambda a, c: conv(jnp.sin(conv(x, a)), c))(p["a"], p["c"]).sum(0)
        h = jnp.tanh(h @ p["b"])
        return (jnp.reshape(h.reshape(*h.shape[:2], 2, 4), h.shape, order="F") * p["g"]) @ p["d"]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    groups = channels.groups(fn, params, x)
    sizes = sorted((g.name.partition("#")[0], g.size) for g in groups)
    assert sizes == [("a[0]", 2), ("a[3]", 8), ("b[1]", 2), ("b[1]", 4), ("c[3]", 6)]
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    found = channels.verify(fn, params, plan, x, gradient=False)  # as one program it takes long to compile
    assert found.ok, found
