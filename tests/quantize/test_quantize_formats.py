"""Formats of hardware and papers: against their definitions, through products, lookups and checkpoints."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from scipy.stats import norm

from jaxcompress import pack, quantize
from jaxcompress.arrays import compressed, dense, nbytes, watch
from jaxcompress.arrays._bits import widened
from jaxcompress.quantize import MX, NF4, Affine, Floats
from jaxcompress.quantize._formats import FP4_LEVELS, NF4_LEVELS

SCHEMES = {
    "e4m3": Floats("float8_e4m3fn"),
    "e5m2": Floats("float8_e5m2", axes=()),
    "bfloat16": Floats("bfloat16"),
    "float16": Floats("float16"),
    "nf4": NF4((-2, 20)),
    "mx e4m3": MX("float8_e4m3fn"),
    "mx e5m2": MX("float8_e5m2"),
    "mx fp4": MX("float4_e2m1fn"),
    "mx int8": MX("int8"),
    **{f"{bits} bits": Affine(bits) for bits in (2, 3, 5, 6, 7, 8)},
}


@jax.jit
def in_every_scheme(weight):
    return {name: scheme.convert(weight) for name, scheme in SCHEMES.items()}


@jax.jit
def materialised(leaves):
    return {name: leaf.materialise() for name, leaf in leaves.items()}


@pytest.fixture
def weight(rng):
    """70 inputs: neither groups of 20 nor of 32 divide them."""
    return jnp.asarray(rng.normal(size=(70, 6)) * np.exp(rng.normal(size=(70, 6))), jnp.float32)


def test_nf4_levels_are_the_papers_quantiles():
    """Dettmers et al. 2023: quantiles of N(0, 1), nine to the right and eight to the left of zero, over the largest."""
    offset = 0.9677083
    right, left = (norm.ppf(np.linspace(offset, 0.5, n)[:-1]) for n in (9, 8))
    levels = np.sort(np.concatenate([right, [0.0], -left]))
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=1e-6)


def test_fp4_levels_are_the_types():
    np.testing.assert_array_equal(
        np.float32(FP4_LEVELS), np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    )


def grouped(w, size):
    return [w[i : i + size] for i in range(0, len(w), size)]


def test_values_are_the_definitions(weight):
    """Written down a second time with NumPy and ml_dtypes."""
    w = np.asarray(weight)
    got = {name: np.asarray(value) for name, value in materialised(in_every_scheme(weight)).items()}

    def near(levels, x):
        return levels[np.argmin(np.abs(x[..., None] - levels), axis=-1)]

    nf4 = [near(np.float32(NF4_LEVELS), g / np.abs(g).max(0)) * np.abs(g).max(0) for g in grouped(w, 20)]
    np.testing.assert_allclose(got["nf4"], np.concatenate(nf4), rtol=1e-6)
    for name, dtype, largest in [
        ("mx e4m3", ml_dtypes.float8_e4m3fn, 8),
        ("mx e5m2", ml_dtypes.float8_e5m2, 15),
        ("mx fp4", ml_dtypes.float4_e2m1fn, 2),
    ]:
        parts = []
        for g in grouped(w, 32):
            scale = 2.0 ** (np.floor(np.log2(np.abs(g).max(0))) - largest)
            top = float(ml_dtypes.finfo(dtype).max)
            parts.append(np.clip(g / scale, -top, top).astype(dtype).astype(np.float32) * scale)
        np.testing.assert_allclose(got[name], np.concatenate(parts), rtol=1e-6)
    parts = []
    for g in grouped(w, 32):
        unit = 2.0 ** np.floor(np.log2(np.abs(g).max(0))) / 64
        parts.append(np.clip(np.round(g / unit), -127, 127) * unit)
    np.testing.assert_allclose(got["mx int8"], np.concatenate(parts), rtol=1e-6)
    scale = np.abs(w).max(0) / np.float32(448)
    e4m3 = (w / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_allclose(got["e4m3"], e4m3, rtol=1e-6)
    for name in ("bfloat16", "float16"):
        np.testing.assert_array_equal(got[name], np.float32(w.astype(jnp.dtype(name))))


def test_bytes(weight):
    sizes = {name: nbytes(leaf) for name, leaf in in_every_scheme(weight).items()}
    n, scales = 70 * 6, 6
    assert sizes["e4m3"] == n + 4 * scales and sizes["bfloat16"] == 2 * n + 4
    assert sizes["nf4"] == n // 2 + 4 * 4 * scales  # four groups of 20
    assert sizes["mx fp4"] == n // 2 + 3 * scales and sizes["mx e4m3"] == sizes["mx int8"] == n + 3 * scales
    assert sizes["3 bits"] == n // 2 + 4 * scales and sizes["5 bits"] == n + 4 * scales


def test_products_and_lookups_need_no_dense_weight(weight, rng):
    x = jnp.asarray(rng.normal(size=(4, 70)), jnp.float32)
    leaves = in_every_scheme(weight)
    values = materialised(leaves)

    @jax.jit
    def run(leaves, x):
        products = compressed(lambda w: (x @ w, (w.T @ x.T).T), strict=True)
        rows = compressed(lambda w: w[jnp.asarray([3, 69])])  # of groups of rows only by way of the dense value
        return {name: (*products(w), rows(w)) for name, w in leaves.items()}

    with watch() as hits:
        out = run(leaves, x)
    assert hits[("Quantized", "dot_general", "rule")] == 2 * len(leaves)
    assert hits[("Quantized", "gather", "rule")] == sum(w.group is None for w in leaves.values())
    for name, (product, turned, rows) in out.items():
        w = np.asarray(values[name])
        np.testing.assert_allclose(product, np.asarray(x) @ w, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(turned, np.asarray(x) @ w, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rows, w[[3, 69]], rtol=1e-6)


def test_every_type_saves_and_restores(weight, tmp_path):
    """By orbax and packed: same types, same structure, same bits."""
    more = {
        "float products": Floats("float8_e4m3fn", inputs="float8_e5m2"),
        "zero points": Affine(8, symmetric=False),
        "groups": Affine(4, group=(0, 32)),
        "integer products": Affine(8, activation_bits=16),
        "codebook": quantize.KMeans(6),
        "ternary": quantize.Ternary(),
        "binary": quantize.Binary(),
    }
    tree = {name.replace(" ", "_"): scheme.convert(weight) for name, scheme in (SCHEMES | more).items()}
    tree["learned"] = quantize.learn(weight, {"": Affine(4, activation_bits=8)})
    calibrated = {"w": quantize.Range(np.float32(-1.0), np.float32(2.0))}
    tree["static"] = quantize.static({"w": Affine(8, activation_bits=8).convert(weight)}, calibrated)["w"]
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", tree)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "step", jax.eval_shape(lambda: tree))
    pack.save(tmp_path / "tree.jxc", tree)
    for back in (restored, pack.load(tmp_path / "tree.jxc")):
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("value", [0.0, -3e38, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e-45, 1.0, 3e4))])
def test_constant_channels_are_finite(value):
    w = jnp.full((40, 3), value, jnp.float32)
    for name, scheme in SCHEMES.items():
        if name == "float16" and abs(value) > 1e5:
            with pytest.raises(ValueError, match="beyond 65504"):
                scheme.convert(w)
            continue
        out = np.asarray(scheme.convert(w).materialise())
        assert np.all(np.isfinite(out)), name
        if value in (0.0, 1.0) or (abs(value) > 1 and "mx" not in name):
            np.testing.assert_allclose(out, value, rtol=0.01, err_msg=name)


def test_huge_weights_of_both_signs_stay_finite(rng):
    """The range is beyond float32's largest number; half a step from the weight there is always an integer within."""
    w = jnp.asarray(np.concatenate([[3e38, -3e38, 3.4e38, -3.4e38], rng.uniform(-3e38, 3e38, 12)]), jnp.float32)
    specs = [Affine(bits, axes=(), symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
    leaves = jax.jit(lambda w: [quantize.quantize(w, spec) for spec in specs])(w)
    for spec, leaf in zip(specs, leaves, strict=True):
        off = np.abs(np.float64(leaf.materialise()) - np.float64(w)) / np.float64(leaf.scale)
        assert np.all(off <= 0.5 + 1e-5), spec


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_up_to_the_largest_of_a_narrow_dtype_stay_finite(dtype, rng):
    """A rounded zero point moves a grid's ends by up to half a step, and bfloat16 rounds float16's largest up."""
    largest = float(jnp.finfo(dtype).max)
    w = np.asarray(rng.uniform(-1, 1, (16, 40)) * largest, np.float32)
    w[:2] = largest * np.where(rng.random((2, 40)) < 0.5, -1, 1)
    w = jnp.asarray(w).astype(dtype)
    schemes = {f"{bits} bits": Affine(bits, symmetric=False) for bits in (2, 4, 7)}
    schemes |= {"bfloat16": Floats("bfloat16"), "e4m3": Floats()}
    converted = jax.jit(lambda w: {name: scheme.convert(w) for name, scheme in schemes.items()})(w)
    for name, leaf in converted.items():
        assert np.all(np.isfinite(np.float32(leaf.materialise()))), name
        if "bits" in name:
            np.testing.assert_array_equal(quantize.fake_quantize(w, schemes[name]), leaf.materialise())
    if dtype == "float16":  # the sums of squares of bfloat16's largest are no float32
        batches, rule = [jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)], {"w": Affine(4, symmetric=False)}
        rounded = quantize.gptq(lambda p, x: x @ p["w"].astype(jnp.float32), {"w": w}, batches, rule)
        assert np.all(np.isfinite(np.float32(dense(rounded)["w"])))


def test_stochastic_rounding_has_the_weight_as_its_mean(rng):
    """Also at the ends of a grid with a zero point."""
    w = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    specs = [Affine(3), Affine(4, symmetric=False), Affine(2, symmetric=False, group=(0, 3))]
    draw = jax.jit(jax.vmap(lambda key: [dense(quantize.quantize(w, spec, key=key)) for spec in specs]))
    for spec, drawn in zip(specs, draw(jax.random.split(jax.random.key(0), 4000)), strict=True):
        drawn, leaf = np.asarray(drawn), quantize.quantize(w, spec, key=jax.random.key(0))
        step = np.asarray(leaf.spread(leaf.scale))
        np.testing.assert_allclose(drawn.mean(0), w, atol=5 * float(step.max()) * 0.5 / np.sqrt(4000))
        assert np.all(np.abs(drawn - w) <= step * (1 + 1e-5)) and np.any(drawn.std(0) > 0)


def test_training_under_a_format(weight):
    fake = quantize.fake(lambda p: jnp.sum(p["w"] ** 2), {"w": NF4((-2, 20))})
    value, grads = jax.value_and_grad(fake)({"w": weight})
    rounded = NF4((-2, 20)).convert(weight).materialise()
    np.testing.assert_allclose(value, jnp.sum(rounded**2), rtol=1e-5)
    np.testing.assert_allclose(grads["w"], 2 * rounded, rtol=1e-5)


def test_refuses():
    with pytest.raises(ValueError, match="dtype is one of"):
        Floats("float8")
    with pytest.raises(ValueError, match="element is one of"):
        MX("int4")
    with pytest.raises(ValueError, match="axis -2"):
        NF4().convert(jnp.ones(4))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize(
    "scheme", [Affine(8), Affine(4, group=(0, 2)), Floats(), NF4(), MX(), quantize.KMeans(4), quantize.Binary()]
)
def test_a_weight_without_entries_is_refused_by_name(scheme, shape):
    params = {"a": {"kernel": jnp.zeros(shape)}}
    with pytest.raises(ValueError, match=r"'a/kernel': a weight of shape .* has no entries"):
        quantize.convert(params, {"kernel$": scheme})
    if not isinstance(scheme, quantize.KMeans):
        with pytest.raises(ValueError, match=r"'a/kernel': a weight of shape .* has no entries"):
            quantize.fake(lambda p: p["a"]["kernel"].sum(), {"kernel$": scheme})(params)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("wide", ["float32", "bfloat16", "float16"])
def test_every_pattern_of_eight_bits_is_the_number_that_it_stands_for(dtype, wide):
    """A CPU decodes them by hand."""
    values = np.arange(256, dtype=np.uint8).view(dtype)
    wanted = values.astype(wide).astype(np.float64)
    for fn in (widened, jax.jit(widened, static_argnums=1)):
        got = np.asarray(fn(jnp.asarray(values), jnp.dtype(wide)))
        assert got.dtype == wide
        np.testing.assert_array_equal(got.astype(np.float64), wanted)
        np.testing.assert_array_equal(np.signbit(got)[wanted == 0], np.signbit(wanted)[wanted == 0])
