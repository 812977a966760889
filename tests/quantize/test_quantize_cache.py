"""Keys and values that attention caches, quantized a token and head, in a model that knows nothing of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import quantize
from jaxcompress.arrays import Quantized, compressed, dense, nbytes, watch

BATCH, LENGTH, HEADS, SIZE = 2, 9, 3, 8


def attention():
    return nn.MultiHeadDotProductAttention(HEADS, qkv_features=HEADS * SIZE, decode=True)


def decoded(variables, tokens, rules):
    """What a decoder gives, token by token, and its cache at the end."""
    model = attention()
    params, cache = variables["params"], variables["cache"]
    cache = quantize.convert(cache, rules) if rules else cache

    @jax.jit
    def step(cache, x):
        out, updated = compressed(model.apply)({"params": params, "cache": cache}, x, mutable=["cache"])
        return updated["cache"], out

    outs = []
    for t in range(LENGTH):
        cache, out = step(cache, tokens[:, t : t + 1])
        outs.append(out)
    return jnp.concatenate(outs, axis=1), cache


def rounded(x, scheme):
    """A step a token and head, written down a second time."""
    if isinstance(scheme, quantize.Floats):
        step = np.abs(x).max(-1, keepdims=True) / 448
        return (x / step).astype(jnp.float8_e4m3fn).astype(np.float32) * step
    if not scheme.symmetric:
        low, high = (np.clip(end, *clip) for end, clip in ((x.min(-1), (None, 0)), (x.max(-1), (0, None))))
        step = ((high - low) / (2**scheme.bits - 1))[..., None]
        zero = np.round(-(2 ** (scheme.bits - 1)) - low[..., None] / step)
        top = 2 ** (scheme.bits - 1)
        return (np.clip(np.round(x / step) + zero, -top, top - 1) - zero) * step
    step = np.abs(x).max(-1, keepdims=True) / (2 ** (scheme.bits - 1) - 1)
    return np.round(x / step) * step


OWN = (-4, -3, -2)


@pytest.mark.parametrize(
    "scheme",
    [
        quantize.Affine(4, axes=OWN),
        quantize.Affine(4, axes=OWN, symmetric=False),
        quantize.Floats("float8_e4m3fn", axes=OWN),
        pytest.param(quantize.Affine(8, axes=OWN), marks=pytest.mark.slow),
    ],
)
def test_attention_over_a_quantized_cache(scheme, rng):
    """Against attention written down in NumPy, on keys and values that are rounded there."""
    bits, shifted = getattr(scheme, "bits", 8), not getattr(scheme, "symmetric", True)
    fine = scheme == quantize.Affine(8, axes=OWN)
    tokens = jnp.asarray(rng.normal(size=(BATCH, LENGTH, 12)), jnp.float32)
    variables = jax.jit(attention().init)(jax.random.key(0), tokens)
    rules = {"cached_(key|value)$": scheme}
    with watch() as hits:
        out, cache = decoded(variables, tokens, rules)
    assert hits[("Quantized", "dynamic_update_slice", "rule")] == 2 and hits[("Quantized", "dot_general", "rule")] == 2
    assert not any(how == "dense" for *_, how in hits)
    assert isinstance(cache["cached_key"], Quantized) and int(cache["cache_index"]) == LENGTH

    def projected(name):
        p = variables["params"][name]
        return np.einsum("bti,ihd->bthd", tokens, p["kernel"]) + np.asarray(p["bias"])

    query, key, value = projected("query"), rounded(projected("key"), scheme), rounded(projected("value"), scheme)
    np.testing.assert_allclose(cache["cached_key"].materialise(), key, rtol=1e-3, atol=0.02 if fine else 0.3)
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(SIZE)
    logits = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
    last = variables["params"]["out"]
    expected = np.einsum("bqhd,hdo->bqo", mixed, last["kernel"]) + np.asarray(last["bias"])
    np.testing.assert_allclose(out, expected, atol=0.01 if fine else 0.1)  # a tie may be rounded the other way
    plain, whole = decoded(variables, tokens, None)
    assert float(jnp.max(jnp.abs(out - plain))) < (0.03 if fine else 0.6)
    held = BATCH * LENGTH * HEADS * (SIZE * bits // 8 + 4 + shifted)
    assert nbytes(cache) - nbytes(whole) == 2 * held - 2 * BATCH * LENGTH * HEADS * SIZE * 4


def test_what_is_written_is_rounded_and_the_rest_stays(rng):
    empty = quantize.quantize(jnp.zeros((4, 6)), quantize.Affine(8, axes=(0,)))
    first, second = (jnp.asarray(rng.normal(size=(n, 6)) * n, jnp.float32) for n in (1, 2))
    write = jax.jit(compressed(lambda w, x, at: jax.lax.dynamic_update_slice(w, x, (at, 0)), strict=True))
    once = write(empty, first, 0)
    twice = write(once, second, 2)
    np.testing.assert_array_equal(twice.materialise()[0], once.materialise()[0])
    np.testing.assert_array_equal(twice.materialise()[1], 0)
    np.testing.assert_allclose(twice.materialise()[2:], rounded(np.asarray(second), quantize.Affine(8)), rtol=1e-5)
    shared = quantize.quantize(jnp.zeros((4, 6)), quantize.Affine(8))
    out = compressed(lambda w, x: jax.lax.dynamic_update_slice(w, x, (1, 0)))(shared, first)
    assert isinstance(out, jax.Array)  # columns share a step that one row can't change


@pytest.mark.parametrize(
    "scheme",
    [quantize.Affine(8, axes=(0,)), quantize.Affine(8, axes=(0,), symmetric=False), quantize.Floats(axes=(0,))],
)
def test_a_row_with_nan_is_nan_and_the_others_stay(scheme):
    cache = scheme.convert(jnp.ones((3, 4)))
    row = jnp.ones((1, 4)).at[0, 2].set(jnp.nan)
    out = dense(jax.jit(compressed(lambda c, row: jax.lax.dynamic_update_slice(c, row, (1, 0))))(cache, row))
    assert jnp.all(jnp.isnan(out[1])) and jnp.all(jnp.isfinite(out[jnp.array([0, 2])]))


def _rows_at(cache, rows, at):
    return jax.vmap(lambda c, row, i: jax.lax.dynamic_update_slice(c, row[None], (i, 0, 0)))(cache, rows, at)


@pytest.mark.parametrize(
    "write", [_rows_at, lambda cache, rows, at: cache.at[jnp.arange(len(rows)), at].set(rows)], ids=["vmap", "at"]
)
@pytest.mark.parametrize(
    "scheme",
    [
        quantize.Affine(8, axes=OWN),
        quantize.Affine(4, axes=OWN, symmetric=False),
        quantize.Floats("float8_e4m3fn", axes=OWN),
    ],
    ids=["8 bits", "4 bits, shifted", "float8"],
)
def test_each_row_of_a_batch_is_written_at_its_own_place(scheme, write, rng):
    """As continuous batching does it: the cache stays what it was, and holds what row after row would have given."""
    cache = scheme.convert(jnp.asarray(rng.normal(size=(3, 40, 2, 6)), jnp.float32))
    rows, at = jnp.asarray(rng.normal(size=(3, 2, 6)), jnp.float32), jnp.array([1, 39, 0])
    step = jax.jit(compressed(write, strict=True)).lower(cache, rows, at).compile()
    out = step(cache, rows, at)
    assert jax.tree.structure(out) == jax.tree.structure(cache) and nbytes(out) == nbytes(cache)
    one_by_one = cache
    for row in range(3):
        place = compressed(lambda c, x, row=row: jax.lax.dynamic_update_slice(c, x[None, None], (row, at[row], 0, 0)))
        one_by_one = place(one_by_one, rows[row])
    np.testing.assert_allclose(dense(out), dense(one_by_one), rtol=1e-6)
    assert "f32[3,40,2,6]" not in step.as_text()


ROWS, PLACES = jnp.array([2, 0, 1]), jnp.array([3, 1, 3])
SCATTERED = {  # what is written, and with indices of its own for each example
    "three axes": ((3, 6), lambda c, x, at: c.at[ROWS, at, jnp.array([1, 0, 1])].set(x)),
    "two axes, one between": ((3, 4, 6), lambda c, x, at: c.at[at % 3, :, jnp.array([1, 0, 1])].set(x)),
    "all rows": ((3, 3, 2, 6), lambda c, x, at: c.at[:, (at + jnp.arange(3)) % 4].set(x)),
    "3-d indices": (
        (1, 3, 2, 2, 6),
        lambda c, x, at: c.at[jnp.arange(3)[None, :, None], jnp.stack([at, (at + 1) % 4], -1)[None]].set(x),
    ),
    "out of range": ((3, 2, 6), lambda c, x, at: c.at[ROWS, at * 2 - 1].set(x)),
    "one": ((2, 6), lambda c, x, at: c.at[1, at[0]].set(x)),
}


@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "vmap"])
@pytest.mark.parametrize("name", SCATTERED)
def test_scattered_rows_are_rounded_and_the_rest_stays(name, mapped, rng):
    """Against NumPy in float64: the rows rounded by their largest number, then put there as an array has them put."""
    shape, write = SCATTERED[name]
    cache = quantize.Affine(8, axes=OWN).convert(jnp.asarray(rng.normal(size=(3, 4, 2, 6)), jnp.float32))
    at = PLACES[None] + jnp.array([[0], [-1]]) if mapped else PLACES
    x = rng.normal(size=(*((2,) if mapped else ()), *shape))
    step = np.abs(np.float32(x)).max(-1, keepdims=True) / np.float32(127)
    kept = dense(cache)
    if mapped:
        cache, kept = jax.tree.map(lambda part: jnp.stack([part, part]), (cache, kept))
        write = jax.vmap(write)
    out = jax.jit(compressed(write, strict=True))(cache, jnp.asarray(x, jnp.float32), at)
    assert jax.tree.structure(out) == jax.tree.structure(cache)
    wanted = write(kept, jnp.asarray(np.round(np.float32(x) / step) * step), at)
    np.testing.assert_allclose(dense(out), wanted, rtol=1e-5, atol=1e-6)


def test_a_row_that_shares_a_step_or_a_byte_with_others_is_not_written_alone():
    rows, at = jnp.ones((3, 2, 6)), jnp.array([1, 2, 0])
    for axes in ((-3, -2), (-4, -3)):  # the batch's rows share steps, or the heads of a token
        cache = quantize.Affine(8, axes=axes).convert(jnp.ones((3, 4, 2, 6)))
        out = compressed(_rows_at)(cache, rows, at)
        assert isinstance(out, Quantized) == (axes == (-4, -3))
    cache = quantize.Affine(4, axes=(-4, -3, -2, -1)).convert(jnp.ones((3, 4, 2, 6)))
    out = compressed(lambda c: c.at[:, :, :, 1].set(0.5))(cache)
    assert isinstance(out, jax.Array) and float(out[0, 0, 0, 1]) == 0.5


def test_a_cache_of_a_symbolic_batch_is_exported(rng):
    scheme = quantize.Affine(8, axes=OWN)
    (batch,) = jax.export.symbolic_shape("b")
    cache = jax.eval_shape(lambda: scheme.convert(jnp.zeros((2, 4, 2, 6))))
    cache = jax.tree.map(lambda part: jax.ShapeDtypeStruct((batch, *part.shape[1:]), part.dtype), cache)
    of_rows = jax.ShapeDtypeStruct((batch, 2, 6), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)

    def step(cache, rows, at):
        cache = _rows_at(cache, rows, at)
        return cache, jnp.einsum("bthd,bhd->bth", cache, rows)

    fn = jax.jit(compressed(step))
    exported = jax.export.deserialize(jax.export.export(fn)(cache, *of_rows).serialize())
    args = scheme.convert(jnp.ones((3, 4, 2, 6))), jnp.asarray(rng.normal(size=(3, 2, 6)), jnp.float32), jnp.arange(3)
    for one, other in zip(jax.tree.leaves(exported.call(*args)), jax.tree.leaves(fn(*args)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


BEAMS, DONE = jnp.array([2, 0, 2]), jnp.array([True, False, True])
REORDERED = {
    "beams": lambda c: c[BEAMS],
    "take, out of range": lambda c: jnp.take(c, jnp.array([2, 7, 0]), axis=0),
    "heads": lambda c: c[:, :, jnp.array([1, 0])],
    "of each row": lambda c: jax.vmap(lambda c, at: c[at])(c, jnp.array([[3, 0, 1, 1], [0, 0, 2, 3], [1, 2, 3, 0]])),
    "where": lambda c: jnp.where(DONE[:, None, None, None], c, c[BEAMS]),
    "where, by token": lambda c: jnp.where((jnp.arange(4) < 2)[:, None, None], c, c[BEAMS]),
    "where, vmapped": lambda c: jax.vmap(jnp.where)(DONE, c, c[BEAMS]),
}

FEWER = {
    "some": lambda c: c[:2],
    "the beginning": lambda c: c[:, :3],
    "one": lambda c: c[1],
    "one, found as it runs": lambda c: c[jnp.argmax(DONE)],
}


@pytest.mark.parametrize(
    "scheme",
    [
        quantize.Affine(4, axes=OWN, symmetric=False),
        pytest.param(quantize.Affine(8, axes=OWN), marks=pytest.mark.slow),
        pytest.param(quantize.Floats("float8_e4m3fn", axes=OWN), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", REORDERED)
def test_rows_in_another_order_or_of_two_caches_stay_quantized(name, scheme, rng):
    cache = scheme.convert(jnp.asarray(rng.normal(size=(3, 4, 2, 6)), jnp.float32))
    out = compressed(REORDERED[name])(cache)
    assert jax.tree.structure(out) == jax.tree.structure(cache) and nbytes(out) == nbytes(cache)
    np.testing.assert_array_equal(dense(out), REORDERED[name](dense(cache)))


@pytest.mark.parametrize("name", FEWER)
def test_the_first_rows_stay_quantized(name, rng):
    cache = quantize.Affine(4, axes=OWN).convert(jnp.asarray(rng.normal(size=(3, 4, 2, 6)), jnp.float32))
    out = compressed(FEWER[name])(cache)
    assert isinstance(out, type(cache)) and out.bits == 4 and nbytes(out) < nbytes(cache)
    np.testing.assert_array_equal(dense(out), FEWER[name](dense(cache)))


def test_what_shares_a_step_is_not_taken_apart(rng):
    cache = quantize.Affine(8, axes=OWN).convert(jnp.asarray(rng.normal(size=(3, 4, 2, 6)), jnp.float32))
    for fn in (
        lambda c: jnp.where(jnp.arange(6) < 2, c, c[BEAMS]),
        lambda c: c[..., jnp.arange(5, -1, -1)],
        lambda c: c[:, ::2],
    ):
        out = compressed(fn)(cache)
        assert isinstance(out, jax.Array)
        np.testing.assert_array_equal(out, fn(dense(cache)))
    # of another length: what JAX has traced before, as `where` above by its newer versions, is not told of again
    longer = quantize.Affine(8, axes=OWN).convert(jnp.asarray(rng.normal(size=(3, 5, 2, 6)), jnp.float32))
    with pytest.raises(TypeError, match=r"Quantized of shape .* is carried by a `scan` .*: select_n had no rule"):
        compressed(
            lambda c: jax.lax.fori_loop(0, 2, lambda i, c: jnp.where(jnp.arange(6) < 2, c, c[BEAMS]), c),
        )(longer)


def test_beam_search_in_a_loop(rng):
    """Writes, new orders and finished rows inside one scan, against the same on the leaf's parts, one by one."""
    scheme, steps = quantize.Affine(8, axes=OWN), 4
    cache = scheme.convert(jnp.zeros((3, steps, 2, 6)))
    rows = jnp.asarray(rng.normal(size=(steps, 3, 2, 6)), jnp.float32)
    orders = jnp.asarray(rng.integers(0, 3, (steps, 3)))

    def step(cache, at):
        i, row, order = at
        new = jax.lax.dynamic_update_slice(cache, row[:, None], (0, i, 0, 0))[order]
        new = jnp.where((order == 1)[:, None, None, None], cache, new)
        return new, jnp.einsum("bthd,bhd->bth", new, row)

    at = jnp.arange(steps), rows, orders
    out, scores = jax.jit(compressed(lambda c, at: jax.lax.scan(step, c, at), strict=True))(cache, at)
    wanted = np.zeros(cache.shape)
    for i in range(steps):
        largest = np.abs(rows[i]).max(-1, keepdims=True)
        new = wanted.copy()
        new[:, i] = np.round(np.asarray(rows[i], np.float64) * 127 / largest) * largest / 127
        wanted = np.where(np.asarray(orders[i] == 1)[:, None, None, None], wanted, new[np.asarray(orders[i])])
        np.testing.assert_allclose(scores[i], np.einsum("bthd,bhd->bth", wanted, rows[i]), atol=1e-4)
    assert isinstance(out, Quantized)
    np.testing.assert_allclose(dense(out), wanted, atol=1e-5)
