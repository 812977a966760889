"""A stream of bytes as it is, or entropy-coded, whichever is smaller.

A coding has a name: `raw`, or `ans8`, `ans4`, `ans2`, `ans1`: asymmetric numeral systems (Duda 2009, as constriction
implements them) on symbols of so many bits, cut from each byte from the low end. Wide symbols know what the bits of
a byte have to do with one another; narrow ones need a smaller table and fit values packed several a byte. A coded
stream is the table of `_model.py` and then the coder's 32-bit words, little-endian, without trailing zero bytes.

For a reader without constriction: of `n` symbols with the probabilities `p`, symbol `i` has a range of the numbers
below `2**24`, which begins at `floor(c * (p[0] + ... + p[i - 1])) + i` with `c = (2**24 - n) / sum(p)`, in float64, and
ends where the next one's begins. The state is made of the last two words, the very last one on top. Its low 24 bits `q`
lie in the range of the next symbol, from `first` on and `size` long; then the state becomes `size * (state >> 24) + q -
first`, and if that is below `2**32` the last word that is left goes under it. In the end the state is 0, and no word is
left.
"""

from typing import NamedTuple

import constriction
import numpy as np

from jaxcompress.pack import _model
from jaxcompress.pack._error import PackError

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

EXPANSION = 4096
"""A coded byte stands for at most so many: a damaged length is refused before memory is set aside for it."""

_WIDTHS = (8, 4, 2, 1)
_WORTH = 0.99  # coding costs time to read: it must save 1 %
_AS_GOOD = 1.001  # wide symbols are fewer symbols: take them where they cost no more than this
_CHUNK = 1 << 18  # bytes; symbols are int32, one each, and should stay in the cache


class Plan(NamedTuple):
    """How a stream is to be coded."""

    coding: str
    size: float
    """In bytes, to within a few."""
    model: _model.Plan | None


def histogram(data: np.ndarray) -> np.ndarray:
    """How often each byte occurs in `data`, uint8 [n]: int64 [256]."""
    counts = np.zeros(256, np.int64)
    for start in range(0, data.size, _CHUNK):
        counts += np.bincount(data[start : start + _CHUNK], minlength=256)
    return counts


def plan(counts: np.ndarray) -> Plan:
    """The best coding for a stream whose bytes occur so often, int [256]."""
    total = int(counts.sum())
    raw = Plan("raw", total, None)
    # narrower symbols know less, so no width can beat the entropy of bytes
    if total < 8 or _model.entropy_bits(counts) / 8 >= _WORTH * total:
        return raw
    plans = []
    for width in _WIDTHS:
        model = _model.plan(_narrow(counts, width))
        plans.append(Plan(f"ans{width}", max(model.bits / 8 + 1, total / EXPANSION), model))
    smallest = min(plan.size for plan in plans)
    best = next(plan for plan in plans if plan.size <= _AS_GOOD * smallest)
    return best if best.size < _WORTH * total else raw


def encode(data: np.ndarray, plan: Plan) -> tuple[str, bytes]:
    """`data`, uint8 [n], coded as planned, and the coding's name; as it is after all if that is no longer."""
    if plan.model is not None:
        width, model = int(plan.coding.removeprefix("ans")), _model.fit(plan.model)
        coded = (model.table + _words(data, width, model)).ljust(data.size // EXPANSION, b"\0")
        if len(coded) < data.size:
            return plan.coding, coded
    return "raw", data.tobytes()


def decode(coding: str, coded: bytearray | memoryview, size: int) -> np.ndarray:
    """The stream of `size` bytes that was coded so: uint8 [size], writable; it may share memory with `coded`.

    Raises:
      PackError: this is no such stream.
    """
    if coding == "raw":
        if len(coded) != size:
            raise PackError(f"{len(coded)} raw bytes where {size} are wanted")
        return np.frombuffer(coded, np.uint8)
    width = int(coding.removeprefix("ans"))
    if size >= EXPANSION * (len(coded) + 1):
        raise PackError(f"{len(coded)} coded bytes can't hold {size}")
    per_byte = 8 // width
    model = _model.read(bytes(coded[: _model.LONGEST]), size * per_byte, width)
    words = bytes(coded[len(model.table) :]).rstrip(b"\0")
    coder = AnsCoder(np.frombuffer(words.ljust(-(-len(words) // 4) * 4, b"\0"), "<u4").astype(np.uint32))
    symbols = Categorical(model.probabilities, perfect=False)
    data = np.empty(size, np.uint8)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        data[start:stop] = _join(coder.decode(symbols, (stop - start) * per_byte), width)
    if not coder.is_empty():
        raise PackError("a coded stream does not end where it should")
    return data


def _words(data: np.ndarray, width: int, model: _model.Model) -> bytes:
    coder, symbols = AnsCoder(), Categorical(model.probabilities, perfect=False)
    for start in reversed(range(0, data.size, _CHUNK)):  # what is coded last is decoded first
        coder.encode_reverse(_split(data[start : start + _CHUNK], width), symbols)
    # the last word is never zero, so its zero bytes can be put back
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def _narrow(counts: np.ndarray, width: int) -> np.ndarray:
    """The histogram of the symbols of `width` bits that bytes of the histogram `counts` are made of."""
    bits = 8
    while bits > width:
        bits //= 2
        square = counts.reshape(2**bits, 2**bits)
        counts = square.sum(0) + square.sum(1)
    return counts


def _split(data: np.ndarray, width: int) -> np.ndarray:
    """Bytes as symbols of `width` bits, int32 [n * 8 / width], the low bits first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return ((data[:, None] >> shifts) & np.uint8(2**width - 1)).reshape(-1).astype(np.int32)


def _join(symbols: np.ndarray, width: int) -> np.ndarray:
    parts = symbols.astype(np.uint8).reshape(-1, 8 // width)
    data = parts[:, 0].copy()
    for i in range(1, parts.shape[1]):
        data |= parts[:, i] << np.uint8(i * width)
    return data
