"""Exact products of bytes, against NumPy's integers of 64 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.arrays import _byte_products
from jaxcompress.arrays._byte_products import DEEP, byte_dot, integer_sums, moved, multiplies_bytes

needs_bytes = pytest.mark.skipif(not multiplies_bytes(), reason="no such instruction here")


def unsigned(rng, *shape):
    return jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)


def signed(rng, *shape):
    return jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)


def exactly(x):
    return np.asarray(x, np.int64)


@needs_bytes
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 300, 3), (33, 128, 65), (5, DEEP, 2)])
@pytest.mark.parametrize("along", [0, 1])
def test_sums_are_exact(rng, sizes, along):
    m, n, k = sizes
    u, s = unsigned(rng, m, n), signed(rng, *((n, k) if along == 0 else (k, n)))
    u, s = u.at[0].set(255), s.at[:, 0].set(-128)
    wanted = exactly(u) @ (exactly(s) if along == 0 else exactly(s).T)
    np.testing.assert_array_equal(byte_dot(u, s, along=along), wanted)
    # what stands around the product moves neither operand to the other's place
    around = jax.jit(lambda u, s: (byte_dot(u ^ 1, s, along=along).T - 1)[::-1])
    wanted = (exactly(u ^ 1) @ (exactly(s) if along == 0 else exactly(s).T) - 1).T[::-1]
    np.testing.assert_array_equal(around(u, s), wanted)


@needs_bytes
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("mapped", [(0, None), (1, None), (None, 0), (None, 2), (None, 1), (0, 1), (2, 0)])
def test_vmapped(rng, along, mapped):
    u, s = unsigned(rng, 3, 16), signed(rng, *((16, 5) if along == 0 else (5, 16)))
    args = [
        x if axis is None else jnp.stack([x, x[::-1], x + x.dtype.type(7), x], axis=axis)
        for x, axis in zip((u, s), mapped, strict=True)
    ]
    got = jax.vmap(lambda u, s: byte_dot(u, s, along=along), mapped)(*args)
    for i in range(4):
        a, b = (x if axis is None else jnp.take(x, i, axis) for x, axis in zip(args, mapped, strict=True))
        np.testing.assert_array_equal(got[i], exactly(a) @ (exactly(b) if along == 0 else exactly(b).T))


@pytest.mark.parametrize("has_bytes", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 130])
@pytest.mark.parametrize("stored", ["inputs first", "outputs first", "outputs first, moved", "moved, odd"])
def test_sums_of_codes_however_stored(monkeypatch, rng, stored, rows, has_bytes):
    if has_bytes and not multiplies_bytes():
        pytest.skip("no such instruction here")
    if not has_bytes and stored == "inputs first":
        pytest.skip("goes another way")
    monkeypatch.setattr(_byte_products, "multiplies_bytes", lambda: has_bytes)
    codes, w = signed(rng, 2, rows, 40), signed(rng, 40, 75 if "odd" in stored else 128)
    values = w if stored == "inputs first" else w.T
    values = moved(values) if "moved" in stored else values
    run = jax.jit(lambda codes, values: integer_sums(codes, values, int(stored != "inputs first")))
    for of in (codes, codes[:1]):
        np.testing.assert_array_equal(run(of, values), exactly(of) @ exactly(w))


def test_moved_there_and_back():
    codes = jnp.arange(-128, 128).astype(jnp.int8)
    assert moved(codes).dtype == jnp.uint8
    np.testing.assert_array_equal(exactly(moved(codes)), np.arange(256))
    np.testing.assert_array_equal(moved(moved(codes)), codes)


def test_operands_that_do_not_fit():
    u, s = jnp.zeros((2, 4), jnp.uint8), jnp.zeros((4, 3), jnp.int8)
    for args, along in (((s, u), 0), ((u, s), 1), ((u, u), 0), ((u[0], s), 0)):
        with pytest.raises(TypeError, match="byte_dot multiplies uint8"):
            byte_dot(*args, along=along)
