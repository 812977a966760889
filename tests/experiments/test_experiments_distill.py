"""The distillation experiments on short settings: real data, every arm, and what they claim to have done."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    _distilling,
    _results,
    distill_capacity,
    distill_methods,
    distill_mnist,
    distill_teaching,
    distill_tinybert,
    distill_why,
)
from experiments._bert import BASE, TINY, Bert
from experiments._distilling import Learner, Mlp, Room, guided, jittered, logits_loss
from experiments.data import DataNotFoundError
from experiments.distill_why import calibration


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return Room(_distilling.Config(seeds=1, epochs=2, batch_size=128, rate=0.01, out=tmp_path_factory.mktemp("out")))


def checked(result: _results.Result, out: Path) -> dict:
    """What holds of every result: it reads back, has its figure, and read test data once a model."""
    assert _results.read(out / f"{result.name}.json") == result
    assert (out / f"{result.name}.png").stat().st_size > 5_000
    assert len({read.model for read in result.test_reads}) == len(result.test_reads)
    return {row.name: row.ours for row in result.rows}


def test_a_learner_is_a_plain_loop_and_its_arms_share_a_program(room, tmp_path):
    """Against Adam on a distillation loss written out."""
    model, total = Mlp((16,)), 2 * room.steps
    traced = []

    def counted(*args):
        traced.append(args)
        return guided(*args)

    learn = room.learner(model, logits_loss(model, counted))
    rows = jax.random.normal(jax.random.key(5), (len(room.labels), 10))
    knobs = {"alpha": 0.3, "temperature": 2.0}
    trained = learn("one", 3, rows=rows, knobs=knobs)["params"]

    tx = optax.adam(optax.cosine_decay_schedule(0.01, total))
    params = room.init(model, 3)["params"]
    state, order = tx.init(params), np.random.default_rng(3)

    @jax.jit
    def step(params, state, index):
        def loss(params):
            z = model.apply({"params": params}, room.images[index])
            p, q = (jax.nn.softmax(x / 2.0) for x in (rows[index], z))
            soft = 4.0 * jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)
            hard = -jax.nn.log_softmax(z)[jnp.arange(len(index)), room.labels[index]]
            return jnp.mean(0.3 * soft + 0.7 * hard)

        updates, new = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), new

    for _ in range(2):
        mixed = order.permutation(np.arange(len(room.labels)))
        for k in range(room.steps):
            params, state = step(params, state, mixed[128 * k : 128 * (k + 1)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), trained, params)

    before = len(traced)
    learn("two", 4, rows=rows + 1, knobs={"alpha": 1, "temperature": 20})
    assert len(traced) == before > 0
    for folder in (None, tmp_path):  # beside the results, or where one says
        room.config = dataclasses.replace(room.config, log=folder)
        found = (folder or room.config.out / "_distilling") / "digits" / "one.jsonl"
        if folder:
            learn("one", 3, rows=rows, knobs=knobs)
        assert [json.loads(line)["step"] for line in found.read_text().splitlines()] == [room.steps, total]


def test_a_subset_is_all_that_is_shown(room):
    """Every index is of the subset, and an epoch shows none twice."""
    learn = Learner(room, lambda seed: {"params": {"w": jnp.zeros(1)}}, lambda p, extras, lesson: (p["w"][0], extras))
    chosen = np.flatnonzero(np.asarray(room.labels) != 3)
    batches = learn._batches(0, chosen)
    for _ in range(2):
        epoch = np.concatenate([next(batches)["index"] for _ in range(len(chosen) // 128)])
        assert len(np.unique(epoch)) == len(epoch) and not np.any(np.asarray(room.labels)[epoch] == 3)
    with pytest.raises(ValueError, match="do not fill a batch of 128"):
        next(learn._batches(0, np.arange(5)))


def test_what_was_measured_before_a_cut_is_not_measured_again(tmp_path):
    """Figures, the reads of test data that they took, and trained networks, under one setting only."""
    config = _distilling.Config(seeds=1, epochs=2, resume=tmp_path, examples=200)
    model, calls = Mlp((4,)), []

    def measure(room: Room) -> float:
        calls.append("measured")
        images, labels = room.test_images("a model")
        return float(images.sum()) + len(labels) / 3

    def learn() -> dict:
        calls.append("trained")
        return first.init(model, 7)

    first, second = Room(config), Room(dataclasses.replace(config, seeds=3, out=tmp_path))
    values = [room.kept("A figure, seed 0", lambda room=room: measure(room)) for room in (first, second)]
    networks = [room.trained("a network", model, learn) for room in (first, second)]
    assert values[0] == values[1] and calls == ["measured", "trained"]
    assert first.dataset.test.reads == second.dataset.test.reads and len(first.dataset.test.reads) == 1
    jax.tree.map(np.testing.assert_array_equal, *networks)
    with pytest.raises(ValueError, match="already read for 'a model'"):
        second.test_images("a model")
    longer = Room(dataclasses.replace(config, epochs=3))
    with pytest.raises(ValueError, match="of other settings"):
        longer.kept("A figure, seed 0", lambda: measure(longer))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and longer.trained("a network", model, learn) is not None
    assert calls == ["measured", "trained", "trained"]


def test_jitter_moves_images_by_whole_pixels():
    images = jax.random.uniform(jax.random.key(0), (40, 6, 6, 1))
    moved = np.asarray(jittered(2)(images, jax.random.key(1)))
    seen = set()
    for image, after in zip(np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), moved, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if np.array_equal(image[i : i + 6, j : j + 6], after)]
        assert len(fits) == 1
        seen.update(fits)
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(5))


def test_calibration_counts_by_hand():
    """Four predictions at 0.9, three of them right, and two at 0.6, one right."""
    p = np.array([0.9] * 4 + [0.6] * 2)
    logits = jnp.log(jnp.stack([p, 1 - p], axis=1))
    found = calibration(logits, jnp.array([0, 0, 0, 1, 0, 1]), bins=4)
    np.testing.assert_allclose(found.share, [0, 0, 2 / 6, 4 / 6])
    np.testing.assert_allclose(found.confidence, [0, 0, 0.6, 0.9], rtol=1e-6)
    np.testing.assert_allclose(found.accuracy, [0, 0, 0.5, 0.75])
    assert found.error == pytest.approx(0.15 * 4 / 6 + 0.1 * 2 / 6, rel=1e-5)
    sure = calibration(jnp.array([[50.0, -50.0]]), jnp.array([0]))
    assert sure.error == pytest.approx(0, abs=1e-6) and sure.share[-1] == 1


def test_bert_has_the_papers_sizes():
    """BERT-base's own count, and TinyBERT's 14.5 million, without making either."""
    sizes = []
    for size in (BASE, TINY):
        tokens, mask = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool)
        shapes = jax.eval_shape(Bert(size).init, jax.random.key(0), tokens, mask)
        sizes.append(sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)))
    assert sizes[0] == 109_482_240 and sizes[1] == 14_350_248


def test_bert_does_not_see_padding():
    size = TINY._replace(layers=1, hidden=12, heads=3, intermediate=16, vocabulary=20, positions=8)
    model, mask = Bert(size), jnp.arange(6)[None] < 4
    tokens = jnp.array([[3, 4, 5, 6, 7, 8]])
    variables = jax.tree.map(lambda x: 10 * x, jax.jit(model.init)(jax.random.key(0), tokens, mask))
    run = jax.jit(model.apply)
    a, b = run(variables, tokens, mask), run(variables, tokens.at[:, 4:].set(1), mask)
    np.testing.assert_allclose(a.pooled, b.pooled, atol=1e-6)
    np.testing.assert_allclose(a.hidden[-1][:, :4], b.hidden[-1][:, :4], atol=1e-6)
    assert len(a.hidden) == 2 and a.attention[0].shape == (1, 3, 6, 6)
    assert float(jnp.abs(a.pooled - run(variables, tokens.at[:, 2].set(1), mask).pooled).max()) > 1e-3


def test_the_cost_of_tinybert(tmp_path):
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_text("a fine film\t1\nno tab , but words\t0\n")
    bundled = distill_tinybert.main(dataclasses.replace(distill_tinybert.SHORT, out=tmp_path))
    assert checked(bundled, tmp_path) and bundled.name == "distill_tinybert_descriptions"
    config = dataclasses.replace(distill_tinybert.SHORT, data="sst2", data_dir=tmp_path, out=tmp_path)
    result = distill_tinybert.main(config)
    rows = checked(result, tmp_path)
    assert result.splits["train"].examples == 2 and not result.test_reads
    small = rows["TinyBERT's student"]
    assert small["parameters_share"].mean == 100 * small["parameters"].mean / rows["BERT-base"]["parameters"].mean
    with pytest.raises(DataNotFoundError, match=r"no SST-2: neither .*sst2/train\.tsv nor .*; give --data-dir"):
        distill_tinybert.main(dataclasses.replace(config, data_dir=tmp_path / "empty"))
    tokens, mask = distill_tinybert.numbered("a fine a film", distill_tinybert.SHORT.small, 6)
    assert mask.tolist() == [[True] * 4 + [False] * 2] and tokens[0, 0] == tokens[0, 2] > 0 == tokens[0, 4]


def test_the_table_of_hinton(tmp_path):
    config = dataclasses.replace(distill_mnist.SHORT, out=tmp_path, parts=("table",))
    (result,) = distill_mnist.main(config)
    rows = checked(result, tmp_path)
    assert list(rows) == list(distill_mnist.PAPER) and all(not row.paper for row in result.rows)
    for ours in rows.values():
        assert 0 <= ours["of_3"].mean <= ours["errors"].mean < 0.9 * 899
    blind, corrected = rows[distill_mnist.WITHOUT], rows[distill_mnist.CORRECTED]
    assert corrected["of_3"].mean <= blind["of_3"].mean  # a larger bias can lose no 3
    (choice,) = result.choices
    assert float(choice.chosen) == corrected["offset"].mean and len(choice.scores) == len(distill_mnist.OFFSETS)


def test_soft_targets_flatten_with_the_temperature(tmp_path):
    config = dataclasses.replace(distill_why.SHORT, out=tmp_path, parts=("targets",))
    (result,) = distill_why.main(config)
    rows = checked(result, tmp_path)
    shares = [[figure.mean for key, figure in ours.items() if key != "teacher"] for ours in rows.values()]
    largest = [max(row) for row in shares]
    assert largest == sorted(largest, reverse=True) and len(result.test_reads) == 1
    assert [sum(row) for row in shares] == pytest.approx([100] * len(shares), abs=1e-3)


def test_the_sweep_and_the_ensemble(tmp_path):
    config = dataclasses.replace(distill_mnist.SHORT, out=tmp_path, parts=("temperatures", "ensemble"))
    sweep, ensemble = distill_mnist.main(config)
    assert set(checked(sweep, tmp_path)["2x8"]) == {"t0", "t1", "t4"}
    rows = checked(ensemble, tmp_path)
    assert [rows[name]["kept"].mean for name in list(rows)[:2]] in ([0, 100], [0, 0])


def test_an_ensemble_teaches_by_images_without_labels(tmp_path):
    """Members learn the first images alone; the students' rows come on top, one of them of a single member."""
    config = dataclasses.replace(distill_mnist.SHORT, out=tmp_path, parts=("ensemble",), labelled=300, epochs=15)
    (ensemble,) = distill_mnist.main(config)
    rows = checked(ensemble, tmp_path)
    assert ensemble.name == "distill_ensemble_digits_transfer" and list(rows)[-1] == "distilled from one member"
    assert all(ours["accuracy"].mean > 60 for ours in rows.values())


