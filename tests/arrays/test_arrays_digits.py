"""Products of int8 codes by digits of the input, and codes that are stored outputs first: the same weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxcompress import compressed, dense, pack, quantize
from jaxcompress.arrays import Quantized, _byte_products, _digits
from jaxcompress.arrays._byte_products import multiplies_bytes
from jaxcompress.quantize import Affine
from jaxcompress.quantize import quantize as to_codes


@pytest.fixture
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(_digits, "WORTH", 1)


def turned(rng, inputs=96, outputs=40, **spec):
    return to_codes(jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32), Affine(**spec)).outputs_first()


def of_integers(fn, *args) -> bool:
    traced = str(jax.make_jaxpr(fn)(*args))
    return "byte_dot" in traced or "preferred_element_type=int32" in traced


def with_bytes(monkeypatch, has: bool) -> None:
    """As on a CPU that multiplies bytes, or on one that doesn't."""
    if has and not multiplies_bytes():
        pytest.skip("no such instruction here")
    monkeypatch.setattr(_digits, "multiplies_bytes", lambda: has)
    monkeypatch.setattr(_byte_products, "multiplies_bytes", lambda: has)


LAID = {
    "outputs first": ("...i,io->...o", (96, 40), 8),
    "as it is": ("...i,io->...o", (96, 40), 8),
    "tied, backwards": ("...i,oi->...o", (40, 96), 8),
    "to heads": ("...i,ihd->...hd", (96, 5, 8), 8),
    "from heads": ("...hd,hdo->...o", (12, 8, 40), 8),
    "packed": ("...i,io->...o", (96, 40), 4),
    "packed, in tiles and a rest": ("...i,io->...o", (96, 300), 4),
    "packed, backwards": ("...i,oi->...o", (200, 96), 4),
    "packed, four a byte": ("...i,io->...o", (96, 40), 2),
    "packed, from heads": ("...hd,hdo->...o", (12, 8, 40), 4),
    "packed, to heads backwards": ("...hd,ohd->...o", (40, 12, 8), 2),
}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("has_bytes", [True, False])
@pytest.mark.parametrize("rows", [(2,), (3, 2), (128,)])
@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_as_near_as_those_of_floats(monkeypatch, rng, laid, rows, has_bytes, symmetric):
    with_bytes(monkeypatch, has_bytes)
    monkeypatch.setattr(_byte_products, "UNPACKED", 96 * 64)
    how, shape, bits = LAID[laid]
    free = -1 if "o" in how.split("->")[0].split(",")[1][-1] else 0
    spec = Affine(bits, axes=() if symmetric or "heads" in laid else (free,), symmetric=symmetric)
    w = to_codes(jnp.asarray(rng.normal(size=shape) + (not symmetric), jnp.float32), spec)
    w = w.outputs_first() if laid == "outputs first" else w
    x = rng.normal(size=(*rows, *((12, 8) if "hd," in how else (96,))))
    x *= np.exp(rng.normal(size=x.shape))
    product = compressed(lambda x, w: jnp.einsum(how, x, w.astype(x.dtype)))
    by_digits = has_bytes or laid in ("outputs first", "tied, backwards")
    for dtype, bound in ((jnp.float32, 3 * 2.0**-24), (jnp.bfloat16, 2.0**-7)):
        number = jnp.asarray(x, dtype)
        whole = np.asarray(dense(w), np.float64)
        wanted = np.einsum(how, np.asarray(number, np.float64), whole)
        largest = np.full_like(x, 1) * np.abs(x).reshape(*rows, -1).max(-1).reshape(*rows, *[1] * (x.ndim - len(rows)))
        reach = np.einsum(how, largest, np.abs(whole))
        got = jax.jit(product)(number, w)
        assert got.dtype == dtype and of_integers(product, number, w) == by_digits
        assert (np.abs(np.asarray(got, np.float64) - wanted) <= bound * reach).all()


@pytest.mark.usefixtures("one_device")
def test_float64_is_not_cut_to_digits(rng):
    w = turned(rng)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(4, 96)), jnp.float64)
        product = compressed(lambda x, w: x @ w.astype(x.dtype))
        assert not of_integers(product, x, w)
        whole = w.codes().astype(np.float64) * np.asarray(w.scale, np.float64)
        np.testing.assert_allclose(jax.jit(product)(x, w), np.asarray(x) @ whole, rtol=1e-12)


