"""Rules are hit inside control flow and custom derivatives, and the numbers are those of the dense model."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from leaves import low_rank, quantized, sparse

from jaxcompress import features, quantize
from jaxcompress.arrays import MadeDenseError, Quantized, compressed, dense, watch


@jax.custom_vjp
def product_vjp(x, w):
    return x @ w


product_vjp.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda r, g: (2.0 * g @ r[1].T, 3.0 * r[0].T @ g)
)  # told apart by 2 and 3


@jax.custom_jvp
def product_jvp(x, w):
    return x @ w


@product_jvp.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2.0 * dx @ w + 3.0 * x @ dw


def in_scan(x, w):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]


def in_stacked_scan(x, w):
    return lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), x, w)[0]


def in_while(x, w):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]


def in_cond(x, w):
    return lax.cond(x[0, 0] > 0, lambda x, w: x @ w, lambda x, w: 2 * (x @ w), x, w)


MODELS = {
    "plain": lambda x, w: x @ w,
    "jit": jax.jit(lambda x, w: x @ w),
    "scan": in_scan,
    "cond": in_cond,
    "remat": jax.checkpoint(lambda x, w: jnp.tanh(x @ w) @ w),
    "remat with a policy": jax.checkpoint(lambda x, w: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable),
    "remat in scan": lambda x, w: lax.scan(jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), None)), x, None, length=3)[0],
    "vmap": jax.vmap(lambda x, w: x @ w, in_axes=(0, None)),
    "custom_vjp": product_vjp,
    "custom_vjp in jit": jax.jit(product_vjp),
    "custom_vjp in scan": lambda x, w: lax.scan(lambda c, _: (jnp.tanh(product_vjp(c, w)), None), x, None, length=3)[0],
    "custom_jvp": product_jvp,
    "custom_jvp in remat": jax.checkpoint(product_jvp),
}
LEAVES = {
    "int8": lambda: quantized((8, 8)),
    "int4 asymmetric": lambda: quantized((8, 8), bits=4, asymmetric=True),
    "sparse": lambda: sparse((8, 8)),
    "low rank": lambda: low_rank((8, 8)),
}
TRAINED = {"sparse": "values", "low rank": "left"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in ("low rank", "int8") else ()) for name in LEAVES]


@pytest.mark.parametrize("leaf", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradient(name, leaf, rng):
    model, w, x = MODELS[name], LEAVES[leaf](), jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    trained = TRAINED.get(leaf, "scale")
    with watch() as hits:
        out = jax.jit(compressed(model, strict=True))(x, w)
    assert any(primitive == "dot_general" for _, primitive, _ in hits)
    np.testing.assert_allclose(out, model(x, dense(w)), rtol=1e-5, atol=1e-5)

    def loss(run, weight):
        return lambda x, part: jnp.sum(jnp.sin(run(x, weight(dataclasses.replace(w, **{trained: part})))))

    got = jax.jit(jax.grad(loss(compressed(model), lambda w: w), argnums=(0, 1)))(x, getattr(w, trained))
    expected = jax.jit(jax.grad(loss(model, dense), argnums=(0, 1)))(x, getattr(w, trained))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.parametrize("leaf", NAMES)
def test_while_loop(leaf, rng):
    w, x = LEAVES[leaf](), jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    np.testing.assert_allclose(
        jax.jit(compressed(in_while, strict=True))(x, w), in_while(x, dense(w)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "w",
    [
        quantized((3, 8, 8), axes=(0 - 3, -1)),
        quantized((3, 8, 8), axes=(-3, -1), bits=4, asymmetric=True),
        quantized((3, 8, 8), axes=(-3, -1), group=(-2, 4)),
        sparse((3, 8, 8), stacked=1),
        low_rank((3, 8, 8), stacked=1),
    ],
    ids=["int8", "int4", "groups", "sparse", "low rank"],
)
def test_stacked_layers(w, rng):
    """Leaves stacked for `scan` carry their leading axis in every child."""
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    with watch() as hits:
        out = jax.jit(compressed(in_stacked_scan, strict=True))(x, w)
    assert hits[(type(w).__name__, "dot_general", "rule")] == 1
    np.testing.assert_allclose(out, in_stacked_scan(x, dense(w)), rtol=1e-5, atol=1e-5)
    each = jax.vmap(compressed(lambda w, x: x @ w, strict=True), in_axes=(0, None))(w, x)
    np.testing.assert_allclose(each, x @ dense(w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w", [sparse((3, 8, 8)), low_rank((3, 8, 8))], ids=["sparse", "low rank of rank 3"])
def test_what_is_not_made_as_a_stack_is_sliced_dense(w, rng):
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    with watch() as hits:
        out = compressed(in_stacked_scan)(x, w)
    assert hits == {(type(w).__name__, "scan", "dense"): 1}
    np.testing.assert_allclose(out, in_stacked_scan(x, dense(w)), rtol=1e-5, atol=1e-5)
    with pytest.raises(MadeDenseError, match="stack of layers"):
        compressed(in_stacked_scan, strict=True)(x, w)


@pytest.mark.parametrize("scheme", [quantize.Affine(4, symmetric=False), quantize.KMeans(4)], ids=["int4", "codebook"])
def test_what_stacked_layers_share_is_given_to_each(scheme, rng):
    """A scale or a codebook for the whole stack: unrolled, captured, measured and trained as the dense value is."""
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(4, 8, 8)) / 3, jnp.float32)
    leaf = scheme.convert(weight)

    def layers(w, x):
        return lax.scan(lambda x, w: (features.named(jnp.tanh(x @ w), "h"), None), x, w, unroll=2)[0]

    wanted = layers(dense(leaf), x)
    np.testing.assert_allclose(jax.jit(compressed(layers))(leaf, x), wanted, rtol=1e-5, atol=1e-5)
    out, found = features.capture(compressed(layers), "h")(leaf, x)
    np.testing.assert_allclose(found["h"][-1], out, rtol=1e-6)
    trained, rest = eqx.partition(leaf, eqx.is_inexact_array)
    got = jax.grad(lambda t: jnp.sum(compressed(layers)(eqx.combine(t, rest), x)))(trained)
    of_dense = jax.grad(lambda t: jnp.sum(layers(eqx.combine(t, rest).materialise(), x)))(trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, of_dense)
    cost, *_ = quantize.layer_costs(lambda p, x: layers(p["w"], x), {"w": weight}, [x], {"w": True}, {"": scheme})
    assert cost.output_snr > 0


def test_custom_vjp_without_compressed_arguments(rng):
    """A model may mix both: its custom derivative on activations, compressed weights elsewhere."""
    w, x = quantized((8, 8)), jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)

    def model(x, w):
        return product_vjp(x @ w, jnp.eye(8))

    np.testing.assert_allclose(compressed(model, strict=True)(x, w), x @ dense(w), rtol=1e-5, atol=1e-4)
    got = jax.grad(lambda x: compressed(model)(x, w).sum())(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: model(x, dense(w)).sum())(x), rtol=1e-5, atol=1e-4)


def test_a_custom_derivative_of_the_weight_itself(rng):
    """The softplus of a compressed weight has no rule: dense, with the right gradient."""
    w = quantized((8, 8))

    def loss(weight, scale):
        return jnp.sum(jnp.sin(jax.nn.silu(weight(dataclasses.replace(w, scale=scale)))))

    got = jax.grad(lambda s: compressed(lambda w: jnp.sum(jnp.sin(jax.nn.silu(w))))(dataclasses.replace(w, scale=s)))(
        w.scale
    )
    np.testing.assert_allclose(got, jax.grad(lambda s: loss(dense, s))(w.scale), rtol=1e-4, atol=1e-4)


def _step(carry, _):
    w, x = carry
    return (w, jnp.tanh(x @ w)), None


def _more(carry):
    return carry[0] < 2


def _next(carry):
    return carry[0] + 1, *_step(carry[1:], None)[0]


def test_a_body_is_traced_anew_for_leaves_with_other_scales(rng):
    """quax keeps traced bodies by a leaf's structure, which is the same whatever axes have scales."""
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(8, 8)) * np.geomspace(0.1, 3, 8), jnp.bfloat16)
    scan = compressed(lambda w, x: lax.scan(_step, (w, x), None, length=2)[0][1])
    loop = compressed(lambda w, x: lax.while_loop(_more, _next, (0, w, x))[2])
    for axes in ((-1,), (0,), ()):
        w = quantize.Affine(8, axes=axes).convert(weight)
        wanted = jnp.tanh(jnp.tanh(x @ dense(w)) @ dense(w)).astype(jnp.float32)
        for run in (scan, loop):
            np.testing.assert_allclose(run(w, x).astype(jnp.float32), wanted, atol=0.1)


