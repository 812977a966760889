import dataclasses
import json
import math
import sys

import jax
import pytest

from experiments import _results, tables
from experiments._results import Column, Figure, Row, read, result
from experiments._selection import select

ACCURACY = Column("accuracy", "test accuracy (%)")
BYTES = Column("bytes", "bytes on disk", 0)


@pytest.fixture
def made(toy):
    """A result with two rows over three seeds, two choices' records and six test reads."""
    _, choice = select("learning rate", (0.1, 0.3), lambda r, _: r, toy.validation)
    scratch = {s: {"accuracy": 96.0 + s / 2, "bytes": 12345} for s in range(3)}
    distilled = {s: {"accuracy": 97.0 + s, "bytes": 12345} for s in range(3)}
    for name in ("scratch", "distilled"):
        for seed in range(3):
            toy.test.read(for_model=f"{name}, seed {seed}")
    rows = [Row.measured("scratch", scratch), Row.measured("distilled", distilled, {"accuracy": 98.9})]
    return result(
        toy, name="toy", title="A toy", source="Nobody et al., table 1.", command="python -m toy --seeds 3",
        selection="Learning rate by validation accuracy; last step.", columns=[ACCURACY, BYTES], rows=rows,
        choices=[choice], pairs=[("accuracy", "distilled", "scratch")], notes=["A note."],
    )  # fmt: skip


def test_a_file_is_read_as_it_was_written(made, tmp_path):
    path = tmp_path / "new" / "toy.json"
    made.write(path)
    assert read(path) == made
    assert [p.name for p in path.parent.iterdir()] == ["toy.json"]
    made.write(path)
    assert read(path) == made


def test_what_a_file_has(made, toy, tmp_path):
    made.write(tmp_path / "toy.json")
    data = json.loads((tmp_path / "toy.json").read_text())
    assert data["rows"][1]["ours"]["accuracy"] == {"mean": 98.0, "std": 1.0, "count": 3, "values": [97.0, 98.0, 99.0]}
    assert data["rows"][1]["paper"] == {"accuracy": 98.9} and data["rows"][1]["seeds"] == [0, 1, 2]
    assert data["splits"]["validation"] == {"examples": 20, "sha256": toy.validation.sha256}
    assert [r["model"] for r in data["test_reads"]][:2] == ["scratch, seed 0", "scratch, seed 1"]
    assert data["choices"][0]["scores"] == {"0.1": 0.1, "0.3": 0.3} and data["choices"][0]["chosen"] == "0.3"
    # differences 1, 1.5, 2: mean 1.5, s = 0.5, t(2, 0.975) = 4.302653
    difference = data["comparisons"][0]["difference"]
    assert (difference["low"], difference["high"]) == pytest.approx((1.5 - 1.242068, 1.5 + 1.242068), abs=1e-6)
    assert data["versions"]["jax"] == jax.__version__ and data["versions"]["python"] == sys.version.split()[0]
    assert data["machine"]["devices"] == f"{len(jax.devices())} x {jax.devices()[0].device_kind}"


def edit(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


ACC = ("rows", 0, "ours", "accuracy")


@pytest.mark.parametrize(
    "path, value, message",
    [
        ((*ACC, "mean"), 99.0, "mean 99.0, std .* are not those of"),
        ((*ACC, "std"), None, "are not those of"),
        ((*ACC, "count"), 2, "are not those of"),
        ((*ACC, "mean"), math.nan, "accuracy'\\].mean: want float; got nan"),
        ((*ACC, "values", 0), None, "values\\[0\\]: want float; got None"),
        ((*ACC, "values", 0), "96", "want float; got '96'"),
        ((*ACC, "values", 0), True, "want float; got True"),
        (ACC, KeyError, "row 'scratch': figures \\['bytes'\\]"),
        (("rows", 0, "seeds"), [0, 1], "3 values of accuracy for 2 seeds"),
        (("rows", 0, "seeds"), [0, 1, 1], "each once"),
        (("rows", 0, "name"), "distilled", "two rows have one name"),
        (("rows", 1, "paper", "speed"), 1.0, "paper's \\['accuracy', 'speed'\\]"),
        (("rows", 1, "paper", "accuracy"), math.inf, "want float"),
        (("rows",), [], "rows is empty"),
        (("command",), KeyError, "missing \\['command'\\]"),
        (("comand",), "x", "unknown \\['comand'\\]"),
        (("selection",), "", "selection is empty"),
        (("splits", "validation"), KeyError, "no validation split"),
        (("splits", "validation", "sha256"), "0" * 64, "learning rate was not chosen on the validation split"),
        (("splits", "test"), KeyError, "go together"),
        (("splits", "test", "sha256"), "0" * 64, "of another split"),
        (("test_reads",), [], "go together"),
        (("test_reads", 0, "model"), "scratch, seed 1", "more than once for scratch, seed 1"),
        (("choices", 0, "chosen"), "0.2", "'0.2' is not a candidate"),
        (("comparisons", 0, "difference", "low"), 1.4, "is not the rows' difference"),
        (("comparisons", 0, "first"), "nobody", "no row 'nobody'"),
        (("machine",), [], "want Mapping"),
    ],
)
def test_a_file_that_does_not_hold_is_refused(made, tmp_path, path, value, message):
    file = tmp_path / "toy.json"
    made.write(file)
    data = json.loads(file.read_text())
    edit(data, path, value)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as raised:
        read(file)
    assert str(raised.value).startswith(str(file))


def test_files_cut_short_are_refused(made, tmp_path):
    file = tmp_path / "toy.json"
    made.write(file)
    text = file.read_text()
    for length in range(0, len(text) - 1, 97):
        file.write_text(text[:length])
        with pytest.raises(ValueError, match=r"toy\.json"):
            read(file)


def test_a_write_that_fails_leaves_the_old_file(made, tmp_path, monkeypatch):
    file = tmp_path / "toy.json"
    made.write(file)
    with pytest.raises(ValueError, match=r"goes into toy\.json"):
        made.write(tmp_path / "other.json")

    def half(path, text, encoding):
        path.write_bytes(text.encode(encoding)[:100])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(type(file), "write_text", half)
        dataclasses.replace(made, title="Another").write(file)
    assert read(file) == made
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]


