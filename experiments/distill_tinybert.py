"""BERT-base beside TinyBERT's student: `python -m experiments.distill_tinybert --data-dir DIR`.

Parameters and the time of one sentence, padded to 128 tokens, for networks with fresh weights: what Jiao et al. 2020
give as 13.3% and 10.6%. Sentences are SST-2's (`train.tsv` and `dev.tsv` in DIR or DIR/sst2), or bundled ones with
`--data descriptions`, with a number for each word; which number, and what the weights are, does not change the time.
Nothing is trained and no test data are read.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _distilling, _results
from experiments._bert import BASE, TINY, Bert, Size
from experiments._command import run_main
from experiments._distilling import bars, command, gathered, written
from experiments._results import Column
from experiments._splits import SplitRecord
from experiments.data._texts import load_texts, sentences, texts_of
from jaxcompress import report


@dataclass(frozen=True)
class Config(_distilling.Config):
    """The cost of BERT-base and of TinyBERT's student."""

    data: str = "sst2"
    """The sentences: sst2 (with --data-dir), or descriptions."""
    seeds: int = 5
    """How many sentences are timed, one after the other."""
    tokens: int = 128
    repeats: int = 15
    """Turns that both networks have with each sentence; the median counts."""
    large: Size = BASE
    small: Size = TINY


SHORT = Config(
    data="descriptions",
    seeds=2,
    tokens=8,
    repeats=1,
    large=Size(2, 16, 2, 32, 100, 16),
    small=Size(1, 8, 2, 16, 100, 16),
)
"""A run of seconds, for tests."""


def numbered(sentence: str, size: Size, tokens: int) -> tuple[jax.Array, jax.Array]:
    """A sentence as `[1, tokens]` numbers of words and the mask of what is not padding."""
    words = sentence.split()[:tokens]
    numbers = [1 + int(hashlib.sha256(word.encode()).hexdigest(), 16) % (size.vocabulary - 1) for word in words]
    row = np.zeros((1, tokens), np.int32)
    row[0, : len(numbers)] = numbers
    return jnp.asarray(row), jnp.asarray(np.arange(tokens)[None] < len(numbers))


def found_sentences(config: Config) -> tuple[list[str], dict[str, SplitRecord]]:
    """The training sentences, and what a result says of the splits."""
    if config.data == "sst2":  # without its test file
        texts, train = sentences(config.data_dir, "train")
        return texts, {"train": train, "validation": sentences(config.data_dir, "dev")[1]}
    dataset = load_texts(config.data, config.data_dir)
    return texts_of(dataset.train), {"train": dataset.train.record(), "validation": dataset.validation.record()}


def main(config: Config) -> _results.Result:
    """Builds both, times them, and writes the result and the figure."""
    c = config
    texts, splits = found_sentences(c)
    figures: list[tuple[str, int, dict[str, float]]] = []
    measured: dict[str, list[dict[str, float]]] = {}
    runs: dict[str, Any] = {}
    for name, size in (("BERT-base", c.large), ("TinyBERT's student", c.small)):
        model, first = Bert(size), numbered(texts[0], size, c.tokens)
        variables: Any = jax.jit(model.init)(jax.random.key(0), *first)
        count = sum(x.size for x in jax.tree.leaves(variables))
        run = jax.jit(lambda v, t, m, model=model: model.apply(v, t, m).pooled)
        runs[name] = size, count, partial(run, variables)
    for i in range(c.seeds):
        calls = {name: partial(run, *numbered(texts[i], size, c.tokens)) for name, (size, _, run) in runs.items()}
        for name, seconds in report.in_turns(calls, c.repeats).items():
            measured.setdefault(name, []).append({"parameters": runs[name][1], "milliseconds": 1e3 * seconds})
    for name, found in measured.items():
        for i, ours in enumerate(found):
            whole = measured["BERT-base"][i]
            shares = {f"{key}_share": 100 * ours[key] / whole[key] for key in ours}
            figures.append((name, i, ours | shares))
    rows = gathered(figures, {"TinyBERT's student": {"parameters_share": 13.3, "milliseconds_share": 10.6}})
    result = _results.Result(
        name=f"distill_tinybert_{c.data}",
        title="What TinyBERT's student costs",
        source="Jiao et al. 2020, table 1, where the time is that of a GPU.",
        command=command("distill_tinybert", c),
        data=c.data,
        splits=splits,
        selection="nothing was chosen",
        choices=(),
        test_reads=(),
        columns=(
            Column("parameters", "parameters", 0),
            Column("parameters_share", "% of BERT-base"),
            Column("milliseconds", "ms a sentence", 1),
            Column("milliseconds_share", "% of BERT-base's time", 1),
        ),
        rows=tuple(rows),
        comparisons=(),
        versions=_results.versions(),
        machine=_results.machine(),
        notes=(
            f"{c.small.layers} layers of {c.small.hidden}, {c.large.layers} of {c.large.hidden}; vocabulary"
            f" {c.large.vocabulary:,}; embeddings and the pooled first token counted, no head. Fresh weights: nothing"
            f" was"
            " trained.",
            f"One sentence padded to {c.tokens} tokens, float32; {c.seeds} sentences stand for the seeds. The networks"
            f" take turns, {c.repeats} with each sentence, and the median counts.",
        ),
    )
    return written(
        result, c, lambda path: bars(path, rows, "milliseconds", x_title="ms a sentence", title=result.title)
    )


if __name__ == "__main__":
    run_main(main, Config)
