"""The k lowest scores against NumPy's stable sort, on every kind of score."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from jaxcompress.prune._ranking import Ranking, _kth, _parts, kth_lowest, lowest
from jaxcompress.prune._renew import scaled

mark = jax.jit(lambda scores, k: lowest([Ranking(scores, k)])[0])


def oracle(scores: list[np.ndarray], k: int) -> np.ndarray:
    flat = np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in scores])
    marked = np.zeros(flat.size, bool)
    order = np.argsort(flat, kind="stable")  # NumPy puts NaN last
    marked[order[~np.isnan(flat[order])][:k]] = True
    return marked


def flat(marked: list[jax.Array]) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in marked])


floats = st.one_of(
    st.floats(width=32, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan]),
)


@settings(max_examples=150, deadline=None)
@given(scores=hnp.arrays(np.float32, 48, elements=floats), k=st.integers(0, 48))
def test_any_float32(scores: np.ndarray, k: int) -> None:
    np.testing.assert_array_equal(flat(mark([scores], jnp.uint32(k))), oracle([scores], k))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.5, 0.9, 0.999, 1.0])
def test_large_with_ties(dtype: jnp.dtype, sparsity: float) -> None:
    scores = [
        jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate([(97, 64), (3, 5, 7)])
    ]
    k = round(sparsity * (97 * 64 + 105))
    np.testing.assert_array_equal(flat(mark(scores, jnp.uint32(k))), oracle([np.asarray(x) for x in scores], k))


@pytest.mark.parametrize("k", [0, 1, 7, 5000, 9999, 10000])
def test_equal_scores_go_by_index(k: int) -> None:
    marked = flat(mark([jnp.full((100, 100), 0.25)], jnp.uint32(k)))
    np.testing.assert_array_equal(marked, np.arange(10000) < k)


def test_stacked_layers_are_ranked_apart() -> None:
    scores = jax.random.normal(jax.random.key(0), (2, 3, 8, 16)) * jnp.arange(1, 7).reshape(2, 3, 1, 1)
    marked = jax.jit(lambda x: lowest([Ranking([x], jnp.uint32(37), stack=2)])[0][0])(scores)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(np.asarray(marked[i, j]).ravel(), oracle([scores[i, j]], 37))


def test_rankings_side_by_side_do_not_meet() -> None:
    """Of different dtypes, sizes, numbers and stacks, in one loop."""
    a, b, c = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(50, 3), (4, 30), (7,)]))
    b = b.astype(jnp.bfloat16)

    @jax.jit
    def together(a, b, c):
        return lowest(
            [
                Ranking([a], jnp.uint32(99)),
                Ranking([b], jnp.uint32(7), 1),
                Ranking([c], jnp.uint32(0)),
            ]
        )

    (got_a,), (got_b,), (got_c,) = together(a, b, c)
    np.testing.assert_array_equal(np.asarray(got_a).ravel(), oracle([a], 99))
    np.testing.assert_array_equal(got_b, [oracle([row], 7) for row in b])
    assert not got_c.any()


def test_under_vmap() -> None:
    scores, k = jax.random.normal(jax.random.key(0), (5, 40)), jnp.array([0, 1, 20, 39, 40], jnp.uint32)
    marked = jax.jit(jax.vmap(lambda x, n: lowest([Ranking([x], n)])[0][0]))(scores, k)
    for row, x, n in zip(marked, scores, k, strict=True):
        np.testing.assert_array_equal(row, oracle([x], int(n)))


@pytest.mark.parametrize("size", [128 * 50, 6 * 1000, 997])
def test_one_device_counts_by_bytes_and_marks_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = jnp.round(jax.random.normal(jax.random.key(0), (size,)), 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    marked = jax.jit(lambda x: mark([x], jnp.uint32(size // 2))[0])(scores)
    np.testing.assert_array_equal(marked, oracle([scores], size // 2))


def test_number_of_passes_is_bounded() -> None:
    """Halving alone needs 32 passes for the value and 12 for the index; interpolation must not cost much more."""
    rng = np.random.default_rng(0)
    spiteful = np.where(rng.random(4096) < 0.9, 1.0, 2.0 ** rng.integers(-120, 120, 4096)).astype(np.float32)

    @jax.jit
    def passes_of(scores, k):
        ranking = Ranking([scores], k)
        return _kth([ranking], *_parts([ranking]))[0].passes

    for scores in (spiteful, rng.standard_normal(4096), rng.random(4096), rng.random(4096) ** 9, np.ones(4096)):
        passes = [int(passes_of(np.float32(scores), jnp.uint32(k))) for k in (1, 41, 2048, 3686, 4055, 4095)]
        assert max(passes) <= 56, passes
        if scores is not spiteful and scores.std() > 0:
            assert np.mean(passes) <= 27, passes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kth_lowest_is_the_value_that_sorting_finds(dtype: jnp.dtype) -> None:
    arrays = [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate([(40, 30), (77,)])]
    ordered = np.sort(np.concatenate([np.asarray(jnp.abs(x), np.float32).ravel() for x in arrays]))
    find = jax.jit(lambda arrays, k: kth_lowest(Ranking(arrays, k, score=jnp.abs)))
    for k in (1, 2, 638, 1276, 1277):
        assert float(find(arrays, jnp.uint32(k))) == ordered[k - 1]


@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 2**31 - 1), share=st.floats(0, 1, width=32))
def test_scaled_number_is_exact_to_one(number: int, share: float) -> None:
    got = int(scaled(number, np.float32(share)))
    assert abs(got - number * share) <= 1 + number * 2.0**-25  # the share has 24 bits after the point
    assert int(scaled(number, jnp.float32(1))) == number and int(scaled(number, jnp.float32(0))) == 0
