"""The distillation experiments on short settings: real data, every arm, and what they claim to have done."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds

from experiments import (
    _distilling,
    _results,
    distill_capacity,
    distill_methods,
    distill_mnist,
    distill_pairs,
    distill_teaching,
    distill_tinybert,
    distill_why,
)
from experiments._bert import BASE, TINY, Bert
from experiments._cifar100 import MODELS, PAIRS, Recipe
from experiments._distilling import Learner, Mlp, Room, guided, jittered, logits_loss
from experiments._pairs import Network, Pruned, Standard, comparable, pair_of
from experiments._resnets import Resnet
from experiments.data import DataNotFoundError, _cifar100, load
from experiments.data._prepare import prepared, read_records
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
    learn = room.learner(model, logits_loss(model, guided))
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

    learn("two", 4, rows=rows + 1, knobs={"alpha": 1, "temperature": 20})
    (jitted, _), *others = learn.step._jitted.values()
    assert not others and jitted._cache_size() == 1
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


COUNTS = {
    "resnet20": 278_324, "resnet32": 472_756, "resnet56": 861_620, "resnet110": 1_736_564, "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860, "WRN-16-2": 703_284, "WRN-40-1": 569_780, "WRN-40-2": 2_255_156, "VGG8": 3_965_028,
    "VGG13": 9_462_180, "ResNet50": 23_705_252, "MobileNetV2": 812_836, "ShuffleNetV1": 949_258,
    "ShuffleNetV2": 1_355_528,
}  # fmt: skip
"""Of the reference implementations, with 100 classes."""


@pytest.mark.parametrize(
    "name", [n if n in ("resnet8x4", "VGG8") else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS]
)
def test_the_networks_of_the_cifar100_pairs_have_the_literatures_sizes(name):
    shapes = jax.eval_shape(MODELS[name]().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) == COUNTS[name]
    assert {"Stage_0", "Stage_1", "Stage_2"} <= set(shapes["params"])


def test_the_pairs_and_their_recipe():
    assert len(PAIRS) == len(set(PAIRS)) == 11 and {n for p in PAIRS for n in p[:2]} == set(MODELS) == set(COUNTS)
    assert Recipe.of("resnet20").rate == 0.05 and Recipe.of("ShuffleNetV2").rate == 0.01
    assert Recipe.of("VGG8", 24).drops == (15, 18, 21)
    tx = Recipe.of("VGG8", 24).optimizer(steps=1)
    params = {"w": jnp.array([1.0, -2.0])}
    state, w, velocity = tx.init(params), np.array([1.0, -2.0]), np.zeros(2)
    for step in range(24):  # as PyTorch's SGD
        gradient = np.array([0.3, -0.1]) * (step + 1)
        velocity = 0.9 * velocity + gradient + 5e-4 * w
        w = w - 0.05 * 0.1 ** sum(step >= drop for drop in (15, 18, 21)) * velocity
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_cifar100_through_the_official_builder(tmp_path):
    """From the binary version's files, and then from the records, which tfds itself knows."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("test", 3)):
        labels, images = rng.integers(0, (20, 100), (n, 2), np.uint8), rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        planes = images.transpose(0, 3, 1, 2).reshape(n, -1)
        (tmp_path / f"{part}.bin").write_bytes(np.concatenate([labels, planes], axis=1).tobytes())
    root = prepared(_cifar100.SOURCE, tmp_path)
    for part in ("train", "test"):
        (tmp_path / f"{part}.bin").unlink()
    assert prepared(_cifar100.SOURCE, tmp_path) == root == tmp_path
    found, fine = read_records(_cifar100.SOURCE, root, "test")
    order = [next(i for i in range(3) if np.array_equal(images[i], image)) for image in found]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_array_equal(fine, labels[order, 1])
    records = tfds.data_source("cifar100:3.0.2", split="test", data_dir=tmp_path, download=False)
    assert [record["coarse_label"] for record in records] == labels[order, 0].tolist()


def test_cifar100_files_that_are_none(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"train\.bin, test\.bin of the binary version in .*--data-dir"):
        load("cifar100", tmp_path)
    for part in ("train", "test"):
        (tmp_path / f"{part}.bin").write_bytes(b"x" * 3073)
    with pytest.raises(ValueError, match="3073 bytes are no whole records"):
        load("cifar100", tmp_path)


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
    result = distill_tinybert.main(dataclasses.replace(distill_tinybert.SHORT, data_dir=tmp_path, out=tmp_path))
    rows = checked(result, tmp_path)
    assert result.splits["train"].examples == 2 and not result.test_reads
    small = rows["TinyBERT's student"]
    assert small["parameters_share"].mean == 100 * small["parameters"].mean / rows["BERT-base"]["parameters"].mean
    with pytest.raises(DataNotFoundError, match=r"no SST-2: neither .*sst2/train\.tsv nor .*; give --data-dir"):
        distill_tinybert.main(dataclasses.replace(distill_tinybert.SHORT, data_dir=tmp_path / "empty"))
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


