"""`LowRank` leaves beyond what `test_arrays_rules.py` asks of every leaf: their layouts, their costs, their limits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from leaves import low_rank

from jaxcompress import compressed, dense, nbytes, quantize, report
from jaxcompress.arrays import LowRank, MadeDenseError, watch


def values(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def agree(cases, *args, tolerance=2e-5):
    """Each function of compressed arguments, strictly and in one program, equals it on dense ones."""
    with watch() as hits:
        got = jax.jit(lambda *args: [compressed(fn, strict=True)(*args) for fn in cases])(*args)
    assert not any(how == "dense" for *_, how in hits)
    for out, fn in zip(got, cases, strict=True):
        expected = fn(*dense(args))
        assert out.dtype == expected.dtype
        np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance * float(jnp.abs(expected).max()))
    return hits


def test_axes_in_any_order():
    """The dense value by hand; then the axes met in other orders than they are stored in."""
    w = LowRank.from_factors(values(2, 4, 3), values(3, 5, 6, seed=2), left_axes=(2, 0))
    assert w.shape == (4, 5, 2, 6) and w.rank == 3
    np.testing.assert_allclose(w.materialise(), jnp.einsum("car,rbd->abcd", w.left, w.right), rtol=1e-5)
    cases = [
        lambda x, y, w: jnp.einsum("xca,abcd->xdb", x, w),
        lambda x, y, w: jnp.einsum("xca,abcd->dbx", x, w),
        lambda x, y, w: jnp.einsum("xdb,abcd->xac", y, w),
        lambda x, y, w: jnp.einsum("xdb,cdab->xac", y, w.transpose(2, 3, 0, 1)),
        lambda x, y, w: jnp.einsum("xca,abcd->axbd", x, w),  # one of its rows indexes products
        lambda x, y, w: jnp.einsum("xdb,abcd->xac", y[..., ::-1], w[:, ::-1]),
    ]
    assert agree(cases, values(7, 2, 4), values(7, 6, 5), w)["LowRank", "dot_general", "rule"] == len(cases)


def test_stacks():
    """Products with an index a stack, as experts have; and axes that are split behind it."""
    cases = [
        lambda x, w: jnp.einsum("ebi,eio->ebo", x, w),
        lambda x, w: jnp.einsum("ebi,eoi->beo", x, w.transpose(0, 2, 1)),
        lambda x, w: jnp.einsum("ebjk,ejko->bejo", x.reshape(3, 7, 2, 4), w.reshape(3, 2, 4, 5)),
    ]
    agree(cases, values(3, 7, 8), low_rank((3, 8, 5), stacked=1))


@pytest.mark.parametrize("rows", [(0, 2), *(pytest.param(rows, marks=pytest.mark.slow) for rows in ((2,), (0, 1, 3)))])
def test_convolutions_of_each_split(rows):
    """A vertical and a horizontal one, a 1x1 one in front, and rows of the outputs."""

    def convolve(strides, padding, dilation, layout="NHWC"):
        return lambda x, w: lax.conv_general_dilated(
            x if layout == "NHWC" else x.transpose(0, 3, 1, 2),
            w,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(layout, "HWIO", layout),
        )

    cases = [
        convolve((1, 1), "SAME", (1, 1)),
        convolve((2, 3), "VALID", (2, 1)),
        convolve((1, 2), [(2, 0), (0, 1)], (1, 1), "NCHW"),
        lambda x, w: lax.conv_transpose(x, w, (2, 3), "SAME"),
        lambda x, w: lax.conv_transpose(x, w.transpose(0, 1, 3, 2), (2, 2), "SAME", transpose_kernel=True),
    ]
    hits = agree(cases, values(2, 8, 9, 4), low_rank((3, 2, 4, 6), rows=rows))
    assert hits["LowRank", "conv_general_dilated", "rule"] == len(cases)


def test_lookups():
    i = jnp.asarray([[3, 19], [0, 3], [7, 7]])
    cases = [
        lambda t, u, i: jnp.take(t, i, axis=0),
        lambda t, u, i: t.T.reshape(9, 4, 5).transpose(1, 2, 0)[i % 4, i % 5],
        lambda t, u, i: u[i],
        lambda t, u, i: u[i, i % 5],
    ]
    table, wide = low_rank((20, 9)), low_rank((20, 5, 3, 4), rows=(0, 1))
    assert agree(cases, table, wide, i)["LowRank", "gather", "rule"] == len(cases)
    beyond = compressed(lambda t, i: jnp.take(t, i, axis=0))(table, jnp.asarray([1, 20]))
    assert jnp.isfinite(beyond[0]).all() and jnp.isnan(beyond[1]).all()  # as of an array
    lookup = jax.jit(compressed(lambda t, i: t[i])).lower(low_rank((4096, 256)), i)
    assert lookup.compile().memory_analysis().temp_size_in_bytes < 4096 * 256 // 10


def test_a_product_costs_two_thin_ones():
    w, x = low_rank((256, 128), rank=8), values(16, 256)
    found = report.cost(lambda w, x: x @ w, w, x, rounds=1)
    assert found.flops == pytest.approx(2 * 16 * 8 * (256 + 128), rel=0.02)
    assert found.nbytes == nbytes(w) == 4 * 8 * (256 + 128)
    assert found.parameters == 256 * 128
    image, kernel = values(1, 16, 16, 16), low_rank((3, 3, 16, 32), rank=4)
    numbers = ("NHWC", "HWIO", "NHWC")
    thin = report.cost(
        lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers), kernel, image, rounds=1
    )
    assert thin.flops == pytest.approx(2 * 14 * 14 * 4 * (9 * 16 + 32), rel=0.02)


def test_factors_that_save_nothing_are_multiplied_first_where_that_is_cheaper():
    w = low_rank((16, 16), rank=16)

    def flops(rows):
        return report.cost(lambda w, x: x @ w, w, values(rows, 16), rounds=1).flops

    assert flops(2) == pytest.approx(2 * 2 * 16 * 32, rel=0.02)
    assert flops(64) == pytest.approx(2 * 16 * 16 * (16 + 64), rel=0.02)
    agree([lambda x, w: x @ w], values(64, 16), w)


def turned(w, bits):
    spec = quantize.Affine(bits)
    return dataclasses.replace(w, left=quantize.quantize(w.left, spec), right=quantize.quantize(w.right, spec))


def test_factors_may_be_compressed_in_their_turn():
    w = turned(low_rank((12, 10)), 8)
    hits = agree([lambda x, w: (x @ w) @ w.T], values(6, 12), w)
    assert hits["Quantized", "dot_general", "rule"] == 2 * 2
    assert nbytes(w) == 12 * 3 + 3 * 10 + 4 * (3 + 10)


@pytest.mark.slow
def test_compressed_factors_everywhere():
    i = jnp.asarray([3, 7])
    cases = [
        lambda x, y, w, k: w[i],
        lambda x, y, w, k: jnp.tensordot(x.reshape(-1, 3, 4), w.reshape(3, 4, 10), 2),
        lambda x, y, w, k: lax.conv_general_dilated(y, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    ]
    w, kernel = turned(low_rank((12, 10)), 4), turned(low_rank((3, 3, 4, 6), rows=(0, 2)), 4)
    hits = agree(cases, values(6, 12), values(2, 5, 5, 4), w, kernel)
    assert hits["Quantized", "dot_general", "rule"] == 1 + 2
    assert hits["Quantized", "conv_general_dilated", "rule"] == 2


def test_what_has_no_rule_is_dense_or_refused():
    x, w = values(6, 4), low_rank((3, 4, 5))
    cases = {
        "dot_general": lambda x, w: jnp.einsum("xj,ijk->xik", x, w),  # some of its rows
        "reshape": lambda x, w: w.reshape(3, 20)[0, :5] * x[0, 0],  # rows and columns in one
        "conv_general_dilated": lambda x, w: lax.conv_general_dilated(
            x[:, :, None], w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=1
        ),
        "scan": lambda x, w: lax.scan(lambda h, w: (h @ w, h), x, w)[0],  # no stack of its own
    }
    rows = {"conv_general_dilated": low_rank((3, 1, 5), rows=(0,)), "scan": low_rank((3, 4, 4))}
    for primitive, fn in cases.items():
        weight = rows.get(primitive, w)
        with watch() as hits:
            out = compressed(fn)(x, weight)
        assert hits["LowRank", primitive, "dense"] == 1
        np.testing.assert_allclose(out, fn(x, dense(weight)), rtol=1e-4, atol=1e-4)
        with pytest.raises(MadeDenseError, match=primitive):
            compressed(fn, strict=True)(x, weight)


def collectives(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (\S+\[[\d,]*\])\S* ({kinds})(?:-start)?\(", text)


def test_on_eight_devices():
    """Columns divided: nothing to tell. Rows divided: one sum, of the thin product. A constraint divides both."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, w = values(16, 64), low_rank((64, 32), rank=4)
    product = compressed(lambda x, w: x @ w, strict=True)

    def placed(x_spec, left, right):
        def put(a, *spec):
            return jax.device_put(a, NamedSharding(mesh, P(*spec)))

        return put(x, *x_spec), dataclasses.replace(w, left=put(w.left, *left), right=put(w.right, *right))

    columns, rows = placed(("data",), (), (None, "model")), placed(("data", "model"), ("model",), ())
    assert collectives(product, *columns) == []
    assert collectives(product, *rows) == [("f32[8,4]", "all-reduce")]

    def constrained(x, w):
        w = lax.with_sharding_constraint(w, NamedSharding(mesh, P("model", "data")))
        return x @ w, w

    out, kept = jax.jit(compressed(constrained, strict=True))(x, w)
    assert kept.left.sharding.spec[0] == "model" and kept.right.sharding.spec[1] == "data"
    for found in (jax.jit(product)(*columns), jax.jit(product)(*rows), out):
        np.testing.assert_allclose(found, x @ w.materialise(), rtol=1e-4, atol=1e-4)


