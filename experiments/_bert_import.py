"""BERT checkpoints as Hugging Face keeps them (`config.json`, `model.safetensors`) into the Flax encoder's parameters.

size, params = load_bert(folder)
outputs = Bert(size).apply({"params": params}, tokens, mask)
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from experiments._bert import Size
from experiments._command import UsageError
from experiments.data import DataNotFoundError

KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
}
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "position_embedding_type": "absolute"}
"""What the encoder has built in; a checkpoint that does without a key means this."""
OURS = {  # below a layer
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm_1",
    "intermediate.dense": "wide",
    "output.dense": "narrow",
    "output.LayerNorm": "norm_2",
}
NOT_THE_ENCODERS = ("cls.", "classifier.", "embeddings.position_ids")


def load_bert(folder: str | os.PathLike[str]) -> tuple[Size, dict[str, Any]]:
    """Size and parameters of the checkpoint in a folder.

    Raises:
      DataNotFoundError: there is no `config.json` or no `model.safetensors`.
      ValueError: the checkpoint is of another architecture, or its tensors are not those that its size asks for.
    """
    config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise DataNotFoundError(f"no {path}: a checkpoint is a folder with config.json and model.safetensors")
    size = size_of(json.loads(config.read_text(encoding="utf-8")))
    return size, bert_params(load_file(weights), size)


def size_of(config: Mapping[str, Any]) -> Size:
    """The `Size` that a `config.json` describes.

    Raises:
      ValueError: a number is missing, or the encoder has not what the configuration asks for.
    """
    if missing := [key for key in KEYS.values() if key not in config]:
        raise UsageError(f"no {', '.join(missing)} in the configuration of a BERT; it has {', '.join(config)}")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UsageError(f"the encoder has {key} {value!r} built in; the checkpoint has {config[key]!r}")
    return Size(**{ours: int(config[theirs]) for ours, theirs in KEYS.items()})


def bert_params(tensors: Mapping[str, np.ndarray], size: Size) -> dict[str, Any]:
    """The parameters of `Bert(size)` from Hugging Face's tensors.

    Args:
      tensors: by the names of `BertModel`, with or without `bert.` in front; dense weights are `[out, in]`. Heads for
        tasks and the buffer of positions are left out; `gamma` and `beta`, the old names, are read as well.
      size: of the encoder.

    Raises:
      ValueError: tensors are missing, not known, or of another shape; all of them are named.
    """
    given = {_plain(name): np.asarray(x) for name, x in tensors.items()}
    given = {name: x for name, x in given.items() if not name.startswith(NOT_THE_ENCODERS)}
    wanted = _wanted(size)
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        raise UsageError(
            f"not the tensors of a BERT of {size}: missing {', '.join(missing) or 'none'}; unknown"
            f" {', '.join(unknown) or 'none'}"
        )
    if other := [f"{n} {given[n].shape}, not {shape}" for n, (_, shape) in wanted.items() if given[n].shape != shape]:
        raise UsageError(f"tensors of other shapes than a BERT of {size} has: {'; '.join(other)}")
    params: dict[str, Any] = {}
    for name, (path, _) in wanted.items():
        *above, last = path
        place = params
        for key in above:
            place = place.setdefault(key, {})
        place[last] = jnp.asarray(given[name].T if last == "kernel" else given[name], jnp.float32)
    return params


def _plain(name: str) -> str:
    name = name.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def _wanted(size: Size) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """By Hugging Face's name: where the tensor goes in our tree, and its shape there."""
    h, wide = size.hidden, size.intermediate
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}

    def dense(theirs: str, path: tuple[str, ...], out: int, into: int) -> None:
        wanted[f"{theirs}.weight"] = ((*path, "kernel"), (out, into))
        wanted[f"{theirs}.bias"] = ((*path, "bias"), (out,))

    def norm(theirs: str, path: tuple[str, ...]) -> None:
        wanted[f"{theirs}.weight"] = ((*path, "scale"), (h,))
        wanted[f"{theirs}.bias"] = ((*path, "bias"), (h,))

    for theirs, ours, rows in (
        ("word", "words", size.vocabulary),
        ("position", "places", size.positions),
        ("token_type", "segments", 2),
    ):
        wanted[f"embeddings.{theirs}_embeddings.weight"] = ((ours, "embedding"), (rows, h))
    norm("embeddings.LayerNorm", ("norm",))
    for i in range(size.layers):
        for theirs, ours in OURS.items():
            name, path = f"encoder.layer.{i}.{theirs}", (f"layer_{i}", ours)
            if ours.startswith("norm"):
                norm(name, path)
            else:
                dense(name, path, wide if ours == "wide" else h, wide if ours == "narrow" else h)
    dense("pooler.dense", ("pool",), h, h)
    return wanted
