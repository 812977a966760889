"""Sentences as data, the encoder's head and masked words, and TinyBERT's recipe on a short setting."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from experiments import _bags, _distilling, _results, distill_sst2
from experiments._bert import Bert, Size
from experiments._bert_import import load_bert
from experiments._distilling import Lesson
from experiments._pieces import Pieces
from experiments._reading import (
    MASKED,
    PADDING,
    UNKNOWN,
    Reader,
    TextRoom,
    Vocabulary,
    averaged,
    dropped_words,
    log_frequencies,
    masked,
    parts_of,
    word_loss,
)
from experiments.data import DataNotFoundError
from experiments.data._texts import load_texts, texts_of
from jaxcompress import distill

REFERENCE = Path(__file__).parent / "bert_reference"
"""A random BERT of `transformers`, with 30 rows of word pieces."""
PIECES = ["a", "[PAD]", "the", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "##aff", "##a", "'", "s", ",", "re"]
PIECES += [
    "regression",
    "data",
    "##s",
    "of",
    "is",
    "in",
    "to",
    "##ed",
    "for",
    "and",
    "with",
    "set",
    "are",
    "##set",
    "b",
]


@pytest.fixture
def checkpoint(tmp_path):
    """The random BERT with a vocabulary beside it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(REFERENCE / name, folder)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    return folder


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
    found = vocabulary.rows(["a b c a", "b"], 3)
    np.testing.assert_array_equal(found, np.array([[4, 3, UNKNOWN], [3, PADDING, PADDING]])[..., None])
    tokens = jnp.asarray(vocabulary.rows(["a b b", "b"], 3))
    np.testing.assert_allclose(np.exp(log_frequencies(tokens, 5)), np.array([1, 1, 1, 4, 2]) / 9, rtol=1e-6)


def test_words_have_the_parts_that_others_have_too():
    """`<abc>` has six parts, which all are `<abcd>`'s but those that end it."""
    vocabulary = Vocabulary(["abc abcd", "abcd"], at_least=2, spelled=True)
    assert set(vocabulary.parts) == {"<ab", "abc", "<abc"} and set(vocabulary.parts.values()) == {1, 2, 3}
    known, other = vocabulary.rows(["abcd xabcx xy"], 4)[0, :2]
    assert known[0] == 3 and sorted(known[1:4]) == [1, 2, 3] and not known[4:].any()
    assert other[0] == UNKNOWN and other[1] == vocabulary.parts["abc"] and not other[2:].any()
    assert len(parts_of("extraordinarily")) == 15 + 14 + 13 + 12 and parts_of("aaaa") == [
        "<aa", "aaa", "aa>", "<aaa", "aaaa", "aaa>", "<aaaa", "aaaa>", "<aaaa>"
    ]  # fmt: skip


def test_a_words_parts_are_added_to_it():
    """Against the tables' rows, summed over the square root of their number; a masked word has none."""
    size = Size(1, 4, 2, 8, 6, 3, parts=4)
    model = Reader(size)
    tokens = jnp.array([[[3, 1, 2, 0], [1, 3, 0, 0], [MASKED, 0, 0, 0]]])
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    table = {name: variables["params"]["bert"][name]["embedding"] for name in ("words", "parts", "places", "segments")}
    parts = jnp.stack([(table["parts"][1] + table["parts"][2]) / 2**0.5, table["parts"][3], jnp.zeros(4)])
    x = table["words"][tokens[0, :, 0]] + parts + table["places"] + table["segments"][0]
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    found = model.apply(variables, tokens, method=Reader.layers).hidden[0][0]
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


SENTENCES = {
    "the unaffable": ["the", "un", "##aff", "##able"],
    "a data's datasets": ["a", "data", "'", "s", "data", "##set", "##s"],
    "unaffx , aaa": ["[UNK]", ",", "a", "##a", "##a"],
    "is,of the set": ["is", ",", "of", "the", "set"],
}


