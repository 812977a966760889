"""The BERT encoder, of any size: Devlin et al., "BERT: pre-training of deep bidirectional transformers", 2019."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Size(NamedTuple):
    """What makes BERT-base or TinyBERT."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 30522
    positions: int = 512
    parts: int = 0
    """How many parts of words have a vector; 0: words are not spelled."""


BASE = Size()
TINY = Size(layers=4, hidden=312, intermediate=1200)
"""TinyBERT's student: Jiao et al., "TinyBERT: distilling BERT for natural language understanding", 2020, section 4."""


class Outputs(NamedTuple):
    """What TinyBERT compares: embeddings and each layer's result `[batch, tokens, hidden]`, first to last, attention
    scores before the softmax `[batch, heads, tokens, tokens]` of each layer, and the pooled first token."""

    hidden: tuple[jax.Array, ...]
    attention: tuple[jax.Array, ...]
    pooled: jax.Array


dense = partial(nn.Dense, kernel_init=nn.initializers.truncated_normal(0.02))
embed = partial(nn.Embed, embedding_init=nn.initializers.truncated_normal(0.02))


class Layer(nn.Module):
    """Self-attention and a feed-forward part, each with a shortcut and a layer normalisation behind, or before."""

    size: Size
    dropout: float = 0.0
    before: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """The layer's result, and its attention scores; `mask` `[batch, tokens]` is True on tokens."""
        size, heads = self.size, self.size.heads
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norms = [nn.LayerNorm(epsilon=1e-12, name=f"norm_{i}") for i in (1, 2)]
        first, second = ((norm, _same) if self.before else (_same, norm) for norm in norms)
        split = (*x.shape[:2], heads, size.hidden // heads)
        y = first[0](x)
        q, k, v = (dense(size.hidden, name=name)(y).reshape(split) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / split[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e9))
        seen = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = first[1](x + drop(dense(size.hidden, name="out")(seen)))
        wide = nn.gelu(dense(size.intermediate, name="wide")(second[0](x)), approximate=False)
        narrow = drop(dense(size.hidden, name="narrow")(wide))
        return second[1](x + narrow), scores


def _same(x: jax.Array) -> jax.Array:
    return x


class Bert(nn.Module):
    """Embeddings, layers, and the pooled first token.

    Attributes:
      size: its widths and numbers.
      dropout: the rate behind the embeddings and behind each half of a layer, in training.
      before: whether a layer's halves are normalised before and not behind, which deep networks learn more easily
        (Xiong et al., "On layer normalization in the transformer architecture", 2020).
    """

    size: Size = BASE
    dropout: float = 0.0
    before: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        train: bool = False,
        segments: jax.Array | None = None,
        spelling: jax.Array | None = None,
    ) -> Outputs:
        """`tokens`, `mask` and `segments` `[batch, tokens]`, all of segment 0 by default.

        `spelling` `[batch, tokens, k]` has the parts of each word, numbered from 1, and zeros behind: their vectors are
        added to the word's (Bojanowski et al., "Enriching word vectors with subword information", 2017).
        """
        size = self.size
        segments = jnp.zeros_like(tokens) if segments is None else segments
        x = embed(size.vocabulary, size.hidden, name="words")(tokens)
        if size.parts and spelling is not None:
            there = spelling > 0
            parts = embed(size.parts, size.hidden, name="parts")(spelling) * there[..., None]
            x += jnp.sum(parts, axis=-2) / jnp.sqrt(jnp.maximum(jnp.sum(there, axis=-1, keepdims=True), 1))
        x += embed(size.positions, size.hidden, name="places")(jnp.arange(tokens.shape[1]))
        x += embed(2, size.hidden, name="segments")(segments)
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        hidden, attention = [x], []
        for i in range(size.layers):
            x, scores = Layer(size, self.dropout, self.before, name=f"layer_{i}")(x, mask, train)
            if self.before and i == size.layers - 1:
                x = nn.LayerNorm(epsilon=1e-12, name="norm_last")(x)
            hidden.append(x)
            attention.append(scores)
        pooled = nn.tanh(dense(size.hidden, name="pool")(x[:, 0]))
        return Outputs(tuple(hidden), tuple(attention), pooled)
