"""Scores against worked examples and what their papers promise of them; masks chosen from them and held."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import prune

W = jnp.array([[1.0, -2.0, 3.0], [-4.0, 0.5, 0.0]])


def test_saliency_is_the_first_order_change_of_the_loss() -> None:
    loss = lambda w: jnp.sum(jnp.tanh(w @ jnp.array([0.3, -0.2, 0.1])))  # noqa: E731
    scores, tiny = prune.saliency(W, jax.grad(loss)(W)), 1e-3
    for i in range(2):
        for j in range(3):
            change = loss(W.at[i, j].multiply(1 - tiny)) - loss(W)
            assert float(scores[i, j]) == pytest.approx(abs(float(change)) / tiny, abs=2e-3)


def test_fisher_is_exact_on_a_quadratic() -> None:
    """Where the Fisher information is the Hessian h, removing w from a minimum costs h w**2 / 2."""
    h = jnp.array([[2.0, 1.0, 0.5], [1.0, 8.0, 3.0]])
    cost = lambda w: 0.5 * jnp.sum(h * (w - W) ** 2)  # noqa: E731
    want = [[float(cost(W.at[i, j].set(0.0))) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(prune.fisher(W, h), want, rtol=1e-6)


def test_wanda_ranks_by_the_norm_of_the_term() -> None:
    x = jax.random.normal(jax.random.key(0), (50, 2)) * jnp.array([10.0, 0.1])
    terms = np.linalg.norm(np.asarray(x)[:, :, None] * np.asarray(W)[None], axis=0)  # what each weight adds
    np.testing.assert_allclose(prune.wanda(W, jnp.linalg.norm(x, axis=0)), terms, rtol=1e-5)
    np.testing.assert_allclose(prune.wanda(W.T, jnp.linalg.norm(x, axis=0), axis=-1), terms.T, rtol=1e-5)
    with pytest.raises(ValueError, match="one norm for each of the 2 inputs"):
        prune.wanda(W, jnp.ones(3))


def test_geometric_median_finds_the_replaceable_filter() -> None:
    """Five filters on a line: the middle one has the least sum of distances, 0.6 to each neighbour and 1.2."""
    kernel = jnp.linspace(-1, 1.4, 5) * jnp.array([0.6, 0.8]).reshape(2, 1)
    scores = prune.geometric_median(kernel)
    np.testing.assert_allclose(scores[0], [6.0, 4.2, 3.6, 4.2, 6.0], rtol=1e-5)
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_allclose(prune.geometric_median(kernel.T, axis=0), scores.T, rtol=1e-6)
    mask = prune.choose({"k": scores[None, None]}, {"k": prune.filters(0.2)})["k"]
    np.testing.assert_array_equal(mask[0, 0], [[True, True, False, True, True]] * 2)


def test_active_counts_what_is_not_zero() -> None:
    x = jnp.array([[[0.0, 1.0], [0.0, 0.0]], [[0.0, 2.0], [3.0, 1.0]]])
    np.testing.assert_array_equal(prune.active(x), [0.25, 0.75])


def test_criteria_of_two_checkpoints() -> None:
    """Each criterion keeps, of these (initial, final) pairs, the one that its name says."""
    initial, final = jnp.array([0.1, -0.2, 3.0, -2.0, 0.9]), jnp.array([-2.2, 0.15, 0.3, -2.1, 4.0])
    best = {
        "large_final": 4, "small_final": 1, "large_init": 2, "small_init": 0, "large_init_large_final": 3,
        "small_init_small_final": 1, "magnitude_increase": 4, "movement": 4,
    }  # fmt: skip
    assert {name: int(jnp.argmax(score(initial, final))) for name, score in prune.CRITERIA.items()} == best
    assert float(prune.CRITERIA["movement"](initial, final)[0]) == pytest.approx(2.3)


def test_chosen_masks_are_held_through_a_training() -> None:
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (12, 9)), "bias": jnp.ones(9)}}
    scores = jax.tree.map(prune.saliency, params, jax.tree.map(jnp.cos, params))
    masks = prune.choose(scores, {"kernel": 0.75})
    order = np.argsort(np.ravel(scores["a"]["kernel"]), kind="stable")
    assert masks["a"]["bias"] is None and set(np.flatnonzero(~masks["a"]["kernel"])) == set(order[:81])
    tx = optax.chain(optax.adam(0.1), prune.fixed(masks))
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["a"]["kernel"] == 0, ~masks["a"]["kernel"])
    np.testing.assert_array_equal(prune.masks(state)["a/kernel"], masks["a"]["kernel"])
    assert int(state[1].step) == 3


def test_bad_scores_and_masks() -> None:
    with pytest.raises(ValueError, match=r"scores are not finite .* 'w'"):
        prune.choose({"w": jnp.array([1.0, jnp.nan])}, {"w": 0.5})
    with pytest.raises(ValueError, match="no parameter for the mask of 'w'"):
        prune.fixed({"w": jnp.ones(3, bool)}).init({"v": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\), but the parameter has \(4,\)"):
        prune.fixed({"w": jnp.ones(3, bool)}).init({"w": jnp.ones(4)})
    with pytest.raises(ValueError, match="the mask of 'w' is float32: want bool"):
        prune.fixed({"w": jnp.ones(4)}).init({"w": jnp.ones(4)})
    tx, w = prune.fixed({"w": jnp.ones(3, bool)}), {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="the pruning state is of other parameters"):
        tx.update(w, prune.fixed({}).init({"v": jnp.ones(3)}), w)
    with pytest.raises(ValueError, match="not passing `params`"):
        prune.fixed({}).update({}, prune.fixed({}).init({}))
