"""The transformation inside everything that may hold it, with a sparsity that ramps."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcompress import paths, prune

SHAPES = {"a/kernel": (24, 30), "b/kernel": (30, 16)}
FINAL = 0.83
RAMP = prune.polynomial(begin=2, end=12, every=5)  # due at 2, 7 and 12, where the sparsity is 0, 7/8 of it and all
RULES = {"kernel$": FINAL}


def parameters(dtypes: tuple = (jnp.float32, jnp.bfloat16)) -> dict:
    keys = jax.random.split(jax.random.key(0))
    tree: dict = {}
    for (name, shape), dtype, key in zip(SHAPES.items(), dtypes, keys, strict=True):
        layer = name.split("/")[0]
        tree[layer] = {"kernel": jax.random.normal(key, shape).astype(dtype), "bias": jnp.ones(shape[-1], dtype)}
    return tree


def loss(tree: dict, step: jax.Array) -> jax.Array:
    """Pulls every weight to a target that moves from step to step, so that no gradient is zero."""
    return sum(
        jnp.sum((x.astype(jnp.float32) - 0.3 * jnp.sin(step + i)) ** 2) for i, x in enumerate(jax.tree.leaves(tree))
    )


def expected(step: int, final: float = FINAL) -> float:
    """The sparsity after the update number `step`, by the paper's formula in float64."""
    due = [t for t in (2, 7, 12) if t <= step]
    return final * (1 - (1 - (due[-1] - 2) / 10) ** 3) if due else 0.0


def assert_sparsity(tree: dict, state, name: str, want: float) -> None:
    """The pruned weights are zero, their number is right, and (but for chance hits in bfloat16) no others are zero."""
    x, mask = np.asarray(dict(paths.named_leaves(tree))[name], np.float32), np.asarray(prune.masks(state)[name])
    assert abs((~mask).sum() - want * x.size) <= 1, (name, (~mask).mean(), want)
    np.testing.assert_array_equal(x[~mask], 0)
    assert (x[mask] != 0).mean() > 0.99


def train(tx: optax.GradientTransformation, params: dict, steps: int = 15):
    @jax.jit
    def step(params: dict, state, i):
        grads = jax.grad(loss)(params, i)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jnp.float32(i))
        yield i, params, state


def chained(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optimizer, prune.sparsify(RULES, RAMP))


@optax.inject_hyperparams
def injected(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.adam(learning_rate), prune.sparsify(RULES, RAMP))


def labels(tree: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda p, _: "k" if "kernel" in paths.path_name(p) else "b", tree)


OPTIMIZERS = {
    "sgd": lambda: chained(optax.sgd(0.1, momentum=0.9)),
    "adam": lambda: chained(optax.adam(1e-2)),
    "adamw": lambda: chained(optax.adamw(1e-2, weight_decay=0.1)),
    "lion": lambda: chained(optax.lion(1e-2)),
    "adafactor": lambda: chained(optax.adafactor(1e-2, min_dim_size_to_factor=8)),
    "muon": lambda: chained(optax.contrib.muon(1e-2)),
    "inject_hyperparams": lambda: injected(learning_rate=1e-2),
    "apply_if_finite": lambda: optax.apply_if_finite(chained(optax.adam(1e-2)), 3),
    "a chain in a chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), chained(optax.adam(1e-2))),
    "masked": lambda: optax.chain(
        optax.adam(1e-2),
        optax.masked(prune.sparsify(RULES, RAMP), lambda t: jax.tree.map(lambda label: label == "k", labels(t))),
    ),
    "multi_transform": lambda: optax.multi_transform({"k": chained(optax.adam(1e-2)), "b": optax.sgd(1e-2)}, labels),
    "MultiSteps inside": lambda: chained(optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation()),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if i % 2 else k for i, k in enumerate(OPTIMIZERS)]
)
def test_updates_alone_leave_exact_zeros(kind: str) -> None:
    for i, params, state in train(OPTIMIZERS[kind](), parameters()):
        for name in SHAPES:
            assert_sparsity(params, state, name, expected(i))


def test_around_multi_steps_the_schedule_counts_emitted_updates() -> None:
    tx = optax.MultiSteps(chained(optax.adam(1e-2)), 2).gradient_transformation()
    for i, params, state in train(tx, parameters(), 28):
        for name in SHAPES:
            assert_sparsity(params, state, name, expected((i + 1) // 2 - 1))


def test_bfloat16_updates_of_float32_weights() -> None:
    """A bfloat16 minus-weight would leave a remainder of about 1e-3."""
    narrow = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates))
    tx = optax.chain(optax.adam(1e-2), narrow, prune.sparsify(RULES, RAMP))
    for i, params, state in train(tx, parameters((jnp.float32,) * 2)):
        assert_sparsity(params, state, "a/kernel", expected(i))
    assert params["a"]["kernel"].dtype == jnp.float32


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    params, tx = parameters((jnp.float32,) * 2), optax.apply_if_finite(chained(optax.sgd(0.1)), 3)
    state = tx.init(params)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, after = tx.update(bad, state, params)
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), params)
    assert int(after.inner_state[1].step) == 0


