"""An array as streams of bytes, and the one line that describes it in the header.

Such a line reads

    int8[72,8] ans8:411 5d41402a
    float32[784,1024] planes raw:802816+raw:802816+raw:802816+ans8:262101 7d793037

that is: dtype and shape as JAX writes them; how the bytes are laid out (nothing: one stream, in memory order); each
stream's coding and its length in the file; the CRC-32 of those bytes, in hexadecimal. The layouts:

* memory order, little-endian, the first index slowest; booleans are packed eight a byte and integers or floats of
  4 and 2 bits two and four a byte, the first in the low bits;
* `planes`: first every element's lowest byte, then every second one, ...: a float's exponents stand together, and an
  integer's empty high bytes;
* `nonzero`: a mask, packed bits, of the elements that are not all zero bits; then the planes of those alone. (The -0.0
  that a product of weights and mask leaves is kept as such, and costs more than a zero.)
"""

import math
import re
import zlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxcompress.pack import _streams
from jaxcompress.pack._error import PackError

_NARROW_FLOATS = [
    f"float8_{kind}" for kind in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
]
_FROM_ML_DTYPES = ["int2", "int4", "uint2", "uint4", "float4_e2m1fn", *_NARROW_FLOATS, "bfloat16"]
_FROM_NUMPY = ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
_FROM_NUMPY += ["float16", "float32", "float64", "complex64", "complex128"]

DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _FROM_NUMPY}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _FROM_ML_DTYPES}
"""What a packed file may hold, by name."""

_PACKED_BITS = {"bool": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
_LINE = re.compile(
    r"(?P<dtype>\w+)\[(?P<shape>(\d+(,\d+)*)?)\] "
    r"((?P<layout>planes|nonzero) )?(?P<streams>(raw|ans[1248]):\d+(\+(raw|ans[1248]):\d+)*) (?P<crc>[0-9a-f]{8})"
)
_Stream = tuple[np.ndarray, _streams.Plan]
_SPLIT = 200  # bytes; of less, planes save less than their line in the header takes
_MOSTLY = 1 / 16  # the share of zeros from which on leaving them out is tried


def encode(array: np.ndarray) -> tuple[str, bytes]:
    """An array of one of `DTYPES` as (its line, its bytes in the file)."""
    name, packed = array.dtype.name, _to_bytes(array)
    width = packed.size // array.size if array.size and name not in _PACKED_BITS else 1
    layout, streams = _cheapest(packed, width)
    coded = [_streams.encode(data, plan) for data, plan in streams]
    section = b"".join(data for _, data in coded)
    shape = ",".join(str(n) for n in array.shape)
    codings = "+".join(f"{coding}:{len(data)}" for coding, data in coded)
    return f"{name}[{shape}] {layout}{codings} {zlib.crc32(section):08x}", section


def decode(line: str, take: Callable[[int], bytearray]) -> np.ndarray:
    """The array of a line; `take(n)` hands out the next `n` bytes of the file.

    Raises:
      PackError: the line can't be understood, or the bytes are not what it says.
    """
    found = _LINE.fullmatch(line)
    if not found or found["dtype"] not in DTYPES:
        raise PackError(f"no array is described by {line[:80]!r}")
    dtype, layout = DTYPES[found["dtype"]], found["layout"]
    shape = tuple(int(n) for n in found["shape"].split(",")) if found["shape"] else ()
    streams = [(coding, int(length)) for coding, length in (s.split(":") for s in found["streams"].split("+"))]
    section = memoryview(take(sum(length for _, length in streams)))
    if zlib.crc32(section) != int(found["crc"], 16):
        raise PackError("its bytes do not match their checksum")
    pieces = []
    for coding, length in streams:
        pieces.append((coding, section[:length]))
        section = section[length:]
    count = math.prod(shape)
    if found["dtype"] in _PACKED_BITS:
        bits = _PACKED_BITS[found["dtype"]]
        return _unpack(_streams_of(pieces, None, -(-count * bits // 8), 1), bits, count).view(dtype).reshape(shape)
    return _streams_of(pieces, layout, count, dtype.itemsize).view(dtype).reshape(shape)


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """The array's bytes in memory order, narrow elements packed: uint8 [n]."""
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = _PACKED_BITS.get(array.dtype.name)
    if bits is None:
        return flat.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    if bits == 1:
        return np.packbits(flat, bitorder="little")
    per_byte = 8 // bits
    elements = np.pad(flat.view(np.uint8) & np.uint8(2**bits - 1), (0, -flat.size % per_byte)).reshape(-1, per_byte)
    return np.bitwise_or.reduce(elements << np.arange(0, 8, bits, dtype=np.uint8), axis=1)


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)[:count]


def _cheapest(packed: np.ndarray, width: int) -> tuple[str, list[_Stream]]:
    """The layout that is expected to be smallest: its word in the line, and its streams."""
    if width == 1 or packed.size < _SPLIT:
        return "", [(packed, _streams.plan(_streams.histogram(packed)))]
    planes = [np.ascontiguousarray(plane) for plane in packed.reshape(-1, width).T]
    counts = [_streams.histogram(plane) for plane in planes]
    candidates = [
        ("", [(packed, _streams.plan(sum(counts, np.zeros(256, np.int64))))]),
        ("planes ", [(plane, _streams.plan(count)) for plane, count in zip(planes, counts, strict=True)]),
    ]
    kept = np.bitwise_or.reduce(planes).astype(bool)
    zeros = kept.size - int(kept.sum())
    if zeros > _MOSTLY * kept.size:
        mask = np.packbits(kept, bitorder="little")
        kept_plans = [_streams.plan(count - zeros * (np.arange(256) == 0)) for count in counts]
        kept_planes = [plane[kept] for plane in planes]
        streams = [(mask, _streams.plan(_streams.histogram(mask))), *zip(kept_planes, kept_plans, strict=True)]
        candidates.append(("nonzero ", streams))
    raw_size = packed.size + len(f"raw:{packed.size}")
    layout, streams = min(candidates, key=lambda candidate: _size(*candidate))
    return (layout, streams) if _size(layout, streams) < 0.99 * raw_size else candidates[0]


def _size(layout: str, streams: list[_Stream]) -> float:
    """The bytes that these streams are expected to take, in their section and in the line."""
    return len(layout) + sum(plan.size + len(f"{plan.coding}:{plan.size:.0f}+") for _, plan in streams)


def _streams_of(pieces: list[tuple[str, memoryview]], layout: str | None, count: int, width: int) -> np.ndarray:
    """The bytes [count * width] of `count` elements that are laid out so."""
    wanted = {None: 1, "planes": width, "nonzero": width + 1}[layout]
    if len(pieces) != wanted:
        raise PackError(f"{len(pieces)} streams where {wanted} are wanted")
    if layout is None:
        return _streams.decode(*pieces[0], count * width)
    if layout == "planes":
        return _interleave(pieces, count)
    mask = _unpack(_streams.decode(*pieces[0], -(-count // 8)), 1, count).view(bool)
    elements = np.zeros((count, width), np.uint8)
    elements[mask] = _interleave(pieces[1:], int(mask.sum())).reshape(-1, width)
    return elements.reshape(-1)


def _interleave(planes: list[tuple[str, memoryview]], count: int) -> np.ndarray:
    first = _streams.decode(*planes[0], count)  # refuses an absurd count before the whole is set aside
    elements = np.empty((count, len(planes)), np.uint8)
    elements[:, 0] = first
    for i, plane in enumerate(planes[1:], 1):
        elements[:, i] = _streams.decode(*plane, count)
    return elements.reshape(-1)
