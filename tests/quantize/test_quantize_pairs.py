"""Pairs found by tracing: in what is expected, and where a scale would change the function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import quantize


class Block(nn.Module):
    """Attention, then a rectified and a gelu layer, beside shortcuts."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="first")(x)
        query, key, value = (nn.DenseGeneral((2, 4), name=name)(y) for name in ("query", "key", "value"))
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(nn.dot_product_attention(query, key, value))
        y = nn.RMSNorm(name="second")(x)
        y = nn.Dense(8, name="gelu")(nn.relu(nn.Dense(12, name="up")(y)))
        y = nn.Dense(6, name="gated")(nn.gelu(y))
        return x + nn.Dense(8, name="down")(y * nn.silu(nn.Dense(6, name="gate")(x)))


@pytest.fixture
def block(rng):
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)
    return Block(), jax.jit(Block().init)(jax.random.key(0), x), x


@pytest.mark.slow
def test_of_a_transformer(block):
    model, variables, x = block
    assert quantize.pairs(model.apply, variables, x) == [
        (["first/scale", "first/bias"], ["query/kernel", "key/kernel", "value/kernel"]),
        (["value/kernel", "value/bias"], ["out/kernel"]),
        (["second/scale"], ["up/kernel"]),
        (["up/kernel", "up/bias"], ["gelu/kernel"]),  # but not from there through gelu
        (["gated/kernel", "gated/bias"], ["down/kernel"]),  # and not through the gate's silu
    ]


def test_of_convolutions_and_of_what_has_none(rng):
    numbers = ("NHWC", "HWIO", "NHWC")

    def run(p, x):
        y = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=numbers) + p["bias"]
        y = nn.max_pool(jax.nn.leaky_relu(y), (2, 2), (2, 2))
        y = jax.nn.relu(lax.conv_general_dilated(y, p["b"], (1, 1), "SAME", dimension_numbers=numbers))
        twice = y.reshape(x.shape[0], -1) @ p["c"]
        return jnp.tanh(twice @ p["d"]) @ p["d"], p["unused"] * 2

    shapes = {"a": (3, 3, 2, 6), "b": (3, 3, 6, 5), "c": (20, 6), "d": (6, 6), "bias": (6,), "unused": (3,)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 5, jnp.float32) for name, shape in shapes.items()}
    params["a"] = params["a"].at[..., 0].set(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 2)), jnp.float32)
    assert quantize.pairs(run, params, x) == [(["a", "bias"], ["b"]), (["b"], ["c"])]
    assert quantize.pairs(lambda p, x: x @ p["c"], {"c": jnp.ones((3, 2))}, jnp.ones((1, 3))) == []


def test_a_gain_that_is_stored_less_one(rng):
    def model(p, x):
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True) * (1 + p["g"])) @ p["w"]

    params = {"g": jnp.asarray(rng.normal(size=8), jnp.float32), "w": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(6, 8)) * np.arange(1, 9), jnp.float32)
    assert quantize.pairs(model, params, x) == []
    with pytest.raises(ValueError, match="stored less one"):
        quantize.smooth(model, params, [x], [(["g"], ["w"])])

    def plus(p, one):
        return {**p, "g": p["g"] + one}

    def of_gains(p, x):
        return model(plus(p, -1), x)

    found = quantize.pairs(of_gains, plus(params, 1), x)
    assert found == [(["g"], ["w"])]
    smoothed = plus(quantize.smooth(of_gains, plus(params, 1), [x], found), -1)
    assert float(jnp.abs(smoothed["g"] - params["g"]).max()) > 0.1
    np.testing.assert_allclose(model(smoothed, x), model(params, x), rtol=1e-3, atol=1e-4)


def test_zeros_in_a_kernel_are_no_evidence(rng):
    """Behind a kernel of zeros any function stays the same; the pair is judged by what it would do with others."""
    params = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.zeros((4, 2))}
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    assert quantize.pairs(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x) == []
    assert quantize.pairs(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, x) == [(["a"], ["b"])]


def test_a_kernel_whose_axes_together_are_as_many_as_the_next_inputs(rng):
    """A kernel [3, 3, 4, 8] in front of 32 inputs, which are 8 channels at 4 places, not 4 * 8 channels."""
    numbers = ("NHWC", "HWIO", "NHWC")

    def run(p, x):
        y = jax.nn.relu(lax.conv_general_dilated(x, p["a"], (2, 2), "SAME", dimension_numbers=numbers))
        return y.reshape(x.shape[0], -1) @ p["b"]

    shapes = {"a": (3, 3, 4, 8), "b": (32, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params["a"] = params["a"] * jnp.exp(jnp.asarray(rng.normal(size=8), jnp.float32))
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32)
    found = quantize.pairs(run, params, x)
    assert found == [(["a"], ["b"])]
    out = quantize.equalize(run, params, x, found)
    makes, takes = jnp.max(jnp.abs(out["a"]), (0, 1, 2)), jnp.max(jnp.abs(out["b"].reshape(4, 8, 3)), (0, 2))
    assert jnp.allclose(makes, takes, rtol=1e-3)
    scaled = quantize.awq(run, params, [x], {"a|b": quantize.Affine(4)}, found)
    ratio = scaled["a"] / params["a"]
    assert jnp.allclose(ratio, ratio[:1, :1, :1], rtol=1e-5) and jnp.ptp(ratio) > 0.1  # a scale an output, of 8
