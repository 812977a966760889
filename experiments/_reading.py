"""Sentences as numbers of words, an encoder that reads them, and what it learns by: masked words, and labels."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import _distilling
from experiments._bert import Bert, Outputs, Size
from experiments._distilling import PARAMS, Lesson, Room
from experiments._splits import Split
from experiments.data._texts import load_texts, texts_of
from jaxcompress import distill

PADDING, UNKNOWN, MASKED = 0, 1, 2  # the first numbers of every vocabulary


class Vocabulary:
    """Words that occur often enough in some texts, the frequent first, numbered behind the three special ones.

    Args:
      texts: the words.
      at_least: how often a word occurs in them.
      spelled: whether words have parts too, so that one which is not in the texts is not wholly unknown.

    Attributes:
      numbers: of the words.
      parts: the numbers of the parts, from 1.
    """

    def __init__(self, texts: Sequence[str], at_least: int, spelled: bool = False) -> None:
        counts = collections.Counter(word for text in texts for word in text.split())
        kept = sorted((word for word, n in counts.items() if n >= at_least), key=lambda word: (-counts[word], word))
        self.numbers = {word: 3 + i for i, word in enumerate(kept)}
        shared = collections.Counter(part for word in counts for part in parts_of(word)) if spelled else {}
        self.parts = {part: 1 + i for i, part in enumerate(sorted(part for part, n in shared.items() if n > 1))}

    def __len__(self) -> int:
        return 3 + len(self.numbers)

    def rows(self, texts: Sequence[str], tokens: int) -> np.ndarray:
        """`[texts, tokens, 1 + k]`, int32: the first `tokens` words of each, padded behind, each with its parts."""
        known: dict[str, list[int]] = {}
        for word in {word for text in texts for word in text.split()}:
            parts = [self.parts[part] for part in parts_of(word) if part in self.parts] if self.parts else []
            known[word] = [self.numbers.get(word, UNKNOWN), *parts[:MOST]]
        wide = 1 + (MOST if self.parts else 0)
        return padded([[known[word] for word in text.split()[:tokens]] for text in texts], tokens, wide)


MOST = 40
"""Parts that count of a word, the short ones first; few words have more."""


def parts_of(word: str) -> list[str]:
    """All that a word has of three to six neighbouring letters, its ends being letters too; each once."""
    whole = f"<{word}>"
    return list(dict.fromkeys(whole[i : i + n] for n in range(3, 7) for i in range(len(whole) - n + 1)))


def padded(numbers: Sequence[Sequence[Sequence[int]]], tokens: int, wide: int) -> np.ndarray:
    """`[texts, tokens, wide]`, int32: each text's words' numbers, and padding behind."""
    rows = np.full((len(numbers), tokens, wide), PADDING, np.int32)
    for row, those in zip(rows, numbers, strict=True):
        for word, its in zip(row, those, strict=False):
            word[: len(its)] = its
    return rows


class TextRoom(Room):
    """A data set of sentences on the device; `images` are their numbered words, `[examples, tokens, 1 + parts]`.

    Args:
      config: which data set, and how much of it.
      tokens: a sentence's first words, or word pieces, that are read.
      at_least: how often a word of the vocabulary occurs in the training sentences.
      spelled: whether words have parts.
      vocabulary: another one than of those words.
    """

    def __init__(
        self,
        config: _distilling.Config,
        tokens: int,
        at_least: int,
        spelled: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.config, self.tokens = config, tokens
        self.dataset = load_texts(config.data, config.data_dir)
        train, validation = self.dataset.train, self.dataset.validation
        self.texts = texts_of(train)[: config.examples]
        self.vocabulary = vocabulary or Vocabulary(texts_of(train), at_least, spelled)
        self.images, self.labels = self.numbered(train)
        self.images, self.labels = self.images[: config.examples], self.labels[: config.examples]
        self.validation = self.numbered(validation)
        self.batch = min(config.batch_size, len(self.labels))
        self.steps = len(self.labels) // self.batch
        self._test, self._forward, self._init = None, {}, {}

    def numbered(self, split: Split) -> tuple[jax.Array, jax.Array]:
        """A split's words and labels."""
        return jnp.asarray(self.vocabulary.rows(texts_of(split), self.tokens)), jnp.asarray(split.labels)

    def test_images(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Words and labels of the test split, which is read once for each final model."""
        return self.numbered(self.dataset.test.read(for_model=name))


class Reader(nn.Module):
    """An encoder with a head on the mean of its last hidden states.

    Attributes:
      size: of the encoder.
      dropout: of the encoder, and before the head.
      classes: outputs.
      before: see `Bert`.
    """

    size: Size
    dropout: float = 0.0
    classes: int = 2
    before: bool = False

    def setup(self) -> None:
        """The encoder and the head."""
        self.bert = Bert(self.size, self.dropout, self.before)
        self.head = nn.Dense(self.classes)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of numbered words and their parts `[batch, tokens, 1 + k]`."""
        mask = tokens[..., 0] != PADDING
        last = self.read(tokens, train).hidden[-1]
        mean = jnp.sum(last * mask[:, :, None], axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
        return self.head(self.drop(mean, deterministic=not train))

    def read(self, tokens: jax.Array, train: bool = False) -> Outputs:
        """All that the encoder puts out."""
        words = tokens[..., 0]
        return self.bert(words, words != PADDING, train, spelling=tokens[..., 1:])

    def layers(self, tokens: jax.Array) -> distill.LayerOutputs:
        """What the encoder's layers put out."""
        out = self.read(tokens)
        return distill.LayerOutputs(out.hidden, out.attention)

    def words(self, tokens: jax.Array, places: jax.Array, train: bool = False) -> jax.Array:
        """Logits of the words at `places` `[batch, k]`: `[batch, k, vocabulary]`, by the embedding's own vectors."""
        last = self.read(tokens, train).hidden[-1]
        table = self.bert.variables[PARAMS]["words"]["embedding"]
        return jnp.take_along_axis(last, places[:, :, None], axis=1) @ table.T


def masked(tokens: jax.Array, key: jax.Array, share: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """BERT's task: words to be guessed from what stands around them (Devlin et al. 2019, section 3.1).

    Of the chosen words 80% become the mask, 10% another word of the batch, 10% stay.

    Args:
      tokens: `[batch, tokens, 1 + k]`.
      key: chooses.
      share: of the words that are chosen, of each sentence at least one.

    Returns:
      The changed tokens; the chosen places `[batch, k]` with `k` the share of a full row; and which of them count,
      since a short sentence has fewer.
    """
    which, how, what = jax.random.split(key, 3)
    words = tokens[..., 0]
    k = max(1, round(share * words.shape[1]))
    score = jnp.where(words == PADDING, -1.0, jax.random.uniform(which, words.shape))
    places = jax.lax.top_k(score, k)[1]
    lengths = jnp.sum(words != PADDING, axis=1)
    counts = jnp.arange(k) < jnp.maximum(1, jnp.round(share * lengths))[:, None]
    rows = jnp.arange(len(words))[:, None]
    old = tokens[rows, places]
    draw = jax.random.uniform(how, places.shape)
    text, place = jax.random.uniform(what, (2, *places.shape))
    text = (text * len(words)).astype(jnp.int32)
    random = tokens[text, (place * lengths[text]).astype(jnp.int32)]
    new = jnp.where((draw < 0.9)[..., None], random, old)
    new = jnp.where((draw < 0.8)[..., None], hidden_word(tokens), new)
    return tokens.at[rows, places].set(jnp.where(counts[..., None], new, old)), places, counts


def hidden_word(tokens: jax.Array) -> jax.Array:
    """What stands for a masked word: its number, and no parts, `[1 + k]`."""
    return jnp.zeros_like(tokens, shape=tokens.shape[-1:]).at[0].set(MASKED)


def word_loss(model: Reader, share: float = 0.15) -> _distilling.Loss:
    """A `Loss`: cross entropy of the masked words, the mean over those that count.

    `knobs` are the logarithms of the words' frequencies, which are added to the logits: BERT's bias, not learned, so
    that the few sentences do not teach the embeddings which words are frequent.
    """

    def of_params(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        changed, places, counts = masked(lesson.images, jax.random.fold_in(lesson.key, 1), share)
        rngs = {"dropout": lesson.key}
        logits: Any = model.apply({PARAMS: params}, changed, places, True, rngs=rngs, method=Reader.words)
        wanted = jnp.take_along_axis(lesson.images[..., 0], places, axis=1)
        losses = distill.hard_label_loss(logits + lesson.knobs, wanted, where=counts)
        return distill.masked_mean(losses, counts), extras

    return of_params


def averaged(loss: _distilling.Loss, decay: float) -> _distilling.Loss:
    """A `Loss` beside which `extras["average"]` follows the parameters, which are not those that learn."""

    def of_params(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
        average = distill.moving_average(extras["average"], jax.lax.stop_gradient(params), decay, lesson.step)
        return loss(params, {}, lesson)[0], {"average": average}

    return of_params


def log_frequencies(tokens: jax.Array, vocabulary: int) -> jax.Array:
    """`[vocabulary]`: the logarithm of each number's share of the words, one more being counted of each."""
    counts = 1 + jnp.bincount(tokens[..., 0].reshape(-1), length=vocabulary).at[PADDING].set(0)
    return jnp.log(counts / jnp.sum(counts))


def dropped_words(share: float) -> Any:
    """Words that are masked at random, each with this probability."""

    def augment(tokens: jax.Array, key: jax.Array) -> jax.Array:
        words = tokens[..., 0]
        gone = (jax.random.uniform(key, words.shape) < share) & (words != PADDING)
        return jnp.where(gone[..., None], hidden_word(tokens), tokens)

    return augment


def layer_tables(room: TextRoom, model: Reader, variables: Mapping[str, Any], layer_map: Sequence[int]) -> Any:
    """The teacher's hidden states and attention scores that a student's layers learn from, a row an example."""
    apply: Any = model.apply
    run = jax.jit(lambda v, x: chosen_layers(apply(v, x, method=Reader.layers), layer_map))
    parts = [run(variables, room.images[i : i + 500]) for i in range(0, len(room.images), 500)]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def chosen_layers(outputs: distill.LayerOutputs, layer_map: Sequence[int]) -> distill.LayerOutputs:
    """Of all layers those of a map, the embedding's 0 first."""
    hidden, attention = outputs
    return distill.LayerOutputs([hidden[g] for g in layer_map], [attention[g - 1] for g in layer_map[1:]])
