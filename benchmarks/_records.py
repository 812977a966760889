"""Figures as records: what was measured, where, with what; merged by name into a JSON file; printed as a table."""

import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from benchmarks._harness import Figure

PACKAGES = ("jax", "flax", "optax", "jaxcompress")

Record = dict[str, Any]


class RecordsError(ValueError):
    """A file that is not a list of records."""


def record(name: str, figure: Figure) -> Record:
    """The figure as JSON types, with the versions and the machine it was measured on."""
    return {
        "name": name,
        "value": figure.value,
        "unit": figure.unit,
        "baseline": figure.baseline,
        "spread": [figure.low, figure.high],
        "coverage": figure.coverage,
        "rounds": figure.rounds,
        "detail": dict(figure.detail),
        "versions": versions(),
        "machine": machine(),
    }


def records(name: str, figures: Figure | Mapping[str, Figure]) -> list[Record]:
    """The records of one benchmark: its own name for a single figure and for key `""`, else `name.key`."""
    if isinstance(figures, Figure):
        return [record(name, figures)]
    return [record(f"{name}.{key}" if key else name, figure) for key, figure in figures.items()]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages; `source` for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "source"
    return found


def machine() -> dict[str, Any]:
    """The processor's model, the cores this process may use, the platform, and JAX's device."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "platform": platform.platform(),
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
    }


def read(path: pathlib.Path) -> list[Record]:
    """The records in a file; none if there is no such file.

    Raises:
      RecordsError: the file is something else.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise RecordsError(f"{path} is not JSON ({error}); name another file, or remove it") from error
    if not isinstance(found, list) or not all(isinstance(item, dict) and "name" in item for item in found):
        raise RecordsError(f"{path} is not a list of benchmark records; name another file, or remove it")
    return found


def merge(path: pathlib.Path, new: Sequence[Record]) -> None:
    """Put records into a file, sorted by name, in place of older ones of the same name; all of it or nothing."""
    by_name = {item["name"]: item for item in [*read(path), *new]}
    text = json.dumps([by_name[name] for name in sorted(by_name)], indent=2, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # a temporary file is private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def table(found: Sequence[Record]) -> str:
    """Name, value, spread, rounds and baseline, a line a record."""
    rows = [("name", "value", "spread", "rounds", "against")]
    for item in found:
        low, high = (_number(x) for x in item["spread"])
        value, spread = f"{_number(item['value'])} {item['unit']}", f"{low} .. {high}"
        against = item["baseline"]
        if "ratio" in item["detail"]:
            against += f": {_number(item['detail']['ratio'])} x"
        rows.append((item["name"], value, spread, str(item["rounds"]), against))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(x: float) -> str:
    """Four significant digits; large whole numbers in full."""
    return f"{x:,.0f}" if abs(x) >= 1e4 else f"{x:.4g}"


def _cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
