"""One device and eight give the same masks; masks lie where their parameters lie; no weights travel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import prune

SPECS = {"rows": P("a", None), "columns": P(None, "b"), "both": P("a", "b"), "whole": P()}
RULES = {"rows": 0.7, "columns": prune.NM(2, 4), "both": prune.Unstructured(0.45, stack=0), "whole": prune.NM(1, 4)}
TX = optax.chain(optax.sgd(0.1), prune.sparsify(RULES, prune.polynomial(0, 4, 2, initial=0.1)))


def parameters() -> dict[str, jax.Array]:
    """With many equal magnitudes, so that ties are broken across shards."""
    key = jax.random.key(0)
    return {
        name: jnp.round(jax.random.normal(jax.random.fold_in(key, i), (64, 48)) * 4) + 0.5
        for i, name in enumerate(SPECS)
    }


@jax.jit
def step(params, state):
    updates, state = TX.update(jax.tree.map(jnp.cos, params), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    ("kind", "jit_init"), [pytest.param(AxisType.Auto, True, marks=pytest.mark.slow), (AxisType.Explicit, False)]
)
def test_eight_devices_as_one(kind: AxisType, jit_init: bool) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    alone = parameters()
    sharded = jax.device_put(alone, {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
    one, eight = TX.init(alone), (jax.jit(TX.init) if jit_init else TX.init)(sharded)
    for i in range(6):
        for name, mask in prune.masks(eight).items():
            assert mask.dtype == bool and mask.sharding.is_equivalent_to(sharded[name].sharding, 2), (i, name)
        alone, one = step(alone, one)
        sharded, eight = step(sharded, eight)
        for name, mask in prune.masks(eight).items():
            np.testing.assert_array_equal(mask, prune.masks(one)[name])
            np.testing.assert_array_equal(sharded[name], alone[name])
    assert len({bytes(np.asarray(m)) for m in prune.masks(one).values()}) == 4


@pytest.mark.parametrize(
    "pattern",
    [
        prune.Unstructured(0.7, scope="all"),
        prune.Below(50.0),
        prune.Blocks(0.5, (None, 1)),
        prune.Blocks(0.5, (1, None)),
    ],
    ids=["scope", "below", "columns", "rows"],
)
def test_masks_on_explicit_axes_are_sharded_as_their_weights(pattern: prune.Pattern) -> None:
    """Also those that spare a layer's best weight, and those that are spread from whole blocks."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    alone = {"w": jax.random.normal(jax.random.key(0), (8, 16)), "v": jax.random.normal(jax.random.key(1), (8, 6))}
    sharded = jax.device_put(alone, NamedSharding(mesh, P("a", "b")))
    tx = prune.sparsify({"": pattern}, prune.one_shot())

    def masks(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return prune.masks(jax.jit(tx.update)(params, tx.init(params), params)[1])

    want = masks(alone)
    for name, mask in masks(sharded).items():
        assert mask.sharding.is_equivalent_to(sharded[name].sharding, 2), name
        np.testing.assert_array_equal(mask, want[name])


def collectives(text: str) -> list[tuple[str, int]]:
    """(operation, elements) of every collective in compiled HLO."""
    found = re.findall(
        r"= (\(?[^=]*?)\s(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    shapes = [(op, re.findall(r"\w+\[([\d,]*)\]", shape)) for shape, op in found]
    return [(op, sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in shape)) for op, shape in shapes]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_only_scalars_travel(kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    sharded = jax.device_put(parameters(), {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
    found = collectives(step.lower(sharded, jax.jit(TX.init)(sharded)).compile().as_text())
    assert found, "the counts must be added up over the mesh"
    assert all(op == "all-reduce" and elements == 1 for op, elements in found), found


@pytest.mark.slow
def test_rewiring_moves_only_scalars_too() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(parameters(), {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
    tx = prune.around(optax.adam(0.1), prune.rewire({"": 0.8}, key=jax.random.key(0), end=9, every=2))
    update = jax.jit(lambda params, state: tx.update(params, state, params))
    found = collectives(update.lower(sharded, tx.init(sharded)).compile().as_text())
    assert found and all(op == "all-reduce" and elements == 1 for op, elements in found), found


@pytest.mark.parametrize("jit_init", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shards_that_are_not_whole_bytes(kind: AxisType, jit_init: bool) -> None:
    """24 columns over 4 devices are 6 each: a mask is then kept as booleans, where the sharding is known."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    tx = prune.sparsify({"w": 0.5}, prune.one_shot())
    alone = {"w": jax.random.normal(jax.random.key(0), (10, 24))}
    sharded = jax.device_put(alone, NamedSharding(mesh, P(None, "a")))
    state = (jax.jit(tx.init) if jit_init else tx.init)(sharded)
    if kind == AxisType.Explicit or not jit_init:
        assert state.masks["w"].dtype == bool and state.masks["w"].sharding.spec[1] == "a"
    _, state = jax.jit(tx.update)(sharded, state, sharded)
    np.testing.assert_array_equal(prune.masks(state)["w"], np.abs(alone["w"]) > np.median(np.abs(alone["w"])))


def test_the_check_above_sees_a_gather() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, P("a")))
    assert ("all-gather", 512) in collectives(jax.jit(lambda x: jnp.sort(x.ravel())).lower(x).compile().as_text())


def test_a_global_threshold_moves_less_than_a_kilobyte() -> None:
    """A pass sums one uint32 a leaf over the mesh: with at most 56 passes over these four leaves, 896 bytes."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(parameters(), {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
    find = jax.jit(lambda tree: prune.threshold(tree, 0.8))
    assert find(sharded) == find(parameters())
    found = collectives(find.lower(sharded).compile().as_text())
    assert found and all(op == "all-reduce" and elements <= len(SPECS) for op, elements in found), found
