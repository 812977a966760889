import json
import math
import os
from pathlib import Path

import jax


class JsonLines:
    """An `on_metrics` for `fit` that writes a line of JSON a step: `{"step": 10, "loss": 0.31, ...}`.

    The file goes on where a resumed run goes on: lines of steps that will be taken again are dropped, so the file of a
    run that was cut off is that of one that was not. Numbers that JSON lacks (nan, infinity) are written as `null`.
    With several processes, the first one writes.

    Args:
      path: the file; its directory is made where it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._begun = False

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one step's line."""
        if jax.process_index() != 0:
            return
        if not self._begun:
            self._drop_from(step)
            self._begun = True
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")

    def _drop_from(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) < step]
        whole = self.path.with_name(self.path.name + ".tmp")
        whole.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(whole, self.path)


def _step_of(line: str) -> float:
    """The line's step; infinity for a line that was cut off in the middle."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
