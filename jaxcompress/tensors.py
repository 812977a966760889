"""Quantized weights as safetensors in the layout of "compressed-tensors", which inference engines read.

    config = tensors.save("model.safetensors", small)   # goes into a model's config.json as "quantization_config"
    small = tensors.load("model.safetensors")           # nested dicts, with Quantized leaves

Of a `Quantized` kernel `a/b/kernel`, `[inputs, outputs]`, the file has (`[outputs, inputs]`, as is the custom there)

* with 8 bits `a.b.weight`, int8; with 4 or 2 bits `a.b.weight_packed`, int32, each word holding `32 // bits` codes plus
  `2**(bits - 1)`, the first in the lowest bits, and `a.b.weight_shape`;
* `a.b.weight_scale`: `[1]` a tensor, `[outputs, 1]` a channel, `[outputs, groups]` a group of inputs;
* `a.b.weight_zero_point`, where there is one: int8, or packed along the outputs;
* `a.b.input_scale` and `a.b.input_zero_point` of static inputs.

Other arrays are there as they are, with dots in their names. Needs the package `safetensors`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._files import replacing
from jaxcompress.arrays import Quantized, is_leaf
from jaxcompress.paths import named_leaves

_KEY = "quantization_config"


def save(path: str | os.PathLike[str], params: Any) -> dict[str, Any]:
    """Writes a tree of arrays and `Quantized` kernels.

    Args:
      path: of the file; it is replaced at once, or not at all.
      params: nested dicts. Kernels are matrices, `[inputs, outputs]`, quantized per tensor, per output or per group of
        inputs; the last step of their path may be `kernel`, which becomes `weight`.

    Returns:
      The `quantization_config`, which the file's metadata holds too.

    Raises:
      TypeError, ValueError: a leaf that the layout has no place for, named by its path.
    """
    from safetensors.numpy import save as to_bytes

    tensors: dict[str, np.ndarray] = {}
    groups: dict[str, list[str]] = {}
    for name, leaf in named_leaves(params, is_leaf):
        dotted = name.replace("/", ".")
        if not is_leaf(leaf):
            tensors[dotted] = np.asarray(leaf)
            continue
        module = dotted.removesuffix(".kernel").removesuffix(".weight")
        scheme, parts = _taken_apart(name, leaf)
        tensors |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(module)
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
        file.write(to_bytes(tensors, {"format": "np", _KEY: json.dumps(config)}))
    return config


def load(path: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads what `save` wrote, or another file of this layout.

    Args:
      path: of the file.
      config: the `quantization_config` from a model's `config.json`; not needed where the file's metadata has it.

    Returns:
      Nested dicts, with `Quantized` kernels, `[inputs, outputs]`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a safetensors file; no config, or one of another layout; tensors that it names are missing.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(os.fspath(path))
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file, or is damaged: {error}") from error
    if config is None:
        if _KEY not in metadata:
            raise ValueError(
                f"{os.fspath(path)} has no {_KEY} in its metadata: hand in that of the model's config.json"
            )
        config = json.loads(metadata[_KEY])
    if config.get("quant_method") != "compressed-tensors":
        raise ValueError(f"want quant_method 'compressed-tensors', got {config.get('quant_method')!r}")
    tree: dict[str, Any] = {}
    for group in config["config_groups"].values():
        for module in group["targets"]:
            _put(tree, [*module.split("."), "kernel"], _put_together(module, group, tensors))
    for name, array in tensors.items():
        _put(tree, name.split("."), jnp.asarray(array))
    return tree


def _taken_apart(name: str, leaf: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The scheme of a kernel, as the config has it, and its tensors."""
    if not isinstance(leaf, Quantized) or leaf.levels is not None or not jnp.issubdtype(leaf.values.dtype, jnp.integer):
        raise TypeError(
            f"{name!r}: the layout has integers of 8, 4 and 2 bits; save other leaves with jaxcompress.pack"
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
    weights = {"num_bits": leaf.bits, "type": "int", "symmetric": leaf.zero_point is None, "dynamic": False}
    weights |= {"strategy": strategy} | ({"group_size": leaf.group[1]} if leaf.group is not None else {})
    codes = np.asarray(leaf.codes()).T
    parts = {"weight_scale": _laid(np.asarray(leaf.steps), strategy, steps)}
    if packed:
        parts |= {"weight_packed": _packed(codes, leaf.bits), "weight_shape": np.asarray(codes.shape, np.int64)}
    else:
        parts["weight"] = codes
    if leaf.zero_point is not None:
        zero = _laid(np.asarray(leaf.zero_point), strategy, steps)
        parts["weight_zero_point"] = _packed(zero.reshape(zero.shape[0], -1).T, leaf.bits).T if packed else zero
    inputs = None
    if leaf.activation_bits is not None:
        dynamic = leaf.input_scale is None
        inputs = {"num_bits": leaf.activation_bits, "type": "int", "symmetric": leaf.input_zero_point is None}
        inputs |= {"dynamic": dynamic, "strategy": "token" if dynamic else "tensor"}
        if leaf.input_scale is not None:
            parts["input_scale"] = np.asarray(leaf.input_scale).reshape(1)
        if leaf.input_zero_point is not None:
            parts["input_zero_point"] = np.asarray(leaf.input_zero_point).reshape(1).astype(np.int8)
    kind = "pack-quantized" if packed else "int-quantized"
    return {"format": kind, "weights": weights, "input_activations": inputs, "dtype": leaf.compute_dtype}, parts


def _laid(per_block: np.ndarray, strategy: str, steps: tuple[int, ...]) -> np.ndarray:
    """[blocks, outputs] as the file has it."""
    return per_block.reshape(1) if strategy == "tensor" else np.broadcast_to(per_block, steps).T


def _put_together(module: str, group: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Quantized:
    """The kernel of a module, whose tensors are taken out."""
    weights, inputs = group["weights"], group.get("input_activations")
    bits, size = weights["num_bits"], weights.get("group_size") if weights["strategy"] == "group" else None

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
    if not weights["symmetric"]:
        zero = take("weight_zero_point")
        zero = zero if zero.dtype == np.int8 else _unpacked(zero.T, bits, scale.shape[0]).T
    static, shifted = inputs is not None and not inputs.get("dynamic"), inputs is not None and not inputs["symmetric"]
    return Quantized.from_codes(
        jnp.asarray(codes.T),
        jnp.asarray(np.reshape(scale, (scale.shape[0], -1)).T, jnp.float32),
        None if zero is None else jnp.asarray(zero.reshape(scale.shape[0], -1).T),
        bits=bits,
        dtype=group.get("dtype", "float32"),
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
