"""Codebooks: the textbook's example, the exact solver against all partitions, and centroids that learn."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import compressed, nbytes, prune, quantize
from jaxcompress.arrays import Codebook
from jaxcompress.quantize._kmeans import assigned, binned, lloyd, optimal, start

TEXTBOOK = jnp.array(
    [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]]
)


def test_the_textbook_example() -> None:
    """Han et al. 2016, figure 3: a 4x4 weight, four centroids, 2 bits an index, 20 bytes instead of 64."""
    leaf = quantize.KMeans(4).convert(TEXTBOOK)
    np.testing.assert_allclose(leaf.centroids.ravel(), [-1.0, 0.0, 1.5, 2.0], atol=1e-6)
    np.testing.assert_array_equal(leaf.codes(), [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]])
    assert leaf.bits == 2 and nbytes(leaf) == 4 + 16 and nbytes(TEXTBOOK) == 64


def test_the_gradient_of_a_centroid_is_the_sum_over_its_cluster() -> None:
    """The same figure: gradients are grouped by the index of their weight, and summed."""
    leaf = quantize.KMeans(4).convert(TEXTBOOK)
    given_gradient = jax.random.normal(jax.random.key(0), (4, 4))
    free, rest = eqx.partition(leaf, eqx.is_inexact_array)
    slope = jax.grad(lambda free: jnp.sum(compressed(jnp.multiply)(eqx.combine(free, rest), given_gradient)))(free)
    want = [np.asarray(given_gradient)[np.asarray(leaf.codes()) == i].sum() for i in range(4)]
    np.testing.assert_allclose(slope.centroids.ravel(), want, rtol=1e-5)


def least(values: np.ndarray, k: int) -> float:
    """The least squared error of k clusters, from all ways to cut the sorted values."""
    values = np.sort(values.astype(np.float64))
    cuts = itertools.combinations(range(1, len(values)), k - 1)
    return min(sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(values, cut)) for cut in cuts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=10), st.integers(2, 4))
def test_the_exact_solver(numbers: list[int], k: int) -> None:
    values = np.array(numbers, np.float32) / 8
    k = min(k, len(values))
    found = np.sort(optimal(binned(values), k)).astype(np.float32)
    error = float(((values - found[assigned(values, found)]) ** 2).sum())
    assert error <= least(values, k) + 1e-5


@pytest.mark.parametrize("k", [7, 16, 200])
def test_bins_lose_little_and_starts_are_no_better(k: int) -> None:
    """4,096 bins against a bin a value; and Lloyd's iterations from the paper's three starts, which only improve."""
    values = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)

    def error(centroids: np.ndarray) -> float:
        return float(
            ((values - centroids.astype(np.float32)[assigned(values, centroids.astype(np.float32))]) ** 2).mean()
        )

    bins = binned(values)
    assert bins.total == values.size and bins.means.size <= 4096
    best = error(optimal(bins, k))
    assert best <= 1.01 * error(optimal(binned(values, bins=20_000), k))
    for how in ("linear", "density", "forgy"):
        first = start(bins, k, how, np.random.default_rng(0))
        after = lloyd(bins, first, 30)
        assert best <= error(after) * 1.001 <= error(first) * 1.01


@pytest.mark.parametrize("k", [2, 31, 33, 256])
def test_assignment_is_to_the_nearest(k: int) -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(size=5000), rng.normal(size=50) * 1e4, [0, 0]]).astype(np.float32)
    centroids = np.sort(rng.normal(size=k)).astype(np.float32)
    distance = np.abs(values[:, None].astype(np.float64) - centroids)
    chosen = distance[np.arange(values.size), assigned(values, centroids)]
    np.testing.assert_allclose(chosen, distance.min(1), rtol=1e-6, atol=1e-7)


def test_counts_are_exact_beyond_what_float32_holds() -> None:
    values = np.full(2**24 + 12_345, 0.5, np.float32)
    values[:5] = 1.0
    bins = binned(values)
    assert bins.counts.tolist() == [2**24 + 12_340, 5] and bins.means.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("axes", [(), (-1,), (0,), (0, -1)])
def test_codebooks_per_layer_and_per_channel(axes: tuple[int, ...]) -> None:
    """Each block by itself is as the block alone."""
    weight = jax.random.normal(jax.random.key(0), (3, 10, 4)) * jnp.array([1.0, 10.0, 0.1, 3.0])
    leaf = quantize.KMeans(4, axes=axes).convert(weight)
    own = {axis % 3 for axis in axes}
    blocks = [n if axis in own else 1 for axis, n in enumerate(weight.shape)]
    assert leaf.shape == weight.shape and leaf.centroids.shape == (*blocks, 4)
    if axes == (-1,):
        alone = quantize.KMeans(4).convert(weight[..., 2])
        np.testing.assert_array_equal(leaf.materialise()[..., 2], alone.materialise())
    everything = quantize.KMeans(4).convert(weight)
    assert jnp.mean((leaf.materialise() - weight) ** 2) <= jnp.mean((everything.materialise() - weight) ** 2) + 1e-9


@pytest.mark.slow
def test_pruned_weights_stay_zero_while_centroids_learn() -> None:
    weight = jax.random.normal(jax.random.key(0), (16, 8))
    weight = jnp.where(prune.choose({"w": jnp.abs(weight)}, {"w": 0.6})["w"], weight, 0.0)
    small = {"w": quantize.KMeans(4, keep_zeros=True).convert(weight)}
    free, rest = eqx.partition(small, eqx.is_inexact_array)
    x, y = jax.random.normal(jax.random.key(1), (32, 16)), jnp.ones((32, 8))

    def loss(free: dict) -> jax.Array:
        return jnp.mean((compressed(lambda tree, x: x @ tree["w"])(eqx.combine(free, rest), x) - y) ** 2)

    tx = optax.sgd(0.1)
    state, before = tx.init(free), float(loss(free))
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(free), state)
        free = optax.apply_updates(free, updates)
    assert loss(free) < before
    np.testing.assert_array_equal(eqx.combine(free, rest)["w"].materialise() == 0, weight == 0)


def test_binary_and_ternary_closed_forms() -> None:
    """XNOR's and ternary networks' scales are the least-squares ones for their signs."""
    weight = jax.random.normal(jax.random.key(0), (50, 3))
    binary = quantize.Binary().convert(weight)
    np.testing.assert_allclose(binary.materialise(), jnp.sign(weight) * jnp.abs(weight).mean(0), rtol=1e-6)
    assert binary.bits == 1 and nbytes(binary) == 50 + 3 * 2 * 4
    plain = quantize.Binary(axes=(), scaled=False).convert(weight)
    np.testing.assert_array_equal(plain.materialise(), jnp.sign(weight))
    ternary = quantize.Ternary().convert(weight)
    kept = np.abs(weight) > 0.7 * np.abs(weight).mean()
    scale = np.abs(weight)[kept].mean()
    np.testing.assert_allclose(ternary.materialise(), np.where(kept, np.sign(weight) * scale, 0), rtol=1e-6)
    signed = quantize.Ternary(signed=True).convert(weight)
    assert jnp.sum((signed.materialise() - weight) ** 2) <= jnp.sum((ternary.materialise() - weight) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [quantize.Binary(), quantize.Ternary(), quantize.Ternary(signed=True, axes=(-1,))])
def test_training_under_two_or_three_values(scheme: quantize.Binary | quantize.Ternary) -> None:
    """The forward pass is the converted one, gradients are those of the values, and a step of training helps."""
    x, y = jax.random.normal(jax.random.key(1), (64, 16)), jax.random.normal(jax.random.key(2), (64, 4))
    params = {"w": jax.random.normal(jax.random.key(0), (16, 4)), "b": jnp.zeros(4)}

    def apply(params: dict, x: jax.Array) -> jax.Array:
        return x @ params["w"] + params["b"]

    faked = quantize.fake(apply, {"^w$": scheme})

    def loss(params: dict, apply=faked) -> jax.Array:
        return jnp.mean((apply(params, x) - y) ** 2)

    small = quantize.convert(params, {"^w$": scheme})
    values = params | {"w": small["w"].materialise()}
    np.testing.assert_allclose(loss(params), loss(values, apply), rtol=1e-6)
    slope, plain = jax.jit(jax.grad(loss))(params), jax.grad(lambda p: loss(p, apply))(values)
    np.testing.assert_allclose(slope["w"], plain["w"], rtol=1e-5, atol=1e-6)
    first = float(loss(params))
    for _ in range(30):
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, jax.grad(loss)(params))
    assert float(loss(params)) < 0.9 * first


@pytest.mark.parametrize("k", [6, 64])
@pytest.mark.parametrize("unit", [3.4e38, 1e-36])
def test_the_ends_of_float32(unit: float, k: int, rng: np.random.Generator) -> None:
    """Sums of two centroids, and differences of two weights, are beyond the largest float; scales beyond the other."""
    weight = rng.uniform(-1, 1, 6000)
    codes = [
        quantize.KMeans(k, start="linear").convert(jnp.asarray(weight * u, jnp.float32)).codes() for u in (1, unit)
    ]
    assert np.mean(np.asarray(codes[0]) != np.asarray(codes[1])) < 1e-2  # but for ties between bins
    few = jnp.asarray([3.3, 3.2, 1, -3.4, 2.9, -3.1]) * 1e38
    np.testing.assert_array_equal(quantize.KMeans(6).convert(few).materialise(), few)


def test_by_path_and_dtype() -> None:
    params = {"a": {"kernel": jnp.ones((3, 5), jnp.bfloat16), "bias": jnp.zeros(5)}, "b": {"kernel": TEXTBOOK}}
    small = quantize.convert(params, {"a/kernel": quantize.Binary(), "b/kernel": quantize.KMeans(4)})
    assert isinstance(small["a"]["kernel"], Codebook) and small["a"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(small["a"]["kernel"].materialise(), params["a"]["kernel"])


@pytest.mark.parametrize("scheme", [quantize.Binary(), quantize.Ternary(), quantize.Ternary(signed=True)])
def test_floats_of_one_byte(scheme) -> None:
    wide = jnp.array([[0.5, -1.0], [2.0, 4.0], [-8.0, 0.25]])
    small = scheme.convert(wide.astype(jnp.float8_e5m2))
    assert small.dtype == jnp.float8_e5m2
    expected = scheme.convert(wide).materialise().astype(jnp.float8_e5m2)
    np.testing.assert_array_equal(small.materialise().astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize("value", [0.0, 3.0, 1e30])
def test_constant_and_huge_weights(value: float) -> None:
    weight = jnp.full((4, 4), value)
    for scheme in (quantize.KMeans(16), quantize.KMeans(4, start="linear", keep_zeros=True), quantize.Ternary()):
        np.testing.assert_array_equal(scheme.convert(weight).materialise(), weight)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: quantize.KMeans(1), ValueError, "2 to 256"),
        (lambda: quantize.KMeans(2.5), ValueError, "2 to 256"),
        (lambda: quantize.KMeans(axes=0), TypeError, "axes must be a tuple"),
        (lambda: quantize.KMeans(iterations=2.5), TypeError, "iterations must be an integer"),
        (lambda: quantize.Binary(axes=-1), TypeError, "axes must be a tuple"),
        (lambda: quantize.Ternary("0.7"), TypeError, "threshold must be a number"),
        (lambda: quantize.KMeans(start="best"), ValueError, "start is one of"),
        (lambda: quantize.Ternary(threshold=0), ValueError, "positive"),
        (lambda: quantize.KMeans().convert(jnp.array([[jnp.nan, 1]])), ValueError, "non-finite"),
        (lambda: quantize.KMeans().convert(jnp.arange(4)), TypeError, "floating"),
        (lambda: quantize.KMeans(axes=(2,)).convert(TEXTBOOK), ValueError, "do not exist"),
        (lambda: quantize.Binary(axes=(3,)).convert(TEXTBOOK), ValueError, "do not exist"),
        (lambda: jax.jit(lambda w: quantize.KMeans().convert(w).codes())(TEXTBOOK), TypeError, "outside of jit"),
        (lambda: quantize.convert({"w": TEXTBOOK, "v": jnp.arange(3)}, {"v": quantize.Binary()}), TypeError, "'v'"),
    ],
)
def test_bad_input(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("scheme", [quantize.Binary(axes=()), quantize.Ternary(), quantize.Ternary(signed=True)])
@pytest.mark.parametrize("size", [3e38, 1e-30])
def test_magnitudes_near_the_ends_of_floats(scheme, size):
    """XLA divides by such a magnitude with its reciprocal, which is zero."""
    weight = jnp.full((64, 8), size, jnp.float32).at[::2].multiply(-1)
    for convert in (scheme.convert, jax.jit(scheme.convert)):
        np.testing.assert_allclose(convert(weight).materialise(), weight, rtol=1e-6)
