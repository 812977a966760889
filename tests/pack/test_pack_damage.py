"""Damaged, forged and foreign files raise PackError and nothing else."""

import contextlib
import io
import json
import pickle
import random
import struct
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcompress import pack
from jaxcompress.arrays import Quantized
from jaxcompress.pack import PackError, _file
from jaxcompress.pack.__main__ import main

any_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def small_tree():
    rng = np.random.default_rng(0)
    codes = jnp.asarray(np.round(rng.normal(size=(8, 9))), jnp.int8)
    return {"w": Quantized.from_codes(codes, jnp.ones((1, 9)), bits=4), "b": np.ones(2, np.float32), "n": [1, None, ()]}


def packed(tmp_path, tree, name="file"):
    pack.save(tmp_path / name, tree)
    return (tmp_path / name).read_bytes()


def load_bytes(tmp_path, data):
    (tmp_path / "damaged").write_bytes(data)
    return pack.load(tmp_path / "damaged")


def refused(tmp_path, data, match=None):
    with pytest.raises(PackError, match=match) as caught:
        load_bytes(tmp_path, data)
    assert str(tmp_path / "damaged") in str(caught.value)  # says which file


def forge(description, sections=b""):
    """A file with right checksums whose header says whatever is wanted."""
    header = description if isinstance(description, bytes) else json.dumps(description).encode()
    sizes = struct.pack("<HI", _file.VERSION, len(header))
    return _file.MAGIC + sizes + struct.pack("<I", zlib.crc32(sizes + header)) + header + sections


def line(text, section):
    return f"{text} {zlib.crc32(section):08x}"


# Damage


def test_every_cut_is_refused(tmp_path):
    data = packed(tmp_path, small_tree())
    for length in range(len(data)):
        refused(tmp_path, data[:length])


def test_every_altered_byte_is_refused(tmp_path):
    data = packed(tmp_path, small_tree())
    for i in range(len(data)):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            refused(tmp_path, data[:i] + bytes([data[i] ^ change]) + data[i + 1 :])


def test_what_follows_the_end_is_refused(tmp_path):
    data = packed(tmp_path, small_tree())
    for tail in (b"\0", b"x", data):
        refused(tmp_path, data + tail, "follow its end")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    rng = np.random.default_rng(1)
    tree = {
        "params": {f"Dense_{i}": {"kernel": rng.normal(size=(40, 30)).astype(np.float32)} for i in range(6)},
        "codes": {f"w{i}": (rng.normal(size=2000) * 3).astype(np.int8) for i in range(6)},
        "same": [np.zeros(500, np.int8), np.zeros(500, np.int8)],
    }
    return packed(tmp_path_factory.mktemp("large"), tree)


@any_file
@given(data=st.data())
def test_any_damage_to_a_larger_file_is_refused(tmp_path, large, data):
    at = data.draw(st.integers(0, len(large) - 1))
    kind = data.draw(st.sampled_from(["alter", "burst", "delete", "insert", "zero", "swap", "cut"]))
    length = data.draw(st.integers(1, 600))
    noise = random.Random(data.draw(st.integers(0, 99))).randbytes(length)
    other = data.draw(st.integers(0, len(large) - 1))
    damaged = {
        "alter": large[:at] + bytes([large[at] ^ noise[0]]) + large[at + 1 :],
        "burst": (large[:at] + noise + large[at + length :])[: len(large)],
        "delete": large[:at] + large[at + length :],
        "insert": large[:at] + noise + large[at:],
        "zero": (large[:at] + bytes(length) + large[at + length :])[: len(large)],
        "swap": large[other:] + large[:other],
        "cut": large[:at],
    }[kind]
    if damaged != large:
        refused(tmp_path, damaged)


def test_foreign_files_are_refused(tmp_path):
    archive = io.BytesIO()
    np.savez(archive, x=np.ones(3))
    newer = packed(tmp_path, {})
    newer = newer[:8] + struct.pack("<H", 2) + newer[10:]
    for data in (b"", b"hello\n", b"\0" * 1000, archive.getvalue(), pickle.dumps({"a": 1}), b'{"metadata":null}'):
        refused(tmp_path, data, "no file of jaxcompress.pack")
    refused(tmp_path, newer, "version 2")


def test_a_file_that_was_taken_for_text_is_refused(tmp_path):
    data = packed(tmp_path, small_tree())
    refused(tmp_path, data.replace(b"\r\n", b"\n"), "no file of jaxcompress.pack")
    refused(tmp_path, data.decode("latin-1").encode("utf-8"), "no file of jaxcompress.pack")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        pack.load(tmp_path / "nothing")


def test_the_message_has_the_path_of_the_damaged_leaf(tmp_path):
    data = packed(tmp_path, {"a": np.arange(5000) % 7, "b": {"c": np.random.default_rng(0).bytes(9) and np.ones(4)}})
    refused(tmp_path, data[:-1] + bytes([data[-1] ^ 1]), "b/c can't be read: .*checksum")


def test_header_and_metadata_of_damaged_files(tmp_path):
    data = packed(tmp_path, small_tree())
    (tmp_path / "damaged").write_bytes(data[:-1])
    assert "w" in pack.read_header(tmp_path / "damaged")["tree"]  # reads no more than the header
    for damaged in (data[:30], data[:20] + b"?" + data[21:], b""):
        (tmp_path / "damaged").write_bytes(damaged)
        for read in (pack.read_header, pack.load_metadata):
            with pytest.raises(PackError):
                read(tmp_path / "damaged")


def test_printing_the_header_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "damaged").write_bytes(packed(tmp_path, small_tree())[:30])
    for arguments, status, says in (
        ([str(tmp_path / "damaged")], 1, "cut short"),
        ([str(tmp_path / "nothing")], 1, "No such file"),
        ([], 2, "usage"),
        (["--help"], 2, "usage"),
    ):
        assert main(arguments) == status
        printed = capsys.readouterr()
        assert says in printed.err and not printed.out


