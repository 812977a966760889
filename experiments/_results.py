"""The form of `experiments/results/NAME.json`: what an experiment measured, and how it came to it.

An experiment measures figures seed by seed, and hands them with its data set to `result`, which computes means,
spreads and paired differences, and adds the splits' hashes, the log of test reads, versions and hardware:

    rows = [Row.measured("student", {0: {"accuracy": 96.4}, 1: {"accuracy": 96.9}}, paper={"accuracy": 97.0})]
    result(dataset, name="quickstart", ..., columns=[Column("accuracy", "test accuracy (%)")], rows=rows).write(path)

A `Result` checks itself whenever one is made, so also when a file is read: a figure that is missing, not finite, or
at odds with the values it was computed from is an error, and so are choices made on other data than the validation
split and test data read twice for one model.
"""

import collections.abc
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments._selection import Choice
from experiments._splits import Dataset, Read, SplitRecord
from experiments._statistics import Interval, mean, paired_difference, std

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "equinox", "quax", "numpy", "constriction"),
    *("grain", "tensorflow-datasets", "scikit-learn"),
)


@dataclass(frozen=True)
class Column:
    """A figure that every row has: its key, its title with the unit, and the decimals that a table prints."""

    key: str
    title: str
    decimals: int = 2


@dataclass(frozen=True)
class Figure:
    """A figure over seeds: its mean, sample standard deviation (none for one seed) and count, and the values."""

    mean: float
    std: float | None
    count: int
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        """The figure with these values, one a seed; a value that is not finite is a ValueError."""
        numbers = tuple(float(value) for value in values)
        return cls(mean(numbers), std(numbers), len(numbers), numbers)

    def __post_init__(self) -> None:
        derived = (mean(self.values), std(self.values), len(self.values))
        if not _agree((self.mean, self.std, self.count), derived):
            raise ValueError(f"mean {self.mean}, std {self.std}, count {self.count} are not those of {self.values}")


@dataclass(frozen=True)
class Row:
    """A model of the experiment: our figures by column key, and what the paper has, where it has it."""

    name: str
    seeds: tuple[int, ...]
    ours: Mapping[str, Figure]
    paper: Mapping[str, float]

    @classmethod
    def measured(
        cls, name: str, by_seed: Mapping[int, Mapping[str, float]], paper: Mapping[str, float] | None = None
    ) -> "Row":
        """A row from `{seed: {column key: value}}`; each seed must have the same keys."""
        keys = sorted({key for figures in by_seed.values() for key in figures})
        for seed, figures in by_seed.items():
            if missing := [key for key in keys if key not in figures]:
                raise ValueError(f"row {name!r}: seed {seed} has no {', '.join(missing)}")
        ours = {key: Figure.of(figures[key] for figures in by_seed.values()) for key in keys}
        return cls(name, tuple(by_seed), ours, dict(paper or {}))


@dataclass(frozen=True)
class Comparison:
    """The paired difference, seed by seed, of a column between two rows: `first - second`."""

    column: str
    first: str
    second: str
    difference: Interval


