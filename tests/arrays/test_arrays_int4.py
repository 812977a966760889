"""4-bit codes that are stored as JAX's int4, and 2-bit ones as int2: the same weight as packed, everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import compiled
from jaxcompress import compressed, dense, export, nbytes, pack, quantize, tensors
from jaxcompress.quantize import Affine

SCHEMES = {
    "per output": Affine(4),
    "zero point": Affine(4, symmetric=False),
    "groups": Affine(4, group=(0, 8)),
    "groups, zero point": Affine(4, group=(0, 8), symmetric=False),
    "integers": Affine(4, activation_bits=8),
    "integers, groups": Affine(4, group=(0, 8), activation_bits=8),
    "nf4": quantize.NF4((-2, 8)),
    "2 bits, groups, zero point": Affine(2, group=(0, 8), symmetric=False),
    "2 bits, integers": Affine(2, activation_bits=8),
}


def both(rng, scheme, shape=(24, 16)):
    packed = scheme.convert(jnp.asarray(rng.normal(size=shape), jnp.float32))
    return packed, packed.as_int4()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_those_of_packed_codes(monkeypatch, name, rows, devices, rng):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    packed, native = both(rng, SCHEMES[name])
    x = jnp.asarray(rng.normal(size=(rows, 24)), jnp.float32)
    np.testing.assert_array_equal(dense(native), dense(packed))

    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w))

    for fn in (jnp.dot, lambda x, w: x[0] @ w, lambda x, w: (x @ w) @ w.T, jax.grad(loss)):
        got, wanted = (jax.jit(compressed(fn))(x, w) for w in (native, packed))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "dtype"), [(4, jnp.int4), (2, jnp.int2)])
def test_it_is_the_same_weight_wherever_it_goes(bits, dtype, rng, tmp_path):
    packed, native = both(rng, Affine(bits, group=(0, 8), symmetric=False))
    assert native.values.dtype == dtype and native.as_int4() == native
    assert native.shape == packed.shape and nbytes(native) == nbytes(packed)

    def ways(w, i):
        return w.T, w.reshape(3, 8, 16), w[i], w * 2, w.astype(jnp.bfloat16), lax.slice_in_dim(w, 8, 16)

    at = jnp.array([3, 5])
    for got, wanted in zip(dense(compressed(ways)(native, at)), ways(dense(packed), at), strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=1e-5, atol=1e-5)
    pack.save(tmp_path / "w.jxc", {"w": native})
    assert pack.load(tmp_path / "w.jxc")["w"] == native
    assert (tmp_path / "w.jxc").stat().st_size < 1.2 * nbytes(native) + 1000
    tensors.save(tmp_path / "w.safetensors", {"w": {"kernel": native}})
    np.testing.assert_array_equal(dense(tensors.load(tmp_path / "w.safetensors"))["w"]["kernel"], dense(packed))
    x = jnp.ones((2, 24))
    export.save(tmp_path / "w.bin", lambda w, x: x @ w, native, x)
    np.testing.assert_allclose(export.load(tmp_path / "w.bin")(x), x @ dense(packed), rtol=1e-5, atol=1e-5)


def test_sharded(rng):
    _, native = both(rng, Affine(4, group=(0, 8)))
    mesh = Mesh(np.asarray(jax.devices()[:2]), "m")
    there = jax.device_put(native, NamedSharding(mesh, PartitionSpec(None, "m")))
    x = jnp.asarray(rng.normal(size=(3, 24)), jnp.float32)
    out = jax.jit(compressed(jnp.dot))(x, there)
    np.testing.assert_allclose(out, x @ dense(native), rtol=1e-5, atol=1e-5)


def test_a_cache_is_written_to(rng):
    cache = {"cached_key": jnp.zeros((1, 6, 2, 8))}
    small = quantize.convert(cache, {"cached_key": Affine(4, axes=(-4, -3, -2))})
    token = jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32)
    write = jax.jit(compressed(lambda cache, x: lax.dynamic_update_slice(cache, x, (0, 2, 0, 0))))
    packed, native = (write(w, token) for w in (small["cached_key"], small["cached_key"].as_int4()))
    assert native.values.dtype == jnp.int4
    np.testing.assert_array_equal(dense(native), dense(packed))
    assert float(jnp.abs(dense(native)[:, 2] - token[:, 0]).max()) < 0.3


def test_by_path(rng):
    w = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    small = quantize.convert({"a": w, "b": w, "c": w}, {"a": Affine(4), "b": Affine(8)})
    laid = quantize.as_int4(small, {"a": True})
    assert laid["a"].values.dtype == jnp.int4 and laid["b"] is small["b"]
    for rule, said in (("b", "'b'.*8 bits"), ("c", "'c'.*no quantized weight")):
        with pytest.raises(ValueError, match=said):
            quantize.as_int4(small, {rule: True})
    with pytest.raises(ValueError, match="4 bits"):
        laid["a"].outputs_first()


def test_moved_bytes_are_those_of_main_memory():
    hlo = """HloModule m

%inner (p: f32[9]) -> f32[9] {
  ROOT %big = f32[9000]{0} negate(%p)
}

ENTRY %main (a: bf16[4,8], w: s4[8,16]) -> f32[4,16] {
  %a = bf16[4,8]{1,0:T(4,128)(2,1)} parameter(0)
  %w = s4[8,16]{1,0:T(8,128)E(4)} parameter(1)
  %copy-start = (s4[8,16]{1,0:T(8,128)S(1)}, s4[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = s4[8,16]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = f32[4,16]{1,0:T(4,128)S(1)} fusion(%a, %copy-done), kind=kOutput, calls=%inner
  ROOT %fusion.1 = f32[4,16]{1,0:T(4,128)} fusion(%fusion), kind=kLoop, calls=%inner
}
"""
    assert compiled.moved_bytes(hlo) == 8 * 16 / 2 + 4 * 8 * 2 + 4 * 16 * 4
