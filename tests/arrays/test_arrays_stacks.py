"""Parts of weights: layers, experts and fused projections are leaves of their own, and meet products as stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaves import low_rank, sparse

from jaxcompress import quantize
from jaxcompress.arrays import Leaf, compressed, dense, take_parts, watch
from jaxcompress.quantize import MX, NF4, Affine, Floats, KMeans, Ternary

N, INPUTS, OUTPUTS = 5, 16, 24

SCHEMES = {
    "int8": Affine(8, axes=(0, -1)),
    "one scale": Affine(8, axes=()),
    "shared by layers": Affine(4, axes=(-1,)),
    "groups with zero points": Affine(4, axes=(0, -1), group=(1, 8), symmetric=False),
    "inputs of 8 bits": Affine(8, axes=(0, -1), activation_bits=8),
    "nf4": NF4(group=(1, 8)),
    "mx": MX(),
    "float8": Floats("float8_e4m3fn"),
    "products of float8": Floats("float8_e4m3fn", inputs="float8_e4m3fn"),
    "ternary": Ternary(axes=(0, -1)),
    "codebooks": KMeans(16, axes=(0,)),
    "one codebook": KMeans(200),
}
KINDS = {
    **{name: scheme.convert for name, scheme in SCHEMES.items()},
    "outputs first": lambda w: Affine(8, axes=(0, -1)).convert(w).outputs_first(),
    "sparse": lambda w: sparse(w.shape, stacked=1),
    "low rank": lambda w: low_rank(w.shape, stacked=1),
}
IDS = jnp.array([3, 0, 4, 0])

WAYS = {
    "w[2]": lambda w, x: x @ w[2],
    "w[-1]": lambda w, x: x @ w[-1],
    "w[i]": lambda w, x: x @ w[IDS[0]],
    "w[1:4:2]": lambda w, x: jnp.einsum("ri,bio->bro", x, w[1:4:2]),
    "split": lambda w, x: sum(x @ part[0] for part in jnp.split(w, N)),
    "unstacked": lambda w, x: sum(x @ layer for layer in w),
    "transposed": lambda w, x: x[:, :1].T @ x @ w[1] @ w[3].T,
    "a loop": lambda w, x: jax.lax.fori_loop(0, N, lambda i, y: y + jnp.tanh(x @ w[i]), jnp.zeros((len(x), OUTPUTS))),
    "some of each": lambda w, x: jax.lax.switch(IDS[0], [lambda x, i=i: x @ w[i] for i in range(N)], x),
}
LOOKUPS = {
    "w[ids]": lambda w, x: jnp.einsum("ti,tio->to", x, w[IDS]),
    "vmap": lambda w, x: jax.vmap(lambda x, i: x @ w[i])(x, IDS),
    "take": lambda w, x: jnp.einsum("ti,tio->to", x, jnp.take(w, IDS + jnp.array([0, 0, 0, 9]), axis=0)),
    "clipped": lambda w, x: jnp.einsum("ti,tio->to", x, w.at[IDS + 2].get(mode="clip")),
}


def weight(rng):
    return jnp.asarray(rng.normal(size=(N, INPUTS, OUTPUTS)), jnp.float32)


# what a weight that is no part isn't served either
LENIENT = {("transposed", name) for name in ("groups with zero points", "nf4", "sparse", "low rank")} | {
    ("w[1:4:2]", "low rank")
}


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_those_of_the_array(name, rng):
    """Strict: no part becomes dense, and no stack."""
    w, x = KINDS[name](weight(rng)), jnp.asarray(rng.normal(size=(4, INPUTS)), jnp.float32)
    tolerance = {"inputs of 8 bits": 0.05, "products of float8": 0.15}.get(name, 1e-5)  # whose inputs are rounded
    for what, way in WAYS.items():
        out = jax.jit(compressed(way, strict=(what, name) not in LENIENT))(w, x)
        wanted = way(dense(w), x)
        np.testing.assert_allclose(
            out, wanted, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(wanted))), err_msg=what
        )


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("sparse", "low rank", "products of float8")])
def test_several_parts_are_decoded_alone(name, rng):
    w, x = KINDS[name](weight(rng)), jnp.asarray(rng.normal(size=(4, INPUTS)), jnp.float32)
    for what, way in LOOKUPS.items():
        out, wanted = jax.jit(compressed(way, strict=True))(w, x), way(dense(w), x)
        np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4, err_msg=what)
        assert bool(jnp.isnan(wanted[3]).all()) == (what == "take")  # out of range


@pytest.mark.parametrize("scheme", [SCHEMES["inputs of 8 bits"], SCHEMES["products of float8"], SCHEMES["ternary"]])
def test_training_rounds_what_the_integers_of_a_part_do(scheme, rng):
    params, rules = {"w": weight(rng)}, {"w": scheme}
    x = jnp.asarray(rng.normal(size=(4, INPUTS)), jnp.float32)

    def fn(params, x):
        return (
            jax.lax.fori_loop(0, N, lambda i, y: y + x @ params["w"][i], jnp.zeros((4, OUTPUTS))) + x @ params["w"][1]
        )

    faked = jax.jit(quantize.fake(fn, rules))(params, x)
    run = jax.jit(compressed(fn, strict=True))(quantize.convert(params, rules), x)
    np.testing.assert_allclose(run, faked, rtol=1e-4, atol=1e-4)
    assert float(jnp.max(jnp.abs(faked - fn(params, x)))) > 1e-3


def test_learned_steps_of_parts(rng):
    params, rules = {"w": weight(rng)}, {"w": Affine(4, axes=(0, -1), activation_bits=8)}
    x = jnp.asarray(rng.normal(size=(4, INPUTS)), jnp.float32)
    learned = quantize.learn(params, rules)

    def fn(params, x):
        return sum(x @ layer for layer in params["w"]) + x @ params["w"][IDS[0]]

    out = compressed(fn)(learned, x)
    np.testing.assert_allclose(compressed(fn)(quantize.settle(learned), x), out, rtol=1e-4, atol=1e-4)
    steps = jax.grad(lambda p: jnp.sum(compressed(fn)(p, x) ** 2))(learned)["w"].step
    assert steps.shape == (N, 1, OUTPUTS) and bool(jnp.all(steps != 0))


def test_centroids_learn_from_the_parts_that_are_used(rng):
    w, x = KMeans(4, axes=(0,)).convert(weight(rng)), jnp.asarray(rng.normal(size=(4, INPUTS)), jnp.float32)

    def loss(centroids, run):
        leaf = type(w)(w.indices, centroids, bits=w.bits, length=w.length)
        return jnp.sum(run(leaf, x) ** 2)

    for way in (WAYS["w[2]"], WAYS["w[i]"], LOOKUPS["w[ids]"], LOOKUPS["vmap"]):
        got = jax.grad(loss)(w.centroids, compressed(way))
        wanted = jax.grad(loss)(w.centroids, lambda leaf, x, way=way: way(leaf.materialise(), x))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_a_table_are_numbers(rng):
    table = Affine(8, axes=(0,)).convert(weight(rng)[0])
    with watch() as seen:
        out = compressed(lambda w: (w[3], w[IDS[0]]))(table)
    assert {how for _, primitive, how in seen if "slice" in primitive} == {"dense"}
    for row in out:
        np.testing.assert_allclose(row, table.materialise()[3], rtol=1e-6)


def test_packed_parts_stay_packed(rng):
    w = Affine(4, axes=(0, -1)).convert(weight(rng))
    part = compressed(lambda w: w[2])(w)
    assert part.length == OUTPUTS and part.values.shape == (INPUTS, OUTPUTS // 2)
    np.testing.assert_array_equal(part.materialise(), w.materialise()[2])


class Half(Leaf):
    values: jax.Array

    def aval(self):
        return jax.core.ShapedArray(self.values.shape, jnp.dtype("float32"))

    def materialise(self):
        return self.values.astype(jnp.float32)


take_parts(Half)


def test_parts_of_a_leaf_of_ones_own(rng):
    w = Half(weight(rng).astype(jnp.bfloat16))
    several, *one = compressed(lambda w: (w[1:3], jax.lax.dynamic_slice_in_dim(w, IDS[0], 1), *w))(w)
    assert type(several) is Half and several.shape == (2, INPUTS, OUTPUTS)
    assert all(type(part) is Half for part in one) and len(one) == 1 + N
    np.testing.assert_array_equal(one[0].materialise(), w.materialise()[3:4])
    np.testing.assert_array_equal(jnp.stack([part.materialise() for part in one[1:]]), w.materialise())


FUSED = {
    "int8": Affine(8),
    "int4": Affine(4),
    "groups": Affine(4, group=(0, 8), symmetric=False),
    "nf4": NF4(group=(0, 8)),
    "mx": MX(),
    "float8": Floats("float8_e4m3fn"),
    "bfloat16": Floats("bfloat16"),
    "ternary": Ternary(axes=(-1,)),
    "one codebook": KMeans(200),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("stack", [(), (3,)])
def test_fused_projections_are_split(name, stack, rng):
    """Whole bytes and groups, along either axis."""
    w = jnp.asarray(rng.normal(size=(*stack, 32, 24)), jnp.float32)
    make = FUSED[name].convert
    w = make(w) if not stack else jax.tree.map(lambda *parts: jnp.stack(parts), *map(make, w))
    x = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)

    def multiply(x, w):
        return jnp.stack([x @ layer for layer in w]) if stack else x @ w

    for way in (
        lambda w: [multiply(x, part) for part in jnp.split(w, 3, axis=-1)],
        lambda w: [multiply(x, w[..., 8:]), multiply(x, w[..., :16])],
        lambda w: [multiply(x[:, 16:], w[..., 16:, :])] if name != "mx" else [],
    ):
        outs = jax.jit(compressed(way, strict=True))(w)
        for out, wanted in zip(outs, way(dense(w)), strict=True):
            np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4)


def test_parts_of_bytes_and_of_groups_are_dense(rng):
    x = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
    for scheme, way in (
        (Affine(4), lambda w: x @ w[:, 1:7]),
        (Affine(8, group=(0, 8)), lambda w: x[:, 4:12] @ w[4:12]),
        (Affine(8, activation_bits=8), lambda w: x @ w[:, :8]),
    ):
        w = scheme.convert(jnp.asarray(rng.normal(size=(32, 24)), jnp.float32))
        with watch() as seen:
            out = compressed(way)(w)
        assert seen["Quantized", "slice", "dense"] == 1
        np.testing.assert_allclose(out, way(w.materialise()), rtol=1e-4, atol=1e-4)
