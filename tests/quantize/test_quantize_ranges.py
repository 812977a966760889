"""Ranges of inputs: what is seen, through which transformations, and what each method makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import calibrate, quantize
from jaxcompress.quantize import Affine, Entropy, LeastSquares, MinMax, Percentile

SPEC = Affine(8, activation_bits=8)


def ranges_of(x, method, *, symmetric=False, bits=8):
    """The range of what a single product sees."""
    rules = {"w": Affine(8, activation_bits=bits)}
    batches = [jnp.asarray(part, jnp.float32).reshape(-1, 1) for part in np.split(np.asarray(x), 2)]
    found = quantize.input_ranges(
        lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}, batches, rules, method, symmetric=symmetric
    )
    return float(found["w"].low), float(found["w"].high)


def test_range_of_all_batches_and_its_average():
    x = [0.5, -1.0, 2.0, 3.0, -4.0, 1.0]
    assert ranges_of(x, MinMax()) == (-4.0, 3.0)
    assert ranges_of(x, MinMax(), symmetric=True) == (-4.0, 4.0)
    np.testing.assert_allclose(ranges_of(x, MinMax(momentum=0.9)), (-0.9 - 0.4, 0.9 * 2.0 + 0.1 * 3.0), rtol=1e-6)
    assert ranges_of([1.0, 2.0], MinMax()) == (0.0, 2.0)  # zero is always among what the integers cover
    assert ranges_of([0.0, 0.0], LeastSquares()) == (0.0, 0.0)


def test_percentiles(rng):
    x = rng.normal(size=4000)
    low, high = ranges_of(x, Percentile(98))
    np.testing.assert_allclose([np.mean(x < low), np.mean(x > high)], 0.01, atol=0.001)
    low, high = ranges_of(x, Percentile(98), symmetric=True)
    assert low == -high
    np.testing.assert_allclose(np.mean(np.abs(x) > high), 0.02, atol=0.001)
    assert ranges_of(np.abs(x), Percentile(98))[0] == 0


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares_is_the_best_clipping_of_the_values_themselves(bits, symmetric, rng):
    """Against a brute-force search on the values, with rounding written down a second time."""
    x = np.float32(rng.laplace(size=2000))
    x = x if symmetric else np.abs(x) - np.float32(0.3)

    def error(low, high):
        low, high = (-max(-low, high), max(-low, high)) if symmetric else (low, high)
        step = (high - low) / (2**bits - (2 if symmetric else 1))
        codes = (
            np.round((np.clip(x, low, high) - low) / step) if not symmetric else np.round(np.clip(x, low, high) / step)
        )
        zero = np.round(-low / step) if not symmetric else 0
        if not symmetric:
            codes = np.clip(np.round(x / step) + zero, 0, 2**bits - 1)
        return np.mean(((codes - zero) * step - x) ** 2)

    best = min(error(t * x.min(), t * x.max()) for t in np.linspace(0.01, 1, 400))
    assert error(*ranges_of(x, LeastSquares(), symmetric=symmetric, bits=bits)) <= 1.03 * best
    if bits < 8:
        assert error(x.min(), x.max()) > 1.1 * best  # there was something to find


def test_entropy_clips_what_is_rare_and_keeps_what_is_even(rng):
    """Migacz's cases: a long thin tail is given up, an even distribution is not."""
    x = np.concatenate([rng.normal(size=20_000), [40.0, -40.0]])
    low, high = ranges_of(x, Entropy(), symmetric=True)
    assert 2.5 < high < 20 and low == -high
    even = rng.uniform(-1, 1, size=200_000)
    assert ranges_of(even, Entropy(), symmetric=True)[1] > 0.95


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_does_not_give_up_what_a_rectifier_lets_through(rng, symmetric):
    """Half of all values are zeros, which any range has: they are no reason for a short one."""
    x = np.maximum(rng.normal(size=20_000), 0)
    assert ranges_of(x, Entropy(), symmetric=symmetric)[1] > 3
    assert ranges_of(x, Entropy(count_zeros=True), symmetric=symmetric)[1] < 2.5
    mostly = np.where(rng.random(20_000) < 0.8, 0, rng.normal(size=20_000))
    assert ranges_of(mostly, Entropy(), symmetric=symmetric)[1] > 3