# Forgery: the checksums are right, the header lies


FORGED_TREES = {
    "huge raw": {"x": line("float32[1000000000000] raw:0", b"")},
    "huge coded": {"x": line("float32[1000000000,1000000000] ans8:0", b"")},
    "huge planes": {"x": line("float32[100000000000000] planes ans8:0+ans8:0+ans8:0+ans8:0", b"")},
    "huge nonzero": {"x": line("int16[100000000000000] nonzero ans1:0+ans8:0+ans8:0", b"")},
    "huge mask": {"x": line("bool[100000000000000] ans1:0", b"")},
    "beyond 64 bits": {"x": line(f"int8[{10**40}] ans8:0", b"")},
    "huge and empty": {"x": line(f"int8[{10**30},0] raw:0", b"")},
    "very many axes": {"x": line(f"int8[{','.join(['1'] * 5000)},0] raw:0", b"")},
    "more digits than int takes": {"x": line(f"int8[{'9' * 5000}] raw:0", b"")},
    "huge length": {"x": "int8[4] raw:99999999999999999999 00000000"},
    "negative length": {"x": "int8[4] raw:-4 00000000"},
    "another dtype": {"x": line("object[0] raw:0", b"")},
    "a structured dtype": {"x": line("V8[0] raw:0", b"")},
    "another coding": {"x": line("int8[0] zip:0", b"")},
    "wrong streams": {"x": line("float32[0] planes raw:0+raw:0", b"")},
    "no line": {"x": "hello"},
    "another leaf": {"x": {"Unheard": {}}},
    "another field": {"x": {"Quantized": {"value": 3}}},
    "no array": {"x": {"Quantized": {"values": 3}}},
    "no fields": {"x": {"Quantized": None}},
    "missing values": {"x": {"Quantized": {"bits": 4}}},
    "static array": {"x": {"Quantized": {"bits": {"a": []}}}},
    "key of another kind": {"x": {"key": ["nothing", line("uint32[0] raw:0", b"")]}},
    "key without data": {"x": {"key": []}},
    "no float": {"x": {"float": "one"}},
    "no complex": {"x": {"complex": 1}},
    "two things": {"x": {"float": "1", "key": 2}},
    "list": {"x": [1]},
    "no tree": {},
    "two roots": {"": 1, "x": 2},
    "two roots, turned": {"x": 2, "": 1},
    "leaf in leaf": {"a": 1, "a/b": 2},
    "leaf over leaf": {"a/b": 1, "a": 2},
    "list with a gap": {"[0]": 1, "[2]": 2},
    "list out of order": {"[1]": 1, "[0]": 2},
    "list and dict": {"[0]": 1, "a": 2},
    "dict and list": {"a": 1, "[0]": 2},
    "list and tuple": {"[0]": 1, "(1)": 2},
    "list without a number": {"[]": 1},
    "int key without a number": {"#x": 1},
    "empty step": {"a//b": 1},
    "deep": {"/".join(["a"] * 100_000): 1},
}


@pytest.mark.parametrize("forged", FORGED_TREES)
def test_forged_trees_are_refused_without_setting_memory_aside(tmp_path, forged):
    data = forge({"metadata": None, "tree": FORGED_TREES[forged]})
    tracemalloc.start()
    try:
        refused(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 30e6 + 100 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"1", b"null", b'{"tree": {}}', b'{"metadata": 1, "tree": {}, "more": 1}', b"\xff" * 9,
        b'{"metadata": null, "tree": []}', b'{"metadata": null, "tree": 1}', b'{"metadata": null, "tree": null}',
        b"{" + b'"a":{' * 100_000, b'{"metadata":' + b"[" * 100_000, b'{"metadata":' + b"9" * 10_000,
        zlib.compress(b"{"), zlib.compress(b'{"metadata": null, "tree": []}')[:-1], zlib.compress(b"[]") + b"x",
    ],
    ids=range(17),
)  # fmt: skip
def test_forged_headers_are_refused(tmp_path, header):
    refused(tmp_path, forge(header))


def test_a_forged_length_within_the_limits_asks_for_memory_in_proportion(tmp_path):
    coded = b"\1"
    for size in (4096 * 2, 10**6, 10**9, 10**12):
        refused(tmp_path, forge({"metadata": None, "tree": {"x": line(f"int8[{size}] ans8:1", coded)}}, coded))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from(["float32[2] raw:8 00000000", "ans8", "Quantized", "key", "uint8[8,5] ans4:32 11111111"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=4) | st.sampled_from(["Quantized", "key", "tuple", "float", "complex", "values", "[0]"]),
        inner, max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip


def places(x, path=()):
    yield path
    for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
        yield from places(x[key], (*path, key))


@any_file
@given(data=st.data())
def test_any_change_of_the_header_reads_or_is_refused(tmp_path, data):
    original = packed(tmp_path, small_tree())
    header = pack.read_header(tmp_path / "file")
    length = struct.unpack("<I", original[10:14])[0]
    *parents, last = data.draw(st.sampled_from([path for path in places(header) if path]))
    parent = header
    for key in parents:
        parent = parent[key]
    if isinstance(parent[last], str) and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(parent[last])))
        parent[last] = (
            parent[last][:at] + data.draw(st.text("0123456789,:+[] ansrw", max_size=3)) + parent[last][at + 1 :]
        )
    else:
        parent[last] = data.draw(values)
    (tmp_path / "forged").write_bytes(forge(header, original[18 + length :]))
    with contextlib.suppress(PackError):
        pack.load(tmp_path / "forged")