def test_kept_weights_get_the_optimizer_s_update_unchanged() -> None:
    params, tx = parameters(), prune.sparsify(RULES, prune.one_shot())
    wanted = jax.grad(loss)(params, jnp.float32(1))
    got, state = jax.jit(tx.update)(wanted, tx.init(params), params)
    for name, mask in prune.masks(state).items():
        u, v, p = (np.asarray(dict(paths.named_leaves(t))[name], np.float32) for t in (got, wanted, params))
        np.testing.assert_array_equal(u, np.where(mask, v, -p))
    np.testing.assert_array_equal(got["a"]["bias"], wanted["a"]["bias"])


def test_dense_phases_let_pruned_weights_come_back() -> None:
    """AC/DC: compressed, then dense again with every weight in training, and compressed at the end."""
    schedule = prune.periodic(begin=2, end=12, dense=3, sparse=2)  # sparse 2-3, dense 4-6, sparse 7-8, dense 9-11
    tx = optax.chain(optax.adam(1e-2), prune.sparsify({"kernel$": prune.vectors(0.5)}, schedule))
    pruned = [1 - float(prune.masks(state)["a/kernel"].mean()) for _, _, state in train(tx, parameters(), 15)]
    np.testing.assert_allclose(pruned, [0] * 2 + [0.5] * 2 + [0] * 3 + [0.5] * 2 + [0] * 3 + [0.5] * 3)
    for i, params, _ in train(tx, parameters(), 12):
        assert i != 3 or (params["a"]["kernel"] == 0).mean() == 0.5
    assert (params["a"]["kernel"] != 0).all()


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_in_an_nnx_optimizer(jit: bool) -> None:
    model = Model(nnx.Rngs(0))
    rules = {"conv/kernel$": 0.5, "head/kernel$": prune.NM(2, 4)}
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), prune.sparsify(rules, RAMP)), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

    def step(model: Model, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model))

    step = nnx.jit(step) if jit else step
    for i in range(14):
        step(model, optimizer)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        assert_sparsity(params, optimizer.opt_state, "conv/kernel", expected(i, 0.5))
        assert_sparsity(params, optimizer.opt_state, "head/kernel", expected(i, 0.5))
    np.testing.assert_array_equal((params["head"]["kernel"] != 0).reshape(2, 4, 10).sum(1), 2)
    jax.tree.map(np.testing.assert_array_equal, prune.apply_masks(params, optimizer.opt_state), params)
    kept = prune.apply_masks(jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)), optimizer.opt_state)
    np.testing.assert_array_equal(kept["head"]["kernel"][...], params["head"]["kernel"] != 0)


def test_one_rule_serves_linen_with_boxes_and_stacked_layers() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "model")))(x), None

    stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: None},
    )()
    variables = stack.init(jax.random.key(0), jnp.ones((2, 8)), None)
    tx = prune.sparsify({"Dense_0/kernel$": prune.Unstructured(0.75, stack=1)}, prune.one_shot())
    updates, state = tx.update(jax.tree.map(jnp.ones_like, variables), tx.init(variables), variables)
    kernel = optax.apply_updates(variables, updates)["params"]["Dense_0"]["kernel"].value
    np.testing.assert_array_equal((kernel == 0).sum((1, 2)), [48, 48, 48])
    assert list(prune.masks(state)) == ["Dense_0/kernel"]


def test_an_ensemble_under_vmap() -> None:
    members = jax.vmap(lambda key: {"w": jax.random.normal(key, (10, 10))})(jax.random.split(jax.random.key(0), 4))
    tx = optax.chain(optax.sgd(0.1), prune.sparsify({"w": 0.6}, prune.one_shot()))

    @jax.vmap
    def step(params):
        updates, state = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    params, _ = jax.jit(step)(members)
    np.testing.assert_array_equal((params["w"] == 0).sum((1, 2)), [60] * 4)
    alone = jax.jit(tx.update)
    for member, pruned in zip(members["w"], params["w"], strict=True):
        updates, _ = alone({"w": member}, tx.init({"w": member}), {"w": member})
        np.testing.assert_array_equal(optax.apply_updates({"w": member}, updates)["w"] == 0, pruned == 0)


def test_nan_is_kept_in_sight() -> None:
    """Under jit a NaN weight can't raise: it must not be replaced by a zero, and the others are counted right."""
    w = jnp.arange(1.0, 11).at[0].set(jnp.nan)
    tx = prune.sparsify({"w": 0.5}, prune.one_shot())

    @jax.jit
    def step(params):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    got = np.asarray(step({"w": w})["w"])
    assert np.isnan(got[0]) and (got == 0).sum() == 5 and (got[1:6] == 0).all()


P = {"dense": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}, "ids": jnp.arange(3)}


