"""Sentences as data, the encoder's head and masked words, and TinyBERT's recipe on a short setting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _distilling, _results, distill_sst2
from experiments._bert import Size
from experiments._distilling import Lesson
from experiments._reading import (
    MASKED,
    PADDING,
    UNKNOWN,
    Reader,
    TextRoom,
    Vocabulary,
    dropped_words,
    log_frequencies,
    masked,
    word_loss,
)
from experiments.data import DataNotFoundError
from experiments.data._texts import load_texts, texts_of
from jaxcompress import distill


@pytest.fixture(scope="module")
def room():
    config = _distilling.Config(data="descriptions", batch_size=32, epochs=1)
    return TextRoom(config, tokens=8, at_least=2)


def test_sst2_is_read_from_its_three_files(tmp_path):
    files = {"train": "a fine film\t1\ntoo long\t0\nno tab , but words\t0\n", "dev": "fine\t1\n", "test": "long\t0"}
    for part, text in files.items():
        (tmp_path / f"{part}.tsv").write_text(text)
    data = load_texts("sst2", tmp_path)
    assert texts_of(data.train) == ["a fine film", "too long", "no tab , but words"]
    assert data.train.labels.tolist() == [1, 0, 0] and len(data.test) == 1 and not data.test.reads
    with pytest.raises(DataNotFoundError, match=r"no SST-2: neither .*sst2/train\.tsv nor .*; give --data-dir"):
        load_texts("sst2", tmp_path / "empty")
    with pytest.raises(ValueError, match="no data set of sentences 'sst3'"):
        load_texts("sst3", tmp_path)
    for text, message in (("fine\t1\nbad\n", r"line 2: want SENTENCE<TAB>LABEL"), ("", "is empty")):
        (tmp_path / "train.tsv").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_texts("sst2", tmp_path)


def test_the_bundled_lines_are_split_without_overlap():
    data = load_texts("descriptions")
    parts = [set(texts_of(split)) for split in (data.train, data.validation, data.test.read(for_model="a test"))]
    assert min(map(len, parts)) > 50 and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert 0.2 < data.train.labels.mean() < 0.8


def test_words_are_numbered_by_frequency():
    vocabulary = Vocabulary(["b a b", "c b a", "d"], at_least=2)
    assert len(vocabulary) == 5
    np.testing.assert_array_equal(vocabulary.rows(["a b c a", "b"], 3), [[4, 3, UNKNOWN], [3, PADDING, PADDING]])
    tokens = jnp.asarray(vocabulary.rows(["a b b", "b"], 3))
    np.testing.assert_allclose(np.exp(log_frequencies(tokens, 5)), np.array([1, 1, 1, 4, 2]) / 9, rtol=1e-6)


def test_masked_words_are_berts():
    """The shares of 15%, 80%, 10% and 10%, no padding, and at least one word of each sentence."""
    lengths = np.array([40] * 300 + [1] * 300 + [20] * 300)
    tokens = np.where(np.arange(40) < lengths[:, None], np.random.default_rng(0).integers(3, 1000, (900, 40)), PADDING)
    changed, places, counts = (np.asarray(x) for x in masked(jnp.asarray(tokens), jax.random.key(0), 0.15, 1000))
    assert places.shape == (900, 6) and set(counts.sum(1).tolist()) == {1, 3, 6}
    np.testing.assert_array_equal(counts.sum(1), np.repeat([6, 1, 3], 300))
    assert all(len(set(row)) == 6 for row in places.tolist())
    rows = np.arange(900)[:, None]
    old, new = tokens[rows, places][counts], changed[rows, places][counts]
    assert (old != PADDING).all()
    assert abs((new == MASKED).mean() - 0.8) < 0.03 and abs((new == old).mean() - 0.1) < 0.03
    restored = changed.copy()
    restored[rows, places] = tokens[rows, places]
    np.testing.assert_array_equal(restored, tokens)
    np.testing.assert_array_equal(changed[rows, places][~counts], tokens[rows, places][~counts])
    dropped = np.asarray(dropped_words(0.3)(jnp.asarray(tokens), jax.random.key(1)))
    assert (
        abs((dropped == MASKED)[tokens != PADDING].mean() - 0.3) < 0.02 and not (dropped == MASKED)[tokens == 0].any()
    )


@pytest.mark.slow
def test_the_loss_of_masked_words_and_the_head(room):
    """Against the embedding's vectors and a softmax written out; the head's mean leaves padding out."""
    model = Reader(Size(1, 8, 2, 16, len(room.vocabulary), 8))
    variables = jax.tree.map(lambda x: 5 * x, room.init(model, 0))
    tokens, bias = room.images[:6], log_frequencies(room.images, len(room.vocabulary))
    assert (np.asarray(tokens) == PADDING).any()
    lesson = Lesson(tokens, room.labels[:6], None, bias, jax.random.key(3), jnp.array(0), jnp.arange(6))
    found, _ = jax.jit(lambda p: word_loss(model)(p, {}, lesson))(variables["params"])
    changed, places, counts = masked(tokens, jax.random.fold_in(lesson.key, 1), 0.15, len(room.vocabulary))

    layers = jax.jit(lambda x: model.apply(variables, x, method=Reader.layers))
    last, expected = np.asarray(layers(changed).hidden[-1], np.float64), []
    table = np.asarray(variables["params"]["bert"]["words"]["embedding"], np.float64)
    for i, k in zip(*np.nonzero(counts), strict=True):
        z = last[i, places[i, k]] @ table.T + np.asarray(bias)
        expected.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[tokens[i, places[i, k]]])
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-4)

    last, head = np.asarray(layers(tokens).hidden[-1]), variables["params"]["head"]
    mean = np.stack([row[np.asarray(t) != PADDING].mean(0) for row, t in zip(last, tokens, strict=True)])
    np.testing.assert_allclose(
        room.logits(model, variables, tokens), mean @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5
    )


def test_the_layers_losses_are_the_librarys():
    rng = np.random.default_rng(0)

    def outputs(layers: int, width: int) -> distill.LayerOutputs:
        hidden = [jnp.asarray(rng.normal(size=(3, 5, width)), jnp.float32) for _ in range(layers + 1)]
        return distill.LayerOutputs(hidden, [jnp.asarray(rng.normal(size=(3, 2, 5, 5)), jnp.float32)] * layers)

    student, teacher, where = outputs(2, 4), outputs(4, 6), jnp.arange(5) < jnp.array([[5], [2], [1]])
    matrix = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    whole = distill.intermediate_loss(student, teacher, project=lambda x: x @ matrix, where=where)
    chosen = distill.LayerOutputs([teacher.hidden[g] for g in (0, 2, 4)], [teacher.attention[g - 1] for g in (2, 4)])
    parts = distill_sst2.layer_losses(student, chosen, lambda x: x @ matrix, where)
    np.testing.assert_allclose(sum(parts.values()), whole, rtol=1e-5)


@pytest.mark.slow
def test_tinyberts_recipe(tmp_path):
    config = dataclasses.replace(distill_sst2.SHORT, out=tmp_path, resume=tmp_path / "kept")
    result = distill_sst2.main(config)
    assert _results.read(tmp_path / f"{result.name}.json") == result
    rows = {row.name: row.ours for row in result.rows}
    assert len(rows) == 9 and len(result.test_reads) == 9
    strength, training = result.choices
    assert strength.what.startswith("C of") and list(training.scores) == ["dropout 0.1", "dropout 0.1, born again"]
    assert rows[distill_sst2.BAG]["accuracy"].mean > 65  # a real task
    taught = [name for name in rows if "student" in name or "without" in name]
    assert len({rows[name]["accuracy"].values for name in taught}) > 2  # each loss does something
    assert len({rows[name]["size"].values for name in taught}) == 1  # the projection stays behind
    assert distill_sst2.main(config).rows == result.rows  # from what was kept