def test_words_are_cut_into_the_longest_pieces(checkpoint):
    pieces = Pieces(checkpoint / "vocab.txt")
    assert [PIECES[i] for i in pieces.order[:5]] == ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]"]
    assert sorted(pieces.order) == list(range(len(PIECES))) and len(pieces) == 30
    for row, cut in zip(pieces.rows(list(SENTENCES), 7), SENTENCES.values(), strict=True):
        assert [PIECES[pieces.order[n]] for n in row[:, 0] if n != PADDING] == ["[CLS]", *cut[:5], "[SEP]"]
    (checkpoint / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    with pytest.raises(ValueError, match=r"vocab\.txt has no \[MASK\], \[CLS\], \[SEP\]: not the word pieces"):
        Pieces(checkpoint / "vocab.txt")


def test_word_pieces_are_those_of_transformers(checkpoint):
    """On every bundled line, where transformers is there."""
    transformers = pytest.importorskip("transformers")
    pieces, theirs = Pieces(checkpoint / "vocab.txt"), transformers.BertTokenizer(str(checkpoint / "vocab.txt"))
    texts = [*SENTENCES, *texts_of(load_texts("descriptions").train)]
    for row, text in zip(pieces.rows(texts, 200), texts, strict=True):
        assert pieces.order[row[row != PADDING]].tolist() == theirs(text)["input_ids"]


def test_a_checkpoint_is_the_teacher_that_learns(checkpoint):
    """With its pieces in our order the encoder says what it said in the checkpoint's."""
    config = dataclasses.replace(distill_sst2.SHORT, checkpoint=checkpoint)
    room, model, variables = distill_sst2.opened(config)
    assert (model.size.layers, model.size.hidden, model.size.positions, model.before) == (2, 12, 8, False)
    size, params = load_bert(checkpoint)
    tokens = room.images[:20, :, 0]
    assert len(np.unique(tokens)) > 10
    found = model.apply(variables, room.images[:20], method=Reader.layers)
    expected = Bert(size).apply({"params": params}, room.vocabulary.order[tokens], tokens != PADDING)
    mask = np.asarray(tokens) != PADDING
    for ours, theirs in zip(found.hidden, expected.hidden, strict=True):
        np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-5)
    (checkpoint / "vocab.txt").write_text("\n".join(PIECES[:-1]))
    with pytest.raises(ValueError, match="has 29 word pieces for 30 rows, and 16 positions for 8 tokens"):
        distill_sst2.opened(config)


def test_masked_words_are_berts():
    """The shares of 15%, 80%, 10% and 10%, no padding, and at least one word of each sentence."""
    lengths = np.array([40] * 300 + [1] * 300 + [20] * 300)
    tokens = np.where(np.arange(40) < lengths[:, None], np.random.default_rng(0).integers(3, 1000, (900, 40)), PADDING)
    spelled = jnp.asarray(np.stack([tokens, 7 * tokens], axis=-1))  # a part that tells its word
    whole, places, counts = (np.asarray(x) for x in masked(spelled, jax.random.key(0), 0.15))
    changed = whole[..., 0]
    np.testing.assert_array_equal(whole[..., 1], np.where(changed == MASKED, 0, 7 * changed))
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
    whole = np.asarray(dropped_words(0.3)(spelled, jax.random.key(1)))
    dropped = whole[..., 0]
    np.testing.assert_array_equal(whole[..., 1], np.where(dropped == MASKED, 0, 7 * dropped))
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
    changed, places, counts = masked(tokens, jax.random.fold_in(lesson.key, 1), 0.15)

    layers = jax.jit(lambda x: model.apply(variables, x, method=Reader.layers))
    last, expected = np.asarray(layers(changed).hidden[-1], np.float64), []
    table = np.asarray(variables["params"]["bert"]["words"]["embedding"], np.float64)
    for i, k in zip(*np.nonzero(counts), strict=True):
        z = last[i, places[i, k]] @ table.T + np.asarray(bias)
        expected.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[tokens[i, places[i, k], 0]])
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-4)

    last, head = np.asarray(layers(tokens).hidden[-1]), variables["params"]["head"]
    mean = np.stack([row[np.asarray(t[:, 0]) != PADDING].mean(0) for row, t in zip(last, tokens, strict=True)])
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


def test_an_average_follows_what_learns(room):
    """Against the mean of all parameters so far, which it is while the decay does not bind."""
    loss = averaged(lambda params, extras, lesson: (jnp.sum((params["x"] - 3.0) ** 2), {}), 0.9)
    start = {"params": {"x": jnp.zeros(2)}, "average": {"x": jnp.zeros(2)}}
    learn = _distilling.Learner(room, lambda seed: start, loss, epochs=1, tx=optax.sgd(0.1))
    learned = learn("average", 0, start=jax.tree.map(jnp.copy, start))
    x, average = 0.0, 0.0
    for step in range(learn.steps):
        average += (1 - min(0.9, 1 - 1 / (step + 1))) * (x - average)
        x -= 0.2 * (x - 3)
    np.testing.assert_allclose(learned["average"]["x"], average, rtol=1e-5)
    np.testing.assert_allclose(learned["params"]["x"], x, rtol=1e-5)
    assert abs(x - average) > 1e-3