def test_seeds_with_different_figures():
    with pytest.raises(ValueError, match="seed 1 has no bytes"):
        Row.measured("a", {0: {"accuracy": 1.0, "bytes": 2.0}, 1: {"accuracy": 1.0}})
    with pytest.raises(ValueError, match="finite"):
        Figure.of([1.0, math.nan])


def test_rows_of_other_seeds_are_not_paired():
    rows = [Row.measured("a", {s: {"x": 1.0} for s in (0, 1)}), Row.measured("b", {s: {"x": 1.0} for s in (1, 0)})]
    with pytest.raises(ValueError, match="not paired: seeds"):
        _results.compare(rows, "x", "a", "b")


def test_an_experiment_on_validation_data_only(made):
    splits = {name: split for name, split in made.splits.items() if name != "test"}
    assert dataclasses.replace(made, splits=splits, test_reads=()).seeds == (0, 1, 2)


# --- tables


def test_the_table(made):
    lines = tables.rendered(made).splitlines()
    assert lines[1:5] == [
        "| model | test accuracy (%) | test accuracy (%), paper | bytes on disk | seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| scratch | 96.50 ± 0.50 | - | 12,345 | 3 |",
        "| distilled | 98.00 ± 1.00 | 98.90 | 12,345 | 3 |",
    ]
    text = "\n".join(lines)
    assert "distilled minus scratch, test accuracy (%): +1.50, 95% interval [+0.26, +2.74] (paired, 3 seeds)." in text
    assert "once for each of 6 final models" in text and "- A note." in text and "`python -m toy --seeds 3`" in text
    assert made.splits["train"].sha256[:12] in text


README = "# Experiments\n\nProse.\n\n<!-- result: toy -->\n<!-- end of result -->\n\nMore prose.\n"


def test_tables_stand_where_they_belong(made):
    text = tables.updated(README, {"toy": made})
    assert text.startswith("# Experiments\n\nProse.\n\n<!-- result: toy -->\n\n| model |")
    assert text.endswith("<!-- end of result -->\n\nMore prose.\n")
    assert tables.updated(text, {"toy": made}) == text
    other = dataclasses.replace(made, name="other", title="Another")
    longer = tables.updated(text, {"toy": made, "other": other})
    assert longer.startswith(text.rstrip()) and "\n## Another\n\n<!-- result: other -->\n\n| model |" in longer
    assert tables.updated(longer, {"toy": made, "other": other}) == longer


@pytest.mark.parametrize(
    "text, message",
    [
        (README + README, "one place"),
        (README.replace("toy", "gone"), "tables for gone"),
        (README.replace("<!-- end of result -->", ""), "needs an `<!-- end of result -->`"),
        (README + "<!-- end of result -->", "line of its own"),
    ],
)
def test_places_that_do_not_fit(made, text, message):
    with pytest.raises(ValueError, match=message):
        tables.updated(text, {"toy": made})


def test_the_command_and_its_check(made, tmp_path, capsys):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README)
    made.write(folder / "toy.json")
    with pytest.raises(SystemExit, match=r"is stale: run `python -m experiments\.tables`"):
        tables.main(check=True, results=folder, readme=readme)
    assert readme.read_text() == README
    tables.main(results=folder, readme=readme)
    tables.main(check=True, results=folder, readme=readme)
    readme.write_text(readme.read_text().replace("96.50", "99.50"))
    with pytest.raises(SystemExit, match="stale"):
        tables.main(check=True, results=folder, readme=readme)
    (folder / "toy.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"error: .*toy\.json: result: missing"):
        tables.main(results=folder, readme=readme)


def test_the_readme_is_not_stale():
    tables.main(check=True)
