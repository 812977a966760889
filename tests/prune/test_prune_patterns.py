"""Patterns against loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import prune
from jaxcompress.prune._ranking import Ranking, lowest

choose = jax.jit(lambda scores, k, stack: lowest([Ranking([scores], k, stack)])[0][0], static_argnames="stack")


def mask(pattern: prune.Pattern, scores: jax.Array, k: int | None = None) -> np.ndarray:
    pattern.check(scores.shape)
    k = pattern.budget(scores.shape) if k is None else k
    return np.asarray(pattern.keep(choose(pattern.pool(scores), jnp.uint32(k), stack=pattern.stack), scores.shape))


def nm_oracle(scores: np.ndarray, n: int, m: int, axis: int) -> np.ndarray:
    """Group by group; zeros fill up the last one and go first."""
    lines = np.moveaxis(scores, axis, -1)
    keep = np.ones(lines.shape, bool)
    for index in itertools.product(*map(range, lines.shape[:-1])):
        for start in range(0, lines.shape[-1], m):
            group = lines[index][start : start + m]
            drop = max(0, len(group) - n)
            keep[index][start : start + m][np.argsort(group, kind="stable")[:drop]] = False
    return np.moveaxis(keep, -1, axis)


@pytest.mark.parametrize(
    "shape, n, m, axis",
    [((8, 6), 2, 4, -2), ((7, 5), 3, 4, 1), ((3, 3, 6, 4), 2, 4, -2), ((9, 2), 4, 8, 0),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in (
         ((8,), 2, 4, 0), ((6, 8), 1, 2, 1), ((7, 5), 2, 4, 0), ((2, 5, 9), 1, 4, 2), ((5, 4), 4, 4, 0),
         ((1, 3), 1, 4, 0),
     ))],
)  # fmt: skip
def test_nm_keeps_the_best_of_every_group(shape: tuple[int, ...], n: int, m: int, axis: int) -> None:
    pattern = prune.NM(n, m, axis=axis, pad=True)
    for seed in range(5):
        scores = np.random.default_rng(seed).integers(0, 6, shape).astype(np.float32)  # with many ties
        want = nm_oracle(scores, n, m, axis)
        pooled = np.asarray(jax.jit(pattern.pool)(scores))
        np.testing.assert_array_equal(pooled, np.where(want, np.nan, scores))
        assert pattern.budget(shape) == (~want).sum()
    np.testing.assert_array_equal(mask(pattern, jnp.asarray(scores)), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nm_ramps_weight_by_weight(dtype: jnp.dtype) -> None:
    """On the way to 2:4 every number of weights is reached, the lowest of those that go in the end."""
    pattern = prune.NM(2, 4)
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (16, 6))).astype(dtype)
    final = ~mask(pattern, scores)
    order = [i for i in np.argsort(np.asarray(scores, np.float32).ravel(), kind="stable") if final.ravel()[i]]
    for k in (0, 1, 5, 24, 47, 48):
        np.testing.assert_array_equal(np.flatnonzero(~mask(pattern, scores, k)), np.sort(order[:k]))


def test_unstructured_prunes_a_rounded_number() -> None:
    for size, sparsity in [(10, 0.25), (10, 0.26), (1000, 0.999), (7, 0.5), (3, 0.0)]:
        assert abs(prune.Unstructured(sparsity).budget((size,)) - sparsity * size) <= 0.5
    assert (~mask(prune.Unstructured(0.34), jnp.arange(1.0, 11))).sum() == 3


def test_stack_gives_each_layer_its_sparsity() -> None:
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (3, 10, 10))) * jnp.array([1, 10, 100]).reshape(3, 1, 1)
    np.testing.assert_array_equal(mask(prune.Unstructured(0.73, stack=1), scores).sum((1, 2)), [27, 27, 27])
    assert mask(prune.Unstructured(0.3), scores)[2].mean() > 0.95  # ranked as one, the small ones go


def block_oracle(scores: np.ndarray, sizes: tuple[int, ...], norm: str) -> tuple[list, list]:
    """Every block's slices and its score."""
    starts = itertools.product(*(range(0, n, size) for n, size in zip(scores.shape, sizes, strict=True)))
    blocks = [tuple(slice(s, s + size) for s, size in zip(start, sizes, strict=True)) for start in starts]
    values = [scores[b].astype(np.float64) for b in blocks]
    return blocks, [v.mean() if norm == "l1" else np.sqrt((v**2).mean()) for v in values]


@pytest.mark.parametrize(
    "pattern, shape, sizes",
    [
        (prune.Blocks(0.5, (4, 2)), (8, 6), (4, 2)),
        (prune.Blocks(0.4, (4, 4), pad=True, norm="l2"), (10, 7), (4, 4)),
        (prune.vectors(0.6), (9, 5), (1, 5)),
        (prune.vectors(0.6, axis=-2), (9, 5), (9, 1)),
        (prune.vectors(0.3, 4, axis=-2, norm="l2"), (2, 8, 3), (1, 4, 1)),
        (prune.kernels(0.55), (3, 3, 4, 5), (3, 3, 1, 1)),
        (prune.filters(0.5, norm="l2"), (3, 2, 4, 6), (3, 2, 4, 1)),
    ],
)
def test_blocks_go_as_a_whole_by_their_norm(pattern: prune.Blocks, shape: tuple, sizes: tuple) -> None:
    scores = np.abs(np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    blocks, values = block_oracle(scores, sizes, pattern.norm)
    want = np.ones(shape, bool)
    for i in np.argsort(values, kind="stable")[: round(pattern.sparsity * len(blocks))]:
        want[blocks[i]] = False
    assert pattern.units(shape) == len(blocks)
    np.testing.assert_array_equal(mask(pattern, jnp.asarray(scores)), want)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: prune.Unstructured(1.0), r"in \[0, 1\), got 1.0"),
        (lambda: prune.Unstructured(-0.1), r"in \[0, 1\), got -0.1"),
        (lambda: prune.Unstructured(float("nan")), r"in \[0, 1\), got nan"),
        (lambda: prune.Unstructured(0.5, stack=-1), "stack must be"),
        (lambda: prune.Unstructured(0.5, stack=3).check((4, 4)), "stack=3 leading axes"),
        (lambda: prune.Blocks(1.5, (2, 2)), r"in \[0, 1\), got 1.5"),
        (lambda: prune.Blocks(0.5, (0, 2)), "a length of 1 or more, or None"),
        (lambda: prune.Blocks(0.5, (2,), norm="max"), "norm must be 'l1' or 'l2', got 'max'"),
        (lambda: prune.Blocks(0.5, (2, 3)).check((4, 4)), r"do not divide the shape \(4, 4\); .* pad=True"),
        (lambda: prune.filters(0.5).check((4, 4)), "need 4 axes"),
        (lambda: prune.vectors(0.5, axis=0), "counted from the end"),
        (lambda: prune.NM(5, 4), "got 5:4"),
        (lambda: prune.NM(0, 4), "got 0:4"),
        (lambda: prune.NM(2, 4).check((6, 8)), r"4 does not divide 6; .* pad=True"),
        (lambda: prune.NM(2, 4).check((8,)), "no such axis"),
        (lambda: prune.NM(2, 4, axis=2).check((8, 8)), "no such axis"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
