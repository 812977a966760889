"""Logistic regression on what a sentence has, in whatever order: what a reader of SST-2 is to beat."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from experiments._reading import TextRoom
from experiments._selection import Choice, select
from experiments._splits import Split
from experiments.data._texts import texts_of

WORDS = "bag of words, logistic regression"
PARTS = "bag of words, pairs and parts of words"
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WORD = r"\S+"


class Bag:
    """Logistic regression on the words of whole sentences.

    Args:
      texts: the training sentences.
      labels: 0 or 1.
      strength: the inverse of the penalty.
      parts: beside them on pairs of neighbours and on parts of words, of three to six letters, all the more the rarer
        they are.
    """

    def __init__(self, texts: Sequence[str], labels: np.ndarray, strength: float, parts: bool = False) -> None:
        count = CountVectorizer(token_pattern=WORD, binary=True)
        if parts:
            pairs = TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), sublinear_tf=True)
            letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 6), min_df=2, sublinear_tf=True)
            count = make_union(pairs, letters)
        self.model = make_pipeline(count, LogisticRegression(C=strength, max_iter=1000)).fit(texts, labels)

    @property
    def size(self) -> int:
        """How many numbers are learned."""
        return int(self.model[-1].coef_.size) + 1

    def right(self, split: Split) -> float:
        """Accuracy in %."""
        return 100 * float(np.mean(self.model.predict(texts_of(split)) == split.labels))


def measured(room: TextRoom, parts: bool = False) -> tuple[dict[str, float], Choice]:
    """The figures of a bag whose strength was chosen on validation data, and that choice."""
    train, validation, name = room.dataset.train, room.dataset.validation, PARTS if parts else WORDS
    bags = {c: Bag(texts_of(train), train.labels, c, parts) for c in STRENGTHS}
    what = "C of the logistic regression" + (" on parts too" if parts else "")
    best, choice = select(what, STRENGTHS, lambda c, split: bags[c].right(split), validation)
    bag, test = bags[best], room.dataset.test.read(for_model=name)
    return {"accuracy": bag.right(test), "validation": bag.right(validation), "size": bag.size}, choice
