"""AWQ's scaling leaves the function as it is, and rounding hurts it less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import quantize
from jaxcompress.arrays import dense
from jaxcompress.quantize import Affine

PAIRS = [(["norm"], ["q", "k"]), (["conv", "conv_bias"], ["out"])]


def model(p, x):
    """A norm's scale in front of two kernels; a convolution and its bias, a rectifier, and a flattened image behind."""
    y = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * p["norm"]
    y = (y @ p["q"]) * jax.nn.sigmoid(y @ p["k"])
    y = lax.conv_general_dilated(y, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(y + p["conv_bias"]).reshape(x.shape[0], -1) @ p["out"]


@pytest.fixture
def trained(rng):
    """A few channels are much louder than the others, as in language models."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "norm": jnp.exp(1.5 * normal(8)),
        "q": normal(8, 8),
        "k": normal(8, 8),
        "conv": normal(3, 3, 8, 6) * jnp.exp(normal(6)),
        "conv_bias": normal(6),
        "out": normal(2 * 2 * 6, 5),
    }
    return params, [normal(16, 4, 4, 8) for _ in range(2)]


@pytest.mark.parametrize(
    "spec",
    [pytest.param(Affine(4), marks=pytest.mark.slow), Affine(3, group=(0, 4))],
    ids=["4 bits", "3 bits, groups"],
)
def test_the_same_function_rounded_better(spec, trained):
    params, batches = trained
    rules = {"q|k|out": spec}
    scaled = quantize.awq(model, params, batches, rules, PAIRS)
    assert not np.allclose(scaled["norm"], params["norm"]) and not np.allclose(scaled["conv"], params["conv"])
    x, run = jnp.concatenate(batches), jax.jit(model)
    out = run(params, x)
    np.testing.assert_allclose(run(scaled, x), out, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(out))))
    errors = [float(jnp.linalg.norm(out - run(dense(quantize.convert(p, rules)), x))) for p in (scaled, params)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.slow
def test_by_itself_no_layer_gets_worse_and_silence_is_left_alone(rng):
    w, x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)
    x = x.at[:, 2].set(0)
    params, rules = {"front": jnp.ones(6), "w": w}, {"w": Affine(3, group=(0, 3))}

    def fn(p, x):
        return (x * p["front"]) @ p["w"]

    scaled = quantize.awq(fn, params, [x], rules, [(["front"], ["w"])])
    errors = [
        float(jnp.linalg.norm(fn(params, x) - fn(dense(quantize.convert(p, rules)), x))) for p in (scaled, params)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)
    assert scaled["front"][2] == 1 and np.all(np.isfinite(scaled["w"]))


def test_refuses(trained):
    params, batches = trained
    rules = {"q|k|out": Affine(4)}
    for message, pairs in {
        "'missing' of the pairs is not there": [(["missing"], ["q"])],
        "'conv' of the pairs is not chosen": [(["norm"], ["conv"])],
        "does not end with the channels": [(["conv"], ["q"])],
        "names parameters in front": [([], ["q"])],
        "scaling changes the function": [(["norm"], ["q"])],  # k sees the norm too
    }.items():
        with pytest.raises(ValueError, match=message):
            quantize.awq(model, params, batches, rules, pairs)
    with pytest.raises(TypeError, match="a pair is two lists of paths"):
        quantize.awq(model, params, batches, rules, [("norm", "q")])
    with pytest.raises(ValueError, match="not an iterator"):
        quantize.awq(model, params, iter(batches), rules, PAIRS)
    with pytest.raises(TypeError, match="an Affine grid, got the rule 4"):
        quantize.awq(model, params, batches, {"q|k|out": 4}, PAIRS)
    stacked = {"front": jnp.ones(4), "w": jnp.ones((2, 4, 4))}

    def scanned(p, x):
        return lax.scan(lambda x, w: (x @ w, None), x * p["front"], p["w"])[0]

    with pytest.raises(ValueError, match="2 matrices"):
        quantize.awq(scanned, stacked, [jnp.ones((2, 4))], {"w": Affine(4)}, [(["front"], ["w"])])
