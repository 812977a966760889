import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import freeze

from jaxcompress import paths


def test_one_rule_serves_every_framework():
    linen = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    boxed = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x"))).init(
        jax.random.key(0), jnp.ones((1, 2))
    )
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    for tree in (linen, freeze(linen), boxed, linen["params"], state, nnx.to_pure_dict(state)):
        assert [name for name, _ in paths.named_leaves(tree)] == ["bias", "kernel"]


def test_optimizer_state_paths_end_with_the_parameters():
    params = {"Dense_0": {"kernel": jnp.ones(2)}}
    names = [name for name, _ in paths.named_leaves(optax.adam(1.0).init(params))]
    assert [name for name in names if name.endswith("Dense_0/kernel")] == ["0/mu/Dense_0/kernel", "0/nu/Dense_0/kernel"]


def test_first_match_wins_and_the_rest_get_the_default():
    names = ["a/kernel", "a/bias", "b/kernel", "b/scale"]
    assert paths.match([("a/", 1), ("kernel$", 2)], names, 0) == [1, 1, 2, 0]
    assert paths.match({"kernel$": 2, "a/": 1}, names, 0) == [2, 1, 2, 0]


def test_assign_keeps_the_tree():
    tree = {"a": (jnp.ones(2), jnp.ones(3)), "b": jnp.ones(1)}
    assert paths.assign([("a/1", "x")], tree) == {"a": (None, "x"), "b": None}


def test_a_rule_shadowed_by_an_earlier_one_is_no_error():
    assert paths.match([("kernel", 1), ("a/kernel", 2)], ["a/kernel"], 0) == [1]


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("Dense_1/kernal$", "Dense_1/kernel"), ("^Conv", "Conv_0/kernel"), ("embeding", "tok/embedding")],
)
def test_an_unmatched_rule_names_the_nearest_paths(pattern, nearest):
    names = ["Dense_0/bias", "Dense_1/kernel", "tok/embedding", "params_Conv_0/kernel"]
    with pytest.raises(paths.UnmatchedRuleError, match=nearest):
        paths.match([(pattern, 1)], names, 0)


def test_an_unmatched_rule_on_an_empty_tree_says_so():
    with pytest.raises(paths.UnmatchedRuleError, match="no leaves"):
        paths.assign([("kernel", 1)], {})


@pytest.mark.parametrize("rules", ["kernel", None, [("kernel",)]])
def test_rules_that_are_no_pairs(rules):
    with pytest.raises(TypeError, match="rules are pairs"):
        paths.match(rules, ["kernel"], 0)


def test_a_broken_pattern_is_named():
    with pytest.raises(ValueError, match=r"'\(kernel' is not a regular expression"):
        paths.match([("(kernel", 1)], ["kernel"], 0)