def test_bags_of_words_and_of_parts(room):
    """Pairs tell an order apart and letters a word's end, words alone do not; both learn the bundled lines."""
    texts, labels = ["a b", "b a", "a b c", "b a c"] * 4, np.array([1, 0, 1, 0] * 4)
    assert _bags.Bag(texts, labels, 30.0, parts=True).model.predict(["a b", "b a"]).tolist() == [1, 0]
    np.testing.assert_allclose(_bags.Bag(texts, labels, 30.0).model.predict_proba(texts), 0.5, atol=1e-3)
    ends = _bags.Bag(["walked", "talked", "walking", "talking"], np.array([0, 0, 1, 1]), 30.0, parts=True)
    assert ends.model.predict(["jumped", "jumping"]).tolist() == [0, 1]
    for parts in (False, True):
        figures, choice = _bags.measured(room, parts)
        assert figures["validation"] == max(choice.scores.values()) > 65 and figures["accuracy"] > 65
    assert _bags.Bag(["a b", "c"], np.array([0, 1]), 1.0).size == 3 + 1


def test_tinyberts_recipe(tmp_path):
    config = dataclasses.replace(distill_sst2.SHORT, out=tmp_path, resume=tmp_path / "kept")
    result = distill_sst2.main(config)
    assert _results.read(tmp_path / f"{result.name}.json") == result
    rows = {row.name: row.ours for row in result.rows}
    assert len(rows) == 10 and len(result.test_reads) == 10
    of_words, of_parts = result.choices
    assert of_words.what == "C of the logistic regression" and of_parts.what.endswith("on parts too")
    assert rows[_bags.WORDS]["accuracy"].mean > 65  # a real task
    taught = [name for name in rows if "student" in name or "without" in name]
    assert len({rows[name]["accuracy"].values for name in taught}) > 2  # each loss does something
    assert len({rows[name]["size"].values for name in taught}) == 1  # the projection stays behind
    assert distill_sst2.main(config).rows == result.rows  # from what was kept


@pytest.fixture
def from_checkpoint(tmp_path, checkpoint):
    """The short setting with that checkpoint, and a student with as many heads."""
    student = distill_sst2.SHORT.student._replace(heads=3, hidden=6)
    changed = {"student": student, "masked_epochs": 0, "fine_tunings": 1, "out": tmp_path}
    return dataclasses.replace(distill_sst2.SHORT, checkpoint=checkpoint, **changed)


def test_a_checkpoint_that_learns_labels(from_checkpoint):
    """Without masked words the teacher of the first phase is the checkpoint as it is; its command gives it again."""
    room, model, start = distill_sst2.opened(from_checkpoint)
    figures, choice = _bags.measured(room)
    teachers = distill_sst2.taught(room, from_checkpoint, model, start)
    jax.tree.map(np.testing.assert_array_equal, teachers["pretrained"], start)
    moved = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), teachers["fine-tuned"], start)["params"]
    assert moved["head"]["kernel"] > 0 and moved["bert"]["layer_0"]["query"]["kernel"] > 0
    result = distill_sst2.reported(from_checkpoint, room, model, [(_bags.WORDS, 0, figures)], [choice])
    assert result.name == "distill_tinybert_checkpoint_descriptions"
    options = tyro.cli(distill_sst2.Config, args=result.command.split()[3:])
    assert options.student == from_checkpoint.student and options.checkpoint == Path("DIR") and options.tokens == 8
    assert "not one known here" in result.notes[2] and "30 word pieces" in result.notes[0]


@pytest.mark.slow
def test_tinyberts_recipe_from_a_checkpoint(from_checkpoint):
    result = distill_sst2.main(from_checkpoint)
    rows = {row.name: row.ours for row in result.rows}
    assert len(rows) == 10 and rows[_bags.WORDS]["accuracy"].mean > 65
    weights = sum(x.size for x in jax.tree.leaves(load_bert(from_checkpoint.checkpoint)[1]))
    assert rows[distill_sst2.TEACHER]["size"].mean == weights - 8 * 12 + 12 * 2 + 2  # 8 positions of 16, and a head
