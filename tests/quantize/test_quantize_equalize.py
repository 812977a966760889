"""SmoothQuant and equalisation: the papers' scales, the same function; AdaRound against all roundings there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import quantize
from jaxcompress.arrays import compressed, dense
from jaxcompress.quantize import Affine

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def attention(p, x):
    y = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * p["norm"]
    return (y @ p["q"]) * jax.nn.sigmoid(y @ p["k"])


def test_smoothquant_scales_are_the_papers_and_help(rng):
    params = {"norm": normal(rng, 8).at[3].mul(40), "q": normal(rng, 8, 8), "k": normal(rng, 8, 8)}
    batches = [normal(rng, 32, 8) for _ in range(2)]
    pairs = [(["norm"], ["q", "k"])]
    out = quantize.smooth(attention, params, batches, pairs, strength=0.75)
    x = np.concatenate(batches)
    y = np.abs(x / np.linalg.norm(x, axis=-1, keepdims=True) * np.asarray(params["norm"])).max(0)
    w = np.maximum(np.abs(params["q"]).max(1), np.abs(params["k"]).max(1))
    scale = y**0.75 / w**0.25
    np.testing.assert_allclose(out["norm"], params["norm"] / scale, rtol=1e-4)
    np.testing.assert_allclose(out["q"], params["q"] * scale[:, None], rtol=1e-4)
    rules = {"q|k": Affine(8, activation_bits=6)}
    wanted = attention(params, batches[0])
    errors = [
        float(jnp.linalg.norm(compressed(attention)(quantize.convert(p, rules), batches[0]) - wanted))
        for p in (out, params)
    ]
    assert errors[0] < 0.5 * errors[1]


def convolutions(p, x):
    y = jax.nn.relu(lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=NHWC) + p["bias"])
    y = jax.nn.relu(lax.conv_general_dilated(y, p["b"], (2, 2), "SAME", dimension_numbers=NHWC))
    return y.reshape(x.shape[0], -1) @ p["c"]


@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_convolutions_stand_behind_what_makes_their_channels(rng, groups):
    """As in MobileNet and ResNeXt: input channel `c` is read by group `c // (channels / groups)` alone."""
    a_group = 6 // groups
    spread = jnp.exp(2 * normal(rng, 6))
    narrow = spread.reshape(groups, a_group).T  # [channel in its group, group]
    params = {
        "a": normal(rng, 1, 1, 3, 6) * spread,
        "b": normal(rng, 3, 3, a_group, 6) / jnp.repeat(narrow, a_group, axis=1),
        "c": normal(rng, 1, 1, 6, 4),
    }

    def fn(p, x):
        y = jax.nn.relu(lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=NHWC))
        y = lax.conv_general_dilated(y, p["b"], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups)
        return lax.conv_general_dilated(jax.nn.relu(y), p["c"], (1, 1), "SAME", dimension_numbers=NHWC)

    batches = [normal(rng, 4, 5, 5, 3)]
    pairs = quantize.pairs(fn, params, batches[0])
    assert pairs == [(["a"], ["b"]), (["b"], ["c"])]
    equal = quantize.equalize(fn, params, batches[0], pairs)
    takes = np.abs(equal["b"]).max((0, 1)).reshape(a_group, groups, a_group).max(2).T.reshape(6)
    np.testing.assert_allclose(np.abs(equal["a"]).max((0, 1, 2)), takes, rtol=1e-2)
    smoothed = quantize.smooth(fn, params, batches, pairs[:1])
    peaks = np.asarray(jax.nn.relu(batches[0] @ params["a"][0, 0])).max((0, 1, 2))
    sizes = np.abs(params["b"]).max((0, 1)).reshape(a_group, groups, a_group).max(2).T.reshape(6)
    scale = np.sqrt(peaks / sizes)
    np.testing.assert_allclose(smoothed["a"], params["a"] / scale, rtol=1e-4)
    np.testing.assert_allclose(
        smoothed["b"], params["b"] * np.repeat(scale.reshape(groups, -1).T, a_group, axis=1), rtol=1e-4
    )
    rules = {"^b$": Affine(3, axes=())}
    rounded = [quantize.convert(p, rules) for p in (params, quantize.awq(fn, params, batches, rules, pairs[:1]))]
    plain, scaled = (np.linalg.norm(compressed(fn)(p, batches[0]) - fn(params, batches[0])) for p in rounded)
    assert scaled < 0.7 * plain


@pytest.mark.slow
def test_equalisation_ends_where_both_sides_are_alike(rng):
    spread = jnp.exp(2 * normal(rng, 6))
    params = {
        "a": normal(rng, 3, 3, 2, 6) * spread,
        "bias": normal(rng, 6) * spread,
        "b": normal(rng, 3, 3, 6, 5) / spread[:, None],
        "c": normal(rng, 2 * 2 * 5, 3) * jnp.tile(jnp.exp(normal(rng, 5)), 4)[:, None],
    }
    x = normal(rng, 4, 4, 4, 2)
    pairs = [(["a", "bias"], ["b"]), (["b"], ["c"])]
    out = quantize.equalize(convolutions, params, x, pairs, rounds=200)
    sizes = {name: np.abs(np.asarray(out[name])) for name in "abc"}
    np.testing.assert_allclose(sizes["a"].max((0, 1, 2)), sizes["b"].max((0, 1, 3)), rtol=1e-3)
    np.testing.assert_allclose(sizes["b"].max((0, 1, 2)), sizes["c"].reshape(4, 5, 3).max((0, 2)), rtol=1e-3)
    rules = {"a|b|c": Affine(8, axes=())}
    wanted = convolutions(params, x)
    np.testing.assert_allclose(convolutions(out, x), wanted, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(wanted))))
    errors = [
        float(jnp.linalg.norm(convolutions(dense(quantize.convert(p, rules)), x) - wanted)) for p in (out, params)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_silent_channels_and_refusals(rng):
    params = {"a": normal(rng, 3, 4).at[:, 1].set(0), "b": normal(rng, 4, 2).at[2].set(0)}

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    x, pairs = normal(rng, 5, 3), [(["a"], ["b"])]
    for out in (quantize.equalize(fn, params, x, pairs), quantize.smooth(fn, params, [x], pairs)):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))
    for message, call in {
        "strength": lambda: quantize.smooth(fn, params, [x], pairs, strength=2),
        "no batches": lambda: quantize.smooth(fn, params, [], pairs),
        "'z' of the pairs is not there": lambda: quantize.equalize(fn, params, x, [(["z"], ["b"])]),
        "names parameters in front": lambda: quantize.equalize(fn, params, x, [([], ["b"])]),
        "scaling changes the function": lambda: quantize.smooth(
            lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, [x], pairs
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def squared_error(x, w, rounded):
    return np.sum((np.asarray(x, np.float64) @ np.float64(rounded - w)) ** 2, axis=0)


def test_adaround_comes_near_the_best_of_all_roundings(rng):
    """Six inputs: each output has 64 roundings, and the best is known."""
    x, w = normal(rng, 40, 6) @ normal(rng, 6, 6), normal(rng, 6, 12)
    params, spec = {"w": w}, Affine(3)
    out = quantize.adaround(lambda p, x: x @ p["w"], params, [x], {"w": spec})
    nearest = quantize.convert(params, {"w": spec})
    np.testing.assert_array_equal(out["w"].scale, nearest["w"].scale)
    step = np.asarray(nearest["w"].scale)
    below = np.floor(np.asarray(w) / step)
    best = np.min(
        [
            squared_error(x, w, np.clip(below + np.asarray(up)[:, None], -3, 3) * step)
            for up in itertools.product([0, 1], repeat=6)
        ],
        axis=0,
    )
    found, plain = (squared_error(x, w, leaf["w"].materialise()) for leaf in (out, nearest))
    assert np.all(found <= plain * (1 + 1e-4)) and np.all(found >= best * (1 - 1e-4))
    assert np.sum(found - best) < 0.6 * np.sum(plain - best)


@pytest.mark.slow
def test_adaround_of_convolutions_stacks_and_groups(rng):
    params = {"a": normal(rng, 3, 3, 4, 6), "stack": normal(rng, 2, 6, 6)}

    def fn(p, x):
        y = jax.nn.relu(lax.conv_general_dilated(x, p["a"], (2, 2), "SAME", dimension_numbers=NHWC))
        return lax.scan(lambda y, w: (jnp.tanh(y) @ w, None), y, p["stack"])[0]

    x = normal(rng, 16, 6, 6, 4) * jnp.asarray([1.0, 3.0, 0.2, 1.0])
    rules = [("a", Affine(3, symmetric=False)), ("stack", Affine(4, axes=(0, -1), group=(1, 4)))]
    out = quantize.adaround(fn, params, [x], rules, steps=300)
    plain = quantize.convert(params, rules)
    wanted = fn(params, x)
    errors = [float(jnp.linalg.norm(fn(dense(p), x) - wanted)) for p in (out, plain)]
    assert errors[0] < errors[1]
    moved = np.abs(np.asarray(out["a"].codes(), int) - np.asarray(plain["a"].codes(), int))
    assert moved.max() == 1
    with pytest.raises(ValueError, match="at least 1 step"):
        quantize.adaround(fn, params, [x], rules, steps=0)
