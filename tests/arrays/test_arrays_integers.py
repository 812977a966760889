"""Products of int8 with int8 on a single CPU, and small weights: exact or as near as floats, and in the quick form."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxcompress import compressed
from jaxcompress.arrays import Quantized, _integers
from jaxcompress.arrays._integers import multiply_integers
from jaxcompress.arrays._products import Dims
from jaxcompress.quantize import Affine, Range, convert, quantize, static


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """With the largest sums that int8 can have among the columns."""
    codes = np.random.default_rng(seed).integers(-128, 128, shape)
    codes[..., :1] = -128
    return codes


CASES = {
    "a row": ((1, 784), (784, 30), Dims((1,), (0,), (), ())),
    "a few": ((3, 784), (784, 30), Dims((1,), (0,), (), ())),
    "more": ((16, 4096), (4096, 20), Dims((1,), (0,), (), ())),
    "many": ((70, 4096), (4096, 20), Dims((1,), (0,), (), ())),
    "no divisors": ((2, 1021), (1021, 20), Dims((1,), (0,), (), ())),
    "short": ((1, 20), (20, 30), Dims((1,), (0,), (), ())),
    "a vector": ((1024,), (1024, 30), Dims((0,), (0,), (), ())),
    "contracted last": ((2, 1024), (30, 1024), Dims((1,), (1,), (), ())),
    "to heads": ((1, 1, 1024), (1024, 3, 5), Dims((2,), (0,), (), ())),
    "batched": ((2, 4, 1024), (2, 1024, 6), Dims((2,), (1,), (0,), (0,))),
    "batched behind": ((1024, 1, 2), (1024, 6, 2), Dims((0,), (0,), (2,), (2,))),
    "batched vectors": ((2, 1024), (2, 1024, 6), Dims((1,), (1,), (0,), (0,))),
    "two axes": ((2, 8, 128), (8, 128, 6), Dims((1, 2), (0, 1), (), ())),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sums_are_those_of_whole_numbers(case: str) -> None:
    x_shape, w_shape, dims = CASES[case]
    x, w = drawn(*x_shape), drawn(*w_shape, seed=1)
    numbers = jax.jit(lambda x, w: multiply_integers(x, w, dims))(x.astype(np.int8), w.astype(np.int8))
    assert numbers.dtype == jnp.int32
    letters = iter("abcdefghij")
    x_axes, w_axes = ["?"] * x.ndim, ["?"] * w.ndim
    for i, j in [*zip(dims.x_batch, dims.w_batch, strict=True), *zip(dims.x_contract, dims.w_contract, strict=True)]:
        x_axes[i] = w_axes[j] = next(letters)
    free_x = [i for i, axis in enumerate(x_axes) if axis == "?"]
    free_w = [j for j, axis in enumerate(w_axes) if axis == "?"]
    for i in free_x:
        x_axes[i] = next(letters)
    for j in free_w:
        w_axes[j] = next(letters)
    kept = [*(x_axes[i] for i in dims.x_batch), *(x_axes[i] for i in free_x), *(w_axes[j] for j in free_w)]
    formula = f"{''.join(x_axes)},{''.join(w_axes)}->{''.join(kept)}"
    np.testing.assert_array_equal(numbers, np.einsum(formula, x, w))


def test_a_product_in_pieces_is_one_of_more_axes() -> None:
    """What makes it quick is in the program that XLA gets: a batch of pieces, and never a single row."""
    w = jnp.asarray(drawn(784, 300), jnp.int8)
    for rows, batch in ((1, 2), (3, 3)):
        program = jax.jit(lambda x, w: multiply_integers(x, w, Dims((1,), (0,), (), ())))
        text = program.lower(jnp.ones((rows, 784), jnp.int8), w).as_text()
        assert re.search(rf"dot_general.*tensor<{batch}x4x196xi8>, tensor<4x196x300xi8>", text)


def test_any_number_of_rows_is_exported_whole() -> None:
    w = jnp.asarray(drawn(1024, 8), jnp.int8)
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 1024"), jnp.int8)
    program = export.export(jax.jit(lambda x: multiply_integers(x, w, Dims((1,), (0,), (), ()))))(x)
    codes = drawn(1, 1024, seed=1)
    np.testing.assert_array_equal(program.call(codes.astype(np.int8)), codes @ np.asarray(w, np.int64))


def known(w: Any, step: float, zero: float) -> Any:
    """The weight with a grid of the inputs that is known beforehand."""
    grid = {"input_scale": step, "input_zero_point": zero}
    return dataclasses.replace(w, **{name: jnp.full([1] * w.ndim, number) for name, number in grid.items()})


@pytest.mark.parametrize("spec", [Affine(), Affine(symmetric=False), Affine(4, symmetric=False)])
@pytest.mark.parametrize("bits, zero", [(8, 0), (8, -7), (16, 0), (16, -777)])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_what_takes_several_products_is_exact(rng: Any, spec: Affine, bits: int, zero: int, lead: tuple) -> None:
    """Zero points of the inputs, and inputs of 16 bits: whole numbers that float32 holds, scaled by powers of two."""
    codes = rng.integers(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1), (64, 3, 8))
    zeros = None if spec.symmetric else jnp.asarray(rng.integers(-8, 8, (1, 3, 8)), jnp.int8)
    w = Quantized.from_codes(jnp.asarray(codes), jnp.full((1, 3, 8), 0.25), zeros, bits=spec.bits, activation_bits=bits)
    x = rng.integers(-100, 100, (*lead, 64)).astype(np.float32) / 2
    run = jax.jit(compressed(lambda x, w: jnp.tensordot(x, w, 1), strict=True))
    wanted = np.tensordot(x, (codes - (0 if zeros is None else np.asarray(zeros, int))) / 4, 1)
    np.testing.assert_array_equal(run(jnp.asarray(x), known(w, 0.5, zero)), wanted)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bits, zero", [(8, None), (8, -7), (16, None), (16, 77)])
def test_integer_inputs_meet_no_wider_weight(rows: int, bits: int, zero: int | None) -> None:
    """Compiled: no copy of the weight, of whatever dtype, and temporaries of a twentieth of its codes."""
    n, columns = 2048, 1024
    w = jax.eval_shape(Affine(activation_bits=bits).convert, jax.ShapeDtypeStruct((n, columns), jnp.float32))
    w = w if zero is None else jax.eval_shape(lambda w: known(w, 0.1, zero), w)
    x = jax.ShapeDtypeStruct((rows, n), jnp.float32)
    compiled = jax.jit(compressed(jnp.dot, strict=True)).lower(x, w).compile()
    assert not re.search(rf"(f32|s32|s16|bf16)\[({n},{columns}|4,{n // 4},{columns})\]", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * n * columns


@pytest.mark.parametrize("rows", [1, 4, 16, 128])
@pytest.mark.parametrize("shape", [(784, 300), (300, 100), (100, 10)])
def test_small_layers_are_as_near_as_those_of_floats(rows: int, shape: tuple[int, int]) -> None:
    """LeNet-300-100's weights, against float64; the largest is never a whole array of floats for few rows."""
    w = quantize(jax.random.normal(jax.random.key(0), shape), Affine())
    x = jax.random.normal(jax.random.key(1), (rows, shape[0]))
    product = jax.jit(compressed(jnp.dot, strict=True))
    wanted = np.asarray(x, np.float64) @ np.asarray(w.materialise(), np.float64)
    reach = np.abs(x).astype(np.float64) @ np.abs(np.asarray(w.materialise(), np.float64))
    assert (np.abs(product(x, w) - wanted) < 2.0**-21 * reach).all()
    whole = f"f32[{shape[0]},{shape[1]}]" in product.lower(x, w).compile().as_text()
    assert whole == (shape != (784, 300) or rows == 128)


