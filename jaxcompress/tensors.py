"""Quantized weights as safetensors in the layout of "compressed-tensors", which inference engines read.

    config = tensors.save("model.safetensors", small)   # goes into a model's config.json as "quantization_config"
    small = tensors.load("model.safetensors")           # nested dicts, with Quantized leaves

Of a `Quantized` kernel `a/b/kernel`, `[inputs, outputs]`, the file has (`[outputs, inputs]`, as is the custom there)

* with 8 bits `a.b.weight`, int8, or F8_E4M3 of `Floats("float8_e4m3fn")`;
* with 4 or 2 bits `a.b.weight_packed`, int32, each word holding `32 // bits` codes plus `2**(bits - 1)`, the first in
  the lowest bits, and `a.b.weight_shape`;
* `a.b.weight_scale`: `[1]` a tensor, `[outputs, 1]` a channel, `[outputs, groups]` a group of inputs;
* `a.b.weight_zero_point`, where there is one: int8; of channels and groups of 4 or 2 bits, packed along the outputs;
* `a.b.input_scale` and `a.b.input_zero_point` of static inputs.

Other arrays are there as they are, with dots in their names. What those do not tell, the path of a leaf that is not
named `kernel` or has dots in it, the file's metadata has, for `load`. Files of other programs are read too: whose
config names classes (`"targets": ["Linear"]`) or patterns (`"re:.*_proj"`) instead of the kernels. Needs the package
`safetensors`.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcompress._files import replacing
from jaxcompress.arrays import Quantized, is_leaf
from jaxcompress.paths import named_leaves

__all__ = ["load", "save"]

_KEY, _PATHS = "quantization_config", "jaxcompress_paths"
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_DTYPES = {"BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"}
_DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_DTYPES |= {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name, sizes in (
        ("F", "float", (16, 32, 64)),
        ("I", "int", (8, 16, 32, 64)),
        ("U", "uint", (8, 16, 32, 64)),
    )
    for bits in sizes
}
"""Of the file, by their names there; numpy alone does not know all."""


def save(path: str | os.PathLike[str], params: Any) -> dict[str, Any]:
    """Writes a tree of arrays and `Quantized` kernels.

    Args:
      path: of the file; it is replaced at once, or not at all.
      params: nested dicts. Kernels are matrices, `[inputs, outputs]`, quantized per tensor, per output or per group of
        inputs; the last step of their path may be `kernel`, which becomes `weight`. What has no arrays (None, an empty
        dict) is not in the file.

    Returns:
      The `quantization_config`, which the file's metadata holds too.

    Raises:
      TypeError, ValueError: a leaf that the layout has no place for, or whose place another has, named by its path.
    """
    from safetensors.numpy import save as to_bytes

    tensors: dict[str, np.ndarray] = {}
    groups: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    paths: dict[str, str] = {}
    for name, leaf in named_leaves(params, is_leaf):
        read_as = name.replace("/", ".")
        if is_leaf(leaf):
            module = read_as.removesuffix(".kernel").removesuffix(".weight")
            scheme, arrays = _taken_apart(name, leaf)
            parts = {f"{module}.{part}": np.ascontiguousarray(array) for part, array in arrays.items()}
            groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(module)
            read_as = f"{module}.kernel"
        else:
            parts = {read_as: _array(name, leaf)}
        for part in {*parts, read_as}:
            if part in owners:
                raise ValueError(f"{name!r} and {owners[part]!r} would both be {part!r} in the file: rename one")
            owners[part] = name
        tensors |= parts
        if read_as.replace(".", "/") != name:
            paths[read_as] = name
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision",
        "config_groups": {
            f"group_{i}": {**json.loads(scheme), "targets": modules}
            for i, (scheme, modules) in enumerate(groups.items())
        },
    }
    formats = {group["format"] for group in config["config_groups"].values()}
    if len(formats) == 1:
        config["format"] = formats.pop()
    with replacing(path) as file:
        told = {_PATHS: json.dumps(paths)} if paths else {}
        file.write(to_bytes(tensors, {"format": "np", _KEY: json.dumps(config), **told}))
    return config


def load(path: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads what `save` wrote, or another file of this layout.

    Args:
      path: of the file.
      config: the `quantization_config` from a model's `config.json`; not needed where the file's metadata has it.

    Returns:
      Nested dicts of JAX arrays, so without `jax_enable_x64` of at most 32 bits; with `Quantized` kernels, `[inputs,
      outputs]`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a safetensors file; no config, or one of another layout; tensors that it names are missing; a
        kernel with scales that this library has no leaf for; integers of more than 32 bits without `jax_enable_x64`.
    """
    tensors, metadata = _read(path)
    if config is None:
        if _KEY not in metadata:
            raise ValueError(
                f"{os.fspath(path)} has no {_KEY} in its metadata: hand in that of the model's config.json"
            )
        config = json.loads(metadata[_KEY])
    if config.get("quant_method") != "compressed-tensors":
        raise ValueError(f"want quant_method 'compressed-tensors', got {config.get('quant_method')!r}")
    tree: dict[str, Any] = {}
    paths = json.loads(metadata.get(_PATHS, "{}"))

    def steps(name: str) -> list[str]:
        return paths[name].split("/") if name in paths else name.split(".")

    for module, group in list(_modules(config, tensors)):
        _put(tree, steps(f"{module}.kernel"), _put_together(module, group, tensors))
    for name, array in tensors.items():
        _put(tree, steps(name), _on_device(name, array))
    return tree


