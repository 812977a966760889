"""A padded batch is the batch without its padding: value and gradient, whatever the padding holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import distill

FEATURES = {
    "distance": distill.distance_relation_loss,
    "angle": distill.angle_relation_loss,
    "relational": distill.relational_loss,
    "similarity": distill.similarity_preserving_loss,
    "correlation": distill.correlation_congruence_loss,
    "bilinear": functools.partial(distill.correlation_congruence_loss, kernel="bilinear", normalize=False),
    "consecutive": distill.consecutive_correlation_loss,
    "probabilistic": distill.probabilistic_transfer_loss,
    "in_batch_contrastive": lambda s, t, where=None: distill.in_batch_contrastive_loss(s, t, where=where).sum(),
    "dist": functools.partial(distill.dist_loss, temperature=2.0),
    "batch_correlation": distill.batch_correlation_loss,
    "class_correlation": distill.class_correlation_loss,
    "multi_level": distill.multi_level_loss,
}
ROWS, PADDED = 5, 8


@functools.cache
def evaluate(name, masked):
    loss = FEATURES[name]
    if masked:
        return jax.jit(jax.value_and_grad(lambda s, t, where: loss(s, t, where=where)))
    return jax.jit(jax.value_and_grad(lambda s, t: loss(s, t)))


def pair(rng, rows=ROWS):
    return (rng.normal(size=(rows, 6)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("name", FEATURES)
def test_padding_changes_neither_value_nor_gradient(name, rng):
    """Zeros, huge numbers and NaN behind the examples, or copies of an example: nothing of them shows."""
    student, teacher = pair(rng)
    value, gradient = evaluate(name, False)(student, teacher)
    where = np.arange(PADDED) < ROWS
    for filling in (0.0, 1e4, np.nan, "copies"):
        rest = student[:3] if filling == "copies" else np.full((PADDED - ROWS, 6), filling, np.float32)
        padded = [np.concatenate([x, rest]) for x in (student, teacher)]
        got, moved = evaluate(name, True)(*padded, where)
        np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(moved[:ROWS], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())
        np.testing.assert_array_equal(moved[ROWS:], 0)
    for where in (np.zeros(PADDED, bool), np.arange(PADDED) == 3):  # nobody, and one alone
        got, moved = evaluate(name, True)(*padded, where)
        assert np.isfinite(got) and np.isfinite(moved).all()
        if not where.any():
            assert got == 0 and not moved.any()


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "consecutive"])
def test_who_counts_may_stand_anywhere(name, rng):
    student, teacher = pair(rng)
    value, gradient = evaluate(name, False)(student, teacher)
    places = np.array([0, 2, 3, 5, 6])
    padded = [np.full((PADDED, 6), 7.0, np.float32) for _ in range(2)]
    for x, own in zip(padded, (student, teacher), strict=True):
        x[places] = own
    got, moved = evaluate(name, True)(*padded, np.isin(np.arange(PADDED), places))
    np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(moved[places], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


def test_contrast_memory_does_not_learn_of_padding(rng):
    """The same losses, gradients, constants and memory as without the padding, whose index is a real example's."""
    memory = distill.contrast_memory(jax.random.key(0), 20, 6)
    student, teacher = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair(rng))
    indices = np.array([4, 9, 2, 7, 1])
    others = np.concatenate([indices[:, None], rng.integers(0, 20, (ROWS, 4))], axis=1)

    def loss(student, teacher, indices, others, where=None):
        losses, after = distill.contrastive_loss(student, teacher, memory, indices, others, where=where)
        return losses.sum(), (losses, after)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, (losses, after) = run(student, teacher, indices, others)
    rest = np.full((3, 6), np.nan, np.float32)
    padded = [np.concatenate([x, rest]) for x in (student, teacher)]
    padded += [np.concatenate([indices, [4, 4, 4]]), np.concatenate([others, np.full((3, 5), 4)])]
    moved, (got, then) = run(*padded, np.arange(PADDED) < ROWS)
    np.testing.assert_allclose(got, [*losses, 0, 0, 0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), then, after)
    for a, b in zip(moved, gradients, strict=True):
        np.testing.assert_allclose(a, np.concatenate([b, np.zeros((3, 6))]), rtol=1e-4, atol=1e-5)
    _, (got, then) = run(*padded, jnp.zeros(PADDED, bool))
    assert not got.any()
    jax.tree.map(np.testing.assert_array_equal, then, memory)


def test_a_mask_of_another_shape_is_an_error(rng):
    student, teacher = pair(rng)
    for name in ("distance", "dist", "probabilistic", "multi_level"):
        with pytest.raises(ValueError, match="where must have"):
            FEATURES[name](student, teacher, where=np.ones(3, bool))