def test_inputs_of_few_digits_meet_whole_numbers() -> None:
    """In bfloat16 a code is exact, a code times its scale is not: scaled afterwards, even where the weight is small."""
    w = quantize(jax.random.normal(jax.random.key(0), (64, 48)), Affine(axes=()))
    x = jnp.ones((1, 64), jnp.bfloat16)
    got = jax.jit(compressed(lambda x, w: jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)))(x, w)
    wanted = np.asarray(w.codes(), np.int64).sum(0) * np.float64(w.scale.item())
    np.testing.assert_allclose(got[0], wanted, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("devices", [1, 2])
def test_groups_of_outputs(monkeypatch, bits: int, activation_bits: int | None, devices: int) -> None:
    """Scales that several outputs share."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    w = quantize(jax.random.normal(jax.random.key(0), (16, 24)), Affine(bits, group=(1, 8)))
    with_inputs = quantize(w.materialise(), Affine(bits, group=(1, 8), activation_bits=activation_bits))
    x = jax.random.normal(jax.random.key(1), (3, 16))
    got = jax.jit(compressed(jnp.dot, strict=True))(x, with_inputs)
    np.testing.assert_allclose(got, x @ w.materialise(), atol=1e-5 if activation_bits is None else 0.1)


def test_pieces_that_would_be_too_short_are_not_cut() -> None:
    for rows in (1, 8, 9):
        w = jnp.ones((_integers.LEAST, 4), jnp.int8)
        assert _integers._piece(w, Dims((1,), (0,), (), ()), rows) == _integers.LEAST


@pytest.mark.parametrize("group", [None, (0, 24)])
@pytest.mark.parametrize("ends", [None, (-2.0, 2.0), (-1.0, 3.0)])
def test_weights_with_a_zero_point_multiply_as_integers_too(group: tuple[int, int] | None, ends: object) -> None:
    """`(x - zero) (w - zero)`, the sums exact: an oracle in whole numbers has the same, to the last rounding."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 70)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(70, 10)) + 0.3, jnp.float32)
    rules = {"w": Affine(8, group=group, symmetric=False, activation_bits=8)}
    small = convert({"w": w}, rules)
    if ends is not None:
        small = static(small, {"w": Range(*np.float32(ends))})
    leaf = small["w"]
    step = np.abs(x).max(1, keepdims=True) / np.float32(127) if ends is None else np.asarray(leaf.input_scale)
    zero = 0 if leaf.input_zero_point is None else np.asarray(leaf.input_zero_point)
    low = -128 if leaf.input_zero_point is not None else -127
    codes = np.clip(np.round(x / step) + zero, low, 127) - zero
    centred = np.asarray(leaf.codes(), int) - np.asarray(leaf.spread(leaf.zero_point), int)
    parts = [slice(i, i + 24) for i in range(0, 70, 24)] if group else [slice(None)]
    sums = [codes[:, part].astype(int) @ centred[part] for part in parts]
    oracle = sum(s * np.asarray(scale, float) for s, scale in zip(sums, leaf.scale, strict=True)) * step.astype(float)
    run = compressed(lambda p, x: x @ p["w"])
    np.testing.assert_allclose(run(small, x), oracle, rtol=3e-6 if group else 3e-7, atol=1e-7 * np.abs(oracle).max())
    assert "xi32>" in jax.jit(run).lower(small, x).as_text()


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_with_a_zero_point_convolve_as_integers_too(groups: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 5, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4 // groups, 6)) + 0.3, jnp.float32)

    def convolve(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    small = static(
        convert({"k": kernel}, {"k": Affine(8, symmetric=False, activation_bits=8)}), {"k": Range(*np.float32([-1, 3]))}
    )
    leaf = small["k"]
    zero = np.asarray(leaf.input_zero_point)
    codes = np.clip(np.round(x / np.asarray(leaf.input_scale)) + zero, -128, 127) - zero
    centred = np.asarray(leaf.codes(), int) - np.asarray(leaf.zero_point, int)
    sums = convolve({"k": jnp.asarray(centred, jnp.float32)}, jnp.asarray(codes, jnp.float32))  # below 2**24
    oracle = np.asarray(sums, float) * np.asarray(leaf.scale, float) * float(leaf.input_scale.ravel()[0])
    out = jax.jit(compressed(convolve))(small, x)
    np.testing.assert_allclose(out, oracle, rtol=3e-7, atol=1e-7 * np.abs(oracle).max())
    assert "xi32>" in jax.jit(compressed(convolve)).lower(small, x).as_text()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_that_int32_does_not_hold_are_added_up_in_floats(bits: int, symmetric: bool) -> None:
    """An image of white pixels, flattened, meets weights of one sign: 150,528 times 127 times 127."""
    n = 224 * 224 * 3
    w = Affine(8, symmetric=symmetric, activation_bits=bits).convert(jnp.ones((n, 2)))
    for rows in (1, 3):
        got = jax.jit(compressed(jnp.dot))(jnp.ones((rows, n)), w)
        np.testing.assert_allclose(got, np.full((rows, 2), float(n)), rtol=1e-4)