def _on_device(name: str, array: np.ndarray) -> Array:
    found = jnp.asarray(array)
    if np.issubdtype(array.dtype, np.integer) and found.dtype != array.dtype and not np.array_equal(found, array):
        raise ValueError(f"{name!r} has numbers that {found.dtype} does not hold: set jax_enable_x64 to load it")
    return found


def _array(name: str, leaf: Any) -> np.ndarray:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if dtype.name not in _DTYPES.values():
        raise TypeError(f"{name!r}: a safetensors file has no place for {dtype.name}; save it with jaxcompress.pack")
    return np.asarray(leaf)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The file's tensors and its metadata."""
    from safetensors import SafetensorError, deserialize

    data = Path(path).read_bytes()
    try:
        found = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file, or is damaged: {error}") from error
    unknown = sorted({part["dtype"] for _, part in found} - set(_DTYPES))
    if unknown:
        raise ValueError(f"{os.fspath(path)} has tensors of {', '.join(unknown)}; read here are {', '.join(_DTYPES)}")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {
        name: np.frombuffer(part["data"], jnp.dtype(_DTYPES[part["dtype"]])).reshape(part["shape"])
        for name, part in found
    }, header.get("__metadata__", {})


def _modules(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The quantized modules of a file and their groups in the config, which names modules, patterns or classes."""
    groups = list(config["config_groups"].values())
    formats = {config.get("format", _FORMATS[0]), *(group.get("format") or _FORMATS[0] for group in groups)}
    if not formats <= set(_FORMATS):
        raise ValueError(f"read here are {', '.join(_FORMATS)}; the config has {', '.join(sorted(formats))}")
    left = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    classes = []
    for target, group in [(name, named) for named in groups for name in named["targets"]]:
        if target.startswith("re:"):
            chosen = [module for module in left if re.match(target[3:], module)]
        elif any(name.startswith(f"{target}.") for name in tensors):
            chosen = [target]
        else:
            classes.append((target, group))
            continue
        yield from ((module, group) for module in chosen)
        left = [module for module in left if module not in chosen]
    if classes and not left:
        raise ValueError(f"the file has no tensors of {classes[0][0]!r}, which its config speaks of")
    if left and any(group is not classes[0][1] for _, group in classes):
        raise ValueError(
            f"the config has groups for {[target for target, _ in classes]}: which of these {left[0]!r} is cannot be "
            "told without the model. Hand in a config whose targets are paths"
        )
    yield from ((module, classes[0][1]) for module in left if classes)


def _taken_apart(name: str, leaf: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The scheme of a kernel, as the config has it, and its tensors."""
    floats = isinstance(leaf, Quantized) and leaf.values.dtype == jnp.float8_e4m3fn and leaf.group is None
    if not isinstance(leaf, Quantized) or not (leaf.of_integers or floats):
        raise TypeError(
            f"{name!r}: the layout has integers of 8, 4 and 2 bits and float8_e4m3fn; save other leaves with "
            "jaxcompress.pack"
        )
    grouped = leaf.group is not None and leaf.group[0] == -2
    steps = leaf.scale.shape
    if leaf.ndim != 2 or (steps[0] > 1 and not grouped) or (leaf.group is not None and not grouped):
        raise ValueError(
            f"{name!r}: want a matrix [inputs, outputs] with scales per tensor, output or group of inputs, got "
            f"{leaf.shape} with scales {steps}, group={leaf.group}"
        )
    strategy = "group" if grouped else "channel" if steps[1] > 1 else "tensor"
    packed = leaf.bits < 8
    kind = "float" if floats else "int"
    weights = {"num_bits": leaf.bits, "type": kind, "symmetric": leaf.zero_point is None, "dynamic": False}
    weights |= {"strategy": strategy} | ({"group_size": leaf.group[1]} if leaf.group is not None else {})
    codes = np.asarray(leaf.values if floats else leaf.codes()).T
    parts = {"weight_scale": _laid(np.asarray(leaf.steps), strategy, steps)}
    if packed:
        parts |= {"weight_packed": _packed(codes, leaf.bits), "weight_shape": np.asarray(codes.shape, np.int64)}
    else:
        parts["weight"] = codes
    if leaf.zero_point is not None:
        zero = _laid(np.asarray(leaf.zero_point), strategy, steps)
        divided = packed and strategy != "tensor"
        parts["weight_zero_point"] = _packed(zero.reshape(zero.shape[0], -1).T, leaf.bits).T if divided else zero
    inputs = None
    if leaf.activation_bits is not None:
        dynamic = leaf.input_scale is None
        inputs = {"num_bits": leaf.activation_bits, "type": "int", "symmetric": leaf.input_zero_point is None}
        inputs |= {"dynamic": dynamic, "strategy": "token" if dynamic else "tensor"}
        if leaf.input_scale is not None:
            parts["input_scale"] = np.asarray(leaf.input_scale).reshape(1)
        if leaf.input_zero_point is not None:
            whole = np.int8 if leaf.activation_bits <= 8 else np.int16
            parts["input_zero_point"] = np.asarray(leaf.input_zero_point).reshape(1).astype(whole)
    return {
        "format": "pack-quantized" if packed else f"{kind}-quantized",
        "weights": weights,
        "input_activations": inputs,
        "dtype": leaf.compute_dtype,
    }, parts


def _laid(per_block: np.ndarray, strategy: str, steps: tuple[int, ...]) -> np.ndarray:
    """[blocks, outputs] as the file has it."""
    return per_block.reshape(1) if strategy == "tensor" else np.broadcast_to(per_block, steps).T


def _put_together(module: str, group: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Quantized:
    """The kernel of a module, whose tensors are taken out."""
    weights, inputs = group["weights"], group.get("input_activations")
    bits, strategy, kind = weights["num_bits"], weights["strategy"], weights.get("type", "int")
    symmetric, size = weights.get("symmetric", True), weights.get("group_size") if strategy == "group" else None
    if strategy not in ("tensor", "channel", "group") or f"{module}.weight_g_idx" in tensors:
        raise ValueError(f"{module!r}: read are scales per tensor, output or group of neighbours, not {weights}")
    if kind not in ("int", "float") or (kind == "float" and (bits != 8 or inputs is not None)):
        raise ValueError(f"{module!r}: read are integers, and weights of 8-bit floats alone, not {dict(group)}")

    def take(part: str) -> np.ndarray:
        try:
            return tensors.pop(f"{module}.{part}")
        except KeyError:
            raise ValueError(f"the file has no {module}.{part}, which its config speaks of") from None

    if f"{module}.weight_packed" in tensors:
        codes = _unpacked(take("weight_packed"), bits, int(take("weight_shape")[1]))
    else:
        codes = take("weight")
    scale, zero = take("weight_scale"), None
    dtype = group.get("dtype", scale.dtype.name)
    per_block = jnp.asarray(np.reshape(scale, (scale.shape[0] if scale.ndim else 1, -1)).T, jnp.float32)
    if kind == "float":
        values = jnp.asarray(codes.T)
        return Quantized(values=values, scale=per_block, zero_point=None, bits=8, length=None, compute_dtype=dtype)
    if not symmetric:
        zero = take("weight_zero_point")
        zero = zero if zero.dtype == np.int8 else _unpacked(zero.T, bits, scale.shape[0]).T
    static = inputs is not None and not inputs.get("dynamic")
    shifted = inputs is not None and not inputs.get("symmetric", True)
    return Quantized.from_codes(
        jnp.asarray(codes.T),
        per_block,
        None if zero is None else jnp.asarray(zero.reshape(per_block.shape[::-1]).T),
        bits=bits,
        dtype=dtype,
        group=None if size is None else (-2, size),
        activation_bits=None if inputs is None else inputs["num_bits"],
        input_scale=jnp.asarray(take("input_scale").reshape(1, 1)) if static else None,
        input_zero_point=jnp.asarray(take("input_zero_point").reshape(1, 1)) if static and shifted else None,
    )


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """`32 // bits` codes a word along the last axis."""
    a_word = 32 // bits
    moved = (codes.astype(np.int64) + 2 ** (bits - 1)).astype(np.uint32)
    moved = np.pad(moved, [(0, 0), (0, -codes.shape[1] % a_word)])
    words = np.zeros((codes.shape[0], moved.shape[1] // a_word), np.uint32)
    for i in range(a_word):
        words |= moved[:, i::a_word] << np.uint32(bits * i)
    return words.view(np.int32)


def _unpacked(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    parts = np.ascontiguousarray(words).view(np.uint32)[..., None] >> (bits * np.arange(32 // bits, dtype=np.uint32))
    codes = (parts & np.uint32(2**bits - 1)).reshape(words.shape[0], -1)[:, :length]
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _put(tree: dict[str, Any], steps: list[str], value: Any) -> None:
    for step in steps[:-1]:
        tree = tree.setdefault(step, {})
    tree[steps[-1]] = value
