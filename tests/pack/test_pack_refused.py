"""What can't be saved is refused, and a save that fails leaves what was there."""

import os
import resource
from collections import OrderedDict, namedtuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.core import ShapedArray

from jaxcompress import pack
from jaxcompress.arrays import Leaf

Pair = namedtuple("Pair", "a b")


class Odd(Leaf):
    """A leaf with a static field that a test chooses."""

    data: jax.Array
    static: object = eqx.field(static=True)

    def aval(self):
        return ShapedArray(self.data.shape, self.data.dtype)

    def materialise(self):
        return self.data


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (flax.core.freeze({"a": np.ones(2)}), "FrozenDict.*flax.core.unfreeze"),
        ({"a": nnx.State({"w": nnx.Param(jnp.ones(2))})}, "'a' holds a .*State.*nnx.to_pure_dict"),
        ({"m": {"p": nnx.Param(jnp.ones(2))}}, "'m/p' holds a .*Param"),
        ([Pair(1, 2)], r"'\[0\]' holds a .*Pair.*_asdict"),
        (OrderedDict(a=1), "OrderedDict"),
        ({"name": "mlp"}, "'name' holds a builtins.str.*metadata"),
        (b"bytes", "the tree holds a builtins.bytes"),
        ({True: 1}, "key True, a bool"),
        ({"a": {(1, 2): 1}}, r"'a' has the key \(1, 2\), a tuple"),
        ({1.5: 1}, "key 1.5"),
        ({"a": np.array(["x"])}, "'a' is an array of dtype <U1; pack.save takes bool, int8"),
        (np.array([None]), "dtype object"),
        (np.zeros(2, [("x", "f4")]), "dtype"),
        (np.array(["2020"], "M8[D]"), "dtype datetime64"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "ShapeDtypeStruct"),
        (np.zeros(2, jax.dtypes.float0), "float0|void|V"),
        ({"w": Odd(jnp.ones(2), [1])}, r"'w': Odd.static is \[1\]; static fields"),
        ({"w": Odd(jnp.ones(2), np.float32)}, "'w': Odd.static"),
        ({"w": Odd(jnp.ones(2), float("nan"))}, "'w': Odd.static"),
        ({"w": Odd(jax.ShapeDtypeStruct((2,), jnp.float32), 1)}, "Odd.data is a ShapeDtypeStruct, not an array"),
        (lambda: None, "builtins.function"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_plain_tree_is_refused(tmp_path, tree, match):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(TypeError, match=match):
        pack.save(tmp_path / "file", tree)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"before"}


def test_tracers_are_refused(tmp_path):
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda x: pack.save(tmp_path / "file", {"x": x}))(jnp.ones(2))
    assert not list(tmp_path.iterdir())


def test_a_container_that_holds_itself_is_refused(tmp_path):
    tree = {"a": []}
    tree["a"].append(tree)
    with pytest.raises(ValueError, match="holds itself"):
        pack.save(tmp_path / "file", tree)


def test_a_leaf_class_that_load_would_not_find_is_refused(tmp_path):
    def define():
        class Twice(Leaf):
            data: jax.Array

            def aval(self):
                return ShapedArray(self.data.shape, self.data.dtype)

            def materialise(self):
                return self.data

        return Twice

    first, _ = define(), define()
    with pytest.raises(ValueError, match="Twice by its name"):
        pack.save(tmp_path / "file", first(jnp.ones(2)))


@pytest.mark.parametrize("metadata", [(1, 2), {1: 2}, {"a": {3}}, float("nan"), np.float32(1), {"x": np.ones(2)}])
def test_metadata_that_json_would_change_is_refused(tmp_path, metadata):
    with pytest.raises(TypeError, match="metadata"):
        pack.save(tmp_path / "file", {}, metadata)
    assert not list(tmp_path.iterdir())


# Writing is all or nothing


def test_a_full_disk_leaves_the_older_file(tmp_path):
    pack.save(tmp_path / "file", {"a": 1})
    before = (tmp_path / "file").read_bytes()
    noise = np.frombuffer(np.random.default_rng(0).bytes(300_000), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            pack.save(tmp_path / "file", {"noise": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": before}


def test_a_target_that_can_not_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        pack.save(tmp_path / "folder", {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileNotFoundError):
        pack.save(tmp_path / "no" / "file", {"a": 1})


def test_links_are_followed_and_the_mode_is_a_new_files(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real" / "file", tmp_path / "link")
    pack.save(tmp_path / "link", {"a": 1})
    (tmp_path / "plain").touch()
    assert (tmp_path / "link").is_symlink() and pack.load(tmp_path / "real" / "file") == {"a": 1}
    assert (tmp_path / "real" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
