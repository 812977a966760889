"""Loads a packed file and evaluates it: `python -m experiments.packed FILE --for-model NAME`, in a process of its own.

Prints one line of JSON: the figures, and the log of the one read of test data.
"""

import dataclasses
import json
import os
from pathlib import Path

import tyro

from experiments._artefacts import measure
from experiments._command import UsageError, run_main
from experiments.data import load
from experiments.models import build
from jaxcompress import pack


def evaluate(
    file: tyro.conf.Positional[Path], for_model: str, data: str = "digits", data_dir: Path | None = None
) -> None:
    """Evaluates a packed model on the test split.

    Args:
      file: the packed file.
      for_model: the final model's name, for the log of test reads.
      data: the data set.
      data_dir: where its files are.
    """
    if not file.is_file():
        raise UsageError(
            f"no file {file}: `python -m experiments.quickstart` writes one, runs/quickstart/seed0/packed.jxc"
        )
    model, variables = build(pack.load_metadata(file)), pack.load(file)
    dataset = load(data, data_dir)
    figures = measure(model, variables, dataset.test.read(for_model), os.path.getsize(file))
    print(json.dumps({"figures": figures, "reads": [dataclasses.asdict(read) for read in dataset.test.reads]}))


if __name__ == "__main__":
    run_main(evaluate)
