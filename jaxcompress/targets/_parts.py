import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PART = "part-{:05d}.array_record"
KEYS = np.dtype("<i8")
_GROUP_BYTES = 4096


class Index:
    """Where each key (example, seed) stands in a list of keys."""

    def __init__(self, keys: np.ndarray):
        self._examples, self._seeds = np.unique(keys[:, 0]), np.unique(keys[:, 1])
        codes = self._codes(keys)
        self._order = np.argsort(codes, kind="stable")
        self._sorted = codes[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        if not len(self._sorted):
            return np.full(len(keys), -1)
        codes = self._codes(keys)
        at = np.minimum(np.searchsorted(self._sorted, codes), len(self._sorted) - 1)
        return np.where((self._sorted[at] == codes) & (codes >= 0), self._order[at], -1)

    def _codes(self, keys: np.ndarray) -> np.ndarray:
        """One number a key, by the ranks of its parts; -1 where a part is unknown."""
        ranks, known = [], np.ones(len(keys), bool)
        for there, column in ((self._examples, keys[:, 0]), (self._seeds, keys[:, 1])):
            rank = np.searchsorted(there, column)
            inside = np.minimum(rank, max(len(there) - 1, 0))
            known &= there[inside] == column if len(there) else False
            ranks.append(inside)
        return np.where(known, ranks[0] * len(self._seeds) + ranks[1], -1)


class PartWriter:
    """Collects records and writes them in whole parts."""

    def __init__(self, directory: Path, size: int):
        there = [int(path.name[5:10]) for path in directory.glob("part-*.array_record")]
        self._directory, self._size, self._next = directory, size, max(there, default=-1) + 1
        self._keys: list[np.ndarray] = []
        self._records: list[np.ndarray] = []
        self._seen: set[tuple[int, int]] = set()

    def has(self, keys: np.ndarray) -> np.ndarray:
        return np.array([tuple(key) in self._seen for key in keys.tolist()], bool)

    def add(self, keys: np.ndarray, records: np.ndarray) -> None:
        rows = np.unique(keys, axis=0, return_index=True)[1]  # a batch may have an example twice
        self._keys.append(keys[rows])
        self._records.append(records[rows])
        self._seen.update(map(tuple, keys[rows].tolist()))
        while sum(map(len, self._keys)) >= self._size:
            self._flush(self._size)

    def close(self) -> None:
        if self._keys and sum(map(len, self._keys)):
            self._flush(None)

    def _flush(self, size: int | None) -> None:
        keys, records = np.concatenate(self._keys), np.concatenate(self._records)
        path = self._directory / _PART.format(self._next)
        write_whole(path, lambda into: _write_records(into, [*records[:size], keys[:size]]))
        self._next += 1
        left = len(keys) if size is None else size
        self._keys, self._records = [keys[left:]], [records[left:]]


def _write_records(path: Path, records: Sequence[Any]) -> None:
    # records that are read and unpacked together: about 4 KiB of them, since a group costs some 130 bytes by itself
    group = min(max(_GROUP_BYTES // records[0].nbytes, 1), 128)
    writer = _array_record().ArrayRecordWriter(str(path), f"group_size:{group}")
    for record in records:
        writer.write(record.tobytes())
    writer.close()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a file of another name, and gives it its own once it is on the disk."""
    writing = path.with_name(path.name + ".writing")
    write(writing)
    with open(writing, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(writing, path)


def open_part(path: Path) -> tuple[Any, np.ndarray]:
    def read() -> tuple[Any, list[bytes]]:
        reader = _array_record().ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        if not reader.num_records():
            raise ValueError("it has no records")
        return reader, reader.read([reader.num_records() - 1])

    reader, raw = _reading(path, read)
    if len(raw) != 1 or len(raw[0]) % 16 or len(raw[0]) // 16 != reader.num_records() - 1:
        raise damaged(path, "its keys do not fit its records")
    return reader, np.frombuffer(raw[0], KEYS).reshape(-1, 2)


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (RuntimeError, ValueError, IndexError) as error:
        raise damaged(path, str(error)) from error


def read_records(path: Path, reader: Any, rows: list[int], dtype: np.dtype) -> np.ndarray:
    """The records in these places of a part."""
    raw = _reading(path, lambda: reader.read(rows))
    if any(len(each) != dtype.itemsize for each in raw):
        raise damaged(path, f"a record is not of {dtype.itemsize} bytes")
    return np.frombuffer(b"".join(raw), dtype)


def damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged; remove it and build again, which makes what is missing ({why})")


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ImportError("kept targets need the array_record package: pip install array_record") from error
    return array_record_module
