"""What products run on a TPU or GPU, run here: the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import compressed, dense, quantize
from jaxcompress.arrays import Codebook, _codebook_rules, _quantized_rules
from jaxcompress.quantize import Affine

SCHEMES = {
    "int8": Affine(8),
    "int8, zero point": Affine(8, symmetric=False),
    "int8, integers": Affine(8, activation_bits=8),
    "int8, groups": Affine(8, group=(-2, 8)),
    "int4": Affine(4),
    "int4, groups": Affine(4, group=(-2, 8)),
    "int4, groups, zero point": Affine(4, group=(-2, 8), symmetric=False),
    "int4, groups of outputs": Affine(4, group=(-1, 8), symmetric=False),
    "int4, groups, integers": Affine(4, group=(-2, 8), activation_bits=8),
    "int4, groups, zero point, integers": Affine(4, group=(-2, 8), symmetric=False, activation_bits=8),
    "int4, an output": Affine(4, axes=(-1,), symmetric=False),
    "int4, an input": Affine(4, axes=(-2,), symmetric=False),
    "int4, integers": Affine(4, activation_bits=8),
    "int2": Affine(2),
    "int2, groups": Affine(2, group=(-2, 8)),
    "int8, 16 bits": Affine(8, activation_bits=16),
    "nf4": quantize.NF4((-2, 8)),
    "mx": quantize.MX(),
    "fp8": quantize.Floats("float8_e4m3fn"),
    "binary": quantize.Binary(),
    "ternary": quantize.Ternary(),
    "k-means": quantize.KMeans(5),
    "k-means, zeros apart": quantize.KMeans(9, keep_zeros=True),
    "k-means an output": quantize.KMeans(16, axes=(-1,)),
    "k-means an input": quantize.KMeans(4, axes=(-2,)),
    "k-means, 200": quantize.KMeans(200),
}
PRODUCTS = {
    "matmul": lambda x, w: x @ w,
    "vector": lambda x, w: x[0] @ w,
    "transposed": lambda x, w: (x @ w) @ w.T,
    "einsum": lambda x, w: jnp.einsum("io,bi->ob", w, x),
    "outer": lambda x, w: jnp.tensordot(x[0, :1], w, 0),
    "all": lambda x, w: jnp.tensordot(x[0, :, None] * x[0, :16], w, 2),
}


@pytest.fixture(params=["tpu", "cuda"])
def platform(request, monkeypatch):
    def there(*args, default=None, **by_platform):
        return by_platform.get(request.param, default)(*args)

    monkeypatch.setattr(lax, "platform_dependent", there)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for rules in _quantized_rules, _codebook_rules:  # the weights here are small
        monkeypatch.setattr(rules, "LEAST", 0)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("name", SCHEMES)
def test_products(name, rows, rng):
    w = SCHEMES[name].convert(jnp.asarray(rng.normal(size=(24, 16)) * (rng.random((24, 16)) < 0.7), jnp.float32))
    x = jnp.asarray(rng.normal(size=(rows, 24)), jnp.float32)
    whole = dense(w)
    # rounded inputs are checked where a product is one of integers; here only that their number of bits is about right
    tolerance = 2e-5 if getattr(w, "activation_bits", None) is None else 2e-2
    for fn in PRODUCTS.values():
        got, wanted = compressed(fn)(x, w), fn(x, whole)
        np.testing.assert_allclose(got, wanted, atol=tolerance * float(jnp.abs(wanted).max()))


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("equation", ["btd,dhk->bthk", "bthk,hkd->btd", "ebd,edf->ebf", "bhd,hdk->hkb", "hk,hkd->d"])
@pytest.mark.parametrize("name", ["int8, zero point", "int4", "int4, groups", "int4, groups, zero point", "k-means"])
def test_weights_of_more_axes(name, equation, rng):
    inputs, weight = equation.split("->")[0].split(",")
    sizes = {"b": 2, "t": 1, "d": 16, "h": 2, "k": 8, "e": 3, "f": 8}
    w = SCHEMES[name].convert(jnp.asarray(rng.normal(size=[sizes[axis] for axis in weight]), jnp.float32))
    x = jnp.asarray(rng.normal(size=[sizes[axis] for axis in inputs]), jnp.float32)
    wanted = jnp.einsum(equation, x, dense(w))
    got = compressed(lambda x, w: jnp.einsum(equation, x, w))(x, w)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("length", [15, 17])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["int4", "int2", "nf4", "binary", "ternary"])
def test_a_length_that_fills_no_byte(name, rows, length, rng):
    w = SCHEMES[name].convert(jnp.asarray(rng.normal(size=(64, length)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.float32)
    wanted = x @ dense(w)
    np.testing.assert_allclose(compressed(jnp.matmul)(x, w), wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "name", ["int8, zero point", "int8, integers", "int4, groups, zero point", "int4, integers", "nf4"]
)
def test_derivatives(name, rows, rng):
    w = SCHEMES[name].convert(jnp.asarray(rng.normal(size=(24, 16)), jnp.float32))
    x, along = (jnp.asarray(rng.normal(size=(rows, 24)), jnp.float32) for _ in range(2))
    factors = jnp.asarray(rng.normal(size=(rows, 16)), jnp.float32)
    got = jax.grad(lambda x: jnp.sum(factors * compressed(jnp.matmul)(x, w)))(x)
    np.testing.assert_allclose(got, factors @ dense(w).T, rtol=1e-4, atol=1e-4)
    got = jax.jvp(lambda x: compressed(jnp.matmul)(x, w), (x,), (along,))[1]
    np.testing.assert_allclose(got, along @ dense(w), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("name", ["int4, groups", "binary", "k-means"])
def test_convolutions(name, rng):
    scheme = Affine(4) if name == "int4, groups" else SCHEMES[name]
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 3, 4, 8), (2, 6, 6, 4)))
    small = scheme.convert(w)

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    np.testing.assert_allclose(compressed(conv)(x, small), conv(x, dense(small)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("zero_point", [None, 3.0])
def test_convolutions_of_integers(bits, zero_point, rng):
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 3, 4, 8), (2, 6, 6, 4)))
    static = {"input_scale": 0.02, "input_zero_point": zero_point}
    static = {name: number and jnp.full((1, 1, 1, 1), number) for name, number in static.items()}
    small = dataclasses.replace(Affine(8, activation_bits=bits).convert(w), **static)

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    zero, top = zero_point or 0, 2 ** (bits - 1) - 1
    codes = np.clip(np.round(np.asarray(x, np.float64) / 0.02) + zero, -top - bool(zero_point), top)
    wanted = conv(jnp.asarray(0.02 * (codes - zero), jnp.float32), dense(small))
    np.testing.assert_allclose(compressed(conv)(x, small), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("name", ["int8, zero point", "int4, groups, zero point", "int4, integers", "nf4", "k-means"])
def test_rows_that_vmap_hands_in_one_by_one_are_a_product(name, rng):
    """As sums each of them would read the whole weight again."""
    rows = 64
    w = SCHEMES[name].convert(jnp.asarray(rng.normal(size=(128, 128)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(rows, 128)), jnp.float32)
    each = jax.jit(jax.vmap(compressed(jnp.matmul), (0, None)))
    wanted = compressed(jnp.matmul)(x, w)
    np.testing.assert_allclose(each(x, w), wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))
    flops = each.lower(x, w).compile().cost_analysis()["flops"]
    assert flops < 4 * 2 * rows * 128 * 128
    temp = each.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    assert temp < rows * 128 * 128
    stack = jax.tree.map(lambda child: jnp.stack([child] * rows), w)  # and an own weight for each
    np.testing.assert_allclose(jax.vmap(compressed(jnp.matmul))(x, stack), each(x, w), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(lambda x: jnp.sum(compressed(jnp.matmul)(x, w))))(x),
        jnp.broadcast_to(dense(w).sum(1), x.shape), rtol=1e-3, atol=1e-3,
    )  # fmt: skip


@pytest.mark.usefixtures("platform")
def test_many_rows_of_integers_in_groups_keep_no_product_a_group():
    w = Affine(4, group=(0, 8), activation_bits=8).convert(jnp.ones((512, 64)))
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    temp = jax.jit(compressed(jnp.matmul)).lower(x, w).compile().memory_analysis().temp_size_in_bytes
    assert temp < 8 * 256 * 64 * 4  # and not 64 of them, one a group


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("blocks", [(1, 1), (1, 6), (4, 1), (4, 6)])
@pytest.mark.parametrize("k", [1, 2, 3, 16, 19, 256])
def test_chosen_is_looked_up(k, blocks, keep_zeros, rng):
    centroids = jnp.asarray(rng.normal(size=(*blocks, k)), jnp.float32)
    w = Codebook.from_indices(jnp.asarray(rng.integers(0, k, (4, 6))), centroids, keep_zeros=keep_zeros)
    np.testing.assert_array_equal(w.chosen(), w.materialise())
    weights = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)

    def gradient(value):
        return jax.grad(lambda w: jnp.sum(weights * value(w)), allow_int=True)(w).centroids

    np.testing.assert_allclose(gradient(Codebook.chosen), gradient(Codebook.materialise), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("platform")
def test_centroids_learn(rng):
    w = quantize.Ternary().convert(jnp.asarray(rng.normal(size=(24, 16)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(3, 24)), jnp.float32)

    def gradient(fn):
        return jax.grad(lambda c: jnp.sum(jnp.sin(fn(x, c))))(w.centroids)

    def leaf(c):
        return Codebook(w.indices, c, bits=w.bits, length=w.length)

    got = gradient(lambda x, c: compressed(jnp.matmul)(x, leaf(c)))
    np.testing.assert_allclose(got, gradient(lambda x, c: x @ leaf(c).materialise()), rtol=1e-4, atol=1e-4)
