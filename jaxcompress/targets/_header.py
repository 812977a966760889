import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.targets._parts import damaged, write_whole

FORMAT = 1


class TargetMismatchError(ValueError):
    """A cache of another teacher, another data set, or another way of keeping targets."""


@dataclass(frozen=True)
class Header:
    teacher: str
    data: str
    shape: tuple[int, ...]  # of one example's logits, classes last
    dtype: str
    k: int | None
    temperatures: tuple[float, ...]
    format: int = FORMAT

    def record(self) -> np.dtype:
        """How a target lies on the disk."""
        lead, kept = self.shape[:-1], self.k or self.shape[-1]
        fields: list[Any] = [("logits", "<f4" if self.dtype == "float32" else "<u2", (*lead, kept))]
        if self.dtype == "bfloat16":
            fields.append(("largest", "<f4", lead))
        if self.k is not None:
            fields.append(("indices", "<u2" if self.shape[-1] <= 2**16 else "<u4", (*lead, kept)))
            fields.append(("log_tail", "<f4", (len(self.temperatures), *lead)))
        return np.dtype(fields)


def write_header(directory: Path, header: Header) -> None:
    """Writes `header.json`."""
    text = json.dumps(asdict(header), indent=2) + "\n"
    write_whole(directory / "header.json", lambda path: path.write_text(text))


def read_header(directory: Path) -> Header:
    """Reads `header.json`."""
    path = directory / "header.json"
    if not path.exists():
        raise FileNotFoundError(f"there are no kept targets in {directory}: make them with targets.build")
    try:
        fields = json.loads(path.read_text())
        if fields["format"] != FORMAT:
            raise TargetMismatchError(f"{path} has format {fields['format']}, this version reads {FORMAT}: build anew")
        return Header(**{**fields, "shape": tuple(fields["shape"]), "temperatures": tuple(fields["temperatures"])})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from error


def compare(directory: Path, header: Header, wanted: Header) -> None:
    """A `TargetMismatchError` where the header of the cache in `directory` is not the wanted one."""
    there, here = asdict(header), asdict(wanted)
    for name in there:
        if there[name] != here[name]:
            raise TargetMismatchError(
                f"the targets in {directory} are not these: their {name} is {there[name]!r}, and {here[name]!r} is "
                "wanted; use another directory, or remove this one and build anew"
            )
