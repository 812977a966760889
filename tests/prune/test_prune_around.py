"""Pruning around an optimizer: what it keeps from it, what it clears, and inside which wrappers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcompress import paths, prune

SHAPES = {"a": (24, 16), "b": (16, 10)}  # 16 packs into bytes, 10 does not
SPARSITY = 0.75
RULES = {"kernel$": SPARSITY}
REWIRE = prune.rewire(RULES, key=jax.random.key(5), end=20, every=2)


def parameters() -> dict:
    key = jax.random.key(0)
    return {
        name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape), "bias": jnp.ones(shape[-1])}
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def gradients(params: dict, step: int) -> dict:
    """Never zero, and other weights are the largest at each step."""
    return jax.tree.map(lambda x: jnp.cos(7 * (x + 0.1) + jnp.arange(x.size).reshape(x.shape) + step), params)


def labels(tree: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda p, _: "k" if "kernel" in paths.path_name(p) else "b", tree)


def arrays_of(state, name: str, shape: tuple) -> list[np.ndarray]:
    """What an optimizer keeps for each weight of a kernel: every array in its state of that shape."""
    return [
        np.asarray(x)
        for path, x in paths.named_leaves(state)
        if path.endswith(f"{name}/kernel") and getattr(x, "shape", None) == shape
    ]


OPTIMIZERS = {
    "sgd": (lambda: optax.sgd(0.1, momentum=0.9), 1),
    "adam": (lambda: optax.adam(1e-2), 2),
    "lion": (lambda: optax.lion(1e-2), 1),
    "adafactor": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=99, momentum=0.9), 2),
    "adafactor, factored": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4), 0),
    "muon": (lambda: optax.contrib.muon(1e-2), 1),
    "multi_transform": (lambda: optax.multi_transform({"k": optax.adam(1e-2), "b": optax.sgd(1e-2)}, labels), 2),
    "masked": (lambda: optax.masked(optax.adam(1e-2), lambda t: jax.tree.map(lambda x: x == "k", labels(t))), 2),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), 2),
    "MultiSteps inside": (lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), 3),
}


@pytest.mark.parametrize(
    "kind",
    [
        kind
        if kind in ("adam", "adafactor, factored", "MultiSteps inside")
        else pytest.param(kind, marks=pytest.mark.slow)
        for kind in OPTIMIZERS
    ],
)
def test_what_comes_back_starts_from_zero(kind: str) -> None:
    """Whatever the optimizer calls its moments, they are zero where a weight has just come in, and nowhere else."""
    make, kept = OPTIMIZERS[kind]
    tx, params = prune.around(make(), REWIRE), parameters()
    state, update, came = tx.init(params), jax.jit(tx.update), 0
    for i in range(7):
        before = prune.masks(state)
        updates, state = update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
        for name, shape in SHAPES.items():
            now = np.asarray(prune.masks(state)[f"{name}/kernel"])
            new = now & ~np.asarray(before[f"{name}/kernel"])
            assert now.sum() == round((1 - SPARSITY) * now.size)
            np.testing.assert_array_equal(np.asarray(params[name]["kernel"])[~now | new], 0)
            moments = arrays_of(state.inner, name, shape)
            assert len(moments) == kept
            for moment in moments:
                np.testing.assert_array_equal(moment[new], 0)
                if i % 2 == 0 and kind != "MultiSteps inside":  # its accumulator is emptied at every second step
                    assert (moment[now & ~new] != 0).all()
            came += int(new.sum())
    assert came > 50


def test_what_comes_back_is_told_apart_where_one_path_ends_another() -> None:
    shape = (16, 8)
    params = {"kernel": jnp.ones(shape), "deep": {"kernel": jnp.ones(shape)}, "whole": {"kernel": jnp.ones(shape)}}
    tx = prune.around(
        optax.trace(0.9), prune.rewire({"^kernel$": 0.5, "^deep": 0.5}, key=jax.random.key(5), end=9, every=1)
    )
    params = jax.tree.map(lambda x: x * jnp.arange(1.0, x.size + 1).reshape(x.shape), params)
    state = tx.init(params)
    for step in range(3):
        before, kept = prune.masks(state), state.inner.trace
        grads = gradients(params, step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        after = prune.masks(state)
        for name, trace in paths.named_leaves(state.inner.trace):
            went = before.get(name, jnp.ones(shape, bool))
            expected = jnp.where(went, dict(paths.named_leaves(grads))[name], 0)
            expected += 0.9 * dict(paths.named_leaves(kept))[name]
            returned = after.get(name, went) & ~went
            np.testing.assert_array_equal(trace, jnp.where(returned, 0, expected), err_msg=name)


def test_the_optimizer_does_not_see_pruned_weights() -> None:
    """The global norm that is clipped is that of the weights in use: a chain would count the others too."""
    params, clip = parameters(), optax.clip_by_global_norm(1.0)
    tx = prune.around(clip, prune.fixed(prune.choose(jax.tree.map(jnp.abs, params), RULES)))
    state, gradient = tx.init(params), gradients(params, 0)
    updates, state = tx.update(gradient, state, params)
    seen = prune.apply_masks(gradient, state)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(seen)))
    mask = prune.masks(state)["a/kernel"]
    np.testing.assert_allclose(updates["a"]["kernel"][mask], seen["a"]["kernel"][mask] / norm, rtol=1e-5)


def test_all_gradients_if_asked() -> None:
    params = parameters()
    pruning = prune.sparsify(RULES, prune.one_shot(), hold=False)
    tx = prune.around(optax.sgd(1.0), pruning, mask_gradients=False)
    gradient, state = gradients(params, 0), tx.init(params)
    for _ in range(2):
        updates, state = tx.update(gradient, state, params)
        jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -g), updates, gradient)
    assert prune.sparsity(prune.masks(state))["a/kernel"] == SPARSITY


@pytest.mark.parametrize("wrap", ["MultiSteps", "inject_hyperparams", "apply_if_finite", "chain"])
def test_inside_wrappers(wrap: str) -> None:
    inner = prune.around(optax.adam(1e-2), REWIRE)
    tx = {
        "MultiSteps": lambda: optax.MultiSteps(inner, 2).gradient_transformation(),
        "inject_hyperparams": lambda: optax.inject_hyperparams(
            lambda learning_rate: prune.around(optax.adam(learning_rate), REWIRE)
        )(learning_rate=1e-2),
        "apply_if_finite": lambda: optax.apply_if_finite(inner, 2),
        "chain": lambda: optax.chain(optax.clip(1.0), inner),
    }[wrap]()
    params = parameters()
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(6):
        updates, state = update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    for name in SHAPES:
        mask = np.asarray(prune.masks(state)[f"{name}/kernel"])
        assert mask.sum() == round((1 - SPARSITY) * mask.size)
        np.testing.assert_array_equal(np.asarray(params[name]["kernel"])[~mask], 0)


def test_in_an_nnx_optimizer() -> None:
    model = nnx.Linear(24, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, prune.around(optax.adam(1e-2), REWIRE), wrt=nnx.Param)
    x, first = jax.random.normal(jax.random.key(1), (8, 24)), prune.masks(optimizer.opt_state)["kernel"]

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda m: jnp.sum((m(x) - 1) ** 2))(model))

    for _ in range(3):
        step(model, optimizer)
    mask = np.asarray(prune.masks(optimizer.opt_state)["kernel"])
    assert mask.sum() == round((1 - SPARSITY) * mask.size) and (mask != first).any()
    np.testing.assert_array_equal(np.asarray(model.kernel[...])[~mask], 0)


@pytest.mark.slow
def test_with_linen_variables() -> None:
    model = nn.Dense(16)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 24)))
    tx = prune.around(optax.adam(1e-2), REWIRE)
    state = tx.init(variables)
    gradient = jax.grad(lambda v: jnp.sum((model.apply(v, jnp.ones((4, 24))) - 1) ** 2))(variables)
    updates, state = tx.update(gradient, state, variables)
    assert prune.sparsity(optax.apply_updates(variables, updates))["kernel"] >= SPARSITY


def test_dense_phases_forget_what_was_kept_for_pruned_weights() -> None:
    """AC/DC: at the step on which a dense phase begins the moments of all that comes back are zero."""
    schedule = prune.periodic(begin=1, end=9, dense=2, sparse=2)
    tx, params = prune.around(optax.adam(1e-2), prune.sparsify(RULES, schedule)), parameters()
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(4):  # dense, sparse, sparse, dense again
        masked = prune.masks(state)["a/kernel"]
        updates, state = update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    assert (~masked).sum() == round(SPARSITY * masked.size) and prune.masks(state)["a/kernel"].all()
    for moment in arrays_of(state.inner, "a", SHAPES["a"]):
        np.testing.assert_array_equal(moment[~masked], 0)
        assert (moment[masked] != 0).all()


@pytest.mark.parametrize("score", ["movement", "taylor", "empirical_fisher"])
def test_scores_gathered_from_gradients(score: str) -> None:
    """Against the sums in NumPy float64, from the gradients that were handed in."""
    made = {"movement": prune.movement, "taylor": prune.taylor, "empirical_fisher": prune.empirical_fisher}[score]()
    tx = prune.around(optax.sgd(0.05), prune.sparsify({"kernel$": 0.5}, prune.one_shot(4), score=made))
    params = parameters()
    state, total = tx.init(params), np.zeros(SHAPES["a"])
    for i in range(5):
        gradient = gradients(params, i)
        w, g = (np.asarray(t["a"]["kernel"], np.float64) for t in (params, gradient))
        total = {
            "movement": total - w * g,
            "taylor": 0.99 * total + 0.01 * np.abs(w * g),
            "empirical_fisher": 0.99 * total + 0.01 * g**2,
        }[score]
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    scores = w**2 * total / 2 if score == "empirical_fisher" else total
    np.testing.assert_array_equal(
        prune.masks(state)["a/kernel"], scores > np.sort(scores.ravel())[scores.size // 2 - 1]
    )


def test_gradients_are_asked_for() -> None:
    params = parameters()
    for pruning in (REWIRE, prune.sparsify(RULES, prune.one_shot(), score=prune.movement())):
        tx = optax.chain(optax.sgd(0.1), pruning)
        with pytest.raises(ValueError, match=r"prune\.around"):
            tx.update(params, tx.init(params), params)


def test_update_without_parameters() -> None:
    tx, params = prune.around(optax.sgd(0.1), REWIRE), parameters()
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))
