"""What an experiment has measured, kept in a folder, so that a command that was cut off goes on there."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from experiments._command import UsageError
from experiments._splits import HeldOut, Read

T = TypeVar("T")


def kept(folder: Path | None, what: str, setting: str, test: HeldOut, measure: Callable[[], T]) -> T:
    """What `measure` returns (JSON types), or what it returned when this experiment was cut off.

    The test reads that it made are kept with it.

    Args:
      folder: where; `None` keeps nothing.
      what: names the file.
      setting: all that changes what is measured.
      test: the split that `measure` reads.
      measure: called unless the folder has its value.

    Raises:
      ValueError: what is kept is of other settings.
    """
    if folder is None:
        return measure()
    path = folder / f"{plain(what)}.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["setting"] != setting:
            raise UsageError(f"{path} is of other settings: {found['setting']}; take another --resume folder")
        test.include(Read(**read) for read in found["reads"])
        value: T = found["value"]
        return value
    before = len(test.reads)
    value = measure()
    reads = [dataclasses.asdict(read) for read in test.reads[before:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"setting": setting, "reads": reads, "value": value}), encoding="utf-8")
    temporary.replace(path)
    return value


def plain(what: str) -> str:
    """A name for a file."""
    return re.sub("[^a-z0-9]+", "_", what.lower())
