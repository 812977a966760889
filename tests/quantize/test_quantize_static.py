"""Inputs on grids that are known beforehand: integers against an oracle, and training under the same integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxcompress.nnx
from jaxcompress import quantize
from jaxcompress.arrays import _tiles, compressed, watch
from jaxcompress.quantize import Affine, MinMax, Range

RULES = {"kernel$": Affine(8, activation_bits=8)}


def oracle(x, low, high, bits=8):
    """Codes less their zero point, and the step, in float64 NumPy: written down a second time."""
    top = 2 ** (bits - 1) - 1
    x = np.asarray(x, np.float32)
    if low == -high:
        step = np.float32(high / top)
        return np.clip(np.round(x / step), -top, top).astype(np.int64), float(step)
    step = np.float32((high - low) / (2**bits - 1))
    zero = np.round(-top - 1 - low / float(step))
    return (np.clip(np.round(x / step) + zero, -top - 1, top) - zero).astype(np.int64), float(step)


RANGES = {"symmetric": Range(np.float32(-2.0), np.float32(2.0)), "asymmetric": Range(np.float32(-0.6), np.float32(2.5))}


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("asymmetric", 8),
        pytest.param("asymmetric", 16, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("symmetric", 8), ("symmetric", 16), ("asymmetric", 4)]
        ),
    ],
)
def test_products_are_exact(kind, bits, rng):
    """Every product against int64: what is clipped, what has a zero point, what is packed, batched, grouped."""
    low_high = RANGES[kind]
    x = jnp.asarray(rng.normal(size=(6, 300)) * 1.5, jnp.float32)
    w = jnp.asarray(rng.normal(size=(300, 6)), jnp.float32)
    codes, step = oracle(x, *map(float, low_high), bits)
    cases = {
        "x @ w": (Affine(8, activation_bits=bits), lambda w, x: x @ w),
        "w.T @ x.T": (Affine(4, activation_bits=bits), lambda w, x: (w.T @ x.T).T),
        "batched": (
            Affine(8, activation_bits=bits),
            lambda w, x: jnp.einsum("bki,kio->bo", x.reshape(6, 3, 100), w.reshape(3, 100, 6)),
        ),
        "grouped": (Affine(8, group=(0, 70), activation_bits=bits), lambda w, x: x @ w),
        "asymmetric weights": (Affine(8, symmetric=False, activation_bits=bits), lambda w, x: x @ w),
    }

    @jax.jit
    def all_of(leaves, x):
        return {name: compressed(fn, strict=True)(leaves[name], x) for name, (_, fn) in cases.items()}

    leaves = {
        name: quantize.static({"w": quantize.quantize(w, spec)}, {"w": low_high})["w"]
        for name, (spec, _) in cases.items()
    }
    for name, out in all_of(leaves, x).items():
        q = leaves[name]
        if name == "grouped":
            scale = np.asarray(q.scale, np.float64)
            sums = [codes[:, i : i + 70] @ np.asarray(q.codes(), np.int64)[i : i + 70] for i in range(0, 300, 70)]
            expected = sum(s * scale[g] for g, s in enumerate(sums)) * step
        else:
            expected = (codes @ np.asarray(q.centred(jnp.int32), np.int64)) * step * np.asarray(q.scale, np.float64)
        np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-4 if "weights" in name or "grouped" in name else 0)


def test_a_zero_point_of_16_bits_leaves_no_sum_of_integers_too_large(rng):
    """All weights near the largest: their sum times such a zero point is beyond int32."""
    x = jnp.asarray(np.abs(rng.normal(size=(5, 2048))), jnp.float32)
    w = quantize.convert({"w": jnp.full((2048, 3), 0.5)}, {"w": Affine(8, activation_bits=16)})
    w = quantize.static(w, {"w": Range(np.float32(0), np.float32(4))})["w"]
    codes, step = oracle(x, 0.0, 4.0, 16)
    expected = (codes @ np.asarray(w.codes(), np.int64)) * step * np.asarray(w.scale, np.float64)
    np.testing.assert_allclose(jax.jit(compressed(jnp.matmul, strict=True))(x, w), expected, rtol=1e-6)


@pytest.mark.parametrize(("kind", "groups"), [("asymmetric", 2), pytest.param("symmetric", 1, marks=pytest.mark.slow)])
def test_convolutions_are_exact_at_the_border_too(kind, groups, rng):
    low_high = RANGES[kind]
    x = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    w = jnp.asarray(rng.normal(size=(3, 3, 4 // groups, 6)), jnp.float32)
    q = quantize.static({"w": quantize.quantize(w, Affine(8, activation_bits=8))}, {"w": low_high})["w"]

    def convolve(w, x):
        return lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    run = jax.jit(compressed(convolve, strict=True))
    codes, step = oracle(x, *map(float, low_high))
    padded = np.pad(codes, [(0, 0), (1, 1), (1, 1), (0, 0)])  # of what is less its zero point
    weight = np.asarray(q.codes(), np.int64)
    sums = np.zeros((2, 3, 6, 6), np.int64)
    for i in range(3):
        for j in range(6):
            for o in range(6):
                channels = slice(o // (6 // groups) * (4 // groups), (o // (6 // groups) + 1) * (4 // groups))
                patch = padded[:, 2 * i : 2 * i + 3, j : j + 3, channels]
                sums[:, i, j, o] = np.sum(patch * weight[None, ..., o], axis=(1, 2, 3))
    scale = np.asarray(q.scale, np.float64).reshape(-1)
    np.testing.assert_allclose(run(q, x), sums * step * scale, rtol=1e-6)
    assert "xi8>" in run.lower(q, x).as_text() and "f32>, tensor<3x3" not in run.lower(q, x).as_text()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x)).reshape(x.shape[0], 6, -1)
        x = nn.RNN(nn.GRUCell(5))(x)
        x = nn.relu(nn.DenseGeneral((2, 3), axis=(-2, -1))(x))
        return nn.DenseGeneral(4, axis=(-2, -1))(x)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_training_rounds_to_what_integers_compute(symmetric, rng):
    """A network of convolution, recurrence and kernels of rank 3; static, with fake quantization in float."""
    batches = [jnp.asarray(rng.normal(size=(4, 6, 4, 2)), jnp.float32) for _ in range(2)]
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), batches[0])
    ranges = quantize.input_ranges(model.apply, variables, batches, RULES, symmetric=symmetric)
    assert len(ranges) == 1 + 6 + 2
    if not symmetric:  # behind rectifiers nothing is negative, and all integers are used
        assert ranges["DenseGeneral_1/kernel"].low == 0 < ranges["DenseGeneral_1/kernel"].high
    small = quantize.static(quantize.convert(variables, RULES), ranges)
    with watch() as hits:
        out = jax.jit(compressed(model.apply, strict=True))(small, batches[0])
    assert sum(n for (_, name, how), n in hits.items() if how == "rule" and name.startswith(("dot", "conv"))) >= 9
    faked = jax.jit(quantize.fake(model.apply, RULES, ranges))(variables, batches[0])
    np.testing.assert_allclose(out, faked, rtol=1e-4, atol=1e-5)
    dynamic = compressed(model.apply)(quantize.convert(variables, RULES), batches[0])
    assert not np.allclose(out, dynamic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(Affine(4, symmetric=False, activation_bits=8), id="zero points", marks=pytest.mark.slow),
        pytest.param(Affine(4, group=(0, 8), activation_bits=8), id="groups"),
        pytest.param(Affine(4, activation_bits=16), id="16-bit inputs", marks=pytest.mark.slow),
    ],
)
def test_tiles_give_the_same_sums(spec, rng, monkeypatch):
    """Decoded tile by tile, as on a single CPU, and all at once: with a zero point, and a step of whole rows."""
    x = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    plain = {"w": quantize.quantize(jnp.asarray(rng.normal(size=(64, 48)), jnp.float32), spec)}
    leaves = {"static": quantize.static(plain, {"w": RANGES["asymmetric"]}), "dynamic": plain}

    def run(leaves, x):
        return {name: compressed(lambda p: x @ p["w"], strict=True)(leaf) for name, leaf in leaves.items()}

    whole = jax.jit(lambda leaves, x: run(leaves, x))(leaves, x)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for name, size in {"TILE": 256, "WIDTH": 16, "WORTH": 1024, "SMALL": 1024}.items():
        monkeypatch.setattr(_tiles, name, size)
    tiled = jax.jit(lambda leaves, x: run(leaves, x))
    assert "scan[" in str(jax.make_jaxpr(tiled)(leaves, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), tiled(leaves, x), whole)


@pytest.mark.parametrize("low_high", [None, RANGES["asymmetric"]], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "spec",
    [
        Affine(8, activation_bits=8),
        Affine(4, activation_bits=8),
        Affine(4, group=(0, 8), activation_bits=8),
        Affine(8, symmetric=False, activation_bits=16),
    ],
    ids=["8", "4", "groups", "zero points"],
)
def test_derivatives_of_integers_are_those_of_training(spec, low_high, rng):
    """Straight through the rounding, nothing where inputs are clipped; of products and of convolutions."""
    w = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(5, 64)) * 2, jnp.float32)
    ranges = None if low_high is None else {"w": low_high}

    def conv(w, x):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def check(fn, w, x):
        small = quantize.convert({"w": w}, {"w": spec})
        small = small if ranges is None else quantize.static(small, ranges)
        faked = quantize.fake(lambda p, x: fn(p["w"], x), {"w": spec}, ranges)
        upstream = jnp.asarray(rng.normal(size=fn(w, x).shape), jnp.float32)
        integers = jax.jit(jax.grad(lambda x: jnp.sum(compressed(fn)(small["w"], x) * upstream)))(x)
        training = jax.grad(lambda x: jnp.sum(faked({"w": w}, x) * upstream))(x)
        np.testing.assert_allclose(integers, training, rtol=1e-4, atol=1e-4)
        assert (training == 0).any() == (low_high is not None)

    check(lambda w, x: x @ w, w, x)
    if spec.group is None:
        check(conv, w.reshape(4, 4, 4, 48), x.reshape(5, 4, 4, 4))


def test_the_codes_of_training_and_of_integers_are_equal(rng):
    x = jnp.asarray(rng.normal(size=(50, 40)) * 2, jnp.float32)
    for low_high in RANGES.values():
        q = quantize.static({"w": quantize.quantize(jnp.eye(40), RULES["kernel$"])}, {"w": low_high})["w"]
        rules = {"w": Affine(8, activation_bits=8)}
        rounded = quantize.fake(lambda p, x: x @ p["w"], rules, {"w": low_high})({"w": jnp.eye(40)}, x)
        integers = compressed(lambda w, x: x @ w)(q, x)
        codes, step = oracle(x, *map(float, low_high))
        np.testing.assert_array_equal(np.round(np.float64(rounded) / step), codes)
        np.testing.assert_array_equal(np.round(np.float64(integers) / step), codes)


def test_layer_by_layer_training_and_integers_have_the_sums_of_an_integer_oracle(rng):
    """From the inputs that each layer has in training: int64 sums of codes, and what both make of them."""

    def layer(name, w, x):
        if name == "conv":
            return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x.reshape(x.shape[0], -1) @ w

    def network(p, x):
        inputs, outputs = {}, {}
        for name, w in p.items():
            inputs[name], outputs[name] = x, layer(name, w, x)
            x = jax.nn.relu(outputs[name])
        return outputs[name], inputs, outputs

    shapes = {"conv": (3, 3, 2, 5), "hidden": (80, 7), "last": (7, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for name, shape in shapes.items()}
    x, rules = jnp.asarray(rng.normal(size=(6, 4, 4, 2)), jnp.float32), {".*": Affine(8, activation_bits=8)}
    ranges = quantize.input_ranges(lambda p, x: network(p, x)[0], params, [x / 2], rules, symmetric=False)
    small = quantize.static(quantize.convert(params, rules), ranges)

    @jax.jit
    def both(params, small, x):
        _, inputs, outputs = quantize.fake(network, rules, ranges)(params, x)
        rounded = {name: quantize.fake_quantize(w, rules[".*"]) for name, w in params.items()}
        integers = {n: compressed(lambda w, x, n=n: layer(n, w, x), strict=True)(small[n], inputs[n]) for n in params}
        return inputs, outputs, rounded, integers

    inputs, outputs, rounded, integers = both(params, small, x)
    for name, q in small.items():
        weight, scale = np.asarray(q.codes(), np.int64), np.asarray(q.scale, np.float64).reshape(-1)
        np.testing.assert_array_equal(np.round(np.float64(rounded[name]) / scale), weight)
        codes, step = oracle(inputs[name], *map(float, ranges[name]))
        if name == "conv":
            patches = np.lib.stride_tricks.sliding_window_view(
                np.pad(codes, [(0, 0), (1, 1), (1, 1), (0, 0)]), (3, 3), (1, 2)
            )
            sums = np.einsum("nhwcij,ijco->nhwo", patches, weight)
        else:
            sums = codes.reshape(len(codes), -1) @ weight
        np.testing.assert_array_equal(np.round(np.float64(integers[name]) / (step * scale)), sums)
        np.testing.assert_array_equal(np.round(np.float64(outputs[name]) / (step * scale)), sums)
    assert all(np.abs(np.asarray(inputs[n])).max() > float(ranges[n].high) for n in ("conv", "hidden"))  # some clipped


def test_stacked_weights_have_a_range_a_layer(rng):
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4, 4)) * [[[1.0]], [[10.0]], [[0.1]]], jnp.float32)}
    rules = {"kernel$": Affine(8, axes=(0, -1), activation_bits=8)}

    def scanned(p, x):
        return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x) @ w, None)), x, p["kernel"])[0]

    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(x) @ p["kernel"][i]
        return x

    ranges = quantize.input_ranges(scanned, params, [x], rules)
    layers, y = [], np.asarray(x)
    for i in range(3):
        layers.append(np.max(np.abs(np.tanh(y))))
        y = np.tanh(y) @ np.asarray(params["kernel"][i])
    np.testing.assert_allclose(ranges["kernel"].high, layers, rtol=1e-5)
    small = quantize.static(quantize.convert(params, rules), ranges)
    out = jax.jit(compressed(scanned, strict=True))(small, x)
    np.testing.assert_allclose(out, quantize.fake(scanned, rules, ranges)(params, x), rtol=1e-4, atol=1e-4)
    alone = x
    for i in range(3):
        one = {"kernel": quantize.convert({"kernel": params["kernel"][i]}, RULES)["kernel"]}
        one = quantize.static(one, {"kernel": Range(ranges["kernel"].low[i], ranges["kernel"].high[i])})
        alone = compressed(lambda p, x: jnp.tanh(x) @ p["kernel"])(one, alone)
    np.testing.assert_allclose(out, alone, rtol=1e-4, atol=1e-4)


def test_nnx_models_take_ranges_too(rng):
    model, x = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    apply, params, rest = jaxcompress.nnx.functional(model)
    ranges = quantize.input_ranges(lambda p, x: apply(p, rest, x)[0], params, [x], RULES)
    small = quantize.static(quantize.convert(params, RULES), ranges)
    out, _ = compressed(apply, strict=True)(small, rest, x)
    np.testing.assert_allclose(out, model(x), atol=0.05)


def test_what_is_outside_gets_no_gradient():
    low_high = {"w": Range(np.float32(-1.0), np.float32(1.0))}
    fake = quantize.fake(lambda p, x: jnp.sum(x * 3 @ p["w"]), {"w": Affine(8, activation_bits=8)}, low_high)
    grads = jax.grad(fake, argnums=1)({"w": jnp.ones((3, 1))}, jnp.asarray([[0.1, 0.5, -9.0]]))
    np.testing.assert_allclose(grads, [[3.0, 0.0, 0.0]])


def test_refuses(rng):
    params, x = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.ones((2, 4))

    def fn(p, x):
        return x @ p["kernel"] + p["bias"]

    small = quantize.convert(params, RULES)
    good = quantize.input_ranges(fn, params, [x], RULES)
    for ranges, message in [
        ({}, r"none for \['kernel'\]"),
        ({**good, "bias": good["kernel"]}, r"spare for \['bias'\]"),
        ({"kernel": Range(np.float32(1), np.float32(2))}, "must hold zero"),
        ({"kernel": Range(np.float32(0), np.float32(np.inf))}, "no grid for inputs"),
        ({"kernel": Range(np.zeros((2, 2)), np.ones((2, 2)))}, "no grid for inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize.static(small, ranges)
        with pytest.raises(ValueError, match=message):
            quantize.fake(fn, RULES, ranges)(params, x)
    with pytest.raises(ValueError, match="no rule asks for quantized inputs"):
        quantize.input_ranges(fn, params, [x], {"kernel$": Affine(8)})
    with pytest.raises(ValueError, match="momentum"):
        MinMax(momentum=1.0)
