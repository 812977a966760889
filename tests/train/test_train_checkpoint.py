import dataclasses
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from train_toys import assert_same

from jaxcompress import train
from jaxcompress.arrays import Quantized, Sparse


def make(tx=None, params=None, extras=None, step=0):
    state = train.TrainState.create(
        {"w": jnp.arange(6.0).reshape(2, 3)} if params is None else params,
        tx or optax.adam(1e-3),
        extras=extras,
        key=jax.random.key(5),
    )
    return dataclasses.replace(state, step=jnp.int32(step))


ODD = {
    "int8": Quantized.from_codes(jnp.arange(-4, 4, dtype=jnp.int8).reshape(2, 4), jnp.full((1, 4), 0.5)),
    "int4": Quantized.from_codes(jnp.arange(-4, 4, dtype=jnp.int8).reshape(2, 4), jnp.full((2, 1), 0.5), bits=4),
    "sparse": Sparse.from_dense(jnp.eye(8)),
    "bfloat16": jnp.full(3, 1.1, jnp.bfloat16),
    "int4 array": jnp.arange(4, dtype=jnp.int4),
    "float8": jnp.full(3, 1.5, jnp.float8_e4m3fn),
    "as bytes": [jnp.full(3, 1.5, jnp.float8_e4m3), jnp.arange(16, dtype=jnp.uint4), jnp.arange(4, dtype=jnp.uint2)],
    "int2": Quantized.from_codes(jnp.arange(-2, 2).reshape(2, 2), jnp.full((2, 1), 0.5), bits=2).as_int4(),
    "none": None,
    "empty": jnp.zeros((0, 3)),
    "bool": jnp.array([True, False]),
    "dotted.name/with slash": jnp.ones(1),
    "list": [jnp.float32(1), (jnp.float32(2),)],
}


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path):
    extras = {
        "keys": jax.random.split(jax.random.key(0), 3),
        "rbg": jax.random.key(1, impl="rbg"),
        "none": jnp.zeros(0),
    }
    state = make(params=ODD, extras=extras, step=4)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"at": [1, {"deep": "ü"}]})
        blank = jax.tree.map(jnp.zeros_like, make(params=ODD, extras=extras))
        restored, position = checkpoints.restore(blank)
    assert_same(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert position == {"at": [1, {"deep": "ü"}]}
    assert jax.random.key_impl(restored.extras["rbg"]) == jax.random.key_impl(extras["rbg"])


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    tx, params = optax.sgd(0.1), {"w": jnp.arange(3e6)}
    step = train.make_step(lambda p, b, c: (p["w"].sum(), {}, c.extras), tx)
    state, _ = step(make(tx, params), None)
    after_one = np.array(state.params["w"])
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(3):
            state, _ = step(state, None)
        restored, _ = checkpoints.restore(make(tx, params))
    np.testing.assert_array_equal(restored.params["w"], after_one)


def test_the_latest_and_the_best_are_kept(tmp_path):
    quality = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4}
    with train.Checkpoints(tmp_path, keep_last=2, best="accuracy") as checkpoints:
        for step, accuracy in quality.items():
            checkpoints.save(make(step=step), metrics={"accuracy": accuracy})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 4, 5]
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 2)
    with train.Checkpoints(tmp_path, keep_last=2, best="accuracy") as checkpoints:  # in a later process
        checkpoints.save(make(step=6), metrics={"accuracy": 0.5})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2
        restored, _ = checkpoints.restore(make(), step=2)
        assert int(restored.step) == 2


def test_the_best_may_be_the_smallest(tmp_path):
    with train.Checkpoints(tmp_path, keep_last=1, best="loss", best_mode="min") as checkpoints:
        for step, loss in enumerate([0.5, 0.2, 0.4, 0.3], start=1):
            checkpoints.save(make(step=step), metrics={"loss": loss})
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 4], 2)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_an_evaluation_that_is_nan_is_never_the_best(mode, tmp_path):
    with train.Checkpoints(tmp_path, keep_last=1, best="m", best_mode=mode) as checkpoints:
        for step, value in enumerate([0.5, 0.9 if mode == "max" else 0.1, jnp.nan, 0.3, jnp.nan], start=1):
            checkpoints.save(make(step=step), metrics={"m": float(value)})
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 5], 2)


W = {"w": jnp.ones((2, 3))}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(params={"w": jnp.ones((2, 4))}), r"params/w is float32\[2, 3\] there and float32\[2, 4\] here"),
        (make(params={"w": jnp.ones((2, 3), jnp.bfloat16)}), r"params/w is float32\[2, 3\] there and bfloat16\[2, 3\]"),
        (
            make(params={"v": jnp.ones((2, 3))}),
            r"params/v is absent there and float32\[2, 3\] here; params/w is .* absent",
        ),
        (make(optax.sgd(0.1)), r"3 of 3 leaves differ.*opt_state/0/mu/w is float32\[2, 3\] there and absent here"),
        (make(extras={"ema": W}), "1 of 7 leaves differ. extras/ema/w is absent there"),
        (
            make(params={"w": Quantized.from_codes(jnp.ones((2, 3), jnp.int8), jnp.ones((1, 1)))}),
            r"here; params/w/scale is absent there and float32\[1, 1\] here; params/w/values is absent there",
        ),
    ],
    ids=["shape", "dtype", "name", "optimizer", "extras", "compressed"],
)
def test_another_models_checkpoint_is_refused(other, message, tmp_path):
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(step=3))
        with pytest.raises(train.CheckpointMismatchError, match=message):
            checkpoints.restore(other, release=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(other))