def test_rules_take_the_first_match_and_none_keeps_dense() -> None:
    tx = prune.sparsify([("^dense", 0.5), ("bias", None)], prune.one_shot())
    _, state = tx.update(jax.tree.map(jnp.zeros_like, P), tx.init(P), P)
    assert list(prune.masks(state)) == ["dense/bias", "dense/kernel"]
    tx = prune.sparsify([("bias", None), ("^dense", 0.5)], prune.one_shot())
    assert list(prune.masks(tx.init(P))) == ["dense/kernel"]


@pytest.mark.parametrize(
    "rules, params, error, message",
    [
        ({"kernal": 0.5}, P, paths.UnmatchedRuleError, "nearest paths: 'dense/kernel'"),
        ({"kernel": 1.0}, P, ValueError, r"in \[0, 1\), got 1.0"),
        ({"kernel": prune.NM(2, 4)}, P, ValueError, "'dense/kernel': 2:4 .* pad=True"),
        ({"kernel": "2:4"}, P, ValueError, "'dense/kernel' gives '2:4': want a pattern"),
        ({"ids": 0.5}, P, ValueError, "'ids' is int32: only floating-point"),
        ({"w": 0.5}, {"w": 2.5}, ValueError, "'w' is a float, no array"),
        ({"bias": 0.95}, P, ValueError, "'dense/bias' of shape .* lose all its weights .* allow_empty=True"),
        ({"w": 0.5}, {"w": jnp.array([1.0, jnp.nan])}, ValueError, "not finite .* 'w'"),
        ({"w": 0.5}, {"w": jnp.array([1.0, -jnp.inf], jnp.bfloat16)}, ValueError, "not finite"),
    ],
)
def test_bad_rules_and_weights(rules, params, error, message: str) -> None:
    with pytest.raises(error, match=message):
        prune.sparsify(rules, prune.one_shot()).init(params)


def test_a_schedule_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"schedule is a Schedule, .* got 10"):
        prune.sparsify({"kernel": 0.5}, 10)


@pytest.mark.parametrize(
    ("score", "message"), [(prune.taylor, r"call it, score=taylor\(\)"), ("magnitude", "got 'magnitude'")]
)
def test_a_score_that_is_none(score, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        prune.sparsify({"kernel": 0.5}, prune.one_shot(), score=score)


def test_an_initial_sparsity_above_the_final_one() -> None:
    with pytest.raises(ValueError, match=r"'dense/kernel': the schedule starts at sparsity 0.7"):
        prune.sparsify({"kernel": 0.5}, prune.polynomial(0, 5, initial=0.7)).init(P)


def test_an_empty_layer_if_asked() -> None:
    tx = prune.sparsify({"bias": 0.95}, prune.one_shot(), allow_empty=True)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, P), tx.init(P), P)
    np.testing.assert_array_equal(optax.apply_updates(P, updates)["dense"]["bias"], 0)


def test_update_without_parameters() -> None:
    tx = prune.sparsify({"kernel": 0.5}, prune.one_shot())
    with pytest.raises(ValueError, match="not passing `params`"):
        tx.update(P, tx.init(P))


@pytest.mark.parametrize(
    "other",
    [
        {"dense": {"kernel": jnp.ones((6, 9)), "bias": jnp.ones(9)}, "ids": jnp.arange(3)},
        {"dense": {"kernel": jnp.ones((6, 8))}, "ids": jnp.arange(3)},
        {"another": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}, "ids": jnp.arange(3)},
    ],
)
def test_a_state_of_other_parameters(other: dict) -> None:
    tx = prune.sparsify({"kernel": 0.5}, prune.one_shot())
    with pytest.raises(ValueError, match="the pruning state is of other parameters"):
        tx.update(P, tx.init(other), P)


def test_a_state_of_other_rules() -> None:
    state = prune.sparsify({"bias": 0.5}, prune.one_shot()).init(P)
    with pytest.raises(ValueError, match="other parameters or rules: the mask of 'dense/bias'"):
        prune.sparsify({"kernel": 0.5}, prune.one_shot()).update(P, state, P)


@pytest.mark.parametrize(
    ("score", "got"),
    [(lambda w: jnp.abs(w).sum(0), "shape (3,) of float32"), (lambda w: (w > 0).astype(int), "shape (4, 3) of int32")],
    ids=["shape", "dtype"],
)
def test_a_score_of_another_shape_or_dtype_is_refused(score, got):
    params = {"kernel": jnp.ones((4, 3))}
    tx = prune.sparsify({"kernel$": 0.5}, prune.one_shot(), score=score)
    with pytest.raises(
        ValueError, match=re.escape(f"'kernel' a floating-point number, so an array of shape (4, 3); got {got}")
    ):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("rule", [
    prune.Blocks(0.5, (2, 2), pad=True), prune.Unstructured(0.5, scope="global"), prune.Below(0.1), 0.5
])  # fmt: skip
def test_a_weight_of_no_entries_has_nothing_to_prune(rule):
    params = {"empty": jnp.zeros((0, 5)), "weight": jnp.arange(1.0, 17.0).reshape(4, 4) / 100}
    tx = prune.sparsify({".": rule}, prune.one_shot(0))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["empty"].shape == (0, 5) and (params["weight"] + updates["weight"] == 0).any()
