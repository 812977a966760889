"""The pairs of the CIFAR-100 tables: their networks, data and recipe, and what of two networks is compared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds

from experiments import _distilling, _results, distill_pairs
from experiments._cifar100 import MODELS, PAIRS, Recipe
from experiments._distilling import Room
from experiments._pairs import Network, Pruned, Standard, comparable, pair_of
from experiments._resnets import Resnet
from experiments.data import DataNotFoundError, _cifar100, load
from experiments.data._prepare import prepared, read_records

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


def test_a_pair_under_the_literatures_recipe(tmp_path):
    """With a student that is pruned from its teacher, on digits."""
    result = distill_pairs.main(dataclasses.replace(distill_pairs.SHORT, out=tmp_path))
    assert _results.read(tmp_path / f"{result.name}.json") == result
    assert (tmp_path / f"{result.name}.png").stat().st_size > 5_000
    rows = {row.name: row.ours for row in result.rows}
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
    assert len(distill_pairs.main(config).rows) == 40


def test_the_validation_split_is_trained_on_where_nothing_is_chosen():
    config = _distilling.Config(seeds=1, epochs=1)
    part, whole = Room(config), Room(config, whole=True)
    assert (len(part.labels), len(whole.labels)) == (718, 898)
    np.testing.assert_array_equal(whole.images[718:], part.dataset.validation.inputs())
    np.testing.assert_array_equal(whole.images[:718], part.images)


def test_maps_of_one_size_are_compared():
    """Of VGG and MobileNetV2, whose stages' sizes are these, and of two networks with one size in common."""
    vgg = [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512), (4, 4, 512)]
    mobile = [(16, 16, 8), (16, 16, 12), (8, 8, 16), (4, 4, 32), (4, 4, 48), (2, 2, 80), (2, 2, 160)]
    assert comparable(mobile, vgg) == ([1, 2, 4], [1, 2, 4])
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


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"teacher": "resnet9"}, "no network resnet9: there are resnet20"),
        ({"methods": ("x",)}, "no method x: there are labels alone, label smoothing"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        distill_pairs.main(distill_pairs.Config(**settings))