def test_ways_of_teaching(tmp_path):
    rows = checked(distill_teaching.main(dataclasses.replace(distill_teaching.SHORT, out=tmp_path)), tmp_path)
    assert len(rows) == 16 and {name for pair in distill_teaching.PAIRS for name in pair} <= set(rows)
    assert all(ours["accuracy"].mean > 12 for ours in rows.values())


def test_capacity(tmp_path):
    growing, shapes = distill_capacity.main(dataclasses.replace(distill_capacity.SHORT, out=tmp_path))
    assert len(checked(growing, tmp_path)) == 2
    rows = checked(shapes, tmp_path)
    thin, deep = rows["thin and deep, hints, then soft targets"], rows["deep teacher"]
    assert thin["size"].mean == 65 * 8 + 4 * 9 * 8 + 9 * 10 < deep["size"].mean  # the regressor stays behind


def test_smoothing_and_partial_teachers(tmp_path):
    config = dataclasses.replace(distill_why.SHORT, out=tmp_path, parts=("smoothing", "partial"))
    smoothing, partial = distill_why.main(config)
    assert len(checked(smoothing, tmp_path)) == 6 and len(checked(partial, tmp_path)) == 8


def test_every_method(tmp_path):
    result = distill_methods.main(dataclasses.replace(distill_methods.SHORT, out=tmp_path))
    rows = checked(result, tmp_path)
    assert len(rows) == 40 and rows["labels alone"]["gain"].mean == 0
    different = {ours["accuracy"].values for ours in rows.values()}
    assert len(different) > 15  # each term does something


