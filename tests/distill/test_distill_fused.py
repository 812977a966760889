"""The chunked loss at a large vocabulary against the plain one: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcompress import distill, train


def plain(student, student_head, teacher, teacher_head, labels, where, *, alpha, beta, temperature):
    ours, theirs = student @ student_head, teacher @ teacher_head
    soft = distill.jensen_shannon_loss(ours, theirs, beta, temperature=temperature, where=where)
    hard = distill.hard_label_loss(ours, labels, where=where)
    return distill.masked_mean(alpha * soft + (1 - alpha) * hard, where)


def case(rng, tokens=37, vocabulary=50, dtype="float32"):
    shapes = ((tokens, 6), (6, vocabulary), (tokens, 9), (9, vocabulary))
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    where = rng.random(tokens) < 0.8
    return arrays, np.where(where, rng.integers(0, vocabulary, tokens), -100), where


@pytest.mark.parametrize("chunk", [1, 8, 37, 100, None])
@pytest.mark.parametrize(
    "alpha,beta,temperature", [pytest.param(1.0, 0.0, 2.0, marks=pytest.mark.slow), (0.7, 0.5, 1.0)]
)
def test_value_and_gradients_are_those_of_the_plain_loss(rng, chunk, alpha, beta, temperature):
    arrays, labels, where = case(rng)
    options = {"alpha": alpha, "beta": beta, "temperature": temperature}

    def fused(s, w):
        return 3 * distill.fused_distillation_loss(s, w, *arrays[2:], labels, where=where, chunk=chunk, **options)

    def naive(s, w):
        return 3 * plain(s, w, *arrays[2:], labels, where, **options)

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*arrays[:2]) for f in (fused, naive))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(fused)(*arrays[:2]), want[0], rtol=1e-5)  # without gradients, another path
    for ours, theirs in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.max(np.abs(theirs)))


def test_padding_may_hold_anything_and_teacher_stays(rng):
    arrays, labels, where = case(rng)
    spoiled = [jnp.where(where[:, None], arrays[0], jnp.nan), *arrays[1:]]

    def loss(*arrays):
        return distill.fused_distillation_loss(*arrays, labels, alpha=0.5, where=where, chunk=8)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*spoiled)
    np.testing.assert_allclose(value, loss(*arrays), rtol=1e-6)
    assert np.all(np.isfinite(gradients[1])) and not np.any(gradients[0][~where])
    assert not np.any(gradients[2]) and not np.any(gradients[3])
    nothing = distill.fused_distillation_loss(*arrays, where=np.zeros(37, bool))
    assert nothing == 0


def test_half_precision_head_sums_in_float32(rng):
    """Many chunks in bfloat16: the head's gradient is as good as one rounding, not as 64 of them."""
    arrays, *_ = case(rng, tokens=256, vocabulary=64, dtype="bfloat16")
    wide = [a.astype("float32") for a in arrays]

    def of(arrays):
        f = lambda w: distill.fused_distillation_loss(arrays[0], w, *arrays[2:], chunk=4)  # noqa: E731
        return jax.jit(jax.grad(f))(arrays[1])

    got, want = of(arrays), of(wide)
    assert got.dtype == jnp.bfloat16
    assert np.linalg.norm(got.astype("float32") - want) < 0.005 * np.linalg.norm(want)


def test_under_jit_with_scheduled_weights(rng):
    arrays, labels, where = case(rng)
    loss = jax.jit(lambda a, t: distill.fused_distillation_loss(*arrays, labels, alpha=a, temperature=t, where=where))
    want = plain(*arrays, labels, where, alpha=0.3, beta=0.0, temperature=2.0)
    np.testing.assert_allclose(loss(0.3, 2.0), want, rtol=1e-5)


def test_memory_at_a_large_vocabulary():
    """Compiled temporary bytes of value and gradients: an eighth of the plain loss's, and a value alone needs no more
    than a few chunks of logits."""
    shapes = [(2048, 64), (64, 16384), (2048, 64), (64, 16384)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def fused(*a):
        return distill.fused_distillation_loss(*a, temperature=2.0, chunk=64)

    def naive(s, w, t, v):
        return distill.soft_target_loss(s @ w, t @ v, temperature=2.0).mean()

    def temp(f):
        return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temp(jax.value_and_grad(fused, argnums=(0, 1))) <= temp(jax.value_and_grad(naive, argnums=(0, 1))) / 8
    assert temp(fused) <= 5 * 64 * 16384 * 4


def test_bad_input(rng):
    arrays, labels, _ = case(rng)
    wrong = [
        (lambda: distill.fused_distillation_loss(*arrays, alpha=0.5), "labels are needed"),
        (lambda: distill.fused_distillation_loss(*arrays, labels[:3], alpha=0.5), r"must be \[tokens\]"),
        (lambda: distill.fused_distillation_loss(*arrays[:3], arrays[3].T), "must fit"),
        (lambda: distill.fused_distillation_loss(arrays[0][0], *arrays[1:]), r"\[tokens, features\]"),
        (lambda: distill.fused_distillation_loss(*arrays, beta=2.0), "beta must lie in"),
        (lambda: distill.fused_distillation_loss(*arrays, chunk=0), "chunk must be"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="floating"):
        distill.fused_distillation_loss(arrays[0].astype(int), *arrays[1:])


def test_in_a_shard_map_each_device_takes_its_tokens_through_the_whole_heads(rng):
    arrays, _, _ = case(rng, tokens=16)

    def mean(student, student_head, *teacher):
        return jax.lax.pmean(distill.fused_distillation_loss(student, student_head, *teacher, chunk=1), "data")

    sharded = jax.shard_map(mean, mesh=train.make_mesh(), in_specs=(P("data"), P(), P("data"), P()), out_specs=P())
    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*arrays) for f in (sharded, distill.fused_distillation_loss)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