def test_refused():
    left, right = jnp.ones((4, 2)), jnp.ones((2, 3))
    for factors, kwargs, says in [
        ((left, jnp.ones((5, 3))), {}, "one stack, rank and dtype"),
        ((left, right.astype(jnp.bfloat16)), {}, "one stack, rank and dtype"),
        ((jnp.ones((3, 4, 2)), jnp.ones((5, 2, 3))), {"stacked": 1}, "one stack"),
        ((left, jnp.ones(2)), {}, "a left axis for each of the rows"),
        ((left, right), {"left_axes": (0, 1)}, "a left axis for each of the rows"),
        ((jnp.ones((4, 2), int), jnp.ones((2, 3), int)), {}, "floats"),
    ]:
        with pytest.raises(ValueError, match=says):
            LowRank.from_factors(*factors, **kwargs)


@pytest.mark.parametrize("layouts", [("NHWC", "HWIO", "NCHW"), ("NCHW", "HWIO", "NHWC"), ("NHWC", "HWIO", "HWNC")])
def test_a_convolution_whose_result_is_laid_out_otherwise_than_its_input(layouts, rng):
    w = low_rank((3, 3, 5, 5), rows=(0, 1, 2))
    x = jnp.asarray(rng.normal(size=(5, 5, 5, 5)), jnp.float32)  # of equal sizes the wrong axes would fit as well

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layouts)

    with watch() as hits:
        found = compressed(convolve)(x, w)
    assert hits["LowRank", "conv_general_dilated", "rule"] == 1
    np.testing.assert_allclose(found, convolve(x, dense(w)), rtol=1e-4, atol=1e-4)
