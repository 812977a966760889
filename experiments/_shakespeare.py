"""A language model of characters, and its text: tiny Shakespeare, or a text that Python brings along for short runs.

A text is cut into windows. Of each the model predicts every next character, the one behind the window too: that one is
the window's label, so that text is a data set of three splits like any other. The customary last tenth is for the test;
the tenth before it is for choices.
"""

import importlib
import os
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from experiments._command import UsageError
from experiments._splits import Dataset, HeldOut, Split
from experiments.data import DataNotFoundError

CONTEXT = 64
TEXTS = ("shakespeare", "pydoc")


def load_text(name: str, data_dir: Path | None = None, *, context: int = CONTEXT, test_windows: int = 512) -> Dataset:
    """Windows of `context` characters that do not overlap, as the numbers of the characters.

    Args:
      name: "shakespeare" (`input.txt`, 1,115,394 characters) or "pydoc": the first 100,000 characters of the help texts
        that come with Python, which differ from version to version.
      data_dir: where `input.txt` or `tinyshakespeare/input.txt` is; default `$JAXCOMPRESS_DATA_DIR`.
      context: characters a window.
      test_windows: at most so many of the last tenth, evenly spaced.

    Raises:
      DataNotFoundError: there is no file.
      ValueError: no such text.
    """
    if name not in TEXTS:
        raise UsageError(f"no text {name!r}: there are {', '.join(TEXTS)}")
    text = _help_texts()[:100_000] if name == "pydoc" else _file(data_dir).read_text(encoding="utf-8")
    parts = np.split(np.array(list(text)), [len(text) * 8 // 10, len(text) * 9 // 10])
    known = np.unique(parts[0])
    made = {}
    for part, characters in zip(("train", "validation", "test"), parts, strict=True):
        codes = np.searchsorted(known, characters)
        codes[known[np.minimum(codes, known.size - 1)] != characters] = 0  # met in training never
        windows = np.lib.stride_tricks.sliding_window_view(codes, context + 1)[::context]
        if part == "test":
            windows = windows[np.linspace(0, len(windows) - 1, min(test_windows, len(windows))).astype(int)]
        made[part] = Split(part, windows[:, :-1].astype(np.uint8), windows[:, -1].astype(np.int32), 1)
    return Dataset(name, known.size, made["train"], made["validation"], HeldOut(made["test"]))


def next_characters(windows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What stands behind each character, `[windows, context]`."""
    return np.concatenate([windows[:, 1:], labels[:, None]], axis=1)


class Block(nn.Module):
    """Causal attention and a hidden layer, both behind a layer normalisation and beside a shortcut."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, context, width]` to the same."""
        width, (batch, context, _) = x.shape[-1], x.shape
        y = nn.LayerNorm(name="before_attention")(x)
        queries, keys, values = (
            nn.Dense(width, name=name)(y).reshape(batch, context, self.heads, -1) for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x = x + nn.Dense(width, name="out")(mixed.reshape(batch, context, width))
        y = nn.LayerNorm(name="before_hidden")(x)
        return x + nn.Dense(width, name="down")(nn.gelu(nn.Dense(4 * width, name="up")(y)))


class Decoder(nn.Module):
    """A transformer that predicts the next character (Vaswani et al. 2017, with normalisation first).

    Attributes:
      vocabulary: characters.
      width: of the residual stream; the hidden layers have four times as many units.
      layers: blocks.
      heads: of attention.
    """

    vocabulary: int
    width: int = 64
    layers: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Logits `[batch, context, vocabulary]` of what comes next, of characters `[batch, context]` as integers."""
        place = self.param("place", nn.initializers.normal(0.02), (characters.shape[1], self.width))
        x = nn.Embed(self.vocabulary, self.width, name="characters")(characters) + place
        for i in range(self.layers):
            x = Block(self.heads, name=f"Block_{i}")(x)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="last")(x))


def _file(data_dir: Path | None) -> Path:
    folder = Path(data_dir or os.environ.get("JAXCOMPRESS_DATA_DIR") or ".")
    places = [folder / "input.txt", folder / "tinyshakespeare" / "input.txt"]
    found = [path for path in places if path.is_file()]
    if not found:
        raise DataNotFoundError(
            f"tiny Shakespeare is one file, input.txt (char-rnn's); it is not at {places[0]} or {places[1]}; give "
            "--data-dir or $JAXCOMPRESS_DATA_DIR"
        )
    return found[0]


def _help_texts() -> str:
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))
