"""Weights that are transposed on the way to a product: the same numbers, and nothing laid out anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import compressed, dense, quantize
from jaxcompress.arrays import MadeDenseError, Quantized, Sparse, is_leaf, watch
from jaxcompress.quantize import Affine


class Half:
    def convert(self, w):
        return Sparse.from_dense(w * (w > 0))


SCHEMES = {
    "int8": Affine(8, axes=(0,)),
    "int8, integers": Affine(8, axes=(-1,), activation_bits=8),
    "int4, groups": Affine(4, group=(-1, 8), symmetric=False),
    "int2": Affine(2),
    "nf4": quantize.NF4((-1, 8)),
    "k-means": quantize.KMeans(5),
    "ternary": quantize.Ternary(),
    "sparse": Half(),
}


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("name", SCHEMES)
def test_products(name, order, rng):
    w = SCHEMES[name].convert(jnp.asarray(rng.normal(size=(4, 6, 16)), jnp.float32))
    sizes = tuple(w.shape[axis] for axis in order)
    products = {
        "first": lambda x, w: jnp.tensordot(x, w.transpose(order), 1),
        "last": lambda x, w: lax.dot_general(x, w.transpose(order), (((1,), (2,)), ((), ()))),
        "weight first": lambda x, w: lax.dot_general(w.transpose(order), x, (((1,), (1,)), ((), ()))),
        "stacked": lambda x, w: jnp.einsum("aix,aio->axo", x, w.transpose(order)),
        "two": lambda x, w: jnp.einsum("ijx,ijo->xo", x, w.transpose(order)),
    }
    shapes = [(3, sizes[0]), (3, sizes[2]), (3, sizes[1]), (sizes[0], sizes[1], 3), (*sizes[:2], 3)]
    for (case, fn), shape in zip(products.items(), shapes, strict=True):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        wanted = fn(x, dense(w))
        tolerance = 3e-2 if "integers" in name else 2e-5
        got = compressed(fn)(x, w)
        np.testing.assert_allclose(got, wanted, atol=tolerance * float(jnp.abs(wanted).max()), err_msg=case)


@pytest.mark.parametrize("name", ["int8", "int4, groups", "k-means", "sparse"])
def test_everything_else(name, rng):
    w = SCHEMES[name].convert(jnp.asarray(rng.normal(size=(6, 16)), jnp.float32))
    i = jnp.asarray([3, 0, 15])

    def fn(w):
        t = w.T
        rows = lax.scan(lambda c, row: (c + row, row * 2), jnp.zeros(6), t)[1]
        return t[i], t.reshape(4, 4, 6), t * 2, t.T, t, t.astype(jnp.bfloat16), rows, jax.jit(lambda t: t + 1)(t)

    for got, wanted in zip(compressed(fn)(w), fn(dense(w)), strict=True):
        np.testing.assert_allclose(dense(got), wanted, rtol=1e-6, atol=1e-6)
        assert got.dtype == wanted.dtype


def test_two_leaves(rng):
    w, v = (SCHEMES[name].convert(jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)) for name in ("int8", "int2"))

    def fn(w, v):
        return w.T @ v, v @ w.T, w.T + v, jnp.where(True, w.T, w)

    for got, wanted in zip(compressed(fn)(w, v), fn(dense(w), dense(v)), strict=True):
        np.testing.assert_allclose(dense(got), wanted, rtol=1e-4, atol=1e-5)


def test_back_again_is_the_weight_itself(rng):
    w = Affine(4).convert(jnp.asarray(rng.normal(size=(6, 16)), jnp.float32))
    back = compressed(lambda w: w.T.transpose(1, 0))(w)
    assert isinstance(back, Quantized)
    np.testing.assert_array_equal(back.values, w.values)


def test_a_stack_of_transposed_weights(rng):
    w = jax.vmap(Affine(4, group=(-1, 8)).convert)(jnp.asarray(rng.normal(size=(5, 6, 16)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
    turned = jax.vmap(compressed(jnp.transpose))(w)
    assert is_leaf(turned) and turned.shape == (5, 16, 6)
    np.testing.assert_allclose(dense(turned), jnp.swapaxes(dense(w), 1, 2), rtol=1e-6)
    got = lax.scan(lambda _, one: (0, compressed(jnp.matmul)(x, one)), 0, turned)[1]
    np.testing.assert_allclose(got, x @ jnp.swapaxes(dense(w), 1, 2), rtol=1e-4, atol=1e-5)


def test_it_is_the_weight_that_is_counted_and_strict(rng):
    w = Affine(8).convert(jnp.asarray(rng.normal(size=(6, 16)), jnp.float32))
    with watch() as hits:
        compressed(lambda x, w: x @ w.T, strict=True)(jnp.ones((3, 16)), w)
    assert hits == {("Quantized", "transpose", "rule"): 1, ("Quantized", "dot_general", "rule"): 1}


def test_what_cannot_be_laid_out_anew_is_dense_there(rng):
    w = Half().convert(jnp.asarray(rng.normal(size=(6, 16)), jnp.float32))
    with watch() as hits:
        compressed(lambda w: w.T + 1)(w)
    assert hits == {("Sparse", "transpose", "rule"): 1, ("Sparse", "add", "dense"): 1}
    with pytest.raises(MadeDenseError, match="Sparse weight"):
        compressed(lambda w: w.T + 1, strict=True)(w)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 16])
def test_nothing_is_laid_out_anew(bits, rows):
    """A tied embedding read backwards: transposing its codes took 20 times as long as the product with one row."""
    n = 2048
    w = jax.eval_shape(Affine(bits, axes=(0,)).convert, jax.ShapeDtypeStruct((n, n), jnp.float32))
    x = jax.ShapeDtypeStruct((rows, n), jnp.float32)

    def temporaries(fn):
        return jax.jit(compressed(fn)).lower(x, w).compile().memory_analysis().temp_size_in_bytes

    got, wanted = temporaries(lambda x, w: x @ w.T), temporaries(lambda x, w: jnp.einsum("bi,oi->bo", x, w))
    assert got == wanted


@pytest.mark.parametrize(
    "w",
    [
        Affine(4, group=(0, 4)).convert(jnp.arange(96.0).reshape(16, 6)),
        Affine(4).convert(jnp.arange(16.0)),
        Affine(8).convert(jnp.arange(96.0).reshape(16, 6)).outputs_first(),
        quantize.KMeans(5).convert(jnp.arange(16.0)),
        Sparse.from_dense(jnp.arange(64.0).reshape(8, 8) % 3),
    ],
    ids=["groups of rows", "packed vector", "outputs first", "packed indices", "sparse rows"],
)
def test_steps_whose_part_is_no_leaf_of_its_own(w):
    def rows(w):
        return lax.scan(lambda c, row: (c, jnp.sin(row)), 0, w)[1]

    np.testing.assert_allclose(compressed(rows)(w), rows(dense(w)), rtol=1e-6)
