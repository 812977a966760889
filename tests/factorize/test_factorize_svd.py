"""Decompositions against NumPy's in double precision, and against what Eckart and Young say is least."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import calibrate, factorize
from jaxcompress.arrays import LowRank
from jaxcompress.factorize import Svd
from jaxcompress.factorize._svd import spectrum
from jaxcompress.paths import UnmatchedRuleError

RNG = np.random.default_rng(0)


def weight(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dropped(matrix, rank):
    """The least squared distance of a matrix of this rank."""
    return float(np.sum(np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[rank:] ** 2))


def squares(x):
    return float(np.sum(np.square(np.asarray(x, np.float64))))


def test_the_best_approximation_in_balanced_factors():
    w = weight(14, 9)
    values = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    for rank in (4, 9):
        small = factorize.svd(w, Svd(rank=rank))
        assert small.left.shape == (14, rank) and small.right.shape == (rank, 9)
        assert squares(w - small.materialise()) == pytest.approx(dropped(w, rank), rel=1e-4, abs=1e-9)
        for gram in (small.left.T @ small.left, small.right @ small.right.T):
            np.testing.assert_allclose(gram, np.diag(values[:rank]), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "spec", "matrix"),
    [
        ((3, 3, 4, 6), Svd(rank=3), lambda w: w.reshape(36, 6)),
        ((8, 3, 4), Svd(rank=3, rows=(0,)), lambda w: w.reshape(8, 12)),
        ((3, 2, 4, 6), Svd(rank=3, rows=(0, -2)), lambda w: w.transpose(0, 2, 1, 3).reshape(12, 12)),
        ((3, 2, 4, 6), Svd(rank=3, rows=(3, 1)), lambda w: w.transpose(3, 1, 0, 2).reshape(12, 12)),
    ],
    ids=["convolution", "heads", "separable", "any order"],
)
def test_weights_of_more_axes(shape, spec, matrix):
    w = weight(*shape)
    small = factorize.svd(w, spec)
    assert small.shape == shape
    assert squares(w - small.materialise()) == pytest.approx(dropped(matrix(w), 3), rel=1e-4)


def test_each_weight_of_a_stack_by_itself():
    w = weight(2, 3, 8, 6)
    small = factorize.svd(w, Svd(rank=2, stacked=2))
    assert small.left.shape == (2, 3, 8, 2)
    off = np.asarray(w - small.materialise())
    for at in np.ndindex(2, 3):
        assert squares(off[at]) == pytest.approx(dropped(w[at], 2), rel=1e-4)


def test_ranks_from_energy_and_from_a_share_of_the_parameters():
    w = weight(20, 16)
    energy = np.cumsum(np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2) / squares(w)
    assert factorize.svd(w, Svd(energy=0.5)).rank == int(np.argmax(energy >= 0.5)) + 1
    found = spectrum(w, Svd())
    for share in (0.05, 0.4, 0.9):
        assert Svd(energy=share).rank_of(found) == int(np.argmax(energy >= share)) + 1
    assert Svd(energy=1.0).rank_of(found) == 16
    assert Svd(energy=1 - 1e-9).rank_of(spectrum(weight(20, 3) @ weight(3, 16), Svd())) == 3
    for ratio in (0.01, 0.3, 0.8):
        rank = Svd(ratio=ratio).rank_of(found)
        assert rank == 1 or rank * 36 <= ratio * 320 < (rank + 1) * 36
    assert Svd(rank=5, round_to=4).rank_of(found) == 8
    assert Svd(ratio=0.8, round_to=4).rank_of(found) == 4  # 7 fit
    both = spectrum(jnp.stack([w, jnp.ones((20, 16))]), Svd(stacked=1))
    assert Svd(energy=0.9).rank_of(both) == Svd(energy=0.9).rank_of(found)


def test_zeros_and_bfloat16():
    zero = factorize.svd(jnp.zeros((5, 4)), Svd(energy=0.9))
    assert zero.rank == 1 and not zero.materialise().any()
    w = weight(12, 10).astype(jnp.bfloat16)
    small = factorize.svd(w, Svd(rank=10))
    assert small.dtype == small.left.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(small.materialise()), np.float32(w), atol=0.1)


X = weight(40, 12) * jnp.asarray([*np.geomspace(3, 0.01, 10), 0.0, 1.0]) @ jnp.eye(12).at[0, 11].set(2.0)


def used(w, x):
    return x @ w


USES = {
    "inputs are rows": (used, (12, 9), Svd(rank=4), X, lambda w: w),
    "inputs are columns": (lambda w, x: x @ w.T, (9, 12), Svd(rank=4), X, lambda w: w.T),
    "heads": (
        lambda w, x: jnp.einsum("nhk,hko->no", x, w),
        (3, 4, 9),
        Svd(rank=4),
        X.reshape(40, 3, 4),
        lambda w: w.reshape(12, 9),
    ),
}


@pytest.mark.parametrize("use", [pytest.param(use, marks=pytest.mark.slow if use == "heads" else ()) for use in USES])
def test_with_inputs_the_outputs_change_least(use):
    """The least squared change of `X W` is what is dropped of the singular values of `X W`; two inputs depend."""
    fn, shape, spec, x, matrix = USES[use]
    w = weight(*shape)
    seen = calibrate.input_statistics(lambda p, x: fn(p["w"], x), {"w": w}, [x[:20], x[20:]], {"w": True})
    flat = np.asarray(x, np.float64).reshape(40, 12)
    least = dropped(flat @ np.asarray(matrix(w), np.float64), 4)

    def change(small):
        return squares(flat @ np.asarray(matrix(w - small.materialise()), np.float64))

    aware = factorize.svd(w, spec, seen["w"], damping=1e-6)
    assert least <= change(aware) * (1 + 1e-6) and change(aware) == pytest.approx(least, rel=1e-2)
    assert change(factorize.svd(w, spec)) > 1.5 * least
    whole = factorize.svd(w, Svd(rank=9), seen["w"])
    np.testing.assert_allclose(whole.materialise(), w, atol=2e-3)


@pytest.mark.slow
def test_with_inputs_of_a_convolution_and_of_a_stack():
    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, p["layers"])[0]

    params, x = {"conv": weight(3, 3, 2, 8), "layers": weight(2, 8, 8)}, weight(2, 5, 5, 2)
    seen = calibrate.input_statistics(fn, params, [x], {"": True})
    patches = jax.lax.conv_general_dilated_patches(
        x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    flat = np.asarray(patches, np.float64).reshape(50, 2, 9).transpose(0, 2, 1).reshape(50, 18)  # [rows, (h, w, in)]
    kernel = factorize.svd(params["conv"], Svd(rank=3), seen["conv"], damping=1e-6)
    change = squares(flat @ np.asarray((params["conv"] - kernel.materialise()).reshape(18, 8), np.float64))
    assert change == pytest.approx(dropped(flat @ np.asarray(params["conv"], np.float64).reshape(18, 8), 3), rel=1e-2)
    layers = factorize.svd(params["layers"], Svd(rank=3, stacked=1), seen["layers"], damping=1e-6)
    for gram, w, off in zip(
        seen["layers"].gram, params["layers"], params["layers"] - layers.materialise(), strict=True
    ):
        values, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
        root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
        assert squares(root @ np.asarray(off, np.float64)) == pytest.approx(dropped(root @ np.asarray(w), 3), rel=1e-2)


PARAMS = {"a": {"kernel": weight(16, 12), "bias": weight(12)}, "b": {"kernel": weight(12, 3)}}


def test_convert_leaves_what_would_not_be_smaller():
    small = factorize.convert(PARAMS, {"kernel$": Svd(rank=4)})
    assert isinstance(small["a"]["kernel"], LowRank) and small["b"]["kernel"] is PARAMS["b"]["kernel"]
    assert small["a"]["bias"] is PARAMS["a"]["bias"]
    abstract = jax.eval_shape(lambda p: factorize.convert(p, {"a/kernel": Svd(ratio=0.5)}), PARAMS)
    assert abstract["a"]["kernel"].rank == math.floor(0.5 * 192 / 28)
    traced = jax.jit(lambda p: factorize.convert(p, {"a/kernel": Svd(rank=2)}))(PARAMS)["a"]["kernel"]
    np.testing.assert_allclose(
        traced.materialise(), factorize.svd(PARAMS["a"]["kernel"], Svd(rank=2)).materialise(), atol=1e-5
    )


def test_refused():
    bad = {**PARAMS, "c": {"kernel": weight(8, 8).at[0, 0].set(jnp.nan)}, "n": jnp.ones((8, 8), int)}
    twice = factorize.convert(PARAMS, {"a/kernel": Svd(rank=2)})
    seen = calibrate.input_statistics(lambda p, x: x @ p["a"]["kernel"], PARAMS, [weight(5, 16)], {"a/kernel": True})
    squares_only = calibrate.input_statistics(
        lambda p, x: x @ p["a"]["kernel"], PARAMS, [weight(5, 16)], {"a/kernel": True}, gram=False
    )
    cases = [
        (
            lambda: factorize.convert(PARAMS, {"b/kernel": Svd(rank=3), "a/k": Svd(rank=2)}),
            "makes no weight smaller.*'b/",
        ),
        (lambda: factorize.convert(PARAMS, {"a/kernel": Svd()}), "give Svd one of rank, energy and ratio"),
        (lambda: factorize.convert(PARAMS, {"a/kernel": 2}), "'a/kernel': want a rule such as Svd"),
        (lambda: factorize.convert(bad, {"c/kernel": Svd(rank=1)}), "'c/kernel'.*non-finite"),
        (lambda: factorize.convert(bad, {"^n$": Svd(rank=1)}), "'n'.*int32"),
        (lambda: factorize.convert(PARAMS, {"bias": Svd(rank=1)}), "'a/bias'.*can't have the rows"),
        (lambda: factorize.convert(twice, {"a/kernel": Svd(rank=1)}), "already"),
        (lambda: factorize.convert(PARAMS, {"b/kernel": Svd(rank=1)}, seen), "'b/kernel'.*not measured"),
        (lambda: factorize.convert(PARAMS, {"a/kernel": Svd(rank=1)}, squares_only), "gram=True"),
        (lambda: factorize.convert(PARAMS, {"a/kernel": Svd(rank=1)}, seen, damping=0.0), "damping"),
        (lambda: factorize.svd(weight(16, 3, 4), Svd(rank=1), seen["a/kernel"]), "meet axes None"),
        (lambda: factorize.svd(weight(6, 5), Svd(rank=6)), "rank 6 of a matrix that has 5"),
        (lambda: factorize.svd(weight(6, 5), Svd(rank=1, rows=(0, 1))), "some left for columns"),
        (lambda: factorize.svd(weight(6, 5), Svd(rank=1, rows=(2,))), "can't have the rows"),
        (lambda: factorize.svd(jnp.zeros((0, 5)), Svd(rank=1)), "nothing to factorize"),
        (lambda: jax.jit(lambda w: factorize.svd(w, Svd(energy=0.5)))(weight(6, 5)), "outside jit"),
        (lambda: Svd(rank=2, energy=0.5), "one of"),
        (lambda: Svd(rank=0), "at least 1"),
        (lambda: Svd(rank=2.5), "rank must be an integer"),
        (lambda: Svd(ratio="0.5"), "must be a number, got '0.5'"),
        (lambda: Svd(rank=2, stacked=None), "stacked must be an integer"),
        (lambda: Svd(rank=2, rows=0), "rows must be a tuple"),
        (lambda: factorize.convert({"stack": weight(3, 8, 8)}, {"stack": Svd(rank=6)}), r"a matrix \[24, 8\]"),
        (lambda: Svd(ratio=1.5), "at most 1"),
        (lambda: factorize.convert_factors(twice, {"a/kernel": Wrong()}), "factors of 'a/kernel'.*wrong"),
    ]
    for case, says in cases:
        with pytest.raises((ValueError, TypeError), match=says):
            case()
    for case in (factorize.convert, factorize.convert_factors):
        with pytest.raises(UnmatchedRuleError):
            case(PARAMS, {"kernal": None})


class Wrong:
    def convert(self, weight):
        raise ValueError("wrong")
