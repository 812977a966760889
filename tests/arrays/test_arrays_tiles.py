"""Weights decoded tile by tile on a single CPU: the same products, and no float copy of the weight."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxcompress import compressed
from jaxcompress.arrays import Leaf, Quantized, _digits, _lanes, _tiles
from jaxcompress.quantize import MX, NF4, Affine, Floats, KMeans, quantize


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """One device, as far as the rules know, and tiles that weights of tests are larger than."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(_digits, "multiplies_bytes", lambda: False)
    monkeypatch.setattr(_tiles, "TILE", 256)
    monkeypatch.setattr(_tiles, "WIDTH", 16)
    monkeypatch.setattr(_tiles, "WORTH", 1024)
    monkeypatch.setattr(_tiles, "SMALL", 1024)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def loops(fn, *args) -> int:
    return str(jax.make_jaxpr(fn)(*args)).count("scan[")


CASES = {
    "dense": ((5, 48), (48, 64), "ik,kn->in"),
    "an axis without divisors": ((5, 47), (47, 64), "ik,kn->in"),
    "to heads": ((2, 3, 48), (48, 4, 12), "bsk,khd->bshd"),
    "from heads": ((2, 3, 4, 12), (4, 12, 40), "bshd,hdk->bsk"),
    "tied, backwards": ((5, 48), (64, 48), "ik,nk->in"),
    "weight first": ((48, 5), (48, 64), "kn,ki->ni"),
    "batched": ((3, 5, 32), (3, 32, 24), "bik,bkn->bin"),
}
SPECS = {
    "int8": Affine(),
    "int4": Affine(bits=4),
    "int2": Affine(bits=2, symmetric=False),
    "int4, zero points": Affine(bits=4, symmetric=False),
    "groups": Affine(group=(0, 8)),
    "int4 groups": Affine(bits=4, group=(0, 8)),
    "rows": Affine(axes=(0,)),
}


