"""Learned steps: the papers' gradients, that they are used in training, and that integers follow."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import lax
from sklearn.datasets import load_digits

import jaxcompress.nnx
from jaxcompress import quantize
from jaxcompress.arrays import Quantized, compressed, is_leaf, watch
from jaxcompress.quantize import Affine, Range
from jaxcompress.quantize._steps import to_steps


def paper(v, s, low, high):
    """Esser et al. 2020, equation 3, an element at a time."""
    if v / s <= low:
        return low
    if v / s >= high:
        return high
    return np.round(v / s) - v / s


def test_lsq_gradients_are_the_papers(rng):
    v, upstream, s = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), np.asarray([[0.3, 0.2, 0.9, 0.4]])

    def loss(v, s):
        return jnp.sum(to_steps(v, s, None, (-4, 3), "lsq", 5) * upstream)

    to_v, to_s = jax.grad(loss, (0, 1))(jnp.float32(v), jnp.float32(s))
    np.testing.assert_array_equal(to_v, np.float32(np.where((v / s >= -4) & (v / s <= 3), upstream, 0)))
    expected = [sum(upstream[i, j] * paper(v[i, j], s[0, j], -4, 3) for i in range(5)) for j in range(4)]
    np.testing.assert_allclose(to_s[0], np.asarray(expected) / np.sqrt(5 * 3), rtol=1e-5)


def test_pact_gradient_is_the_papers(rng):
    """`alpha` gets the gradients of what is above it; inside nothing, below zero nothing (equation 3)."""
    x, upstream = rng.normal(size=(6, 3)) * 2, rng.normal(size=(6, 2))
    w = rng.normal(size=(3, 2))
    params = {"w": jnp.float32(w)}
    rules = {"w": Affine(8, activation_bits=4)}
    learned = quantize.learn(params, rules, {"w": Range(np.float32(0), np.float32(1.25))}, inputs="pact")
    assert float(learned["w"].input_step.reshape(())) == pytest.approx(1.25)
    loss = compressed(lambda p, x: jnp.sum(x @ p["w"] * upstream))
    to_params, to_x = jax.grad(loss, (0, 1))(learned, jnp.float32(x))
    through = upstream @ np.asarray(learned["w"].materialise()).T
    np.testing.assert_allclose(to_params["w"].input_step.reshape(()), np.sum(through * (x > 1.25)), rtol=1e-4)
    np.testing.assert_allclose(to_x, np.where((x >= 0) & (x <= 1.25), through, 0), rtol=1e-4, atol=1e-6)
    fixed = quantize.learn(params, rules, {"w": Range(np.float32(0), np.float32(1.25))}, inputs=None)
    assert not jax.grad(loss)(fixed, jnp.float32(x))["w"].input_step.any()


def test_trained_ternary_gradients_are_the_papers(rng):
    """Zhu et al. 2017, equations 7 and 8, a weight at a time (36 share a value); the codebook is what was trained."""
    w, x, upstream = rng.normal(size=(9, 4)), rng.normal(size=(5, 9)), rng.normal(size=(5, 4))
    learned = quantize.learn({"w": jnp.float32(w)}, {"w": quantize.Ternary(0.7)})["w"]
    level = 0.7 * np.abs(w).mean()
    np.testing.assert_allclose([learned.high.item(), learned.low.item()], [w[w > level].mean(), -w[w < -level].mean()])
    learned = dataclasses.replace(learned, high=2 * learned.high)
    high, low = learned.high.item(), learned.low.item()
    ternary = np.where(w > level, high, np.where(w < -level, -low, 0))
    np.testing.assert_allclose(learned.materialise(), ternary, rtol=1e-6)
    loss = compressed(lambda w, x: jnp.sum(x @ w * upstream))
    gradients = jax.grad(loss)(learned, jnp.float32(x))
    of_ternary = x.T @ upstream
    scaled = of_ternary * np.where(w > level, high, np.where(w < -level, low, 1))
    np.testing.assert_allclose(gradients.weight, scaled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients.high.item(), of_ternary[w > level].sum() / 6, rtol=1e-4)
    np.testing.assert_allclose(gradients.low.item(), -of_ternary[w < -level].sum() / 6, rtol=1e-4)
    settled = quantize.settle({"w": learned})["w"]
    np.testing.assert_array_equal(settled.materialise(), learned.materialise())
    assert settled.bits == 2
    of_nothing = quantize.learn({"w": jnp.zeros((3, 2))}, {"w": quantize.Ternary(axes=(-1,))})["w"]
    slopes = jax.grad(compressed(lambda w: jnp.sum(w * 2.0)))(of_nothing)
    assert of_nothing.high.shape == (1, 2) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(slopes))


def test_both_ends_of_an_inputs_grid_learn_as_lsq_plus_has_it(rng):
    """Bhalgat et al. 2020, equations 3 to 6, where the low end lies on the grid: 16 values from -0.75 to 3."""
    x, upstream, w = rng.normal(size=(40, 3)) * 2, rng.normal(size=(40, 2)), rng.normal(size=(3, 2))
    x[np.abs(np.abs((x + 0.75) / 0.25 % 1) - 0.5) < 1e-3] += 0.01  # no ties
    rules, ends = {"w": Affine(8, activation_bits=4)}, Range(np.float32(-0.75), np.float32(3))
    learned = quantize.learn({"w": jnp.float32(w)}, rules, {"w": ends})
    assert float(learned["w"].input_step.reshape(())) == 0.25 and float(learned["w"].input_low.reshape(())) == -0.75
    loss = compressed(lambda p, x: jnp.sum(x @ p["w"] * upstream))
    to_params, to_x = jax.grad(loss, (0, 1))(learned, jnp.float32(x))
    through = upstream @ np.asarray(learned["w"].materialise()).T
    at = (x + 0.75) / 0.25
    below, above = at < 0, at > 15
    to_step = np.where(below, 0, np.where(above, 15, np.round(at) - at))
    scale = 1 / np.sqrt(3 * (15 - 3))  # three features a row; the code that means zero is 3 of 15
    np.testing.assert_allclose(to_x, np.where(below | above, 0, through), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(to_params["w"].input_step.reshape(()), scale * np.sum(through * to_step), rtol=1e-4)
    np.testing.assert_allclose(
        to_params["w"].input_low.reshape(()), scale * np.sum(through * (below | above)), rtol=1e-4
    )
    assert above.any() and below.any() and not (below | above).all()

    of_largest = quantize.learn({"w": jnp.float32(w)}, rules, {"w": ends}, inputs="pact")["w"]
    assert float(of_largest.input_step.reshape(())) == pytest.approx(3)
    to_pact = jax.grad(loss)({"w": of_largest}, jnp.float32(x))["w"]
    np.testing.assert_allclose(to_pact.input_step.reshape(()), np.sum(through * above), rtol=1e-4)
    np.testing.assert_allclose(to_pact.input_low.reshape(()), np.sum(through * below), rtol=1e-4)
    for kind in (learned["w"], of_largest, dataclasses.replace(learned["w"], input_low=jnp.full((1, 1), -0.8))):
        small = quantize.settle({"w": kind})
        assert float(small["w"].input_zero_point.reshape(())) == -5
        np.testing.assert_allclose(
            compressed(jnp.matmul)(jnp.float32(x), small["w"]),
            jnp.float32(x_on(x) @ small["w"].materialise()),
            rtol=1e-5,
            atol=1e-5,
        )


def test_inputs_that_are_never_positive_have_finite_gradients(rng):
    x, rules = -jnp.abs(jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)), {"w": Affine(8, activation_bits=4)}
    for inputs in ("lsq", "pact"):
        learned = quantize.learn({"w": jnp.eye(3)}, rules, {"w": Range(np.float32(-2), np.float32(0))}, inputs=inputs)
        out, to_learned = jax.value_and_grad(compressed(lambda p, x: jnp.sum((x @ p["w"]) ** 2)))(learned, x)
        assert np.isfinite(out) and all(np.isfinite(g).all() for g in jax.tree.leaves(to_learned))
        on_grid = jnp.maximum(jnp.round(x * 7.5) / 7.5, -2)
        np.testing.assert_allclose(
            compressed(jnp.matmul)(x, learned["w"]), on_grid @ learned["w"].materialise(), atol=1e-5
        )


def x_on(x):
    return np.clip(np.round(x / 0.25), -3, 12) * 0.25


def test_a_weights_step_begins_as_lsq_plus_has_it(rng):
    """Bhalgat et al. 2020: the larger of |mean - 3 std| and |mean + 3 std| over `2 ** (bits - 1)`, a block each."""
    w = rng.normal(size=(50, 4)) * [1, 0.1, 10, 0] + [0.5, -1, 0, 0]
    for spec, blocks in ((Affine(4), w[None]), (Affine(3, group=(0, 10)), w.reshape(5, 10, 4))):
        mean, std = blocks.mean(1), blocks.std(1)
        expected = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std)) / 2 ** (spec.bits - 1)
        learned = quantize.learn({"w": jnp.float32(w)}, {"w": spec})["w"]
        np.testing.assert_allclose(learned.step, np.where(expected > 0, expected, 1), rtol=1e-5)


def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)


def network(p, x):
    return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] + p["b"]["bias"]


def loss_of(apply, p, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(p, x), labels).mean()


@pytest.mark.slow
def test_training_at_two_bits_beats_steps_that_follow_the_largest_weight(tmp_path):
    """Two bits for weights and inputs. The leaves train, save and restore like any parameters, and become integers."""
    x, labels = digits()
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "a": {"kernel": jax.random.normal(keys[0], (64, 32)) / 8, "bias": jnp.zeros(32)},
        "b": {"kernel": jax.random.normal(keys[1], (32, 10)) / 6, "bias": jnp.zeros(10)},
    }
    rules = {"kernel$": Affine(2, symmetric=False, axes=(), activation_bits=2)}

    def train(loss, params, rate, steps=150):
        tx = optax.adam(rate)

        @jax.jit
        def run(params):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            return lax.scan(step, (params, tx.init(params)), None, length=steps)[0][0]

        return run(params)

    trained = train(lambda p: loss_of(network, p, x, labels), params, 1e-2)
    ranges = quantize.input_ranges(network, trained, [x], rules, quantize.LeastSquares(), symmetric=False)
    learned = quantize.learn(trained, rules, ranges)
    assert learned["b"]["kernel"].unsigned
    apply = compressed(network, strict=True)
    learned = train(lambda p: loss_of(apply, p, x, labels), learned, 5e-3)
    faked = quantize.fake(network, {"kernel$": Affine(2, axes=(), activation_bits=2)})
    dynamic = train(lambda p: loss_of(faked, p, x, labels), trained, 5e-3)
    assert float(loss_of(apply, learned, x, labels)) < 0.5 * float(loss_of(faked, dynamic, x, labels))

    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", learned)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "step", jax.eval_shape(lambda: learned))
    assert jax.tree.structure(back) == jax.tree.structure(learned)
    jax.tree.map(np.testing.assert_array_equal, back, learned)

    small = quantize.settle(learned)
    assert all(x.bits == 2 for x in jax.tree.leaves(small, is_leaf=is_leaf) if isinstance(x, Quantized))
    with watch() as hits:
        out = jax.jit(apply)(small, x)
    assert hits[("Quantized", "dot_general", "rule")] == 2
    np.testing.assert_allclose(out, apply(learned, x), rtol=1e-4, atol=1e-4)
    assert set(np.unique(small["a"]["kernel"].codes())) == {-2, -1, 0, 1}


@pytest.mark.slow
def test_convolutions_transposes_lookups_groups_and_stacks(rng):
    """Wherever a weight goes, what is trained is what the integers compute."""
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 4)), jnp.float32)
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 4, 4)), jnp.float32),
        "turned": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
        "grouped": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
        "stack": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32),
        "table": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32),
    }

    def fn(p, x):
        y = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jnp.tanh(y) @ p["turned"].T.astype(jnp.float32) @ p["grouped"]
        y = lax.scan(lambda y, w: (jnp.tanh(y) @ w, None), y, p["stack"])[0]
        return y + p["table"][jnp.asarray([3])]

    rules = [
        ("conv", Affine(4, activation_bits=8)),
        ("turned", Affine(3, axes=(0,), activation_bits=8)),
        ("grouped", Affine(8, group=(0, 2), activation_bits=16)),
        ("stack", Affine(8, axes=(0, -1), activation_bits=8)),
        ("table", Affine(8, axes=(0,))),
    ]

    ranges = quantize.input_ranges(fn, params, [x], rules)
    assert ranges["stack"].high.shape == (3,)
    learned = quantize.learn(params, rules, ranges)
    run = jax.jit(compressed(fn, strict=True))
    np.testing.assert_allclose(run(learned, x), run(quantize.settle(learned), x), rtol=1e-4, atol=1e-4)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(compressed(fn)(p, x) ** 2)))(learned)
    for g in jax.tree.leaves(grads):
        assert np.all(np.isfinite(g)) and np.any(g != 0)


@pytest.mark.parametrize("rule", [Affine(3), quantize.Ternary()], ids=["steps", "ternary"])
def test_what_stacked_layers_share_is_learned_as_it_is_settled(rule, rng):
    """One step, or one threshold, for layers of different size that a scan slices."""
    size = jnp.asarray([1.0, 0.7, 0.5]).reshape(3, 1, 1)
    weight, x = size * jnp.asarray(rng.normal(size=(3, 8, 8))), jnp.asarray(rng.normal(size=(4, 8)))
    learned = quantize.learn({"w": weight}, {"w": rule})
    layers = compressed(lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0])
    np.testing.assert_allclose(layers(learned, x), layers(quantize.settle(learned), x), rtol=1e-5, atol=1e-6)
    slopes = jax.jit(jax.grad(lambda p: jnp.sum(layers(p, x))))(learned)
    assert jax.tree.map(jnp.shape, slopes) == jax.tree.map(jnp.shape, learned)
    assert all(bool(jnp.any(slope != 0)) for slope in jax.tree.leaves(slopes))


def test_linen_nnx_and_a_plain_function_are_the_same_beside_a_float_teacher(rng):
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(5, 6), (6, 3)])
    params, rules = {"kernel": kernel, "bias": jnp.ones(3)}, {"kernel$": Affine(3, activation_bits=3)}
    learned = quantize.learn(params, rules, {"kernel": Range(np.float32(-1), np.float32(1))})
    module = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    apply, _, rest = jaxcompress.nnx.functional(module)
    layer = nn.Dense(3)

    @jax.jit
    def run(learned, params, x):
        plain = compressed(lambda p, x: x @ p["kernel"] + p["bias"])(learned, x)
        linen = compressed(layer.apply)({"params": learned}, x)
        teacher = layer.apply({"params": params}, x)
        return plain, linen, compressed(apply)(learned, rest, x)[0], teacher

    plain, linen, functional, teacher = run(learned, params, x)
    np.testing.assert_allclose(linen, plain, rtol=1e-6)
    np.testing.assert_allclose(functional, plain, rtol=1e-6)
    np.testing.assert_allclose(teacher, x @ kernel + 1, rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(teacher - plain))) > 0.1


def test_zero_weights_and_steps_that_cross_zero():
    params = {"w": jnp.zeros((3, 2))}
    learned = quantize.learn(params, {"w": Affine(4, activation_bits=4)}, {"w": Range(np.float32(0), np.float32(0))})
    value, grads = jax.value_and_grad(compressed(lambda p: jnp.sum((jnp.ones((1, 3)) @ p["w"]) ** 2)))(learned)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    negative = jax.tree.map(lambda x: -x, learned)
    assert np.all(np.isfinite(quantize.settle(negative)["w"].scale))


def test_refuses():
    params = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="'lsq', 'pact' or None"):
        quantize.learn(params, {"w": Affine()}, inputs="ema")
    with pytest.raises(TypeError, match="'w': steps are learned of an Affine grid"):
        quantize.learn(params, {"w": quantize.Binary()})
    with pytest.raises(TypeError, match="'w' is a Quantized already"):
        quantize.learn(quantize.convert(params, {"w": Affine()}), {"w": Affine()})
    with pytest.raises(ValueError, match="cannot quantize 'w'"):
        quantize.learn({"w": jnp.full((2, 2), jnp.nan)}, {"w": Affine()})
    with pytest.raises(ValueError, match=r"none for \['w'\]"):
        quantize.learn(params, {"w": Affine(activation_bits=8)}, {})