def test_a_pair_under_the_literatures_recipe(tmp_path):
    """With a student that is pruned from its teacher, on digits."""
    result = distill_pairs.main(dataclasses.replace(distill_pairs.SHORT, out=tmp_path))
    rows = checked(result, tmp_path)
    whole = rows["teacher resnet20"]["size"].mean
    assert len(rows) == 4 and whole == 272_186  # 10 classes and one channel
    assert 0.2 * whole < rows["pruned, soft targets (KD)"]["size"].mean <= 0.3 * whole
    assert "stages 0, 1, 2 of the student with 0, 1, 2" in result.notes[1]


@pytest.mark.slow
@pytest.mark.parametrize("student", ["small", distill_pairs.PRUNED])
def test_every_method_under_the_literatures_recipe(tmp_path, monkeypatch, student):
    monkeypatch.setitem(MODELS, "large", lambda: Resnet(1, (8, 12, 16)))
    monkeypatch.setitem(MODELS, "small", lambda: Resnet(1, (4, 6, 8)))
    config = dataclasses.replace(
        distill_pairs.SHORT, teacher="large", student=student, methods=(distill_pairs.ALL,), left=0.6, out=tmp_path
    )
    assert len(checked(distill_pairs.main(config), tmp_path)) == 40


def test_the_validation_split_is_trained_on_where_nothing_is_chosen():
    config = _distilling.Config(seeds=1, epochs=1)
    part, whole = Room(config), Room(config, whole=True)
    assert (len(part.labels), len(whole.labels)) == (718, 898)
    np.testing.assert_array_equal(whole.images[718:], part.dataset.validation.inputs())
    np.testing.assert_array_equal(whole.images[:718], part.images)


def test_maps_of_one_size_are_compared():
    """Of VGG and MobileNetV2, whose stages' sizes are these, and of two networks with one size in common."""
    vgg = [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512), (4, 4, 512)]
    mobile = [(16, 16, 8), (8, 8, 12), (4, 4, 16), (2, 2, 32), (2, 2, 48), (1, 1, 80), (1, 1, 160)]
    assert comparable(mobile, vgg) == ([0, 1, 2], [1, 2, 4])
    with pytest.raises(ValueError, match="two sizes of maps that both networks have"):
        comparable(mobile, vgg[:2])


def test_a_network_sees_standardised_images_and_its_margins():
    images = jax.random.uniform(jax.random.key(0), (40, 8, 8, 3)) * jnp.array([1.0, 2.0, 0.0])
    standard = Standard.of(images)
    x = (images - standard.mean) / standard.deviation
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 1, 2)), [1, 1, 0], atol=1e-5)
    network = Network(Resnet(1, (4, 6, 8)), standard)
    variables = jax.jit(network.init)(jax.random.key(1), images)
    seen = jax.jit(network.seen)(variables, images)
    np.testing.assert_allclose(seen.logits, network.model.apply(variables, x), atol=1e-4)
    assert [m.shape[1:] for m in seen.maps] == [(8, 8, 4), (4, 4, 6), (2, 2, 8)]
    last = np.asarray(seen.maps[-1])
    np.testing.assert_allclose(
        pair_of(seen, seen).margins[-1], [c[c < 0].mean() for c in last.reshape(-1, 8).T], rtol=1e-4
    )


def test_a_pruned_student_is_the_teacher_without_some_channels():
    """In evaluation against the teacher with those channels at zero; in training it moves its own statistics."""
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    whole = Network(Resnet(1, (8, 8, 8), stem_stride=2), Standard.of(images))
    variables = jax.jit(whole.init)(jax.random.key(1), images)
    pruned = Pruned(whole, variables, images[:1], 0.5)
    small = pruned.init(jax.random.key(2), images)
    wanted = jax.jit(whole.seen)(pruned.plan.mask(variables), images)
    found = jax.jit(pruned.seen)(small, images)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)
    for ours, theirs in zip(found.maps, wanted.maps, strict=True):  # the channels that are left
        assert ours.shape[-1] < theirs.shape[-1]
        assert all(np.isclose(theirs, x[..., None], atol=1e-5).all((0, 1, 2)).any() for x in np.moveaxis(ours, -1, 0))
    seen, state = jax.jit(lambda v: pruned.trained(v, images))(small)
    assert seen.logits.shape == (4, 10) and jax.tree.map(jnp.shape, state) == jax.tree.map(
        jnp.shape, small["batch_stats"]
    )
    assert not np.allclose(*(jax.tree.leaves(x)[0] for x in (state, small["batch_stats"])))
    assert _distilling.parameters(small) <= 0.5 * _distilling.parameters(variables)


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
        (lambda: distill_pairs.main(distill_pairs.Config(teacher="resnet9")), "no network resnet9: there are resnet20"),
        (
            lambda: distill_pairs.main(distill_pairs.Config(methods=("x",))),
            "no method x: there are labels alone, label sm",
        ),
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