def test_histograms_are_those_of_numpy_wherever_the_product_stands(rng):
    """Under jit, remat, scan (sliced and not), cond, vmap and on a sharded batch; of several uses together."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = rng.normal(size=(16, 4)).astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    names = ["jit", "remat", "scan", "cond", "vmap", "twice", "transposed"]
    params = {name: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for name in names}
    params["stack"] = jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32)

    def fn(p, x):
        x = jax.jit(jnp.matmul)(x, p["jit"])
        x = jax.checkpoint(jnp.matmul)(jnp.tanh(x), p["remat"])
        x = lax.scan(lambda x, _: (jnp.tanh(x @ p["scan"]), None), jnp.tanh(x), length=3)[0]
        x = lax.cond(jnp.sum(x) > -1e9, lambda x: x @ p["cond"], lambda x: 2 * x @ p["cond"], x)
        x = jax.vmap(lambda row: jnp.tanh(row) @ p["vmap"])(x)
        x = jnp.round(x) @ p["twice"] + jnp.sin(x) @ p["twice"]  # what has no derivative, too
        x = (p["transposed"].T @ jnp.tanh(x).T).T
        return lax.scan(lambda x, w: (jnp.tanh(x) @ w, None), x, p["stack"])[0]

    seen = {name: [] for name in params}

    def note(name, x, w):
        seen[name].append(np.asarray(x))
        return x @ np.asarray(w)

    w = params
    y = np.tanh(note("jit", x, w["jit"]))
    y = np.tanh(note("remat", y, w["remat"]))
    for _ in range(3):
        y = np.tanh(note("scan", y, w["scan"]))
    y = note("cond", y, w["cond"])
    y = note("vmap", np.tanh(y), w["vmap"])
    y = note("twice", np.round(y), w["twice"]) + note("twice", np.sin(y), w["twice"])
    y = note("transposed", np.tanh(y), w["transposed"])
    for i in range(2):
        y = note("stack", np.tanh(y), w["stack"][i])

    found = calibrate.input_values(fn, params, [sharded, sharded], [("", True)], bins=50)
    for name, values in found.items():
        for layer in range(2) if name == "stack" else [()]:
            each = seen[name][layer] if name == "stack" else np.concatenate(seen[name])
            counts, bounds = values.counts[layer], values.bounds[layer]
            np.testing.assert_allclose(bounds, [min(each.min(), 0), max(each.max(), 0)], rtol=1e-4)
            expected, _ = np.histogram(each, 50, tuple(bounds))
            assert counts.sum() == 2 * each.size
            assert np.abs(counts - 2 * expected).sum() <= 8  # what rounding moved over an edge


def test_one_batch_is_not_batches():
    """Its rows would pass for batches, and give other ranges, or steps, without a word."""
    params, x, pairs = {"a": jnp.eye(3), "b": jnp.eye(3)}, jnp.ones((2, 3)), [(["a"], ["b"])]
    small = quantize.convert(params, {"a": SPEC})

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    for call in (
        lambda: quantize.input_ranges(fn, params, x, {"a": SPEC}),
        lambda: quantize.layer_costs(fn, params, x, {"a": True}, {"4": SPEC}),
        lambda: quantize.smooth(fn, params, x, pairs),
        lambda: quantize.awq(fn, params, x, {"b": SPEC}, pairs),
        lambda: quantize.gptq(fn, params, x, {"a": SPEC}),
        lambda: quantize.correct_biases(fn, params, small, x),
    ):
        with pytest.raises(TypeError, match=r"batches must be several"):
            call()


def test_refuses(rng):
    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))

    def product(p, x):
        return x @ p["w"]

    for fn, batches, message in [
        (product, [], "no batches"),
        (product, [jnp.full((2, 3), jnp.nan)], "not finite"),
        (lambda p, x: x + p["w"][0], [x], "meets no floating-point input"),
        (lambda p, x: lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c @ p["w"], x), [x], "while_loop"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize.input_ranges(fn, {"w": w}, batches, {"w": SPEC})
    with pytest.raises(ValueError, match="not an iterator"):
        quantize.input_ranges(product, {"w": w}, iter([x]), {"w": SPEC}, Percentile())
    with pytest.raises(ValueError, match="even number of bins"):
        quantize.input_ranges(product, {"w": w}, [x], {"w": SPEC}, LeastSquares(bins=255))
    for wrong in ({"fractions": 0}, {"bins": 0}):
        with pytest.raises(ValueError, match="at least 2 bins, of at least 1 fraction"):
            LeastSquares(**wrong)
    for make in (lambda: LeastSquares(bins=2.5), lambda: Percentile("99"), lambda: quantize.MinMax("0.9")):
        with pytest.raises(TypeError, match="must be a"):
            make()
    for method in (quantize.MinMax, "minmax"):
        with pytest.raises(TypeError, match=r"method is MinMax\(\), "):
            quantize.input_ranges(product, {"w": w}, [x], {"w": SPEC}, method)
    for percent, bins in ((0, 2048), (0.999, 2048), (99, 0)):
        with pytest.raises(ValueError, match="percent"):
            Percentile(percent, bins)