@pytest.mark.usefixtures("one_device")
def test_a_tied_embedding_read_backwards_is_stored_so_already(rng):
    w = to_codes(jnp.asarray(rng.normal(size=(40, 96)), jnp.float32), Affine(axes=(0,)))
    x = jnp.asarray(rng.normal(size=(4, 96)), jnp.float32)
    fn = compressed(lambda x, w: x @ w.T, strict=True)
    np.testing.assert_allclose(jax.jit(fn)(x, w), x @ dense(w).T, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("one_device")
def test_derivatives_are_those_of_the_product(rng):
    w, x = turned(rng), jnp.asarray(rng.normal(size=(4, 96)), jnp.float32)
    way = jnp.asarray(rng.normal(size=(4, 40)), jnp.float32)
    got = jax.jit(jax.grad(lambda x: (way * compressed(jnp.matmul)(x, w)).sum()))(x)
    np.testing.assert_allclose(got, way @ dense(w).T, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_rows_of_any_size_are_their_own_affair(rng):
    w = turned(rng)
    x = np.asarray(rng.normal(size=(6, 96)), np.float32)
    x[1], x[2], x[3] = 0, x[3] * 1e30, x[3] * 1e-30
    x[4, 7] = np.nan
    got = np.asarray(jax.jit(compressed(jnp.matmul))(jnp.asarray(x), w))
    assert np.isnan(got[4]).all() and (got[1] == 0).all()
    for row in (0, 2, 3, 5):
        reach = np.abs(x[row]).max() * np.abs(np.asarray(dense(w))).sum(0)
        assert (np.abs(got[row] - x[row] @ np.asarray(dense(w))) <= 2.0**-22 * reach).all()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("spec", [{"bits": 8}, {"bits": 6, "symmetric": False}, {"group": (0, 32)}])
def test_what_is_not_so_laid_goes_the_other_ways(rng, spec):
    w, x = turned(rng, **spec), jnp.asarray(rng.normal(size=(129, 96)), jnp.float32)  # many rows
    assert not of_integers(compressed(jnp.matmul), x, w)
    np.testing.assert_allclose(jax.jit(compressed(jnp.matmul))(x, w), x @ dense(w), rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("has_bytes", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_integers_are_the_same_to_the_bit(monkeypatch, rng, rows, has_bytes):
    with_bytes(monkeypatch, has_bytes)
    w, x = turned(rng, activation_bits=8), jnp.asarray(rng.normal(size=(rows, 96)), jnp.float32)
    plain = to_codes(dense(w), Affine(activation_bits=8))
    assert (plain.codes() == w.codes()).all()
    run = jax.jit(compressed(jnp.matmul, strict=True))
    np.testing.assert_array_equal(run(x, w), run(x, plain))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [1, 5, 90])
@pytest.mark.parametrize("backwards", [False, True])
def test_packed_integers_are_exact(monkeypatch, rng, bits, rows, backwards):
    with_bytes(monkeypatch, True)
    monkeypatch.setattr(_byte_products, "UNPACKED", 96 * 64)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (300, 96) if backwards else (96, 300))
    w = Quantized.from_codes(jnp.asarray(codes), jnp.full((1, 1), 0.5), bits=bits, activation_bits=8)
    x = rng.integers(-127, 128, (rows, 96))
    x[:, 0] = 127  # so that a step is one
    product = compressed(lambda x, w: x @ (w.T if backwards else w))
    number = jnp.asarray(x, jnp.float32)
    assert ("byte_dot" in str(jax.make_jaxpr(product)(number, w))) == (backwards or rows > 1)
    np.testing.assert_array_equal(jax.jit(product)(number, w), 0.5 * (x @ (codes.T if backwards else codes)))


def test_it_is_the_same_weight_wherever_it_goes(rng, tmp_path):
    w = turned(rng, 12, 8)
    whole = np.asarray(dense(w))
    assert (w.shape, w.values.shape, w.outputs_first()) == ((12, 8), (8, 12), w)
    np.testing.assert_array_equal(w.codes(), np.asarray(w.values, np.int32).T - 128)

    def ways(w, i):
        return w.T, w.reshape(3, 4, 8), w[i], w * 2, w.astype(jnp.bfloat16), jnp.ones((1, 9, 12)) @ w

    got, wanted = compressed(ways)(w, jnp.array([3, 5])), ways(jnp.asarray(whole), jnp.array([3, 5]))
    for a, b in zip(dense(got), wanted, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-5, atol=1e-5)
    for start in (0, 4):
        np.testing.assert_array_equal(dense(w.tile(0, start, 4)), whole[start : start + 4])
        np.testing.assert_array_equal(dense(w.tile(1, start, 4)), whole[:, start : start + 4])
    pack.save(tmp_path / "w.jxc", {"w": w})
    np.testing.assert_array_equal(dense(pack.load(tmp_path / "w.jxc")["w"]), whole)
    kept = export.deserialize(export.export(jax.jit(lambda w: compressed(jnp.dot)(jnp.ones(12), w)))(w).serialize())
    np.testing.assert_allclose(kept.call(w), whole.sum(0), rtol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_signed_codes_from_older_files_are_the_same_weight(rng):
    w = turned(rng)
    older = dataclasses.replace(w, values=w.codes().T)
    x = jnp.asarray(rng.normal(size=(4, 96)), jnp.float32)
    np.testing.assert_array_equal(dense(older), dense(w))
    np.testing.assert_allclose(jax.jit(compressed(jnp.dot))(x, older), x @ dense(w), rtol=2e-5, atol=2e-5)


def test_stacked_by_scan(rng):
    w = jnp.asarray(rng.normal(size=(3, 16, 16)) / 4, jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    small = to_codes(w, Affine(axes=(0, -1))).outputs_first()
    got = jax.jit(compressed(lambda w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], strict=True))(small)
    wanted = x
    for layer in dense(small):
        wanted = jnp.tanh(wanted @ layer)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_by_path(rng):
    w = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    params = {"a": {"kernel": w, "bias": w[0]}, "b": {"kernel": w}}
    small = quantize.convert(params, {"a/kernel$": Affine(), "b/kernel$": Affine(bits=4)})
    laid = quantize.outputs_first(small, {"a/kernel$": True})
    assert laid["a"]["kernel"].turned and not laid["b"]["kernel"].turned
    for rule, said in (("b/kernel$", "b/kernel.*4 bits"), ("bias$", "a/bias.*no quantized weight")):
        with pytest.raises(ValueError, match=said):
            quantize.outputs_first(small, {rule: True})


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_beside_an_outlier_keeps_its_small_numbers(dtype, rng):
    w = turned(rng, inputs=256)
    w = to_codes(dense(w).at[7].set(0), Affine()).outputs_first()  # the outlier meets nothing
    x = jnp.asarray(rng.normal(size=(4, 256)), dtype).at[:, 7].set(1e4)
    product = compressed(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    assert of_integers(product, x, w)
    wanted = np.asarray(x, np.float64) @ np.asarray(dense(w), np.float64)
    assert np.linalg.norm(jax.jit(product)(x, w) - wanted) < 1e-3 * np.linalg.norm(wanted)
