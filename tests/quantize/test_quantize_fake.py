"""Fake quantization in unmodified models: what it rounds, what it leaves alone, and that integers follow it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import quantize
from jaxcompress.arrays import compressed, dense, watch
from jaxcompress.paths import UnmatchedRuleError

SPEC = quantize.Affine(bits=8, activation_bits=8)
RULES = (("kernel$", SPEC),)


def rounded(w, bits=8, axis=0):
    """Symmetric rounding, written down a second time, in NumPy and float64."""
    limit = 2 ** (bits - 1) - 1
    w = np.float64(w)
    step = np.max(np.abs(w), axis=axis, keepdims=True) / limit
    return np.round(w / step) * step


def test_a_product_by_hand(rng):
    x, w = rng.normal(size=(5, 7)), rng.normal(size=(7, 3))
    fake = quantize.fake(lambda p, x: x @ p["kernel"], RULES)
    expected = rounded(x, axis=1) @ rounded(w, axis=0)  # a step a row of inputs, a step a column of weights
    np.testing.assert_allclose(fake({"kernel": jnp.float32(w)}, jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: jnp.dot(x, w),
        lambda x, w: jnp.einsum("bi,io->bo", x, w),
        lambda x, w: (w.T @ x.T).T,
        lambda x, w: jax.jit(jnp.matmul)(x, w),
        lambda x, w: jax.checkpoint(lambda x, w: x @ w)(x, w),
        lambda x, w: jax.lax.scan(lambda c, _: (c, x @ w), 0, None, length=1)[1][0],
        lambda x, w: jnp.tensordot(x.reshape(5, 2, 4), w.reshape(2, 4, 3), 2),
    ],
    ids=["@", "dot", "einsum", "transposed", "a user's jit", "remat", "scan", "reshaped"],
)
def test_every_way_to_multiply(product, rng):
    x, w = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32), jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    out = quantize.fake(lambda p, x: product(x, p["kernel"]), RULES)({"kernel": w}, x)
    np.testing.assert_allclose(out, rounded(x, axis=1) @ rounded(w, axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [8, None])
def test_integers_compute_what_training_rounded_to(bits, activation_bits, net):
    """The converted model in integers equals the fake-quantized one in floats, layer by layer, from the same inputs."""
    model, variables, x = net
    rules = {"kernel$": quantize.Affine(bits, activation_bits=activation_bits)}
    run = jax.jit(compressed(model.apply, strict=True))
    with watch() as hits:
        out = run(quantize.convert(variables, rules), x)
    assert hits[("Quantized", "dot_general", "rule")] == 2
    assert hits[("Quantized", "conv_general_dilated", "rule")] == 1
    np.testing.assert_allclose(out, quantize.fake(model.apply, rules)(variables, x), rtol=1e-4, atol=1e-4)


def _convolved(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("grid", "product", "shapes"),
    [
        ({"axes": (0, -1)}, jnp.matmul, ((5, 12), (12, 9))),  # scales that no product can be scaled by afterwards
        ({"axes": (0,), "group": (-1, 4)}, jnp.matmul, ((5, 12), (12, 9))),
        ({"axes": (), "group": (-1, 4)}, jnp.matmul, ((5, 12), (12, 9))),
        ({"axes": (), "group": (0, 5)}, lambda x, w: x @ w.T, ((5, 9), (12, 9))),
        ({"axes": (-1,), "group": (2, 3)}, _convolved, ((2, 4, 4, 8), (3, 3, 8, 6))),
        ({"axes": (2,)}, _convolved, ((2, 4, 4, 8), (3, 3, 8, 6))),
    ],
)
def test_inputs_are_rounded_where_the_weight_becomes_dense_too(grid, product, shapes, rng):
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    spec = quantize.Affine(4, activation_bits=3, **grid)
    small = quantize.convert({"w": w}, {"w": spec})["w"]
    wanted = quantize.fake(lambda p: product(x, p["w"]), {"w": spec})({"w": w})
    np.testing.assert_allclose(compressed(product)(x, small), wanted, rtol=1e-4, atol=1e-4)
    assert float(jnp.max(jnp.abs(wanted - product(x, dense(small))))) > 0.1


def test_integer_products_are_exact(rng):
    """Against an oracle in int64: the codes of the input times those of the weight, and nothing rounded between."""
    x, w = jnp.asarray(rng.normal(size=(6, 300)), jnp.float32), jnp.asarray(rng.normal(size=(300, 5)), jnp.float32)
    q = quantize.quantize(w, SPEC)
    step = np.max(np.abs(x), axis=1, keepdims=True) / np.float32(127)
    codes = np.clip(np.round(np.asarray(x) / step), -127, 127).astype(np.int64)
    sums = codes @ np.asarray(q.codes(), np.int64)
    out = jax.jit(compressed(lambda w, x: x @ w, strict=True))(q, x)
    np.testing.assert_allclose(out, sums * step.astype(np.float64) * np.asarray(q.scale, np.float64), rtol=1e-6)
    text = jax.jit(compressed(lambda w, x: x @ w)).lower(q, x).as_text()
    assert "xi8>, tensor<300x5xi8>) -> tensor<6x5xi32>" in text


def test_a_float_teacher_and_a_quantized_student_do_not_touch_each_other(net):
    """One process, one trace: the same module, user-jitted, with and without fake quantization."""
    model, variables, x = net
    apply = jax.jit(model.apply)
    before = apply(variables, x)

    @jax.jit
    def both(variables, x):
        student = quantize.fake(apply, RULES)(variables, x)
        return student, apply(variables, x)

    student, teacher = both(variables, x)
    np.testing.assert_allclose(teacher, before, rtol=1e-6)
    np.testing.assert_array_equal(apply(variables, x), before)
    assert float(jnp.max(jnp.abs(student - teacher))) > 1e-3


def test_no_way_to_use_a_weight_lets_teacher_and_student_touch(rng):
    """In one trace, the same function twice: the student is what its rounded weights make, the teacher is as it was."""
    helper = jax.jit(lambda x, w: jnp.tanh(x @ w))  # of the user, traced before either runs

    def fn(p, tokens):
        x = p["table"][tokens]  # looked up here, and a product at the end: tied
        x = x + x @ p["a"] + jnp.dot(x, p["b"]) + helper(x, p["c"])  # a to d are of one shape
        x = x + x @ (p["gain"] * p["d"] / jnp.linalg.norm(p["d"], axis=0))  # weight norm

        def cell(h, x):
            return jnp.tanh(h @ p["state"] + x @ p["input"]), h

        h, _ = jax.lax.scan(cell, jnp.zeros(x.shape[1:]), x)
        return h @ p["table"].T

    shapes = {name: (6, 6) for name in ("a", "b", "c", "d", "state", "input")} | {"table": (9, 6), "gain": (6,)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for name, shape in shapes.items()}
    tokens = jnp.asarray(rng.integers(0, 9, (4, 3)))
    helper(jnp.ones((3, 6)), params["c"])
    wanted = jax.jit(fn)(params, tokens)
    rules = {"^(a|c|d|state|table)$": quantize.Affine(3, axes=())}

    @jax.jit
    def both(params, tokens):
        student = quantize.fake(fn, rules)
        gradient = jax.grad(lambda p: jnp.sum(student(p, tokens) * fn(params, tokens)))(params)
        return fn(params, tokens), student(params, tokens), fn(params, tokens), gradient

    before, student, after, gradient = both(params, tokens)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(before, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(fn)(params, tokens), wanted)
    np.testing.assert_allclose(student, fn(dense(quantize.convert(params, rules)), tokens), rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(student - before))) > 1e-2
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(gradient))


def test_two_weights_of_one_shape_are_told_apart():
    params = {"a": jnp.asarray([[0.3, 0.7], [0.123, 1.0]]), "b": jnp.asarray([[0.3, 0.7], [0.123, 1.0]])}
    out = quantize.fake(lambda p: (p["a"], p["b"]), [("^a$", quantize.Affine(2))])(params)
    assert not np.allclose(out[0], params["a"]) and np.array_equal(out[1], params["b"])


def test_tied_embedding(rng):
    """The table is on its grid at both ends; only the product rounds its input."""
    embed = nn.Embed(12, 6)
    variables = jax.jit(embed.init)(jax.random.key(0), jnp.zeros(1, jnp.int32))
    rules = {"embedding$": quantize.Affine(8, axes=(0,), activation_bits=8)}
    table = rounded(variables["params"]["embedding"], axis=1)
    looked_up = quantize.fake(embed.apply, rules)(variables, jnp.arange(12))
    np.testing.assert_allclose(looked_up, table, rtol=1e-5, atol=1e-6)
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    attended = quantize.fake(lambda v, x: embed.apply(v, x, method="attend"), rules)(variables, x)
    np.testing.assert_allclose(attended, rounded(x, axis=1) @ table.T, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recurrent_cell(rng):
    """The same weight in every step of a scan, rounded once and the same."""
    model, x = nn.RNN(nn.LSTMCell(6)), jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rules = {"kernel$": SPEC}
    got = quantize.fake(model.apply, rules)(variables, x)
    integers = jax.jit(compressed(model.apply, strict=True))(quantize.convert(variables, rules), x)
    np.testing.assert_allclose(got, integers, rtol=1e-4, atol=1e-4)


def test_gradients_reach_float_parameters_and_training_works(net):
    model, variables, x = net
    tx = optax.adam(1e-2)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    labels = jnp.arange(4)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply({"params": params, **rest}, x), labels
        ).mean()

    fake_loss = quantize.fake(loss, {"kernel$": quantize.Affine(4, activation_bits=8)})
    first, state = float(fake_loss(params)), tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(fake_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert jax.tree.structure(params) == jax.tree.structure(variables["params"])
    assert float(fake_loss(params)) < 0.1 * first


def test_zero_inputs_and_empty_scales_are_finite():
    fake = quantize.fake(lambda p, x: jnp.sum(x @ p["kernel"]), RULES)
    for x in (jnp.zeros((1, 4)), jnp.full((1, 4), 1e30)):
        value, grad = jax.value_and_grad(fake)({"kernel": jnp.zeros((4, 3))}, x)
        assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(grad["kernel"])))


@pytest.mark.parametrize("grid", [quantize.Affine(8, activation_bits=8), quantize.Floats(inputs="float8_e4m3fn")])
def test_inputs_that_are_not_finite_are_not_rounded_to_numbers(grid):
    """A run that diverges must be seen to; other rows are as they were."""
    params, x = {"w": jnp.eye(4)}, jnp.ones((3, 4)).at[0, 1].set(jnp.nan).at[1, 1].set(jnp.inf)
    for out in (
        quantize.fake(lambda p, x: x @ p["w"], {"w": grid})(params, x),
        compressed(lambda p, x: x @ p["w"])(quantize.convert(params, {"w": grid}), x),
    ):
        assert jnp.all(jnp.isnan(out[0])) and not jnp.any(jnp.isfinite(out[1, 1]))
        np.testing.assert_allclose(out[2], 1.0, rtol=1e-6)


def test_refuses(net):
    model, variables, x = net
    with pytest.raises(UnmatchedRuleError, match=r"nearest paths: .*Conv_0/kernel"):
        quantize.fake(model.apply, {"Conv_0/kernels": SPEC})(variables, x)
    with pytest.raises(TypeError, match="compressed already"):
        quantize.fake(model.apply, RULES)(quantize.convert(variables, RULES), x)
    with pytest.raises(TypeError, match=r"cannot quantize '.*kernel': want a scheme"):
        quantize.fake(model.apply, {"kernel$": 8})(variables, x)
    with pytest.raises(ValueError, match=r"cannot quantize '.*kernel': axis 7"):
        quantize.fake(model.apply, {"kernel$": quantize.Affine(axes=(7,))})(variables, x)
    with pytest.raises(TypeError, match=r"cannot quantize 'w': it is of int32"):
        quantize.fake(lambda p: p["w"], {"w": SPEC})({"w": jnp.arange(3)})
    with pytest.raises(TypeError, match="first positional"):
        quantize.fake(model.apply, RULES)()


def test_codebooks_of_a_host_are_not_faked(net):
    model, variables, x = net
    faked = jax.jit(quantize.fake(model.apply, {"kernel$": quantize.KMeans(4)}))
    with pytest.raises(TypeError, match=r"quantize '.*kernel': .*outside of jit and `fake`, and train the values"):
        faked(variables, x)
