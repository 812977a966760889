"""`python -m benchmarks`: selection, records, the file they are merged into."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import _harness as harness
from benchmarks import _records as records
from benchmarks import pack as pack_benchmarks
from jaxcompress.arrays import Quantized

NAMES = ["pack.rate", "pack.size", "prune.mask_update", "prune.step", "quantize.fake_step"]


@pytest.fixture
def tiny():
    """Two benchmarks that take no time: `test.one` of one figure, `test.many` of two."""

    def one(rounds):
        """The time of nothing."""
        return harness.paired(lambda: None, lambda: None, "nothing", rounds, calls=1)

    def many(rounds):
        """Numbers."""
        return {"": harness.summary([1.0, 2.0, 3.0], "x", "one"), "bytes": harness.exact(10_000, "bytes", "none", of=2)}

    harness.benchmark("test.one")(one)
    harness.benchmark("test.many")(many)
    yield
    harness.REGISTRY.pop("test.one"), harness.REGISTRY.pop("test.many")


def valid(record):
    assert list(record) == [
        "name", "value", "unit", "baseline", "spread", "coverage", "rounds", "detail", "versions", "machine"
    ]  # fmt: skip
    assert record["spread"][0] <= record["value"] <= record["spread"][1]
    assert 0 <= record["coverage"] <= 1 and record["rounds"] >= 1
    assert record["unit"] and record["baseline"]
    assert set(record["versions"]) == {"python", "jax", "flax", "optax", "jaxcompress"}
    assert record["machine"]["cpu"] and record["machine"]["cores"] >= 1 and record["machine"]["platform"]
    return True


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ([], NAMES),
        (["prune.*"], ["prune.mask_update", "prune.step"]),
        (["*.step", "pack.rate"], ["pack.rate", "prune.step"]),
        (["pack.*", "pack.size"], ["pack.rate", "pack.size"]),
        (["quantize.fake_step"], ["quantize.fake_step"]),
    ],
)
def test_names_and_patterns_select(patterns, chosen):
    assert command.select(patterns, NAMES) == chosen


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("pack.rat", "pack.rate"), ("prun.step", "prune.step"), ("zzz", "pack")]
)
def test_an_unknown_name_is_refused_with_the_nearest(pattern, nearest):
    with pytest.raises(command.UnknownBenchmarkError, match=f"{pattern!r}; nearest: {nearest}"):
        command.select(["pack.size", pattern], NAMES)


def test_figures_become_records_and_a_file_of_them(tmp_path, tiny, capsys):
    file = tmp_path / "figures.json"
    assert command.main(["test.*", "--json", str(file), "--rounds", "6"]) == 0
    found = json.loads(file.read_text())
    assert [item["name"] for item in found] == ["test.many", "test.many.bytes", "test.one"]
    assert all(valid(item) for item in found)
    assert (found[0]["value"], found[0]["spread"], found[0]["coverage"], found[0]["rounds"]) == (2, [1, 3], 0.75, 3)
    assert (found[1]["value"], found[1]["unit"], found[1]["detail"]) == (10_000, "bytes", {"of": 2})
    assert found[2]["rounds"] == 6
    printed = capsys.readouterr()
    assert "10,000 bytes" in printed.out and "1 .. 3" in printed.out
    assert printed.err.splitlines() == ["[1/2] test.many", "[2/2] test.one"]  # said before each; tables stay alone


def test_what_an_extra_lacks_is_left_out_and_the_others_run(tiny, monkeypatch, capsys):
    def absent(rounds):
        raise ModuleNotFoundError("pip install it")

    monkeypatch.setitem(harness.REGISTRY, "test.many", absent)
    assert command.main(["test.*"]) == 1
    printed = capsys.readouterr()
    assert "test.many is left out: pip install it" in printed.err and "test.one" in printed.out


def test_records_are_merged_by_name(tmp_path, tiny):
    file = tmp_path / "figures.json"
    others = [{"name": "zoo", "value": 1}, {"name": "test.many", "value": "old"}, {"name": "a", "value": 2}]
    file.write_text(json.dumps(others))
    command.main(["test.many", "--json", str(file)])
    found = {item["name"]: item["value"] for item in json.loads(file.read_text())}
    assert found == {"a": 2, "test.many": 2, "test.many.bytes": 10_000, "zoo": 1}
    assert list(found) == sorted(found)
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("content", ["not JSON", "{}", '["text"]', '[{"value": 1}]'])
def test_a_file_of_something_else_is_left_alone(tmp_path, tiny, capsys, content):
    file = tmp_path / "figures.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        command.main(["test.many", "--json", str(file)])
    captured = capsys.readouterr()
    assert str(file) in captured.err and "10,000" not in captured.out  # refused before anything ran
    assert file.read_text() == content


def test_a_record_that_json_lacks_leaves_the_older_file(tmp_path):
    file = tmp_path / "figures.json"
    records.merge(file, [{"name": "a", "value": 1}])
    before = file.read_text()
    with pytest.raises(ValueError):
        records.merge(file, [{"name": "b", "value": float("nan")}])
    assert file.read_text() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pack.rat"], "no benchmark is called 'pack.rat'; nearest: pack.rate"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["pack.size", "--json", "/no/such/folder/file.json"], "no folder /no/such/folder"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, says):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_the_command_lists_what_there_is():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], capture_output=True, text=True, check=True, timeout=120
    )
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert {"pack.rate", "pack.size"} <= set(lines) and all(lines.values())


def test_pack_rate_on_small_trees(tmp_path, monkeypatch):
    small = {"int4": lambda: pack_benchmarks.codes_tree(4, widths=(64, 32, 10))}
    monkeypatch.setattr(pack_benchmarks, "TREES", small)
    monkeypatch.setattr(pack_benchmarks, "MIN_SECONDS", 0.0)
    file = tmp_path / "figures.json"
    command.main(["pack.rate", "--json", str(file), "--rounds", "2"])
    found = json.loads(file.read_text())
    assert [item["name"] for item in found] == ["pack.rate.load.int4", "pack.rate.save.int4"]
    for item in found:
        assert valid(item) and item["value"] > 0 and item["detail"]["MB"] == pytest.approx(0.00158, rel=0.05)
        low, high = item["detail"]["ratio_spread"]
        assert low <= item["detail"]["ratio"] <= high


def test_pack_size_compares_with_the_entropy_and_zlib(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_benchmarks, "TREES", {"int8": lambda: pack_benchmarks.codes_tree(8, widths=(300, 200))})
    command.main(["pack.size", "--json", str(tmp_path / "f"), "--rounds", "1"])
    found = {item["name"]: item for item in json.loads((tmp_path / "f").read_text())}
    assert set(found) == {f"pack.size.{tree}{peer}" for tree in ("int8", "small_int4") for peer in ("", ".zlib")}
    assert 0.95 < found["pack.size.int8"]["value"] < 1.02
    assert found["pack.size.int8.zlib"]["value"] < 1


def test_the_entropy_is_that_of_a_closed_form():
    codes = jnp.tile(jnp.array([0, 0, 1, -1], jnp.int8), (8, 16))  # 1.5 bits each
    tree = {"w": Quantized.from_codes(codes, jnp.ones((1, 64)), bits=4), "b": np.ones(10, np.float32)}
    assert pack_benchmarks.entropy_bytes(tree) == pytest.approx(8 * 64 * 1.5 / 8 + 64 * 4 + 10 * 4)
