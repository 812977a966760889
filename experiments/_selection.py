"""Choices (a learning rate, when to stop, which checkpoint): on the validation split, and written down."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from experiments._splits import Split

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """How a choice was made, for the result file.

    Attributes:
      what: what was chosen: `"learning rate of the student"`.
      rule: how, in words.
      validation_sha256: the split that scored the candidates.
      scores: every candidate's score, in the order tried; `None` where it was not finite (training diverged).
      chosen: the winner.
    """

    what: str
    rule: str
    validation_sha256: str
    scores: Mapping[str, float | None]
    chosen: str

    def __post_init__(self) -> None:
        if self.scores.get(self.chosen) is None:
            raise ValueError(
                f"choice of {self.what}: {self.chosen!r} is not a candidate with a score: {dict(self.scores)}"
            )


def select(
    what: str,
    candidates: Iterable[T],
    score: Callable[[T, Split], float],
    on: Split,
    *,
    measure: str = "accuracy",
    largest: bool = True,
) -> tuple[T, Choice]:
    """Chooses the candidate with the best validation score; of equals the first.

    Args:
      what: what is chosen, for the record.
      candidates: the alternatives; their `str` names them.
      score: from a candidate and the validation split to its score. A score that is not finite never wins.
      on: the validation split.
      measure: what the score is, for the record.
      largest: whether the largest score is the best, or the smallest.

    Returns:
      The best candidate and the record of the choice.

    Raises:
      ValueError: `on` is another split, candidates share a name, or none has a finite score.
    """
    if on.name != "validation":
        raise ValueError(f"the {what} is chosen on the validation split, not on the {on.name} split")
    by_name: dict[str, T] = {}
    for candidate in candidates:
        if str(candidate) in by_name:
            raise ValueError(f"two candidates for the {what} are called {str(candidate)!r}")
        by_name[str(candidate)] = candidate
    scores: dict[str, float | None] = {}
    for name, candidate in by_name.items():
        value = float(score(candidate, on))
        scores[name] = value if math.isfinite(value) else None
    finite = {name: value for name, value in scores.items() if value is not None}
    if not finite:
        raise ValueError(f"no candidate for the {what} has a finite score: {', '.join(by_name) or 'there is none'}")
    best = (max if largest else min)(finite, key=finite.__getitem__)
    rule = f"{'largest' if largest else 'smallest'} {measure} on the validation split; of equals the first"
    return by_name[best], Choice(what, rule, on.sha256, scores, best)
