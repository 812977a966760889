"""The experiments on cut channels, on short settings: real data, every arm, and what they claim to have done."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _results, prune_channels, prune_norms
from experiments._channels import Network, changed, drawn_for, whole
from experiments._command import UsageError
from experiments._distilling import Room, command
from experiments._pruning import Strided
from jaxcompress.prune import channels

SETTING = dataclasses.replace(prune_channels.SHORT, examples=96, batch_size=32)


@pytest.fixture(scope="module")
def network():
    return whole(Room(SETTING), Strided((4, 6), 8, normalise=True), SETTING)


@pytest.mark.slow
def test_random_weights_of_a_cut_network_spread_as_its_own_initialisation(network):
    """Against the module built so small: the variance of each kernel, over many draws."""
    model, small = Strided((4, 6), 8), Strided((2, 3), 4)
    images = jnp.zeros((1, 8, 8, 1))
    params = model.init(jax.random.key(0), images)
    groups = channels.groups(model.apply, params, images)
    plan = channels.plan(groups, channels.random(groups, jax.random.key(1)), 0.5)
    keys = jax.random.split(jax.random.key(2), 200)
    ours = jax.vmap(lambda key: drawn_for(model.init(key, images), plan))(keys)
    own = jax.vmap(lambda key: small.init(key, images))(keys)
    for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1"):
        a, b = ours["params"][name]["kernel"], own["params"][name]["kernel"]
        assert a.shape == b.shape
        np.testing.assert_allclose(a.std(), b.std(), rtol=0.05, err_msg=name)


def test_cut_networks_of_like_widths_share_a_program_and_are_checked(network):
    variables = network.room.init(Strided((4, 6), 8, normalise=True), 0)
    first = channels.plan(network.groups, channels.norm(network.groups, variables), 0.5)
    other = channels.plan(network.groups, channels.random(network.groups, jax.random.key(3)), 0.5)
    one, cut = network.cut(first, variables)
    two, _ = network.cut(other, variables)
    assert one is two and one is not network
    assert one.parameters == sum(x.size for x in jax.tree.leaves(cut["params"]))
    assert channels.flops(one.groups) == channels.flops(network.groups, first) < channels.flops(network.groups)
    wrong = Network(network.room, SETTING, lambda v, x: one.evaluate(v, x) + 1.0, one.train, one.shapes)
    network._smaller[(*first.widths.items(), False)] = wrong
    with pytest.raises(RuntimeError, match="the smaller network differs by"):
        network.cut(first, variables)


def test_images_are_moved_and_mirrored_or_left_alone():
    images = jnp.arange(2 * 4 * 4.0).reshape(2, 4, 4, 1) + 1
    assert changed(images, jax.random.key(0), 0) is images
    keys = jax.random.split(jax.random.key(1), 30)
    seen = np.asarray(jax.jit(jax.vmap(lambda key: changed(images, key, 1)[0, :, :, 0]))(keys))
    wanted = set()
    for turned in (images[0, :, :, 0], images[0, :, ::-1, 0]):
        padded = np.pad(turned, 1)
        wanted |= {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
    assert {x.tobytes() for x in seen} <= wanted and len({x.tobytes() for x in seen}) > 8


def checked(result: _results.Result, out: Path) -> dict:
    """What holds of every result: it reads back, has its figure, and read test data once a model."""
    assert _results.read(out / f"{result.name}.json") == result
    assert (out / f"{result.name}.png").stat().st_size > 10_000
    assert len({read.model for read in result.test_reads}) == len(result.test_reads)
    return {row.name: row.ours for row in result.rows}


@pytest.mark.slow
def test_channels(tmp_path):
    """Every arm; and again from what was kept, without training."""
    config = dataclasses.replace(prune_channels.SHORT, out=tmp_path, resume=tmp_path / "kept")
    first, second = prune_channels.main(config)
    scores, beside = checked(first, tmp_path), checked(second, tmp_path)
    assert len(scores) == 10 and len(beside) == 16
    assert all(row["flops"].mean <= 50 for row in scores.values())
    assert beside["not cut"]["flops"].mean == 100 and beside["not cut"]["epochs"].mean == config.epochs
    assert beside["l1, fine-tuned"]["accuracy"].mean == scores["l1"]["tuned"].mean
    again = prune_channels.main(config)
    assert [r.rows for r in again] == [first.rows, second.rows]


@pytest.mark.slow
def test_training_with_changed_images_and_a_teacher_that_sees_them():
    """A network learns from moved images, and stays good with itself as the teacher."""
    setting = dataclasses.replace(SETTING, shift=1, examples=10_000)
    room, model = Room(setting), Strided((4, 6), 8, normalise=True)
    network = whole(room, model, setting)
    first = room.init(model, 0)
    trained = network.trained(first, seed=0, epochs=12, rate=0.05)
    taught = network.trained(trained, seed=1, epochs=2, rate=0.01, teacher=(network, trained))
    images, labels = room.validation
    before, after = network.accuracy(trained, images, labels), network.accuracy(taught, images, labels)
    assert before > network.accuracy(first, images, labels) + 20 and after > before - 5


@pytest.mark.slow
def test_norms(tmp_path):
    rows = checked(prune_norms.main(dataclasses.replace(prune_norms.SHORT, out=tmp_path)), tmp_path)
    assert len(rows) == 6


@pytest.mark.parametrize("scores", [{"wide": ("x",)}, {"rewound": ("x",)}, {"rewound": ("lamp",)}])
def test_refuses_scores_that_there_are_not_before_it_trains(scores):
    with pytest.raises(UsageError, match=r"no score .*: there are l1, l2, .* \(lamp in --wide alone\)"):
        prune_channels.main(dataclasses.replace(SETTING, **scores))


def test_commands():
    assert command("prune_channels", prune_channels.Config()) == "python -m experiments.prune_channels --data-dir DIR"
    config = prune_channels.Config(wide=("lamp", "taylor"), seeds=2, resume=Path("x"))
    assert command("prune_channels", config) == (
        "python -m experiments.prune_channels --seeds 2 --wide lamp taylor --data-dir DIR"
    )


def test_recorded_normalisations_are_alike_after_fine_tuning(recorded):
    rows = recorded("prune_norms_digits")
    for title in prune_norms.MODELS:
        for percent in ("12.5", "25", "50"):
            traced, derived = (rows[f"{title}, {way}"][f"tuned_{percent}"].mean for way in prune_norms.WAYS)
            assert abs(traced - derived) < 1.5
            assert traced > rows[f"{title}, as traced"][f"bare_{percent}"].mean


def test_recorded_scores_are_alike_after_fine_tuning_and_not_at_once(recorded_means):
    rows = recorded_means("prune_channels_scores_cifar10")
    local = {name: row for name, row in rows.items() if ", " not in name}
    assert len(local) == 9 and all(50 < row["flops"] < 52 for row in rows.values())
    assert all(row["tuned"] > row["at_once"] + 20 for row in rows.values())
    assert max(r["tuned"] for r in local.values()) - min(r["tuned"] for r in local.values()) < 2.5
    assert max(local, key=lambda name: local[name]["at_once"]) == "hessian"
    assert rows["lamp, all layers together"]["tuned"] < rows["random"]["tuned"] - 3


def test_recorded_random_weights_do_as_well_as_fine_tuned_ones_and_rewound_ones_as_well_as_the_whole(recorded_means):
    rows = {name: row["accuracy"] for name, row in recorded_means("prune_channels_beside_cifar10").items()}
    assert rows["random weights, same epochs"] > rows["l1, fine-tuned"]
    assert rows["random weights, same operations"] > rows["l1, fine-tuned"]
    for score in ("l1", "taylor"):
        rewound = rows[f"{score}, rewound to epoch 1, trained again"]
        assert rewound > rows[f"{score}, fine-tuned"] + 2 and abs(rewound - rows["not cut"]) < 1
    assert rows["slimming, cut, fine-tuned"] > rows["l1, fine-tuned"] + 1
    assert abs(rows["slimming, rewound to epoch 1, trained again"] - rows["not cut"]) < 1
    lamp = "lamp, all layers together"
    assert rows[f"{lamp}: its architecture, random weights, same epochs"] > rows[f"{lamp}, fine-tuned"] + 3