def test_codes_of_another_grid_are_refused(tmp_path):
    """Arrays of one shape and dtype, which stand for other numbers."""
    codes, scale = jnp.arange(-4, 4, dtype=jnp.int8).reshape(2, 4), jnp.ones((1, 4))
    grid = make(params={"w": Quantized.from_codes(codes, scale, bits=4)})
    table = make(params={"w": dataclasses.replace(grid.params["w"], levels=tuple(float(i**2) for i in range(16)))})
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(grid)
        with pytest.raises(train.CheckpointMismatchError, match=r"params/w/levels is None there and \(0.0, 1.0"):
            checkpoints.restore(table)
        marked = make(params={"w": dataclasses.replace(grid.params["w"], strict=True)})
        assert_same(checkpoints.restore(marked)[0], grid)


def test_a_directory_without_the_checkpoint(tmp_path):
    with train.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* there are none"):
            checkpoints.restore(make())
        checkpoints.save(make(step=3))
        checkpoints.wait()
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 in .* there are \[3\]"):
            checkpoints.restore(make(), step=2)
        for step in (2, 3):
            with pytest.raises(ValueError, match=f"has a checkpoint of step 3, so none of step {step} can follow"):
                checkpoints.save(make(step=step))
        assert checkpoints.all_steps() == [3]


# orbax's readers that are cut off complain when they are collected, whenever that is: here
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["state missing", "arrays cut short", "meta missing"])
def test_a_damaged_checkpoint_is_not_restored_in_part(damage, tmp_path):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=10_000))}
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(params=params, step=3))
    if damage == "arrays cut short":
        largest = max((tmp_path / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1000])
    else:
        shutil.rmtree(tmp_path / "3" / damage.split()[0])
    with (
        train.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"checkpoint 3 in .* cannot be read"),
    ):
        checkpoints.restore(make(params=params))
    gc.collect()


def test_positions_of_another_number_of_processes(tmp_path):
    """Two processes' positions that are equal serve one process too (`test_train_processes.py`); others do not."""
    with train.Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="positions of 2 processes, which"):
        checkpoints._position(3, [{"next_index": 1}, {"next_index": 2}])


def test_options_that_cannot_be_followed(tmp_path):
    with pytest.raises(ValueError, match="mounted file system, got the address gs://bucket/run"):
        train.Checkpoints("gs://bucket/run")
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        train.Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="best_mode"):
        train.Checkpoints(tmp_path, best="loss", best_mode="lowest")
    with train.Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="no metric to judge by"):
        checkpoints.best_step()
    with train.Checkpoints(tmp_path, best="accuracy") as checkpoints:
        with pytest.raises(ValueError, match=r"judged by 'accuracy'; step 1 has \['loss'\]"):
            checkpoints.save(make(step=1), metrics={"loss": 0.1})
        with pytest.raises(TypeError, match="a data position must be JSON"):
            checkpoints.save(make(step=1), data={"at": b"x"}, metrics={"accuracy": 0.1})
        assert checkpoints.all_steps() == []


def test_leaves_restored_lie_where_the_given_ones_do(tmp_path):
    mesh = train.make_mesh(data=2, model=4)
    rules = [("w", P("model", "data"))]
    state = make(params={"w": jnp.arange(32.0).reshape(4, 8)}, step=1)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(train.shard(state, mesh, rules))
        abstract = jax.eval_shape(lambda: make(params={"w": jnp.zeros((4, 8))}))
        there, _ = checkpoints.restore(
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                abstract,
                train.shardings(abstract, mesh, rules),
            )
        )
        here, _ = checkpoints.restore(abstract)
    assert there.params["w"].sharding.spec == P("model", "data")
    assert here.params["w"].sharding.device_set == {jax.devices()[0]}
    assert_same(there, state)
    assert_same(here, state)
    np.testing.assert_array_equal(there.opt_state[0].mu["w"], 0)


def test_a_run_on_another_device_than_the_first_resumes_there(tmp_path):
    """Step and key, which nobody put anywhere, follow the parameters, as in the run's first call."""
    tx, device = optax.adam(0.1), jax.devices()[3]
    step = train.make_step(lambda p, b, c: (jnp.sum(p["w"] ** 2), {}, c.extras), tx)
    with train.Checkpoints(tmp_path) as checkpoints:
        state, _ = step(make(tx, jax.device_put({"w": jnp.ones(3)}, device)), None)
        checkpoints.save(state)
        restored, _ = checkpoints.restore(make(tx, jax.device_put({"w": jnp.ones(3)}, device)))
    assert_same(restored, state)
    assert {device for x in jax.tree.leaves(restored) for device in x.devices()} == {device}
    step(restored, None)
