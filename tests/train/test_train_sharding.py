import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcompress import train
from jaxcompress.arrays import Quantized, Sparse
from jaxcompress.paths import UnmatchedRuleError

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def mesh():
    return train.make_mesh(data=2, model=4)


def specs(tree, mesh, rules):
    """Each leaf's spec by its path."""
    placed = train.shardings(tree, mesh, rules)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(placed)
    }


def test_meshes_have_auto_axes_and_the_sizes_asked_for():
    assert dict(train.make_mesh().shape) == {"data": 8}
    assert dict(train.make_mesh(data=-1, model=2).shape) == {"data": 4, "model": 2}
    assert dict(train.make_mesh(model=2, devices=jax.devices()[:2]).shape) == {"model": 2}
    assert set(train.make_mesh(data=-1, model=2).axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "do not fit 8 devices; make one of them -1, or pass fewer devices="),
        ({"data": -1, "model": 3}, "the fixed sizes must divide 8"),
        ({"data": -1, "model": -1}, "one of them may be -1"),
        ({"data": 0}, "must be positive"),
    ],
)
def test_meshes_that_cannot_be_made(axes, message):
    with pytest.raises(ValueError, match=message):
        train.make_mesh(**axes)


def test_the_first_rule_wins_and_the_rest_is_replicated(mesh):
    tree = {"params": {"a": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}, "b": {"kernel": jnp.ones((8, 8))}}}
    rules = [("^a/kernel$", P(None, "model")), ("kernel", P("model"))]
    assert specs(tree, mesh, rules) == {
        "params/a/bias": P(),
        "params/a/kernel": P(None, "model"),
        "params/b/kernel": P("model"),
    }


@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), data=st.data())
def test_an_axis_that_does_not_divide_is_left_out_and_every_array_can_be_placed(shape, data):
    mesh = train.make_mesh(data=2, model=4)
    names = data.draw(st.permutations(["data", "model", ("data", "model"), None]))
    spec = P(*names[: data.draw(st.integers(0, len(shape)))])
    if sum(name is not None for name in spec) > 1 and ("data", "model") in spec:
        return  # an axis stands in a spec once
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    placed = train.shard({"x": x}, mesh, [("x", spec)])["x"]
    np.testing.assert_array_equal(placed, x)
    for i, (axes, kept) in enumerate(zip(spec, placed.sharding.spec, strict=False)):
        size = {"data": 2, "model": 4, ("data", "model"): 8, None: 1}[axes]
        assert kept == (axes if shape[i] and shape[i] % size == 0 else None)


