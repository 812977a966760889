"""Safetensors of quantized weights: read back to the bit, and laid out as the format is described."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcompress import quantize, tensors
from jaxcompress.quantize import Affine


@pytest.fixture
def tree(rng):
    def kernel(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "eight": {"kernel": kernel(10, 6), "bias": jnp.ones(6)},
        "four": {"kernel": kernel(70, 12)},
        "zero": {"four": {"kernel": kernel(20, 11).astype(jnp.bfloat16)}, "eight": {"kernel": kernel(9, 5)}},
        "two": {"kernel": kernel(33, 4)},
        "norm": {"scale": jnp.full(3, 2, jnp.float16), "steps": jnp.arange(3)},
    }
    rules = [
        ("^eight/kernel", Affine(8, activation_bits=8)),
        ("^four/kernel", Affine(4, group=(0, 32))),
        ("zero/four", Affine(4, symmetric=False, activation_bits=8)),
        ("zero/eight", Affine(8, symmetric=False, axes=())),
        ("two/kernel", Affine(2, axes=(), symmetric=False)),
        ("", None),
    ]
    small = jax.jit(lambda params: quantize.convert(params, rules))(params)
    ranges = {"eight/kernel": quantize.Range(np.float32(-1), np.float32(2))}
    small["eight"] = quantize.static({"eight": small["eight"]}, ranges)["eight"]
    return small


def test_read_back_to_the_bit(tree, tmp_path):
    config = tensors.save(tmp_path / "model.safetensors", tree)
    for given in (None, config):
        back = tensors.load(tmp_path / "model.safetensors", given)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
        assert [x.dtype for x in jax.tree.leaves(back)] == [x.dtype for x in jax.tree.leaves(tree)]
    assert config["format"] == "mixed-precision" and config["quant_method"] == "compressed-tensors"


def test_a_zero_point_of_16_bits_comes_back(tmp_path):
    small = quantize.convert({"a": {"kernel": jnp.ones((8, 4))}}, {"kernel": Affine(8, activation_bits=16)})
    small = quantize.static(small, {"a/kernel": quantize.Range(np.float32(0), np.float32(4))})
    tensors.save(tmp_path / "model.safetensors", small)
    back = tensors.load(tmp_path / "model.safetensors")
    assert float(back["a"]["kernel"].input_zero_point.item()) == -(2**15)


def test_the_layout_is_the_formats(tree, tmp_path):
    """Eight codes a word, plus eight each, the first in the lowest bits; outputs in front."""
    tensors.save(tmp_path / "model.safetensors", tree)
    file = load_file(tmp_path / "model.safetensors")
    packed, codes = file["four.weight_packed"], np.asarray(tree["four"]["kernel"].codes())
    assert packed.dtype == np.int32 and packed.shape == (12, 9) and file["four.weight_shape"].tolist() == [12, 70]
    assert file["four.weight_scale"].shape == (12, 3)
    for out, word, place in [(0, 0, 0), (3, 2, 7), (11, 8, 5)]:
        assert (int(packed[out, word]) >> (4 * place) & 15) - 8 == codes[8 * word + place, out]
    assert file["eight.weight"].dtype == np.int8 and file["eight.weight"].shape == (6, 10)
    assert file["eight.weight_scale"].shape == (6, 1) and file["two.weight_scale"].shape == (1,)
    zero = np.asarray(tree["zero"]["four"]["kernel"].zero_point)[0]
    words = file["zero.four.weight_zero_point"]  # packed along the outputs
    assert words.shape == (2, 1) and (int(words[1, 0]) >> 8 & 15) - 8 == zero[10]
    one = file["two.weight_zero_point"]  # of a tensor it is not packed
    assert one.dtype == np.int8 and one.tolist() == np.asarray(tree["two"]["kernel"].zero_point).reshape(1).tolist()
    assert file["norm.scale"].dtype == np.float16


@pytest.mark.parametrize("axes", [(), (-1,)])
def test_small_floats(axes, tmp_path, rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(7, 5)), jnp.bfloat16), "bias": jnp.ones(5, jnp.float8_e5m2)}
    small = quantize.convert({"a": params}, {"kernel": quantize.Floats("float8_e4m3fn", axes=axes)})
    config = tensors.save(tmp_path / "model.safetensors", small)
    assert config["format"] == "float-quantized" and config["config_groups"]["group_0"]["weights"]["type"] == "float"
    back = tensors.load(tmp_path / "model.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(small), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))


def test_arrays_of_every_dtype_come_back_or_are_refused_by_their_path(tmp_path):
    path = tmp_path / "model.safetensors"
    kept = ["bool", "int8", "uint16", "int32", "float16", "bfloat16", "float8_e5m2", "complex64"]
    tree = {dtype: jnp.asarray([[1, 0, 1]]).astype(dtype) for dtype in kept}
    tensors.save(path, tree)
    back = tensors.load(path)
    for dtype in kept:
        assert back[dtype].dtype == dtype
        np.testing.assert_array_equal(back[dtype], tree[dtype])
    for leaf in (jnp.ones(3, jnp.int4), jnp.ones(3, jnp.float8_e4m3fnuz), jax.random.key(0), np.asarray("text")):
        with pytest.raises(TypeError, match="'a/b'"):
            tensors.save(path, {"a": {"b": leaf}})


def test_integers_that_32_bits_do_not_hold_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors.save(path, {"steps": np.int64([5])})
    assert int(tensors.load(path)["steps"][0]) == 5
    tensors.save(path, {"steps": np.int64([2**40])})
    with pytest.raises(ValueError, match=r"'steps' has numbers that int32 does not hold: set jax_enable_x64"):
        tensors.load(path)


@pytest.mark.parametrize("targets", [["Linear"], ["re:model[.]"]])
def test_files_of_other_programs(targets, tmp_path, rng):
    """As llm-compressor writes them: classes or patterns for targets, scales in bfloat16, fields left out."""
    weight = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
    params = {"model": {"proj": {"kernel": weight}}, "lm_head": {"kernel": weight}}
    small = quantize.convert(params, {"proj": Affine(4, group=(0, 16), symmetric=False)})
    tensors.save(tmp_path / "ours", small)
    arrays = load_file(tmp_path / "ours")
    scale = arrays["model.proj.weight_scale"].astype(jnp.bfloat16)
    save_file(arrays | {"model.proj.weight_scale": scale}, tmp_path / "theirs")
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
    group = {"targets": targets, "weights": weights, "input_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    back = tensors.load(tmp_path / "theirs", config)
    leaf, ours = back["model"]["proj"]["kernel"], small["model"]["proj"]["kernel"]
    np.testing.assert_array_equal(leaf.codes(), ours.codes())
    np.testing.assert_array_equal(leaf.scale.T, scale.astype(np.float32))
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back["lm_head"]["kernel"], weight)

    def refused(match, **changed):
        with pytest.raises(ValueError, match=match):
            tensors.load(tmp_path / "theirs", config | changed)

    refused("cannot be told", config_groups={"a": {**group, "targets": ["A"]}, "b": {**group, "targets": ["B"]}})
    refused("not .*'block'", config_groups={"a": {**group, "weights": weights | {"strategy": "block"}}})
    refused("the config has nvfp4", format="nvfp4-pack-quantized")
    order = {"model.proj.weight_g_idx": np.zeros(32, np.int32)}
    save_file(arrays | order, tmp_path / "theirs")
    refused("group of neighbours")


def test_a_config_that_names_what_is_not_there(tree, tmp_path):
    config = tensors.save(tmp_path / "model.safetensors", tree)
    arrays = load_file(tmp_path / "model.safetensors")
    save_file({name: x for name, x in arrays.items() if not name.startswith("two.")}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no tensors of 'two'"):
        tensors.load(tmp_path / "model.safetensors", config)


def test_refuses(tree, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match=r"'w': the layout has integers.*jaxcompress.pack"):
        tensors.save(path, quantize.convert({"w": jnp.ones((64, 4))}, {"w": quantize.NF4()}))
    with pytest.raises(ValueError, match="'w': want a matrix"):
        tensors.save(path, quantize.convert({"w": jnp.ones((3, 3, 4))}, {"w": Affine()}))
    with pytest.raises(ValueError, match="'w': want a matrix"):
        tensors.save(path, quantize.convert({"w": jnp.ones((3, 4))}, {"w": Affine(axes=(0,))}))
    with pytest.raises(FileNotFoundError):
        tensors.load(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        tensors.load(path)
    config = tensors.save(path, tree)
    arrays = load_file(path)
    del arrays["four.weight_scale"]
    save_file(arrays, path)
    with pytest.raises(ValueError, match="quantization_config"):
        tensors.load(path)
    with pytest.raises(ValueError, match=r"no four.weight_scale"):
        tensors.load(path, config)
    with pytest.raises(ValueError, match="gptq"):
        tensors.load(path, {"quant_method": "gptq"})


def test_paths_that_the_files_names_do_not_tell_come_back(tmp_path):
    weight = jnp.asarray(np.arange(12).reshape(4, 3), jnp.float32)
    params = {
        "model.layers.0": {"kernel": weight, "bias": jnp.ones(3)},
        "model": {"table": weight, "weight": weight, "scale": jnp.ones(2)},
        "w": weight,
    }
    small = quantize.convert(params, {"kernel$|table$|weight$|w$": Affine(4)})
    tensors.save(tmp_path / "model.safetensors", small)
    back = tensors.load(tmp_path / "model.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, back, small)
    assert "model.layers.0.weight_packed" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["weight", "kernel"])
def test_two_leaves_of_one_path_are_refused(name, tmp_path):
    """Keys may have slashes: each path would be `a/b/weight`, and one array would take the other's place unsaid."""
    with pytest.raises(ValueError, match=rf"would both be 'a\.b\.{name}' in the file"):
        tensors.save(tmp_path / "model.safetensors", {"a/b": {name: jnp.ones(3)}, "a": {"b": {name: jnp.zeros(3)}}})


@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_two_leaves_of_one_name_in_the_file_are_refused(name, tmp_path):
    tree = {"a": quantize.convert({"kernel": jnp.ones((4, 3)), name: jnp.ones((4, 3))}, {"kernel$": Affine(8)})}
    with pytest.raises(ValueError, match=rf"would both be 'a\.{name}' in the file"):
        tensors.save(tmp_path / "model.safetensors", tree)
