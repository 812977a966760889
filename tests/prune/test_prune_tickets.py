"""Lottery tickets: the driver, criteria, treatments, supermasks and the counter-experiment's arithmetic."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import prune
from jaxcompress.prune import tickets

SIZES = (12, 20, 6)
RULES = {"kernel$": 0.75}


def neurons(s: float) -> prune.Blocks:
    return prune.vectors(s, axis=-2)


def init(key: jax.Array) -> dict:
    keys = jax.random.split(key, 2)
    return {
        f"Dense_{i}": {"kernel": jax.random.normal(k, (a, b)) / np.sqrt(a), "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, SIZES[:-1], SIZES[1:], strict=True))
    }


def apply(params: dict, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


X = jax.random.normal(jax.random.key(7), (64, 12))
Y = apply(init(jax.random.key(8)), X)
INITIAL = init(jax.random.key(0))


def loss(params: dict) -> jax.Array:
    return jnp.mean((apply(params, X) - Y) ** 2)


@jax.jit
def descended(params: dict, masks: dict) -> dict:
    tx = optax.chain(optax.adam(0.01), prune.fixed(masks))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, 30)[0][0]


def train(params, masks, number):
    return descended(params, masks)


def kernels(tree: dict) -> list[np.ndarray]:
    return [np.asarray(layer["kernel"]) for layer in tree.values()]


FINAL = train(INITIAL, jax.tree.map(lambda x: jnp.ones_like(x, bool), INITIAL), 0)
MASKS = tickets.by_criterion("large_final", INITIAL, FINAL, RULES)
EARLIER = tickets.by_criterion("movement", INITIAL, FINAL, {"kernel$": 0.4})  # of an earlier round


def test_iterative_magnitude_pruning_by_hand():
    """The rounds against the algorithm in NumPy: the largest of what is left, from the trained weights, reset."""
    rounds = list(tickets.search(train, INITIAL, tickets.levels({"Dense_1/kernel": 0.25, "kernel$": 0.5}, 3)))
    assert [r.number for r in rounds] == [0, 1, 2, 3]
    np.testing.assert_array_equal(kernels(rounds[0].masks)[0], True)
    for before, now in itertools.pairwise(rounds):
        for i, rate in enumerate((0.5, 0.25)):
            mask, weight = kernels(now.masks)[i], np.abs(kernels(before.params)[i])
            want = round(weight.size * (1 - rate) ** now.number)
            assert abs(int(mask.sum()) - want) <= 1
            assert weight[mask].min() >= weight[~mask].max()
            assert not np.any(mask & ~kernels(before.masks)[i])
            np.testing.assert_array_equal(kernels(now.start)[i], np.where(mask, kernels(INITIAL)[i], 0))
            assert np.all(kernels(now.params)[i][~mask] == 0)
        assert now.masks["Dense_0"]["bias"] is None
        np.testing.assert_array_equal(now.start["Dense_0"]["bias"], 0)


def test_rewinding_to_a_later_step_and_going_on_after_a_round():
    early = descended(INITIAL, jax.tree.map(lambda x: jnp.ones_like(x, bool), INITIAL))
    levels = tickets.levels({"kernel$": 0.4}, 3)
    rounds = list(tickets.search(train, INITIAL, levels, rewind_to=early))
    for now in rounds[1:]:
        for mask, start, wanted in zip(kernels(now.masks), kernels(now.start), kernels(early), strict=True):
            np.testing.assert_array_equal(start, np.where(mask, wanted, 0))
    resumed = list(tickets.search(train, INITIAL, levels, rewind_to=early, after=rounds[1]))
    assert [r.number for r in resumed] == [2, 3]
    jax.tree.map(np.testing.assert_array_equal, resumed[-1].params, rounds[-1].params)


def test_pruned_weights_stay_pruned_under_criteria_that_would_bring_them_back():
    for criterion in ("small_final", "large_init", "random"):
        rounds = list(
            tickets.search(
                train, INITIAL, tickets.levels({"kernel$": 0.4}, 3), criterion=criterion, key=jax.random.key(1)
            )
        )
        parts = [1 - prune.sparsity(r.masks)[""] for r in rounds]
        np.testing.assert_allclose(parts, [1, 0.6, 0.36, 0.216], atol=0.01)


def test_levels_of_whole_neurons():
    (last,) = list(tickets.search(train, INITIAL, tickets.levels({"Dense_0/kernel": 0.5}, 1, neurons)))[1:]
    columns = kernels(last.masks)[0]
    assert np.all(columns == columns[:1]) and columns[0].sum() == 10
    assert last.masks["Dense_1"]["kernel"] is None


@pytest.mark.slow
def test_a_stack_of_networks_is_pruned_each_on_its_own():
    stack = jax.vmap(init)(jax.random.split(jax.random.key(3), 3))
    levels = tickets.levels({"kernel$": 0.5}, 1, lambda s: prune.Unstructured(s, stack=1))
    first, last = tickets.search(lambda p, m, number: jax.vmap(descended)(p, m), stack, levels)
    for mask, weight in zip(kernels(last.masks), kernels(first.params), strict=True):
        for own, w in zip(mask, np.abs(weight), strict=True):
            assert own.sum() == own.size // 2 and w[own].min() >= w[~own].max()


def test_training_that_forgets_the_masks_is_found_out():
    def forgetful(params, masks, number):
        return jax.tree.map(lambda x: x + 1, params)

    rounds = tickets.search(forgetful, INITIAL, tickets.levels({"kernel$": 0.5}, 1))
    next(rounds)
    with pytest.raises(ValueError, match=r"let pruned weights of 'Dense_0/kernel' move.*prune.fixed"):
        next(rounds)


def test_criteria_by_hand():
    first, last = jnp.array([1.0, -2.0, 3.0, -0.1]), jnp.array([-4.0, -3.0, 0.5, 0.2])
    wanted = {
        "large_final_same_sign": [1, 2],  # the two that kept their sign
        "large_final_other_sign": [0, 3],
        "large_final": [0, 1],
        "movement": [0, 2],
        "magnitude_increase": [0, 1],
    }
    for criterion, kept in wanted.items():
        mask = tickets.by_criterion(criterion, {"w": first}, {"w": last}, {"w": 0.5})["w"]
        assert np.flatnonzero(mask).tolist() == kept, criterion
    own = tickets.by_criterion(lambda a, b: -a, {"w": first}, {"w": last}, {"w": 0.5})["w"]
    assert np.flatnonzero(own).tolist() == [1, 3]
    draws = [
        tickets.by_criterion("random", {"w": first}, {"w": last}, {"w": 0.5}, key=jax.random.key(i))["w"]
        for i in range(20)
    ]
    assert {int(d.sum()) for d in draws} == {2} and len({tuple(np.asarray(d)) for d in draws}) > 2


@pytest.mark.parametrize("name", tickets.TREATMENTS)
def test_treatments_keep_what_they_say(name):
    start = tickets.treated(INITIAL, MASKS, *tickets.TREATMENTS[name], key=jax.random.key(5), init=init)
    again = tickets.treated(INITIAL, MASKS, *tickets.TREATMENTS[name], key=jax.random.key(6), init=init)
    magnitude, sign = tickets.TREATMENTS[name]
    for x, y, mask, w in zip(*map(kernels, (start, again, MASKS, INITIAL)), strict=True):
        assert np.all(x[~mask] == 0) and np.all(x[mask] != 0)
        if sign == "keep":
            np.testing.assert_array_equal(np.sign(x[mask]), np.sign(w[mask]))
        if sign == "random":
            assert 0.2 < np.mean(np.sign(x[mask]) == np.sign(w[mask])) < 0.8
            assert np.any(np.sign(x) != np.sign(y))
        if magnitude == "initial":
            np.testing.assert_array_equal(np.abs(x[mask]), np.abs(w[mask]))
        if magnitude == "constant":
            np.testing.assert_allclose(np.abs(x[mask]), w.std(), rtol=1e-5)
        if magnitude == "reshuffle":
            np.testing.assert_array_equal(np.sort(np.abs(x[mask])), np.sort(np.abs(w[mask])))
            assert np.mean(np.abs(x[mask]) != np.abs(w[mask])) > 0.5 and np.any(x != y)
            if sign == "own":
                np.testing.assert_array_equal(np.sort(x[mask]), np.sort(w[mask]))
        if magnitude == "resample":
            assert not set(np.abs(x[mask]).tolist()) & set(np.abs(w[mask]).tolist())
            assert x[mask].std() == pytest.approx(w.std(), rel=0.5)


def test_treatments_leave_unmasked_weights_unless_all_is_drawn_anew():
    initial = {**INITIAL, "Dense_1": {"kernel": INITIAL["Dense_1"]["kernel"], "bias": jnp.ones(6)}}
    for name, treatment in tickets.TREATMENTS.items():
        start = tickets.treated(initial, MASKS, *treatment, key=jax.random.key(5), init=init)
        np.testing.assert_array_equal(start["Dense_1"]["bias"], 0 if name == "reinitialise" else 1)


@pytest.mark.slow
def test_treatments_and_criteria_run_under_jit_and_vmap():
    def both(key):
        first = init(key)
        masks = tickets.by_criterion("movement", first, FINAL, RULES)
        return masks, tickets.treated(first, masks, "reshuffle", "keep", key=key, init=init)

    keys = jax.random.split(jax.random.key(9), 2)
    together = jax.jit(jax.vmap(both))(keys)
    alone = [both(key) for key in keys]
    for i in range(2):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), together, alone[i])


def over_four_devices(tree: dict) -> dict:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    place = {2: NamedSharding(mesh, PartitionSpec("rows")), 1: NamedSharding(mesh, PartitionSpec())}
    return jax.tree.map(lambda x: jax.device_put(x, place[x.ndim]), tree)


@pytest.mark.slow
def test_a_mesh_gives_the_same_masks_and_starts():
    first, last = over_four_devices(INITIAL), over_four_devices(FINAL)
    masks = tickets.by_criterion("magnitude_increase", first, last, RULES, within=over_four_devices(EARLIER))
    wanted = tickets.by_criterion("magnitude_increase", INITIAL, FINAL, RULES, within=EARLIER)
    jax.tree.map(np.testing.assert_array_equal, masks, wanted)
    assert masks["Dense_0"]["kernel"].sharding.is_equivalent_to(first["Dense_0"]["kernel"].sharding, 2)
    for treatment in (("constant", "keep"), ("initial", "random")):
        here = tickets.treated(first, masks, *treatment, key=jax.random.key(0))
        there = tickets.treated(INITIAL, wanted, *treatment, key=jax.random.key(0))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), here, there)


@pytest.mark.slow
def test_edge_popup_keeps_the_top_scores_and_passes_gradients_through():
    scores = tickets.popup_scores(INITIAL, RULES, jax.random.key(2))
    assert scores["Dense_0"]["bias"] is None
    masks = tickets.popup_masks(INITIAL, scores, RULES)
    for mask, s in zip(kernels(masks), kernels(scores), strict=True):
        assert mask.sum() == round(0.25 * mask.size)
        assert np.abs(s)[mask].min() >= np.abs(s)[~mask].max()
        assert np.abs(s).max() <= 1 / np.sqrt(s.shape[0])
    fn = tickets.edge_popup(loss, RULES)
    np.testing.assert_array_equal(fn(INITIAL, scores), loss(tickets.masked(INITIAL, masks)))
    through = jax.grad(loss)(tickets.masked(INITIAL, masks))
    for g, s, w, d in zip(*map(kernels, (jax.grad(fn, 1)(INITIAL, scores), scores, INITIAL, through)), strict=True):
        np.testing.assert_allclose(g, np.sign(s) * w * d, atol=1e-6)


def test_supermasks_learn_without_training_weights():
    """A mask alone lowers the loss on a fixed random network: by scores, and by probabilities with rescaling."""

    def learned(objective, scores, rate):
        key = jax.random.key(4)
        tx = optax.adam(rate)

        @jax.jit
        def run(scores):
            def step(carry, key):
                scores, state = carry
                updates, state = tx.update(jax.grad(objective)(scores, key), state)
                return (optax.apply_updates(scores, updates), state), None

            return jax.lax.scan(step, (scores, tx.init(scores)), jax.random.split(key, 300))[0][0]

        return run(scores)

    half = {"kernel$": 0.5}
    popped = tickets.edge_popup(loss, half)
    scores = tickets.popup_scores(INITIAL, half, jax.random.key(2))
    last = learned(lambda s, key: popped(INITIAL, s), scores, 0.01)
    assert popped(INITIAL, last) < 0.6 * popped(INITIAL, scores)
    drawn = tickets.bernoulli(loss, rescale=True)
    logits = tickets.bernoulli_logits(INITIAL, half)
    last = learned(lambda s, key: drawn(INITIAL, s, key), logits, 0.1)
    final = loss(tickets.masked(INITIAL, tickets.bernoulli_masks(last), rescale=True))
    assert final < 0.6 * drawn(INITIAL, logits, jax.random.key(0))


def test_bernoulli_draws_with_its_probability_and_passes_gradients_through():
    logits = tickets.bernoulli_logits(INITIAL, {"Dense_0/kernel": 0.3})
    assert logits["Dense_1"]["kernel"] is None
    key = jax.random.key(3)
    masks = tickets.bernoulli_masks(logits, key)
    keys = jax.random.split(key, 200)
    part = np.mean([tickets.bernoulli_masks(logits, k)["Dense_0"]["kernel"].mean() for k in keys])
    assert part == pytest.approx(0.3, abs=0.01)
    np.testing.assert_array_equal(tickets.bernoulli_masks(logits)["Dense_0"]["kernel"], False)
    fn = tickets.bernoulli(loss)
    gradient = jax.grad(fn, 1)(INITIAL, logits, key)["Dense_0"]["kernel"]
    through = jax.grad(loss)(tickets.masked(INITIAL, masks))["Dense_0"]["kernel"]
    np.testing.assert_allclose(gradient, 0.3 * 0.7 * INITIAL["Dense_0"]["kernel"] * through, atol=1e-6)
    rescaled = tickets.masked(INITIAL, masks, rescale=True)["Dense_0"]["kernel"]
    mask = masks["Dense_0"]["kernel"]
    np.testing.assert_allclose(
        rescaled, np.where(mask, INITIAL["Dense_0"]["kernel"], 0) * mask.size / mask.sum(), rtol=1e-6
    )


def test_multiply_adds_skipping_zeros_and_of_smaller_layers():
    params = {
        "Conv_0": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "Dense_0": {"kernel": jnp.ones((8, 5))},
    }
    positions = {"Conv_0/kernel": 36, "Dense_0/kernel": 1}
    assert tickets.multiply_adds(params, None, positions) == 36 * 72 + 40
    single = {"Dense_0": {"kernel": jnp.zeros((8, 5), bool).at[jnp.arange(5), jnp.arange(5)].set(True)}}
    assert tickets.multiply_adds(params, single, positions) == 36 * 72 + 5
    assert tickets.multiply_adds(params, single, positions, units=True) == 36 * 72 + 25
    filters = {"Conv_0": {"kernel": jnp.ones((3, 3, 2, 4), bool).at[..., 1:].set(False)}}
    for units in (False, True):
        assert tickets.multiply_adds(params, filters, positions, units=units) == 36 * 18 + 40
    nothing = {"Dense_0": {"kernel": jnp.zeros((8, 5), bool)}}
    assert tickets.multiply_adds(params, nothing, positions, units=True) == 36 * 72


def test_scratch_steps():
    assert tickets.scratch_steps(1000, 300, 200) == 1500
    assert tickets.scratch_steps(1000, 300, 30) == 2000
    assert tickets.scratch_steps(1000, 300, 30, most=None) == 10_000
    assert tickets.scratch_steps(1000, 300, 300) == 1000


def one(**arguments):
    return list(tickets.search(train, INITIAL, tickets.levels({"kernel$": 0.5}, 1), **arguments))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tickets.levels({"kernel$": 1.0}, 3), "rates in"),
        (lambda: tickets.levels({"kernel$": 0.5}, 0), "1 or more rounds"),
        (lambda: list(tickets.search(train, INITIAL, [])), "no levels"),
        (lambda: one(treatment="forget"), "no treatment 'forget'"),
        (lambda: one(rewind_to={"Dense_0": INITIAL["Dense_0"]}), "has no leaf 'Dense_1/bias'"),
        (lambda: one(treatment="reinitialise"), "pass a key"),
        (lambda: one(criterion="random"), "need a key"),
        (lambda: one(criterion="largest"), "no criterion 'largest'"),
        (lambda: list(tickets.search(train, INITIAL, [{"kernel$": 0.5}, {"kernel$": 0.3}])), "round 2 would bring"),
        (lambda: list(tickets.search(train, INITIAL, [{"kernels$": 0.5}])), "matches no path"),
        (lambda: tickets.treated(INITIAL, MASKS, "large"), "want a magnitude"),
        (lambda: tickets.treated(INITIAL, MASKS, "resample", key=jax.random.key(0)), "pass init"),
        (lambda: tickets.treated(INITIAL, {"x": MASKS["Dense_0"]["kernel"]}), "no weight for the mask of 'x'"),
        (lambda: tickets.treated(INITIAL, {"Dense_0": {"kernel": jnp.ones(3, bool)}}), "has shape"),
        (lambda: tickets.edge_popup(loss, RULES)(INITIAL, {}), "has the rule 0.75 and no scores"),
        (lambda: tickets.bernoulli_logits(INITIAL, {"kernel$": 1.0}), r"in \(0, 1\)"),
        (lambda: tickets.scratch_steps(0, 2, 1), "steps >= 1"),
        (lambda: tickets.scratch_steps(5, 2, 3), "pruned <= dense"),
        (lambda: tickets.scratch_steps(5, 2, 1, most=0.5), "most must be 1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