QUICK = {
    ("dense", "int8"),
    ("dense", "int4 groups"),
    ("dense", "rows"),
}


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        pytest.param(case, spec, marks=() if (case, spec) in QUICK else pytest.mark.slow)
        for case in CASES
        for spec in SPECS
    ],
)
def test_products(small_tiles, case: str, spec: str) -> None:
    """Against the product with the dense value, and its gradient."""
    x_shape, w_shape, formula = CASES[case]
    x, w = normal(*x_shape), quantize(normal(*w_shape, seed=1), SPECS[spec])
    operands = (lambda x, w: (w, x)) if case == "weight first" else (lambda x, w: (x, w))
    product = compressed(lambda x, w: jnp.einsum(formula, *operands(x, w)))

    @jax.jit
    def value_and_slope(x: jax.Array, w: jax.Array | Quantized) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: product(x, w), x)
        return value, pull(jnp.sin(value))[0]

    for got, want in zip(value_and_slope(x, w), value_and_slope(x, w.materialise()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    if case in ("dense", "from heads", "tied, backwards") and spec == "int8":
        assert loops(product, x, w) >= 1


QUICK_FEW = {"int8"}
FEW_ROWS = {
    "dense": ((2, 64), (64, 48), "ik,kn->in"),
    "to heads": ((1, 2, 64), (64, 4, 12), "bsk,khd->bshd"),
    "weight first": ((64, 2), (64, 48), "kn,ki->ni"),
    "batched": ((3, 2, 64), (3, 64, 24), "bik,bkn->bin"),
}


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        pytest.param(case, spec, marks=() if case == "dense" and spec in QUICK_FEW else pytest.mark.slow)
        for case in FEW_ROWS
        for spec in SPECS
        if (case, spec) not in {("dense", "int2"), ("dense", "int4, zero points")}
    ],
)
def test_few_rows_meet_no_decoded_weight(small_tiles, monkeypatch, case: str, spec: str) -> None:
    """As above; and the only products are those for other platforms: what runs here is one loop of arithmetic."""
    monkeypatch.setattr(_lanes, "LEAST", 64)
    monkeypatch.setattr(_lanes, "LARGE", 0)
    monkeypatch.setattr(_lanes, "FEW", 8)
    x_shape, w_shape, formula = FEW_ROWS[case]
    chosen = Affine(axes=(0, 2)) if (case, spec) == ("batched", "int8") else SPECS[spec]
    x, w = normal(*x_shape), quantize(normal(*w_shape, seed=1), chosen)
    operands = (lambda x, w: (w, x)) if case == "weight first" else (lambda x, w: (x, w))
    product = compressed(lambda x, w: jnp.einsum(formula, *operands(x, w)))

    @jax.jit
    def value_and_slopes(x: jax.Array, w: jax.Array | Quantized) -> tuple[jax.Array, jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: product(x, w), x)
        return value, pull(jnp.sin(value))[0], jax.jvp(lambda x: product(x, w), (x,), (jnp.cos(x),))[1]

    for got, want in zip(value_and_slopes(x, w), value_and_slopes(x, w.materialise()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    if w.group is None or case != "batched":
        compiled = jax.jit(product).lower(x, w).compile().as_text()
        assert "while" in compiled
        assert not re.search(r" dot\(|__onednn|__ynn|eigen", compiled)


def test_a_number_of_rows_that_is_not_known_yet_is_not_few(small_tiles, monkeypatch) -> None:
    """A program for any batch goes by tiles: by lanes, each row more would cost as much as the first."""
    monkeypatch.setattr(_lanes, "LEAST", 64)
    monkeypatch.setattr(_lanes, "LARGE", 0)
    x, w = jax.ShapeDtypeStruct(export.symbolic_shape("b, 64"), jnp.float32), quantize(normal(64, 48), Affine())
    program = export.export(jax.jit(lambda x: compressed(jnp.dot)(x, w)))(x)
    assert "dot_general" in program.mlir_module()
    np.testing.assert_allclose(program.call(normal(9, 64)), normal(9, 64) @ w.materialise(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_integers_are_exact(small_tiles, monkeypatch, rows: int) -> None:
    """The int32 sums of integer execution, from an oracle in int64."""
    monkeypatch.setattr(_tiles, "TILE", 1 << 16)
    x, w = 100 * normal(rows, 4096), quantize(normal(4096, 32, seed=1), Affine(axes=(), activation_bits=8))
    got = compressed(jnp.dot)(x, w)
    step = np.abs(np.asarray(x)).max(1, keepdims=True) / np.float32(127)
    codes = np.round(np.asarray(x) / step).astype(np.int64)
    sums = codes @ np.asarray(w.codes(), np.int64)
    assert np.abs(sums).max() < 2**24  # so that the float32 result shows every unit
    np.testing.assert_array_equal(np.round(np.asarray(got) / step / float(w.scale.item())), sums)


@pytest.mark.parametrize("bits", [4, 8])
def test_convolutions(small_tiles, bits: int) -> None:
    x, w = normal(2, 9, 9, 16), quantize(normal(3, 3, 16, 64, seed=1), Affine(bits=bits))

    def convolve(x: jax.Array, w: jax.Array | Quantized) -> jax.Array:
        return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert loops(compressed(convolve), x, w) >= 1
    np.testing.assert_allclose(compressed(convolve)(x, w), convolve(x, w.materialise()), rtol=1e-4, atol=1e-4)


SMALL_FLOATS = {
    "e4m3": Floats("float8_e4m3fn"),
    "e5m2": Floats("float8_e5m2"),
    "bfloat16": Floats("bfloat16"),
    "float16": Floats("float16"),
    "mx": MX(),
    "mx int8": MX("int8"),
}


@pytest.mark.parametrize("spec", ["int8", "int4", "groups", "outputs first", *SMALL_FLOATS])
def test_no_float_copy_of_the_weight(monkeypatch, spec: str) -> None:
    """Compiled at batch 1: temporaries of a twentieth of its numbers, and no other float array of its shape."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    n = 4096
    makes = {
        "int8": Affine().convert,
        "int4": Affine(bits=4).convert,
        "groups": Affine(group=(0, 64)).convert,
        "outputs first": lambda w: Affine().convert(w).outputs_first(),
    } | {name: scheme.convert for name, scheme in SMALL_FLOATS.items()}
    w = jax.eval_shape(makes[spec], jax.ShapeDtypeStruct((n, n), jnp.float32))
    x = jax.ShapeDtypeStruct((1, n), jnp.float32)

    def slope(x: jax.Array, w: Quantized) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(compressed(jnp.dot)(x, w))))(x)

    stored = {"bfloat16": "bf16", "float16": "f16"}.get(w.values.dtype.name)
    wide = "|".join({"f32", "f16", "bf16", "s16"} - {stored})
    for fn, most in ((compressed(jnp.dot), 0.05 * w.values.size), (slope, 0.2 * n * n)):
        compiled = jax.jit(fn).lower(x, w).compile()
        assert not re.search(rf"\b({wide})\[{n},{n}\]", compiled.as_text())
        assert compiled.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("spec", ["bfloat16", "e4m3", "mx"])
def test_few_rows_take_a_twentieth_of_the_float_weight(monkeypatch, spec: str, backwards: bool) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    n = 4096
    w = jax.eval_shape(SMALL_FLOATS[spec].convert, jax.ShapeDtypeStruct((n, n), jnp.float32))
    x = jax.ShapeDtypeStruct((16, n), jnp.float32)
    compiled = jax.jit(compressed(lambda x, w: x @ (w.T if backwards else w))).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * 4 * n * n


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("spec", SMALL_FLOATS)
def test_products_of_small_floats(small_tiles, monkeypatch, spec: str, rows: int) -> None:
    """By lanes and by tiles, and their derivatives."""
    monkeypatch.setattr(_lanes, "LARGE", 1)
    rng = np.random.default_rng(0)
    w = SMALL_FLOATS[spec].convert(jnp.asarray(rng.normal(size=(256, 64)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(rows, 256)), jnp.float32)
    dense = np.asarray(w.values, np.float64) * np.asarray(w.spread(w.steps), np.float64)
    out, slope = jax.vjp(lambda x: compressed(jnp.matmul)(x, w), x)
    np.testing.assert_allclose(out, np.asarray(x, float) @ dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope(out)[0], np.asarray(out, float) @ dense.T, rtol=1e-5, atol=1e-4)


def test_a_small_weight_is_decoded_at_once(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, w = normal(2, 64), quantize(normal(64, 64, seed=1))
    assert loops(compressed(jnp.dot), x, w) == 0


@pytest.mark.parametrize("scheme", [NF4(), Affine(8, group=(0, 128)), Affine(4, group=(0, 64), symmetric=False)])
def test_a_table_whose_groups_lie_along_the_outputs_is_decoded_by_tiles(scheme, monkeypatch) -> None:
    """Read backwards, its scale can be taken out neither before nor behind the product."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    n = 1024
    rng = np.random.default_rng(0)
    table = scheme.convert(jnp.asarray(rng.normal(size=(n, n)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(2, n)), jnp.float32)
    backwards = compressed(lambda table, x: x @ table.T)
    compiled = jax.jit(backwards).lower(table, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 4 * n * n
    wanted = np.asarray(x, float) @ np.asarray(table.materialise(), float).T
    np.testing.assert_allclose(compiled(table, x), wanted, rtol=1e-5, atol=1e-4)


def test_kernels_with_groups_are_decoded_by_tiles(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    kernel = NF4().convert(jnp.asarray(rng.normal(size=(3, 3, 128, 512)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(1, 4, 4, 128)), jnp.float32)

    def convolve(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    compiled = jax.jit(compressed(convolve)).lower(kernel, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * 4 * kernel.size
    np.testing.assert_allclose(compiled(kernel, x), convolve(kernel.materialise(), x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [(0, 4), (0, 2), (1, 16)], ids=str)
def test_small_groups_and_groups_of_outputs(small_tiles, monkeypatch, group: tuple[int, int], bits: int) -> None:
    """Several groups lie in a part of the rows, or along the outputs of each row."""
    spec = Affine(bits, axes=(1 - group[0],), group=group)
    x, w = normal(1, 256), quantize(normal(256, 64, seed=1), spec)
    wanted = np.asarray(x, np.float64) @ np.asarray(w.materialise(), np.float64)
    np.testing.assert_allclose(jax.jit(compressed(jnp.dot))(x, w), wanted, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(_lanes, "LARGE", 1)
    np.testing.assert_allclose(jax.jit(compressed(jnp.dot))(x, w), wanted, rtol=1e-4, atol=1e-4)


ENDS = [
    Affine(),
    Affine(4, symmetric=False),
    Affine(4, group=(0, 8)),
    Affine(8, group=(0, 10), activation_bits=8),
    NF4((0, 8)),
]


@pytest.mark.parametrize("scheme", [*ENDS, KMeans(4, axes=(-1,), start="linear")])
def test_what_tiles_leave_over(small_tiles, scheme) -> None:
    """Both axes are primes, or have a shorter last group: values and gradients are those of the dense weight."""
    x, w = jnp.round(30 * normal(5, 83)).at[:, 0].set(127.0), scheme.convert(normal(83, 61, seed=1))  # 8 bits hold x
    product = compressed(jnp.dot)
    assert loops(product, x, w) >= 1

    @jax.jit
    def value_and_slope(x: jax.Array, w: jax.Array | Leaf) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: product(x, w), x)
        return value, pull(value)[0]

    for got, want in zip(value_and_slope(x, w), value_and_slope(x, w.materialise()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("n", "m", "group"), [(768, 6101, None), (1000, 2048, (0, 64)), (1021, 1031, None)])
def test_no_float_copy_of_a_weight_that_tiles_do_not_divide(monkeypatch, n: int, m: int, group: Any) -> None:
    """As the vocabulary of 30,522 words of BERT, and a last group that is shorter."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    w = jax.eval_shape(Affine(group=group).convert, jax.ShapeDtypeStruct((n, m), jnp.float32))
    compiled = jax.jit(compressed(jnp.dot)).lower(jax.ShapeDtypeStruct((1, n), jnp.float32), w).compile()
    assert not re.search(rf"(f32|f16|bf16|s16)\[{n},{m}\]", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 0.06 * 4 * n * m


def test_no_float_copy_where_groups_lie_along_the_outputs(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    n = 2048
    w = jax.eval_shape(Affine(axes=(0,), group=(1, 64)).convert, jax.ShapeDtypeStruct((n, n), jnp.float32))
    compiled = jax.jit(compressed(jnp.dot)).lower(jax.ShapeDtypeStruct((2, n), jnp.float32), w).compile()
    assert not re.search(rf"f32\[{n},{n}\]", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * 4 * n * n
