"""The pruning experiments on short settings: real data, every arm, and what they claim to have done."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _pruning, _results, prune_curves, prune_masks, prune_rewire, prune_slimming, prune_tickets
from experiments._pruning import LAYERS, Lab, all_kept, command, completed, coupled, held
from jaxcompress import prune

LITTLE = {"seeds": 1, "epochs": 2, "batch_size": 128}


@pytest.fixture(scope="module")
def lab():
    return Lab(_pruning.Config(model="convnet", **LITTLE))


def units_masks(lab: Lab) -> tuple:
    params = lab.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases too
    rules = {"Conv_.*/kernel": prune.filters(0.5), "Dense_0/kernel": prune.vectors(0.5, axis=-2)}
    masks = completed(prune.choose(jax.tree.map(jnp.abs, params), rules), params)
    return params, coupled(masks, LAYERS["convnet"])


@pytest.mark.slow
def test_coupled_masks_leave_the_network_without_the_units(lab):
    """Against a smaller network with the kept units' weights alone."""
    params, masks = units_masks(lab)
    masked = jax.tree.map(jnp.multiply, params, masks)
    alive = {name: np.flatnonzero(masks[name]["bias"]) for name in LAYERS["convnet"]}
    assert [len(alive[name]) for name in LAYERS["convnet"]] == [4, 8, 16, 10]
    small, inputs = {}, np.arange(1)
    for name in LAYERS["convnet"]:
        kernel = np.asarray(params[name]["kernel"])
        if name == "Dense_0":  # flattened: places, then channels
            inputs = (np.arange(kernel.shape[0] // 16)[:, None] * 16 + inputs).reshape(-1)
        small[name] = {
            "kernel": jnp.asarray(kernel[..., inputs, :][..., alive[name]]),
            "bias": params[name]["bias"][alive[name]],
        }
        inputs = alive[name]
    thin = _pruning.Strided(widths=(4, 8), hidden=16)
    images = lab.images[:20]
    np.testing.assert_allclose(thin.apply({"params": small}, images), lab.apply(masked, images), rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_the_trainer_is_a_plain_loop_and_holds_masks(lab):
    """Against a loop written out, with the optimizer's schedule as a number a step."""
    params, masks = units_masks(lab)
    seed, epochs, rate = 3, 2, 0.05
    trained = lab.trainer(held)(params, {"masks": masks, "rate": jnp.float32(rate)}, seed=seed, epochs=epochs)
    order, total = np.random.default_rng(seed), epochs * lab.steps
    now, velocity, step = params, jax.tree.map(jnp.zeros_like, params), 0
    for _ in range(epochs):
        for index in order.permutation(len(lab.labels))[: lab.steps * lab.batch].reshape(lab.steps, lab.batch):
            gradients = jax.grad(
                lambda p, index=index: lab.loss(p, {}, {}, lab.images[index], lab.labels[index], None)[0]
            )(now)
            velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradients)
            size = rate * (1 + np.cos(np.pi * step / total)) / 2
            now = jax.tree.map(lambda p, v, m, size=size: (p - size * v) * m, now, velocity, masks)
            step += 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trained, now)
    jax.tree.map(lambda x, m: np.testing.assert_array_equal(np.asarray(x)[~np.asarray(m)], 0), trained, masks)


def test_a_training_is_the_same_again_and_longer_ones_share_its_program(lab):
    params, traced = lab.init(jax.random.key(0)), []

    def counted(arguments):
        traced.append(arguments)
        return held(arguments)

    trainer = lab.trainer(counted)
    arguments = {"masks": all_kept(params), "rate": jnp.float32(0.1)}
    curve: list[float] = []
    first = trainer(params, arguments, seed=0, epochs=2, curve=curve)
    again = trainer(params, arguments, seed=0, epochs=2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    before = len(traced)
    trainer(params, arguments, seed=0, epochs=3)
    assert len(traced) == before > 0 and len(curve) == 2


def test_gathered_scores_are_those_of_the_gradients_that_passed(lab):
    """Movement over three steps by hand."""
    score = prune.movement()
    tx = optax.chain(prune_curves.gathering(score), optax.sgd(0.1))
    params, total = {"w": jnp.array([1.0, -2.0])}, np.zeros(2)
    state = tx.init(params)
    for gradient in ([1.0, 1.0], [-2.0, 0.5], [0.0, 3.0]):
        total -= np.asarray(params["w"]) * gradient
        updates, state = tx.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state[0]["w"], total, rtol=1e-6)


def test_command_lines_say_what_differs():
    assert command("prune_tickets", prune_tickets.Config(structured=True)) == (
        "python -m experiments.prune_tickets --structured"
    )
    config = prune_curves.Config(data="mnist", data_dir=Path("x"), sparsities=(0.5, 0.9), out=Path("y"))
    assert command("prune_curves", config) == (
        "python -m experiments.prune_curves --data mnist --sparsities 0.5 0.9 --data-dir DIR"
    )


def checked(result: _results.Result, out: Path, rows: int) -> dict:
    """What holds of every result: it reads back, has its figure, and read test data once a model."""
    assert _results.read(out / f"{result.name}.json") == result
    assert (out / f"{result.name}.png").stat().st_size > 10_000
    assert len(result.rows) == rows and len({read.model for read in result.test_reads}) == len(result.test_reads)
    return {row.name: row.ours for row in result.rows}


@pytest.mark.slow
@pytest.mark.parametrize("structured", [False, True])
def test_tickets(structured, tmp_path):
    config = dataclasses.replace(prune_tickets.SHORT, out=tmp_path, structured=structured, **LITTLE)
    rows = checked(prune_tickets.main(config), tmp_path, 2)
    first, second = rows.values()
    assert first["left"].mean > second["left"].mean
    assert first["epochs_b"].mean >= config.epochs
    if not structured:  # the hidden layers lose 0.4 of their weights a round, the last one half as much
        kept = [(64 * 300 + 300 * 100) * 0.6**n + 1000 * 0.8**n for n in (1, 2)]
        np.testing.assert_allclose([r["left"].mean for r in (first, second)], [k / 502 for k in kept], atol=0.01)


@pytest.mark.slow
def test_units_by_every_score(tmp_path):
    config = prune_curves.Config(
        table="units", model="convnet", sparsities=(0.5,), tune_epochs=1, out=tmp_path, **LITTLE
    )
    rows = checked(prune_curves.main(config), tmp_path, 1 + len(prune_curves.UNIT_SCORES))
    assert rows.keys() == {"dense", *prune_curves.UNIT_SCORES}


@pytest.mark.slow
@pytest.mark.parametrize("table", ["criteria", "signs"])
def test_masks_and_signs(table, tmp_path):
    config = prune_masks.Config(
        table=table, sparsities=(0.7,), out=tmp_path, seeds=1, epochs=10, batch_size=128, rate=0.1
    )
    rows = {
        name: {k: f.mean for k, f in ours.items()}
        for name, ours in checked(prune_masks.main(config), tmp_path, 10 + 2 * (table == "criteria")).items()
    }
    if table == "criteria":
        assert rows["large_final"]["untrained_70"] > 40 > rows["random"]["untrained_70"]
        assert rows["large_final"]["trained_70"] > rows["small_final"]["trained_70"] + 20
    else:
        assert rows["constant_keep_sign"]["untrained_70"] > 40 > rows["constant_random_sign"]["untrained_70"]


@pytest.mark.slow
def test_slimming(tmp_path):
    config = dataclasses.replace(prune_slimming.SHORT, out=tmp_path, seeds=1, epochs=10, strengths=(0.1,))
    rows = checked(prune_slimming.main(config), tmp_path, 3)
    assert (
        rows["proximal, 0.1"]["zero"].mean
        > 0
        == rows["subgradient, 0.1"]["zero"].mean
        == rows["no penalty"]["zero"].mean
    )
    assert rows["no penalty"]["left_50"].mean < 60


def test_recorded_tickets_of_weights_win_and_learn_faster(recorded_means):
    rows = recorded_means("prune_tickets_weights_lenet_mnist")
    for name, row in rows.items():
        assert row["gain"] > 0, name
        if row["left"] > 4:  # "match down to 3.6 %"; at the large rate to within a quarter of a point
            assert row["early_ticket"] > row["early_dense"], name
            assert not name.startswith("rate 0.1,") or row["ticket"] > row["dense"] - 0.25, name
    last = {rate: rows[f"rate {rate}, 1.0 % of weights"] for rate in ("0.01", "0.1")}
    assert last["0.01"]["gain"] > 10 * last["0.1"]["gain"] > 30


def test_recorded_tickets_of_units_are_no_better_than_longer_training(recorded_means):
    for name, row in recorded_means("prune_tickets_units_lenet_mnist").items():
        if name.startswith("rate 0.1,"):
            assert row["scratch_b"] > row["ticket"] and row["gain"] < 1, name


def test_recorded_signs_matter_more_than_sizes(recorded_means):
    trained = {name: row["trained_95"] for name, row in recorded_means("prune_signs_lenet_mnist").items()}
    assert trained["constant_keep_sign"] > trained["constant_random_sign"] + 20
    assert trained["resample_keep_sign"] > trained["reinitialise"] + 20
    assert abs(trained["reshuffle_keep_sign"] - trained["rewind"]) < 1
    criteria = {name: row["trained_95"] for name, row in recorded_means("prune_criteria_lenet_mnist").items()}
    assert min(criteria[k] for k in ("large_final", "magnitude_increase", "movement")) > criteria["random"] + 50


def test_recorded_supermasks_classify_without_trained_weights(recorded_means):
    rows = recorded_means("prune_supermasks_lenet_mnist")
    for kind in map(str, prune_masks.KINDS):
        assert rows[kind]["accuracy"] > rows["no mask, initial weights"]["accuracy"] + 70, kind
        assert (
            not kind.endswith("rescaled") or rows[kind]["accuracy"] > rows[kind.removesuffix(", rescaled")]["accuracy"]
        )


def test_recorded_scores_all_beat_random_and_spreading_matters_most(recorded_means):
    rows = recorded_means("prune_scores_lenet_mnist")
    assert rows.keys() == {"dense", *prune_curves.SCORES}
    for name in prune_curves.SCORES:
        assert name == "random" or all(rows[name][s] > rows["random"][s] + 20 for s in ("90", "95", "98")), name
        assert ", " in name or rows[name]["98"] < rows["magnitude, ERK"]["98"] - 10, name


def test_recorded_slimming_costs_little_where_the_penalty_made_room(recorded_means):
    rows = recorded_means("prune_slimming_digits")
    assert rows["proximal, 0.08"]["bare_60"] > rows["proximal, 0.08"]["dense"] - 1
    assert rows["no penalty"]["bare_60"] < rows["no penalty"]["dense"] - 30
    assert rows["proximal, 0.08"]["zero"] > 60 > 0 == rows["subgradient, 0.08"]["zero"]


@pytest.mark.slow
def test_scores_schedules_supermasks_and_rewiring(tmp_path):
    short = dataclasses.replace(prune_curves.SHORT, out=tmp_path, seeds=1)
    checked(prune_curves.main(short), tmp_path, 1 + len(prune_curves.SCORES))
    checked(prune_curves.main(dataclasses.replace(short, table="schedules", sparsities=(0.8,))), tmp_path, 7)
    masks = dataclasses.replace(prune_masks.SHORT, table="supermasks", out=tmp_path, seeds=1, mask_epochs=20)
    rows = checked(prune_masks.main(masks), tmp_path, len(prune_masks.KINDS) + 2)
    assert rows["learned probabilities, signed constants"]["accuracy"].mean > 60
    checked(prune_rewire.main(dataclasses.replace(prune_rewire.SHORT, out=tmp_path)), tmp_path, 5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Lab(_pruning.Config(model="vgg")), "no model 'vgg'"),
        (lambda: Lab(_pruning.Config(seeds=0)), "1 seed and 1 epoch or more"),
        (lambda: prune_curves.main(prune_curves.Config(table="all")), "no table 'all'"),
        (lambda: prune_masks.main(prune_masks.Config(table="all")), "no table 'all'"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
