"""Products with integers that have a scale a group, as integers group by group: against float64, and to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import compressed, dense, quantize
from jaxcompress.arrays import Quantized, _digit_groups, _digits, _quantized_rules
from jaxcompress.arrays._byte_products import multiplies_bytes

pytestmark = pytest.mark.skipif(not multiplies_bytes(), reason="no such instruction here")


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(_digit_groups, "WORTH", 1)
    monkeypatch.setattr(_quantized_rules, "WORTH", 1)
    monkeypatch.setattr(_digit_groups, "OF_DIGITS", 16)


def grouped(rng, bits, *, shape=(64, 24), size=16, zero=False, powers=False, **spec):
    """A weight of random codes, with random steps a group and output; powers of two where sums shall be exact."""
    blocks = (-(-shape[0] // size), *shape[1:])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    steps = 2.0 ** rng.integers(-3, 3, blocks) if powers else np.exp(rng.normal(size=blocks))
    zeros = jnp.asarray(rng.integers(low, high, blocks), jnp.int8) if zero else None
    codes = jnp.asarray(rng.integers(low, high, shape))
    return Quantized.from_codes(
        codes, jnp.asarray(steps, jnp.float32), zeros, bits=bits, group=(-len(shape), size), **spec
    )


def as_bytes(fn, *args) -> bool:
    return "byte_dot" in str(jax.make_jaxpr(fn)(*args))


product = compressed(lambda x, w: jnp.tensordot(x, w, 1))


@pytest.mark.parametrize("bits, zero", [(8, False), (8, True), (4, False), (4, True), (2, False), (2, True)])
@pytest.mark.parametrize("rows", [(2,), (3, 2), (128,)])
@pytest.mark.parametrize("shape", [(64, 24), (96, 3, 8)])
def test_products_are_as_near_as_those_of_floats(rng, bits, zero, rows, shape):
    w = grouped(rng, bits, zero=zero, shape=shape)
    x = rng.normal(size=(*rows, shape[0])) * np.exp(rng.normal(size=(*rows, shape[0])))
    for dtype, bound in ((jnp.float32, 2.0**-22), (jnp.bfloat16, 2.0**-7)):
        number, whole = jnp.asarray(x, dtype), np.asarray(dense(w), np.float64)
        wanted = np.tensordot(np.asarray(number, np.float64), whole, 1)
        # each group adds its own roundings; a code and its zero point are as large as the levels go
        reach = np.abs(number.astype(jnp.float32)).max(-1)[..., None] * np.abs(whole).sum(0).reshape(-1)
        got = np.asarray(jax.jit(product)(number, w), np.float64)
        assert as_bytes(product, number, w)
        assert (np.abs(got - wanted).reshape(*rows, -1) <= bound * reach).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [None, 4])
def test_one_row_has_its_zero_points_apart(rng, bits, activation_bits):
    w = grouped(rng, bits, zero=True, shape=(64, 3, 8), activation_bits=activation_bits)
    x = jnp.asarray(rng.normal(size=(1, 64)), jnp.float32)
    grid = x if activation_bits is None else quantize.fake_quantize(x, quantize.Affine(4, axes=(0,)))
    whole = np.asarray(dense(w), np.float64)
    reach = np.abs(x).max() * np.abs(whole).sum(0)
    assert (np.abs(jax.jit(product)(x, w) - np.tensordot(grid, whole, 1)) <= 2.0**-20 * reach).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("input_zero", [None, -5.0])
@pytest.mark.parametrize("rows", [2, 200])
def test_integer_inputs_are_exact(rng, bits, input_zero, rows):
    held = {} if input_zero is None else {"input_zero_point": jnp.full((1, 1), input_zero)}
    w = grouped(rng, bits, powers=True, activation_bits=8, input_scale=jnp.full((1, 1), 0.25), **held)
    x = rng.integers(-100, 100, (rows, 64)) / 4
    got = jax.jit(product)(jnp.asarray(x, jnp.float32), w)
    assert as_bytes(product, jnp.asarray(x, jnp.float32), w)
    np.testing.assert_array_equal(got, x @ np.asarray(dense(w), np.float64))


def test_derivatives_are_those_of_the_product(rng):
    w, x = grouped(rng, 4, zero=True), jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    way = jnp.asarray(rng.normal(size=(4, 24)), jnp.float32)
    got = jax.jit(jax.grad(lambda x: (way * product(x, w)).sum()))(x)
    np.testing.assert_allclose(got, way @ dense(w).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "case, rows, spec",
    [
        ("one row", 1, {}),
        ("more rows than digits pay for", _digits.FEW + 1, {}),
        ("groups that do not divide the axis", 4, {"shape": (72, 24)}),
        ("small groups", 4, {"size": 8}),
        ("bytes that are cut off", 4, {"shape": (64, 23)}),
    ],
)
def test_others_are_decoded(rng, case, rows, spec):
    w = grouped(rng, **{"bits": 4, **spec})
    x = jnp.asarray(rng.normal(size=(rows, w.shape[0])), jnp.float32)
    assert not as_bytes(product, x, w)
    whole = np.asarray(dense(w), np.float64)
    np.testing.assert_allclose(jax.jit(product)(x, w), np.asarray(x) @ whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_half_precision_meets_weights_that_are_not_rounded_to_it(monkeypatch, rng, rows):
    monkeypatch.setattr(_digit_groups, "OF_DIGITS", 1 << 20)  # so that they are decoded
    w = grouped(rng, 8, shape=(1024, 32), size=32)
    x = jnp.asarray(rng.normal(size=(rows, 1024)), jnp.bfloat16)
    wide = compressed(lambda x, w: jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32))
    whole = np.asarray(dense(w), np.float64)
    got, wanted = np.asarray(jax.jit(wide)(x, w)), np.asarray(x, np.float64) @ whole
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("worth", [1, 1 << 18])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_one_scale_for_all_outputs_meet_integers_as_integers(monkeypatch, rng, symmetric, worth):
    monkeypatch.setattr(_digit_groups, "WORTH", worth)
    scheme = quantize.Affine(4, axes=(), group=(0, 32), symmetric=symmetric, activation_bits=8)
    w = scheme.convert(jnp.asarray(rng.normal(size=(256, 24)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(5, 256)), jnp.float32)
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(compressed(jnp.matmul))(x, w))
    step = np.abs(np.float64(x)).max(-1, keepdims=True) / 127
    wanted = np.round(np.float64(x) / step) * step @ np.float64(w.materialise())
    np.testing.assert_allclose(compressed(jnp.matmul)(x, w), wanted, atol=1e-4)
