"""Inputs in 8-bit floats: against NumPy's rounding of them, in training and converted, wherever a product stands."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from jaxcompress import compressed, nbytes, quantize
from jaxcompress.arrays import watch
from jaxcompress.quantize import Floats


def rounded(x, dtype, axis):
    """Each row (or column) over its own scale, to the nearest float; written down a second time."""
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(largest)
    return (x / scale).astype(dtype).astype(np.float64) * scale


CASES = {
    "x @ w": lambda w, x: x @ w,
    "transposed": lambda w, x: (w.T @ x.T).T,
    "reshaped": lambda w, x: jnp.einsum("bki,kio->bo", x.reshape(-1, 2, 8), w.reshape(2, 8, -1)),
}


@pytest.mark.parametrize(("weights", "inputs"), [("float8_e4m3fn", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e5m2")])
def test_products_are_of_the_rounded_numbers(weights, inputs, rng):
    x, w = jnp.asarray(rng.normal(size=(6, 16)), jnp.float32), jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    spec = Floats(weights, inputs=inputs)
    small = quantize.convert({"w": w}, {"w": spec})
    assert nbytes(small) == 16 * 5 + 4 * 5
    wanted = rounded(x, inputs, 1) @ rounded(w, weights, 0)

    @jax.jit
    def both(small, params, x):
        run = {name: lambda p, x, fn=fn: fn(p["w"], x) for name, fn in CASES.items()}
        return {
            n: (compressed(fn, strict=True)(small, x), quantize.fake(fn, {"w": spec})(params, x))
            for n, fn in run.items()
        }

    for name, found in both(small, {"w": w}, x).items():
        for out in found:
            np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_convolutions_round_example_by_example_and_lookups_nothing(rng):
    x, w = rng.normal(size=(2, 4, 4, 3)).astype(np.float32), jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)
    spec = Floats(inputs="float8_e4m3fn")

    def run(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    small = quantize.convert({"w": w}, {"w": spec})
    kernel = small["w"].materialise()
    wanted = run({"w": kernel}, jnp.float32(rounded(x, spec.inputs, (1, 2, 3))))
    np.testing.assert_allclose(compressed(run, strict=True)(small, x), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(quantize.fake(run, {"w": spec})({"w": w}, x), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        compressed(lambda w: w[jnp.asarray([2, 0])], strict=True)(small["w"]), kernel[jnp.asarray([2, 0])]
    )


def test_a_gpu_gets_products_of_small_floats(rng):
    small = Floats(inputs="float8_e4m3fn").convert(jnp.asarray(rng.normal(size=(16, 8)), jnp.float32))
    traced = jax.jit(compressed(jnp.dot)).trace(jnp.ones((4, 16)), small)
    dots = {
        platform: [
            line
            for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
            if "dot_general" in line
        ]
        for platform in ("cuda", "cpu")
    }
    assert ["f8E4M3FN" in line for line in dots["cuda"]] == [True]
    assert ["f8E4M3FN" in line for line in dots["cpu"]] == [False]


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e30])
def test_zeros_and_extremes_are_finite_and_gradients_pass(value, rng):
    spec, x = Floats(inputs="float8_e5m2"), jnp.full((1, 4), value, jnp.float32)
    w = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32).at[:, 1].set(0)
    fn = quantize.fake(lambda p, x: jnp.sum(x @ p["w"]), {"w": spec})
    out, (of_w, of_x) = jax.value_and_grad(fn, argnums=(0, 1))({"w": w}, x)
    assert bool(jnp.isfinite(out))
    np.testing.assert_allclose(of_w["w"], np.broadcast_to(x.T, w.shape), rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(of_x[0], spec.convert(w).materialise().sum(1), rtol=1e-6)


def test_the_codes_are_watched_and_bad_types_refused():
    small = Floats(inputs="float8_e4m3fn").convert(jnp.ones((4, 3)))
    with watch() as hits:
        compressed(jnp.dot)(jnp.ones((2, 4)), small)
    assert hits[("FloatProduct", "dot_general", "rule")] == 1
    with pytest.raises(ValueError, match="inputs is None or one of float8_e4m3fn, float8_e5m2, with weights in one of"):
        Floats("bfloat16", inputs="float8_e4m3fn")
    with pytest.raises(ValueError, match="got 'int8' for weights in float8_e4m3fn"):
        Floats(inputs="int8")


def test_no_whole_weight_of_floats_is_written_out_on_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    n = 1024
    w = Floats("float8_e4m3fn", inputs="float8_e4m3fn").convert(jax.random.normal(jax.random.key(0), (n, 4 * n)))
    compiled = jax.jit(compressed(jnp.dot, strict=True)).lower(jnp.ones((1, n)), w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * 4 * w.size