@dataclass(frozen=True)
class Result:
    """A result file. Made by `result`, or by `read`.

    Attributes:
      name: the file's name without `.json`.
      title: the table's heading.
      source: the paper and table that the `paper` figures are from, or what is shown where there is none.
      command: what to run to get this again.
      data: the data set.
      splits: size and hash of each split that was used.
      selection: in words, how everything was chosen that was not fixed beforehand.
      choices: the record of each choice.
      test_reads: for which final models test data were read.
      columns, rows, comparisons: the table, and the differences stated below it.
      versions, machine: what it ran on.
      notes: sentences for below the table.
    """

    name: str
    title: str
    source: str
    command: str
    data: str
    splits: Mapping[str, SplitRecord]
    selection: str
    choices: tuple[Choice, ...]
    test_reads: tuple[Read, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed of any row."""
        return tuple(sorted({seed for row in self.rows for seed in row.seeds}))

    def __post_init__(self) -> None:
        for text in (
            "name",
            "title",
            "source",
            "command",
            "data",
            "selection",
            "versions",
            "machine",
            "columns",
            "rows",
        ):
            if not getattr(self, text):
                raise ValueError(f"result {self.name!r}: {text} is empty")
        self._check_discipline()
        self._check_figures()

    def _check_discipline(self) -> None:
        if missing := {"train", "validation"} - set(self.splits):
            raise ValueError(f"result {self.name!r}: no {' and no '.join(sorted(missing))} split is recorded")
        for choice in self.choices:
            if choice.validation_sha256 != self.splits["validation"].sha256:
                raise ValueError(f"result {self.name!r}: the {choice.what} was not chosen on the validation split")
        test = self.splits.get("test")
        if bool(test) != bool(self.test_reads):
            raise ValueError(
                f"result {self.name!r}: the test split and the log of its reads go together: give both or none"
            )
        models = [read.model for read in self.test_reads]
        if twice := {model for model in models if models.count(model) > 1}:
            raise ValueError(f"result {self.name!r}: test data were read more than once for {', '.join(sorted(twice))}")
        if test and any(read.sha256 != test.sha256 for read in self.test_reads):
            raise ValueError(f"result {self.name!r}: a test read is of another split than the recorded one")

    def _check_figures(self) -> None:
        keys, rows = [column.key for column in self.columns], {row.name: row for row in self.rows}
        if len(set(keys)) < len(keys) or len(rows) < len(self.rows):
            raise ValueError(f"result {self.name!r}: two columns or two rows have one name")
        for row in self.rows:
            where = f"result {self.name!r}, row {row.name!r}"
            if set(row.ours) != set(keys) or not set(row.paper) <= set(keys):
                raise ValueError(
                    f"{where}: figures {sorted(row.ours)}, paper's {sorted(row.paper)}; columns are {keys}"
                )
            if not row.seeds or len(set(row.seeds)) < len(row.seeds):
                raise ValueError(f"{where}: seeds must be given, each once: {row.seeds}")
            for key, figure in row.ours.items():
                if figure.count != len(row.seeds):
                    raise ValueError(f"{where}: {figure.count} values of {key} for {len(row.seeds)} seeds")
            if not all(math.isfinite(value) for value in row.paper.values()):
                raise ValueError(f"{where}: a figure of the paper is not finite: {dict(row.paper)}")
        for stated in self.comparisons:
            derived = compare(self.rows, stated.column, stated.first, stated.second, stated.difference.confidence)
            if not _agree(dataclasses.astuple(stated.difference), dataclasses.astuple(derived.difference)):
                raise ValueError(f"result {self.name!r}: {stated} is not the rows' difference {derived.difference}")

    def write(self, path: Path) -> None:
        """Writes the file in one go: a reader finds the old one or the new one.

        Raises:
          ValueError: the file's name is not `NAME.json`.
        """
        if path.name != f"{self.name}.json":
            raise ValueError(f"result {self.name!r} goes into {self.name}.json, not {path.name}")
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def written(result: Result, out: Path, draw: Callable[[Path], None] | None = None) -> Result:
    """Writes `NAME.json` into `out`, and its figure `NAME.png` if there is one, and says so."""
    result.write(out / f"{result.name}.json")
    if draw is not None:
        draw(out / f"{result.name}.png")
    print(f"written: {out / result.name}.json{' and .png' if draw is not None else ''}", flush=True)
    return result


def result(
    dataset: Dataset,
    *,
    name: str,
    title: str,
    source: str,
    command: str,
    selection: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    choices: Sequence[Choice] = (),
    pairs: Sequence[tuple[str, str, str]] = (),
    notes: Sequence[str] = (),
) -> Result:
    """The result of an experiment that has ended; `Result` has the arguments' meanings.

    Args:
      pairs: `(column key, first row, second row)` for each paired difference to state; each needs two seeds or more.
    """
    return Result(
        name=name, title=title, source=source, command=command, data=dataset.name, splits=dataset.records(),
        selection=selection, choices=tuple(choices), test_reads=dataset.test.reads, columns=tuple(columns),
        rows=tuple(rows), comparisons=tuple(compare(rows, *pair) for pair in pairs), versions=versions(),
        machine=machine(), notes=tuple(notes),
    )  # fmt: skip


def compare(rows: Sequence[Row], column: str, first: str, second: str, confidence: float = 0.95) -> Comparison:
    """The paired difference of a column between two rows that have the same seeds in the same order."""
    by_name = {row.name: row for row in rows}
    if missing := [name for name in (first, second) if name not in by_name or column not in by_name[name].ours]:
        raise ValueError(
            f"nothing to compare: no row {' and no row '.join(map(repr, missing))} with a column {column!r}"
        )
    a, b = by_name[first], by_name[second]
    if a.seeds != b.seeds:
        raise ValueError(f"{first!r} and {second!r} are not paired: seeds {a.seeds} and {b.seeds}")
    difference = paired_difference(a.ours[column].values, b.ours[column].values, confidence)
    return Comparison(column, first, second, difference)


def read(path: Path) -> Result:
    """Reads a result file and checks it.

    Raises:
      ValueError: it is no JSON, a field is missing, unknown or of another type, or what it says does not hold.
    """
    try:
        return _decode(Result, json.loads(path.read_text(encoding="utf-8")), "result")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a figure may depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """The processor, its cores and JAX's devices."""
    import jax  # so that reading results and making tables does not load it

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line[:10] == "model name"
        ]
        processor = models[0] if models else processor
    devices = jax.devices()
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "system": sys.platform,
    }


def _agree(stated: Sequence[float | None], derived: Sequence[float | None]) -> bool:
    return all(
        a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
        for a, b in zip(stated, derived, strict=True)
    )


def _decode(kind: Any, data: Any, where: str) -> Any:
    """`data`, as `json.loads` gave it, as a value of the annotated type `kind`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints, names = typing.get_type_hints(kind), {field.name for field in dataclasses.fields(kind)}
        if not isinstance(data, dict) or set(data) != names:
            keys = set(data) if isinstance(data, dict) else set()
            raise ValueError(f"{where}: missing {sorted(names - keys)}, unknown {sorted(keys - names)}")
        return kind(**{key: _decode(hints[key], value, f"{where}.{key}") for key, value in data.items()})
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(inner[0], value, f"{where}[{i}]") for i, value in enumerate(data))
    if origin is collections.abc.Mapping and isinstance(data, dict):
        return {key: _decode(inner[1], value, f"{where}[{key!r}]") for key, value in data.items()}
    if origin is types.UnionType:
        return None if data is None else _decode(inner[0], data, where)
    if kind is float and type(data) in (int, float) and math.isfinite(data):
        return float(data)
    if kind in (int, str) and type(data) is kind:
        return data
    raise ValueError(f"{where}: want {getattr(kind, '__name__', kind)}; got {data!r:.60}")
