"""Packed files: a tree of arrays and compressed leaves, entropy-coded, in one file with a header people can read.

    pack.save("model.jxc", {"params": params}, metadata={"accuracy": 0.97})
    params = pack.load("model.jxc")["params"]

Quantized and pruned weights have few distinct values, some far more frequent than others; coding each by its frequency
brings a leaf within about one per cent of its order-0 entropy, so a zero among ten costs half a bit. Each leaf's bytes
are coded where that saves at least one per cent and stored as they are otherwise; floats are split into byte planes,
whose exponents shrink. Always lossless. No pickle: a file can hold data, never code.

A file that is cut short, altered or of another kind raises `PackError` and nothing else. `python -m jaxcompress.pack
FILE` prints the header: every leaf's path, dtype, shape, coding, length and checksum. The modules say what is on the
disk: `_file.py` the frame, `_tree.py` the header, `_arrays.py` an array's bytes, `_streams.py` and `_model.py` coding.
"""

from jaxcompress.pack._error import PackError
from jaxcompress.pack._file import load, load_metadata, read_header, save

__all__ = ["PackError", "load", "load_metadata", "read_header", "save"]
