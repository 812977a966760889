"""The file: a few fixed bytes, the header, the arrays' bytes one after the other.

    8 bytes     89 4A 58 43 0D 0A 1A 0A: magic, damaged by whatever takes a file for text, as PNG's is
    2 bytes     the format's version
    4 bytes     the header's length
    4 bytes     CRC-32 of version, length and header
    header      JSON: {"metadata": ..., "tree": {path: what stands there, ...}}, perhaps deflated (zlib, RFC 1950)
    sections    the arrays' bytes, in the header's order

Numbers are little-endian. The header is JSON because it is documentation; it has each section's length and checksum, so
the file has no other structure. Like everything here it is compressed only where that makes the file at least 1 %
smaller: of a small model's file plain JSON would be a third, in a large model's it can be read with any pager. (zlib's
output is at most 1032 times its input, so a forged header can't ask for much more memory than the file takes.)
"""

import json
import os
import struct
import zlib
from typing import Any, BinaryIO

import numpy as np

from jaxcompress._files import replacing
from jaxcompress.pack import _arrays, _tree
from jaxcompress.pack._error import PackError

Path = str | os.PathLike[str]

MAGIC = b"\x89JXC\r\n\x1a\n"
VERSION = 1
_SIZES = struct.Struct("<HI")
_CHECKSUM = struct.Struct("<I")


def save(path: Path, tree: Any, metadata: Any = None) -> int:
    """Write `tree` to a file, losslessly and as small as its symbols' frequencies allow.

    The file replaces an older one of that name in one step, once it is complete and on the disk; where anything fails
    the older one stays. The same tree makes the same bytes, with the same libraries.

    Args:
      path: the file.
      tree: dicts (with string or int keys), lists and tuples, nested; in them JAX or NumPy arrays of any dtype JAX has,
        typed PRNG keys, compressed leaves, Python numbers and None.
      metadata: anything of JSON types, for `load_metadata`: a model's configuration, its test accuracy.

    Returns:
      The file's size in bytes.

    Raises:
      TypeError: something in the tree is of another kind (a FrozenDict, an nnx.State, a namedtuple, a string); the
        message has its path and how to get a plain tree. Or metadata that JSON would not give back the same.
      ValueError: the tree is nested too deeply, or an array is spread over processes.
    """
    sections: list[bytes] = []

    def put(array: np.ndarray) -> str:
        line, section = _arrays.encode(array)
        sections.append(section)
        return line

    description = {"metadata": _checked(metadata), "tree": _tree.flatten(tree, put)}
    header = json.dumps(description, separators=(",", ":"), allow_nan=False).encode()
    deflated = zlib.compress(header, 9)
    if len(header) - len(deflated) > 0.01 * (len(header) + sum(map(len, sections))):
        header = deflated
    sizes = _SIZES.pack(VERSION, len(header))
    with replacing(path) as file:
        file.write(MAGIC + sizes + _CHECKSUM.pack(zlib.crc32(sizes + header)) + header)
        for section in sections:
            file.write(section)
        return file.tell()


def load(path: Path) -> Any:
    """The tree that `save` wrote.

    Plain arrays come back as NumPy arrays (a bfloat16 one with the dtype `jnp.bfloat16`), so that 64-bit numbers are
    kept and nothing is on a device yet: `jax.device_put(load(path), shardings)` puts them where they belong. Compressed
    leaves have JAX arrays in them; typed PRNG keys are JAX arrays. NumPy scalars come back as arrays of shape ().

    Raises:
      PackError: the file is cut short, altered, or no packed file; or a leaf in it is of a class not known here.
      OSError: the file can't be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            description = _read_header(file, size)

            def take(count: int) -> bytearray:
                if count > size - file.tell():
                    raise PackError("the file ends before it")
                section = bytearray(count)
                if file.readinto(section) != count:
                    raise PackError("the file ends before it")
                return section

            tree = _tree.unflatten(description["tree"], lambda line: _arrays.decode(line, take))
            if file.tell() != size:
                raise PackError(f"{size - file.tell()} bytes follow its end")
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            MemoryError,
            RecursionError,
            zlib.error,
        ) as error:
            # whatever a header with a right checksum may still say wrongly
            raise PackError(f"{os.fspath(path)}: {error or type(error).__name__}") from error
    return tree


def read_header(path: Path) -> dict[str, Any]:
    """The header of a packed file, its checksum verified: `{"metadata": ..., "tree": {path: description}}`.

    Descriptions of arrays read `int8[64,32] ans8:1790 1b2c3d4e`: dtype, shape, coding, bytes in the file, CRC-32.
    `python -m jaxcompress.pack FILE` prints it.

    Raises:
      PackError: the header is damaged, or this is no packed file.
      OSError: the file can't be opened.
    """
    with open(path, "rb") as file:
        try:
            return _read_header(file, os.fstat(file.fileno()).st_size)
        except (ValueError, RecursionError, zlib.error) as error:
            raise PackError(f"{os.fspath(path)}: {error or type(error).__name__}") from error


def load_metadata(path: Path) -> Any:
    """The metadata of a packed file, without reading its arrays; raises what `read_header` does."""
    return read_header(path)["metadata"]


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    fixed = len(MAGIC) + _SIZES.size + _CHECKSUM.size
    start = file.read(fixed)
    if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
        raise PackError("this is no file of jaxcompress.pack")
    if len(start) < fixed:
        raise PackError("the file is cut short within its first bytes")
    sizes = start[len(MAGIC) : len(MAGIC) + _SIZES.size]
    version, length = _SIZES.unpack(sizes)
    if version != VERSION:
        raise PackError(f"the file has format version {version}; this jaxcompress reads {VERSION}")
    if length > size - fixed:
        raise PackError("the file is cut short within its header")
    header = file.read(length)
    if zlib.crc32(sizes + header) != _CHECKSUM.unpack(start[-_CHECKSUM.size :])[0]:
        raise PackError("the header does not match its checksum")
    description = json.loads(header if header.startswith(b"{") else zlib.decompress(header))
    if not isinstance(description, dict) or set(description) != {"metadata", "tree"}:
        raise PackError("the header is not one of jaxcompress.pack")
    return description


def _checked(metadata: Any) -> Any:
    try:
        same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be of JSON types: {error}") from error
    if not same:
        raise TypeError("metadata would come back changed: use lists for tuples, strings for keys")
    return metadata
