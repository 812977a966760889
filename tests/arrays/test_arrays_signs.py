"""Weights of two or three values that meet the input's digits as signs, beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import compressed, dense, quantize
from jaxcompress.arrays import Codebook, _byte_products, _signs
from jaxcompress.arrays._byte_products import multiplies_bytes

pytestmark = pytest.mark.usefixtures("in_tiles")


@pytest.fixture
def in_tiles(monkeypatch) -> None:
    """As on one device, with weights of tests' sizes large, and cut into tiles."""
    if not multiplies_bytes():
        pytest.skip("no such instruction here")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(_signs, "WORTH", 1)
    monkeypatch.setattr(_byte_products, "UNPACKED", 96 * 64)


def by_signs(fn, *args) -> bool:
    return "byte_dot" in str(jax.make_jaxpr(fn)(*args))


HOW = {
    "a matrix": ("...i,io->...o", (96, 600)),
    "read backwards": ("...i,oi->...o", (200, 96)),
    "to heads": ("...i,ihd->...hd", (96, 5, 8)),
    "from heads": ("...hd,hdo->...o", (12, 8, 40)),
}
SCHEMES = {
    "binary": quantize.Binary(),
    "binary, a layer": quantize.Binary(axes=()),
    "ternary": quantize.Ternary(),
    "ternary, an output": quantize.Ternary(axes=(-1,)),
    "trained ternary": quantize.Ternary(signed=True),
    "three means": quantize.KMeans(3),
    "two means": quantize.KMeans(2),
}


CASES = [
    *[("a matrix", scheme, rows) for scheme in SCHEMES for rows in [(1,), (3, 2)]],
    *[(how, scheme, (32,)) for how in HOW for scheme in ("binary, a layer", "ternary", "trained ternary")],
]


@pytest.mark.parametrize(("how", "scheme", "rows"), CASES)
def test_products_are_as_near_as_those_of_floats(rng, how, rows, scheme):
    axes, shape = HOW[how]
    w = SCHEMES[scheme].convert(jnp.asarray(rng.normal(size=shape) + 0.3, jnp.float32))
    x = rng.normal(size=(*rows, *((12, 8) if "hd," in axes else (96,))))
    x *= np.exp(rng.normal(size=x.shape))
    product = compressed(lambda x, w: jnp.einsum(axes, x, w.astype(x.dtype)), strict=True)
    for dtype, bound in ((jnp.float32, 4 * 2.0**-24), (jnp.bfloat16, 2.0**-7)):
        number = jnp.asarray(x, dtype)
        whole = np.asarray(dense(w).astype(dtype), np.float64)
        wanted = np.einsum(axes, np.asarray(number, np.float64), whole)
        largest = np.full_like(x, 1) * np.abs(x).reshape(*rows, -1).max(-1).reshape(*rows, *[1] * (x.ndim - len(rows)))
        reach = np.einsum(axes, largest, np.abs(whole))
        assert by_signs(product, number, w)
        got = jax.jit(product)(number, w)
        assert got.dtype == dtype
        assert (np.abs(np.asarray(got, np.float64) - wanted) <= bound * reach).all()


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_any_three_values_in_any_order(rng, keep_zeros):
    indices = jnp.asarray(rng.integers(0, 3, size=(96, 40)), jnp.uint8)
    centroids = jnp.asarray(rng.normal(size=(1, 40, 3)), jnp.float32)
    w = Codebook.from_indices(indices, centroids, keep_zeros=keep_zeros)
    x = jnp.asarray(rng.normal(size=(4, 96)), jnp.float32)
    assert by_signs(compressed(jnp.matmul), x, w)
    wanted = np.asarray(x, np.float64) @ np.asarray(dense(w), np.float64)
    np.testing.assert_allclose(jax.jit(compressed(jnp.matmul))(x, w), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["binary", "ternary", "trained ternary"])
def test_derivatives_are_those_of_the_dense_product(rng, scheme):
    w = SCHEMES[scheme].convert(jnp.asarray(rng.normal(size=(96, 40)), jnp.float32))
    x, way = (jnp.asarray(rng.normal(size=(4, size)), jnp.float32) for size in (96, 40))

    def loss(x, centroids, product):
        leaf = Codebook.from_indices(w.codes(), centroids, keep_zeros=w.keep_zeros)
        return (way * product(x, leaf)).sum()

    got = jax.grad(loss, (0, 1))(x, w.centroids, compressed(jnp.matmul))
    wanted = jax.grad(loss, (0, 1))(x, w.centroids, lambda x, w: x @ w.materialise())
    for g, t in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g, t, rtol=1e-5, atol=1e-5)


def test_rows_of_any_size_are_their_own_affair(rng):
    w = quantize.Binary().convert(jnp.asarray(rng.normal(size=(96, 40)), jnp.float32))
    x = np.asarray(rng.normal(size=(5, 96)), np.float32)
    x[1], x[2], x[3, 7] = 0, 3e38, np.nan  # three times 96 of that is no float32 any more
    got = np.asarray(jax.jit(compressed(jnp.matmul))(jnp.asarray(x), w))
    assert (got[1] == 0).all() and np.isnan(got[3]).all()
    for row in (0, 4):
        np.testing.assert_allclose(got[row], x[row] @ np.asarray(dense(w)), rtol=1e-5, atol=1e-5)


def test_stacked_and_batched(rng):
    stacked = jnp.asarray(rng.normal(size=(3, 96, 40)), jnp.float32)
    weights = jax.vmap(quantize.Ternary(signed=True).convert)(stacked)
    x = jnp.asarray(rng.normal(size=(3, 4, 96)), jnp.float32)
    one = compressed(jnp.matmul)
    wanted = jnp.einsum("lri,lio->lro", x, jax.vmap(lambda w: w.materialise())(weights))
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x, weights), wanted, rtol=1e-5, atol=1e-5)
    same = jax.tree.map(lambda part: part[0], weights)
    np.testing.assert_allclose(jax.vmap(one, (0, None))(x, same)[0], wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["binary", "ternary"])
@pytest.mark.parametrize("backwards", [False, True])
def test_no_weight_is_written_out(monkeypatch, scheme, backwards):
    monkeypatch.setattr(_byte_products, "UNPACKED", 1 << 18)
    n = 2048
    w = SCHEMES[scheme + ", a layer" * (scheme == "binary")].convert(jax.random.normal(jax.random.key(0), (n, n)))
    product = compressed((lambda x, w: x @ w.T) if backwards else jnp.matmul)
    for rows in (1, 16):
        compiled = jax.jit(product).lower(jnp.ones((rows, n)), w).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < (0.05 if rows == 1 else 0.1) * 4 * n * n
        assert f"f32[{n},{n}]" not in compiled.as_text()
