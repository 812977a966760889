"""On eight devices: the numbers of one device, and no collective that the dense model would not have."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from leaves import quantized, sparse

from jaxcompress import quantize
from jaxcompress.arrays import LowRank, Sparse, compressed
from jaxcompress.quantize import MX, NF4, Affine, KMeans


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def place(w, spec, on):
    """Each child under `spec`, whole along the axes that it has no elements to divide."""

    def put(child):
        fits = [name if child.shape[i] > 1 else None for i, name in enumerate(spec)]
        return jax.device_put(child, NamedSharding(on, P(*fits)))

    return jax.tree.map(put, w)


def collectives(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return sorted(re.findall(rf"= (?:\S+|\([^)]*\)) ({kinds})(?:-start)?\(", text))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("axes", "group", "asymmetric"),
    [((-1,), None, False), ((-1,), None, True), ((), None, False), ((-1,), (-2, 8), False)],
)
@pytest.mark.parametrize(
    ("spec", "expected"), [((None, "model"), []), (("model", None), ["all-reduce"])], ids=["columns", "rows"]
)
def test_products(bits, axes, group, asymmetric, spec, expected, rng):
    """Columns divided: nothing to tell each other. Rows divided: one sum, of the output."""
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    w = quantized((64, 64), axes=axes, bits=bits, group=group, asymmetric=asymmetric)
    on = mesh()
    x_on = jax.device_put(x, NamedSharding(on, P("data", spec[0])))
    w_on = place(w, spec, on)
    fn = compressed(lambda x, w: x @ w, strict=True)
    np.testing.assert_allclose(jax.jit(fn)(x_on, w_on), fn(x, w), rtol=1e-4, atol=1e-4)
    assert collectives(fn, x_on, w_on) == expected


@pytest.mark.parametrize(
    "w", [quantized((64, 64)), quantized((64, 64), bits=4), sparse((64, 64))], ids=["int8", "int4", "sparse"]
)
def test_sharding_constraint_on_a_compressed_weight(w, rng):
    on = mesh()
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)

    def model(x, w):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(on, P(None, "model")))
        return x @ w

    fn = compressed(model, strict=True)
    np.testing.assert_allclose(jax.jit(fn)(x, w), x @ w.materialise(), rtol=1e-4, atol=1e-4)


def test_replicated_sparse_weights_under_data_parallelism(rng):
    on = mesh()
    x, w = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32), sparse((64, 64))
    x_on = jax.device_put(x, NamedSharding(on, P("data")))
    w_on = jax.tree.map(lambda child: jax.device_put(child, NamedSharding(on, P())), w)
    fn = compressed(lambda x, w: x @ w, strict=True)
    np.testing.assert_allclose(jax.jit(fn)(x_on, w_on), x @ w.materialise(), rtol=1e-4, atol=1e-4)
    assert collectives(fn, x_on, w_on) == []


def test_inside_shard_map(rng):
    """`compressed` goes inside an explicitly sharded function, not around it."""
    on = mesh()
    x, w = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32), quantized((64, 64))
    fn = jax.shard_map(
        compressed(lambda x, w: x @ w, strict=True),
        mesh=on,
        in_specs=(P("data"), jax.tree.map(lambda _: P(None, "model"), w)),
        out_specs=P("data", "model"),
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(fn)(x, w), x @ w.materialise(), rtol=1e-4, atol=1e-4)


def test_an_inner_shard_map_says_what_to_do(rng):
    on = mesh()
    inner = jax.shard_map(
        lambda x, w: x @ w, mesh=on, in_specs=(P("data"), P(None, "model")), out_specs=P("data", "model")
    )
    with pytest.raises(NotImplementedError, match="inside"):
        compressed(inner)(jnp.ones((16, 64)), quantized((64, 64)))


def test_explicit_axes(rng):
    """A user's mesh with Explicit axes: products of columns keep their sharding in the type."""
    on = mesh(AxisType.Explicit)
    with jax.set_mesh(on):
        x = jax.device_put(jnp.asarray(rng.normal(size=(16, 64)), jnp.float32), NamedSharding(on, P("data")))
        w = place(quantized((64, 64)), (None, "model"), on)
        out = jax.jit(compressed(lambda x, w: x @ w, strict=True))(x, w)
        assert jax.typeof(out).sharding.spec == P("data", "model")
    np.testing.assert_allclose(out, np.asarray(x) @ np.asarray(quantized((64, 64)).materialise()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [NF4(group=(0, 16)), KMeans(5), MX("float4_e2m1fn")])
def test_values_of_a_table_under_explicit_axes(scheme, rng):
    """`jax.make_mesh` makes such axes."""
    on = mesh(AxisType.Explicit)
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    w = scheme.convert(jnp.asarray(rng.normal(size=(64, 64)), jnp.float32))
    expected = np.asarray(x) @ np.asarray(w.materialise())
    rows = jax.device_put(x, NamedSharding(on, P("data")))
    out = jax.jit(compressed(lambda x, w: x @ w))(rows, place(w, (None, "model"), on))
    assert jax.typeof(out).sharding.spec == P("data", "model")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_a_codebook_an_output_divided_by_rows_under_explicit_axes(rng):
    on = mesh(AxisType.Explicit)
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    w = quantize.Binary().convert(jnp.asarray(rng.normal(size=(64, 64)), jnp.float32))

    def slope(centroids, indices, x, **kwargs):
        def loss(w):
            return jnp.sum(jnp.matmul(x, w, **kwargs) ** 2)

        return jax.grad(lambda c: compressed(loss)(dataclasses.replace(w, centroids=c, indices=indices)))(centroids)

    rows, indices = (jax.device_put(a, NamedSharding(on, P(d))) for a, d in ((x, "data"), (w.indices, "model")))
    with jax.set_mesh(on):
        got = jax.jit(lambda *args: slope(*args, out_sharding=P("data", None)))(w.centroids, indices, rows)
    np.testing.assert_allclose(got, jax.jit(slope)(w.centroids, w.indices, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheme", [Affine(4), KMeans(4)])
def test_rows_that_are_asked_for_with_their_sharding(scheme, rng):
    on = mesh(AxisType.Explicit)
    w = scheme.convert(jnp.asarray(rng.normal(size=(64, 64)), jnp.float32))
    ids = jax.device_put(jnp.asarray([3, 63, 0, 3]), NamedSharding(on, P("data")))
    with jax.set_mesh(on):
        look_up = compressed(lambda w, ids: w.at[ids].get(out_sharding=P("data", None)), strict=True)
        out = jax.jit(look_up)(place(w, ("model", None), on), ids)
    assert jax.typeof(out).sharding.spec == P("data", None)
    np.testing.assert_allclose(out, np.asarray(w.materialise())[np.asarray(ids)], rtol=1e-6)


@pytest.mark.parametrize("scheme", [Affine(8), Affine(4), KMeans(4)])
def test_a_weight_that_is_laid_on_other_axes_stays_compressed(scheme, rng):
    on = mesh(AxisType.Explicit)
    w = scheme.convert(jnp.asarray(rng.normal(size=(8, 16)), jnp.float32))
    with jax.set_mesh(on):
        fn = compressed(lambda w: jax.sharding.reshard(w, P("data", "model")), strict=True)
        out = jax.jit(fn)(jax.device_put(w, P()))
        assert type(out) is type(w)
        np.testing.assert_array_equal(out.materialise(), w.materialise())


def test_a_cache_is_written_to_under_explicit_axes(rng):
    on, at = mesh(AxisType.Explicit), jnp.array([3, 0, 2, 1])
    cache = Affine(8, axes=(-3, -2)).convert(jnp.zeros((4, 5, 6)))
    rows = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)

    def step(cache, rows, at, spec):
        return cache.at[jnp.arange(4), at].set(rows, out_sharding=spec)

    expected = compressed(step)(cache, rows, at, None)
    with jax.set_mesh(on):
        cache, rows, at = (jax.tree.map(lambda x: jax.device_put(x, P("data")), x) for x in (cache, rows, at))
        out = jax.jit(compressed(lambda *args: step(*args, P("data")), strict=True))(cache, rows, at)
    assert jax.tree.structure(out) == jax.tree.structure(cache) and jax.typeof(out.values).sharding.spec[0] == "data"
    np.testing.assert_allclose(out.materialise(), expected.materialise(), rtol=1e-6)


STACKS = {
    "int8": Affine(8, axes=(0, -1)).convert,
    "groups": Affine(4, axes=(0, -1), group=(1, 4)).convert,
    "outputs first": lambda w: Affine(8, axes=(0, -1)).convert(w).outputs_first(),
    "nf4": NF4(group=(1, 4)).convert,
    "mx": MX().convert,
    "ternary": quantize.Ternary(axes=(0, -1)).convert,
    "codebooks": KMeans(4, axes=(0,)).convert,
    "sparse": lambda w: Sparse.from_dense(jnp.where(abs(w) > 1, w, 0), stacked=1),
    "low rank": lambda w: LowRank.from_factors(w[..., :3], w[:, :3], left_axes=(1,), stacked=1),
}


@pytest.mark.parametrize("name", STACKS)
def test_vmap_under_explicit_axes(name, rng):
    """JAX holds how the mapped axes are divided against each other, so a leaf's type says it as an array's does."""
    on, w = mesh(AxisType.Explicit), STACKS[name](jnp.asarray(rng.normal(size=(4, 8, 6)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(4, 3, 8)), jnp.float32)
    with jax.set_mesh(on):
        w_on, x_on = (jax.tree.map(lambda part: jax.device_put(part, P("data")), tree) for tree in (w, x))
        assert jax.typeof(w_on.materialise()).sharding.spec == w_on.aval().sharding.spec == P("data", None, None)
        inside, outside = compressed(jax.vmap(jnp.dot), strict=True), jax.vmap(compressed(jnp.dot, strict=True))
        outs = [jax.jit(fn)(x_on, w_on) for fn in (inside, outside)]
    for out in outs:
        assert jax.typeof(out).sharding.spec[0] == "data"
        np.testing.assert_allclose(out, np.einsum("bri,bio->bro", x, w.materialise()), rtol=1e-4, atol=1e-4)


def test_a_transposed_weight_of_divided_outputs_under_explicit_axes(rng):
    """Its scales meet the input, which stays divided as it was."""
    on, w = mesh(AxisType.Explicit), Affine(8).convert(jnp.asarray(rng.normal(size=(16, 8)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    with jax.set_mesh(on):
        rows, w_on = jax.device_put(x, P("data")), place(w, (None, "model"), on)
        out = jax.jit(compressed(lambda x, w: x @ w.T, strict=True))(rows, w_on)
        assert jax.typeof(out) == jax.typeof(rows @ w_on.materialise().T)
    np.testing.assert_allclose(out, x @ w.materialise().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [(None, None), (None, "model"), ("model", None)])
def test_a_divided_mask_under_explicit_axes(spec, rng):
    """Products, rows that are looked up and derivatives, and the dense value: divided as those of the array are."""
    on, w = mesh(AxisType.Explicit), sparse((16, 32))
    array = w.materialise()
    with jax.set_mesh(on):
        x = jax.device_put(jnp.asarray(rng.normal(size=(8, 32)), jnp.float32), P("data"))
        w_on = dataclasses.replace(w, mask=jax.device_put(w.mask, P(*spec)), values=jax.device_put(w.values, P()))
        array_on = jax.device_put(array, P(*spec))

        def both(x, w):
            return x @ w.T, w.at[jnp.array([3, 9])].get(out_sharding=P()), (w * 2).sum()

        out = jax.jit(compressed(both))(x, w_on)
        for one, other in zip(out, jax.jit(both)(x, array_on), strict=True):
            assert jax.typeof(one) == jax.typeof(other)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert jax.typeof(w_on.materialise()) == jax.typeof(array_on)
        change = jax.grad(lambda w: (compressed(lambda w: x @ w.T)(w) ** 2).sum(), allow_int=True)
        expected = jax.grad(lambda w: ((x @ w.materialise().T) ** 2).sum(), allow_int=True)
        np.testing.assert_allclose(jax.jit(change)(w_on).values, jax.jit(expected)(w).values, rtol=1e-4)


@pytest.mark.parametrize("spec", [(None, "model"), ("model", None)])
@pytest.mark.parametrize("scheme", [Affine(4), Affine(4, group=(0, 8)), NF4(group=(0, 8)), quantize.Ternary()])
def test_packed_codes_and_groups_are_made_under_explicit_axes(scheme, spec, rng):
    on = mesh(AxisType.Explicit)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 64), (64, 64)))
    expected = np.asarray(x) @ np.asarray(scheme.convert(w).materialise())
    with jax.set_mesh(on):
        small = scheme.convert(jax.device_put(w, NamedSharding(on, P(*spec))))
        rows = jax.device_put(x, NamedSharding(on, P("data")))
        out = jax.jit(compressed(lambda x, w: jnp.matmul(x, w, out_sharding=P("data", None))))(rows, small)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_calibration_under_explicit_axes(rng):
    on = mesh(AxisType.Explicit)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 64), (64, 64)))

    def found(x, w):
        fn, rules = lambda params, x: x @ params["w"], {"w": Affine(4, activation_bits=8)}
        ranges = quantize.input_ranges(fn, {"w": w}, [x], rules, quantize.Percentile(99.0))
        return ranges["w"], quantize.gptq(fn, {"w": w}, [x], rules)["w"].codes()

    expected = found(x, w)
    with jax.set_mesh(on):
        got = found(
            jax.device_put(x, NamedSharding(on, P("data"))), jax.device_put(w, NamedSharding(on, P(None, "model")))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
