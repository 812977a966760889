"""Convolutions written otherwise give what `lax` gives, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import compressed, dense, quantize
from jaxcompress.prune import channels
from jaxcompress.prune.channels._convolve import convolve

LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
LINE = ("NWC", "WIO", "NWC")


def ours(fn):
    """`fn` with its convolutions as the smaller model has them."""

    def run(*args):
        closed = jax.make_jaxpr(fn)(*args)
        (eqn,) = closed.eqns
        return convolve(*args, **eqn.params)

    return run


@pytest.mark.parametrize(
    ("x", "kernel", "way", "left"),
    [  # `left`: inputs of the convolution that is left, None where none is
        ((2, 6, 5, 8), (1, 1, 8, 3), {"window_strides": (2, 1)}, None),
        ((2, 6, 5, 8), (1, 1, 8, 3), {"padding": ((1, 0), (0, 0))}, 8),
        ((2, 6, 5, 8), (3, 8, 1, 1), {"dimension_numbers": ("NHWC", "OIHW", "NHWC")}, None),
        ((2, 8, 6, 5), (3, 8, 1, 1), {"dimension_numbers": FIRST}, 8),
        ((2, 27, 25, 3), (3, 2, 3, 20), {"window_strides": (2, 2), "padding": "SAME"}, 4),
        ((2, 13, 25, 3), (3, 2, 3, 4), {"padding": "SAME"}, 3),
        ((2, 13, 25, 7), (3, 2, 7, 4), {"padding": "SAME"}, 8),
        ((2, 13, 25, 1), (3, 2, 1, 20), {"padding": "SAME"}, 1),
        ((2, 6, 5, 7), (3, 3, 7, 2), {"lhs_dilation": (2, 2)}, 7),
        ((2, 6, 5, 1), (3, 3, 1, 2), {}, None),
        ((2, 7, 5, 7), (3, 2, 7, 4), {"window_strides": (2, 3), "padding": "SAME"}, None),
        ((2, 9, 8, 5), (3, 2, 5, 4), {"rhs_dilation": (2, 3), "padding": ((2, 1), (0, 3))}, None),
        ((2, 9, 8, 5), (3, 2, 5, 4), {"padding": ((-1, 2), (0, -1))}, None),
        ((2, 6, 5, 4), (3, 4, 3, 2), {"dimension_numbers": ("NHWC", "OIHW", "NHWC")}, None),
        (
            (2, 6, 4),
            (3, 4, 2),
            {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")},
            None,
        ),
        ((2, 6, 5, 6), (3, 3, 3, 4), {"feature_group_count": 2}, 6),
        ((2, 6, 5, 6), (3, 3, 1, 6), {"feature_group_count": 6, "padding": "SAME"}, None),
        ((2, 9, 8, 5), (3, 2, 1, 5), {"feature_group_count": 5, "window_strides": (2, 3)}, None),
        ((2, 9, 8, 5), (3, 2, 1, 5), {"feature_group_count": 5, "rhs_dilation": (2, 3), "padding": "SAME"}, None),
        ((2, 9, 8, 5), (3, 2, 1, 5), {"feature_group_count": 5, "padding": ((-1, 2), (0, -1))}, None),
        ((2, 6, 5, 6), (3, 3, 1, 12), {"feature_group_count": 6}, 6),
    ],
)
def test_each_way_of_writing_gives_the_same(rng, x, kernel, way, left):
    way = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0)), "dimension_numbers": LAST} | way
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x, kernel))

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, **way)

    weights = jnp.asarray(rng.normal(size=jax.eval_shape(plain, x, kernel).shape), jnp.float32)

    @jax.jit
    def both(x, kernel):
        def of(fn):
            return fn(x, kernel), jax.grad(lambda *args: (weights * fn(*args)).sum(), (0, 1))(x, kernel)

        return of(ours(plain)), of(plain)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), *both(x, kernel))
    text = jax.jit(ours(plain)).lower(x, kernel).as_text()
    assert ("stablehlo.convolution" in text) == (left is not None)
    if left is not None:
        of_input = "x".join(map(str, (*x.shape[:-1], left) if way["dimension_numbers"] != FIRST else x.shape))
        assert f"(tensor<{of_input}xf32>" in text.split("stablehlo.convolution")[1]


@pytest.mark.parametrize("groups", [1, 6])
def test_half_precision_keeps_its_types(rng, groups):
    x = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(1 if groups == 1 else 3, 6 // groups, 6)), jnp.bfloat16)
    for wanted in (None, jnp.float32):

        def plain(x, kernel, wanted=wanted):
            return lax.conv_general_dilated(
                x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups,
                preferred_element_type=wanted,
            )  # fmt: skip

        a, b = jax.jit(lambda x, kernel, plain=plain: (ours(plain)(x, kernel), plain(x, kernel)))(x, kernel)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_few_positions_of_other_types_stay_a_convolution(dtype):
    x, kernel = jnp.ones((1, 4, 4, 6), dtype), jnp.ones((3, 3, 6, 6), dtype)
    run = ours(lambda x, kernel: lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAST))
    assert "stablehlo.convolution" in jax.jit(run).lower(x, kernel).as_text()


def test_few_positions_under_vmap(rng):
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 2, 4, 4, 6), (5, 3, 3, 6, 6)))

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAST)

    got, want = jax.jit(lambda x, k: (jax.vmap(ours(plain))(x, k), jax.vmap(plain)(x, k)))(x, kernel)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_compressed_kernels_meet_their_own_rules_and_it_can_be_cut_again(rng):
    def n(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"a": n(3, 3, 3, 8), "b": n(1, 1, 8, 12), "c": n(3, 3, 1, 12), "d": n(3, 3, 12, 4)}

    def fn(p, x):
        for name, kernel in p.items():
            groups = x.shape[-1] if name == "c" else 1
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAST, feature_group_count=groups)
        return x

    x = n(2, 5, 5, 3)
    groups = channels.groups(fn, params, x)
    plan = channels.from_units(groups, {group.name: [0] for group in groups})  # 7 and 11 channels are left
    small = channels.shrink(fn, params, plan)
    again = channels.groups(small, plan.apply(params), x)  # to be cut again: all but the way it is written is as it was
    assert {group.size for group in again} == {7, 11} and not again.unknown
    assert channels.flops(again) == channels.flops(groups, plan)
    codes = quantize.convert(plan.apply(params), {".": quantize.Affine(bits=8)})
    got = jax.jit(compressed(small, strict=True))(codes, x)  # strict: nothing is made dense
    np.testing.assert_allclose(got, jax.jit(small)(dense(codes), x), rtol=1e-4, atol=1e-3)