def test_recorded_mnist_has_the_papers_order_in_every_seed(recorded):
    rows = recorded("distill_table_mnist")
    errors = [rows[name]["errors"].values for name in distill_mnist.PAPER]
    for teacher, scratch, distilled, blind, corrected in zip(*errors, strict=True):
        assert teacher < distilled < scratch and distilled < corrected < blind
    assert rows[distill_mnist.WITHOUT]["of_3"].mean < 0.15 * 1010  # it knows the digit that it has never seen


def test_recorded_temperatures_matter_less_where_there_is_room(recorded):
    rows = {
        name: {key: f.mean for key, f in ours.items()} for name, ours in recorded("distill_temperatures_mnist").items()
    }
    wide, narrow = rows["2x300"], rows["2x30"]
    assert max(wide["t8"], wide["t20"]) - min(wide["t8"], wide["t20"]) < 0.1 and wide["t20"] < wide["t0"] - 0.5
    assert narrow["t1"] < narrow["t2"] < min(narrow["t8"], narrow["t20"])


def test_recorded_larger_teachers_teach_a_small_student_worse(recorded):
    rows = recorded("distill_growing_mnist").values()
    teachers, students = ([ours[key].mean for ours in rows] for key in ("teacher", "distilled"))
    assert teachers == sorted(teachers) and students == sorted(students, reverse=True)