@pytest.mark.parametrize(
    "loop",
    [
        lambda f, w: lax.scan(lambda c, _: (f(c), None), w, None, length=3)[0],
        lambda f, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, w))[1],
    ],
    ids=["scan", "while"],
)
def test_a_loop_keeps_its_leaf_or_says_what_became_of_it(loop):
    w = quantized((8, 8))
    with pytest.raises(TypeError, match=r"Quantized of shape \(8, 8\) is carried .* in its place: mul had no rule"):
        compressed(lambda w: loop(lambda c: 0.9 * c, w))(w)
    with pytest.raises(TypeError, match=r"another: .*\(1, 8\)\) became .*\(8, 1\)"):
        compressed(lambda w: loop(lambda c: c.T, w))(w)
    turned = compressed(lambda w: loop(lambda c: c.T, w))(quantized((8, 8), axes=()))
    assert isinstance(turned, Quantized)
    np.testing.assert_array_equal(dense(turned), dense(quantized((8, 8), axes=())).T)


def test_a_while_loop_that_is_mapped(rng):
    """Its condition is one an example, so some go on while others wait."""
    w, x = quantized((8, 8)), jnp.asarray(rng.normal(size=(4, 8)) * np.geomspace(0.1, 9, 4)[:, None], jnp.float32)

    def settle(w, x):
        return lax.while_loop(lambda c: jnp.sum(c[1] ** 2) > 1, lambda c: (c[0], c[1] @ c[0] / 40), (w, x))[1]

    mapped = jax.vmap(settle, (None, 0))
    np.testing.assert_allclose(jax.jit(compressed(mapped, strict=True))(w, x), mapped(dense(w), x), atol=1e-5)


def test_branches_agree_on_a_leaf_or_on_its_dense_value():
    w, other, yes = quantized((8, 8)), quantized((8, 8), bits=4, seed=1), jnp.bool(True)
    for first, second in [
        (lambda w, o: w, lambda w, o: 0.9 * w),
        (lambda w, o: w, lambda w, o: o),
        (lambda w, o: w.T, lambda w, o: w),
    ]:
        fn = compressed(lambda yes, w, o, f=first, s=second: lax.cond(yes, f, s, w, o))
        for flag, branch in ((yes, first), (~yes, second)):
            np.testing.assert_allclose(fn(flag, w, other), branch(dense(w), dense(other)), rtol=1e-6)
    kept = compressed(lambda yes, w, o: lax.cond(yes, lambda w, o: w, lambda w, o: w, w, o))(yes, w, other)
    assert isinstance(kept, Quantized)
    with pytest.raises(MadeDenseError, match="another step or branch"):
        compressed(lambda yes, w, o: lax.cond(yes, lambda w, o: w, lambda w, o: o, w, o), strict=True)(yes, w, other)
