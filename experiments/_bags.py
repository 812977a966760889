"""Logistic regression on which words a sentence has: what a reader of SST-2 is to beat, and what it may learn from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from experiments._reading import TextRoom
from experiments._selection import Choice, select
from experiments._splits import Split
from experiments.data._texts import texts_of

WORDS = "bag of words, logistic regression"
PAIRS = "bag of words and pairs, weighed by their log-count ratios"
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Bag:
    """Logistic regression on the words of whole sentences, or on words and pairs of neighbours weighed by how much
    oftener than in the others they stand in sentences of the class 1 (Wang and Manning, "Baselines and bigrams", 2012).

    Args:
      texts: the training sentences.
      labels: 0 or 1.
      strength: the inverse of the penalty.
      pairs: whether there are pairs and weights.
    """

    def __init__(self, texts: Sequence[str], labels: np.ndarray, strength: float, pairs: bool = False) -> None:
        self.count = CountVectorizer(token_pattern=r"\S+", binary=True, ngram_range=(1, 2 if pairs else 1))
        seen = self.count.fit_transform(texts)
        self.weights = log_count_ratios(seen, labels) if pairs else np.ones(seen.shape[1])
        self.model = LogisticRegression(C=strength, max_iter=1000).fit(self._weighed(seen), labels)

    def _weighed(self, seen: Any) -> Any:
        return seen.multiply(self.weights).tocsr()

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Of each class, `[texts, 2]`."""
        return np.asarray(self.model.predict_proba(self._weighed(self.count.transform(texts))))

    def right(self, split: Split) -> float:
        """Accuracy in %."""
        return 100 * float(np.mean(self.probabilities(texts_of(split)).argmax(1) == split.labels))


def log_count_ratios(seen: Any, labels: np.ndarray) -> np.ndarray:
    """`[features]`: the logarithm of a feature's share of all in the class 1 over that in the class 0, each counted
    once more than it occurs."""
    counts = [1 + np.asarray(seen[labels == label].sum(axis=0)).ravel() for label in (0, 1)]
    zero, one = (count / count.sum() for count in counts)
    return np.asarray(np.log(one / zero))


class Measured(NamedTuple):
    """A bag whose strength was chosen on validation data, its figures, and that choice."""

    bag: Bag
    figures: dict[str, float]
    choice: Choice


def measured(room: TextRoom, pairs: bool = False) -> Measured:
    """The bag of the best strength, which then reads the test sentences."""
    train, validation, name = room.dataset.train, room.dataset.validation, PAIRS if pairs else WORDS
    bags = {c: Bag(texts_of(train), train.labels, c, pairs) for c in STRENGTHS}
    what = "C of the logistic regression" + (" on words and pairs" if pairs else "")
    best, choice = select(what, STRENGTHS, lambda c, split: bags[c].right(split), validation)
    bag, test = bags[best], room.dataset.test.read(for_model=name)
    figures = {"accuracy": bag.right(test), "validation": bag.right(validation), "size": bag.weights.size + 1}
    return Measured(bag, figures, choice)