def test_recorded_teachers_that_saw_more_help_shallow_and_thin_students_in_every_seed(recorded):
    rows = {name: ours["accuracy"].values for name, ours in recorded("distill_shapes_mnist_jittered").items()}
    arms = {
        "shallow": ("soft targets", "logits matched"),
        "thin and deep": ("soft targets", "hints, then soft targets"),
    }
    for student, ways in arms.items():
        for way in ways:
            ahead = np.subtract(rows[f"{student}, {way}"], rows[f"{student}, from scratch"])
            assert min(ahead) > 0.3, (student, way, ahead)
    found = recorded("distill_smoothing_mnist_jittered")
    taught, alone = (
        found[name]["accuracy"].values for name in ("student of the teacher with hard labels", "student, hard labels")
    )
    assert min(np.subtract(taught, alone)) > 0.2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Room(_distilling.Config(seeds=0)), "1 seed and 1 epoch or more"),
        (lambda: distill_mnist.main(distill_mnist.Config(parts=("all",))), "parts are table, temperatures, ensemble"),
        (lambda: distill_why.main(distill_why.Config(parts=())), "parts are smoothing, partial, targets; got none"),
        (lambda: distill_capacity.main(distill_capacity.Config(parts=("x",))), "parts are growing, shapes; got x"),
        (
            lambda: distill_methods.main(distill_methods.Config(data="no", methods=("x",))),
            "no method x: there are labels",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