EACH = {"a": {"kernel": True}, "kernel": True}
OPTIMIZERS = {
    "adam": (optax.adam(1e-3), 2),
    "multi steps, injected": (optax.MultiSteps(optax.inject_hyperparams(optax.adam)(1e-3), 2), 3),
    "masked, chained": (optax.chain(optax.masked(optax.adam(1e-3), EACH), optax.ema(0.9)), 3),
    "partitioned": (optax.partition({True: optax.adam(1e-3)}, EACH), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_arrays_lie_as_their_parameters_do(name, mesh):
    """Also under rules that are anchored to the parameter's path, and where one parameter's path ends another's."""
    tx, copies = OPTIMIZERS[name]
    params = {"a": {"kernel": jnp.ones((8, 4))}, "kernel": jnp.ones((8, 4))}
    state = train.TrainState.create(params, tx, key=KEY)
    found = specs(state, mesh, [("^a/kernel$", P(None, "model")), ("^kernel$", P("data"))])
    first = [spec for path, spec in found.items() if path.endswith("/a/kernel")]
    second = [spec for path, spec in found.items() if path.endswith("kernel") and not path.endswith("/a/kernel")]
    assert first == [P(None, "model")] * (1 + copies)
    assert second == [
        P(
            "data",
        )
    ] * (1 + copies)
    assert all(spec == P() for path, spec in found.items() if not path.endswith("kernel"))


def test_factored_moments_are_replicated(mesh):
    state = train.TrainState.create({"kernel": jnp.ones((256, 512))}, optax.adafactor(1e-3), key=KEY)
    found = specs(state, mesh, [("kernel", P("data", "model"))])
    assert found["params/kernel"] == P("data", "model")
    factors = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 1 and leaf.size > 1]
    assert {leaf.shape for leaf in factors} == {(256,), (512,)}
    assert {spec for path, spec in found.items() if path.startswith("opt_state")} == {P()}
    train.shard(state, mesh, [("kernel", P("data", "model"))])


def test_extras_follow_their_own_paths(mesh):
    extras = {"batch_stats": {"mean": jnp.ones(8)}, "ema": {"kernel": jnp.ones((8, 8))}}
    state = train.TrainState.create({"kernel": jnp.ones((8, 8))}, optax.sgd(0.1), extras=extras, key=KEY)
    found = specs(state, mesh, [("kernel", P("model"))])
    assert found["extras/ema/kernel"] == P("model")
    assert found["extras/batch_stats/mean"] == found["step"] == found["key"] == P()


def test_the_parts_of_a_compressed_weight(mesh):
    """One rule for the array that stood there: integers and per-channel scales take it, where it divides them."""
    codes = jnp.ones((8, 16), jnp.int8)
    tree = {
        "int8": {"kernel": Quantized.from_codes(codes, jnp.ones((1, 16)))},
        "int4": {"kernel": Quantized.from_codes(codes, jnp.ones((4, 16)), bits=4, group=(-2, 2))},
        "sparse": {"kernel": Sparse.from_dense(jnp.ones((8, 16)))},
    }
    found = specs(tree, mesh, [("kernel$", P("data", "model"))])
    assert found["int8/kernel/values"] == found["int4/kernel/values"] == P("data", "model")
    assert found["int8/kernel/scale"] == P(None, "model")
    assert found["int4/kernel/scale"] == P("data", "model")
    placed = train.shard(tree, mesh, [("kernel$", P("data", "model"))])
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    moved = train.TrainState.create(tree, optax.adam(1e-3), key=KEY)
    moments = specs(moved, mesh, [("kernel$", P("data", "model"))])
    assert moments["opt_state/0/mu/int4/kernel/scale"] == P("data", "model")


def test_boxes_and_nnx_states_have_the_same_paths(mesh):
    boxed = {"dense": {"kernel": nn.Partitioned(jnp.ones((8, 8)), names=(None, None))}}
    state = nnx.state(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    assert specs(boxed, mesh, [("^dense/kernel$", P("model"))]) == {"dense/kernel/value": P("model")}
    assert set(specs(state, mesh, [("^kernel$", P("model"))]).values()) == {P("model"), P()}


def test_rules_that_cannot_be_followed(mesh):
    tree = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    with pytest.raises(UnmatchedRuleError, match="'kernal' matches no path; nearest paths: 'kernel'"):
        train.shardings(tree, mesh, [("kernal", P())])
    with pytest.raises(ValueError, match=r"names \['heads'\], but the mesh has the axes \('data', 'model'\)"):
        train.shardings(tree, mesh, [("kernel", P("heads"))])
    with pytest.raises(ValueError, match=r"has 2 axes, but 'bias' has shape \(8,\)"):
        train.shardings(tree, mesh, {".*": P(None, "model")})
    with pytest.raises(TypeError, match="rules are pairs of a pattern and a spec"):
        train.shardings(tree, mesh, P("data"))
    with pytest.raises(TypeError, match="want a PartitionSpec"):
        train.shardings(tree, mesh, [("kernel", "model")])


def test_batches_are_divided_by_rows(mesh):
    batch = {"x": np.arange(12.0).reshape(4, 3), "weight": 0.5}
    placed = train.shard_batch(batch, mesh)
    np.testing.assert_array_equal(placed["x"], batch["x"])
    assert placed["x"].sharding.spec == P("data") and placed["weight"].sharding.spec == P()
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 3)}
    assert train.shard_batch(placed, mesh)["x"] is placed["x"]
    both = train.shard_batch(np.ones((8, 2)), mesh, ("data", "model"))
    assert {shard.data.shape for shard in both.addressable_shards} == {(1, 2)}
    with pytest.raises(ValueError, match="x has 3 rows, which 2 devices along 'data' cannot share"):
        train.shard_batch({"x": np.ones((3, 2))}, mesh)


def test_the_moments_of_a_single_array_lie_as_it_does(mesh):
    state = train.TrainState.create(jnp.ones((8, 4)), optax.adam(1e-3), key=KEY)
    found = train.shardings(state, mesh, [("^params$", P("data"))])
    assert found.params.spec == found.opt_state[0].mu.spec == P("data")
    assert found.opt_state[0].count.spec == P()
