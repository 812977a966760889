"""Thin factors with everything else: transformations, devices, files, programs, and models whose units were cut."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcompress import compressed, dense, export, factorize, nbytes, pack, quantize, report, train
from jaxcompress.arrays import LowRank, is_leaf, watch
from jaxcompress.factorize import Svd
from jaxcompress.prune import channels

RNG = np.random.default_rng(5)


def weight(*shape):
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)


def model(p, tokens):
    """A table that is read both ways around layers in a scan, each run again on the way back."""

    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    x, _ = lax.scan(layer, p["table"][tokens] + p["bias"], p["layers"])
    return x @ p["table"].T


PARAMS = {"table": weight(40, 16), "layers": weight(3, 16, 16), "bias": jnp.ones(16)}
RULES = {"table": Svd(rank=6), "layers": Svd(rank=4, stacked=1)}
TOKENS = jnp.asarray(RNG.integers(0, 40, (8, 5)))


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


STRICT = compressed(model, strict=True)


def loss(p, tokens, run=model):
    out = run(p, tokens)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], tokens[:, 1:])), out


@pytest.mark.slow
def test_transformed():
    """Under jit, scan, remat and grad no weight is made dense, and the factors get their derivatives."""
    small = factorize.convert(PARAMS, RULES)
    with watch() as hits:
        (_, out), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)(small, TOKENS, STRICT)
    assert hits and not any(how == "dense" for *_, how in hits)
    close(out, model(dense(small), TOKENS))
    close(slopes, jax.grad(lambda p: loss(dense(p), TOKENS)[0])(small))
    assert jax.tree.structure(slopes) == jax.tree.structure(small)


@pytest.mark.slow
def test_under_vmap():
    small = factorize.convert(PARAMS, RULES)
    close(jax.jit(jax.vmap(STRICT, (None, 0)))(small, TOKENS), model(dense(small), TOKENS))


@pytest.mark.slow
def test_trained_on_eight_devices():
    """The factors are parameters: adam takes them, and eight devices make the steps of one."""
    small, tx = factorize.convert(PARAMS, RULES), optax.adam(1e-2)

    @jax.jit
    def steps(p, tokens):
        def step(carry, _):
            p, state = carry
            (value, _), slopes = jax.value_and_grad(loss, has_aux=True)(p, tokens, STRICT)
            updates, state = tx.update(slopes, state, p)
            return (optax.apply_updates(p, updates), state), value

        (p, _), values = lax.scan(step, (p, tx.init(p)), None, length=4)
        return p, values

    mesh = train.make_mesh(data=2, model=4)
    placed = train.shard(small, mesh, [("layers", P(None, None, "model")), ("table", P("model", None))])
    assert placed["table"].left.sharding.spec[0] == "model" and placed["layers"].right.sharding.spec[2] == "model"
    one, many = steps(small, TOKENS), steps(placed, train.shard_batch(TOKENS, mesh))
    assert one[1][-1] < one[1][0]
    close(many, one, 1e-4)


def test_saved_packed_and_exported(tmp_path):
    small = factorize.convert(PARAMS, RULES)
    small["layers"] = factorize.convert_factors(small, {"layers": quantize.Affine(8, axes=(0, -1))})["layers"]
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", small)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "step", jax.eval_shape(lambda: small))
    pack.save(tmp_path / "small.jxc", small)
    for other in (restored, pack.load(tmp_path / "small.jxc")):
        assert jax.tree.structure(other) == jax.tree.structure(small)
        jax.tree.map(np.testing.assert_array_equal, other, small)
    shape = jax.export.symbolic_shape("batch, 5")
    size = export.save(tmp_path / "model.bin", model, small, jax.ShapeDtypeStruct(shape, jnp.int32))
    stored = 4 * (6 * (40 + 16) + 16) + 3 * (4 * (16 + 16) + 4 * (4 + 16))
    assert nbytes(small) == stored and size < stored + 20_000
    close(export.load(tmp_path / "model.bin")(TOKENS[:3].astype(jnp.int32)), model(dense(small), TOKENS[:3]), 1e-4)


class Network(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 16)
        x = embed(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return embed.attend(x + nn.Conv(16, (3,))(x))


@pytest.mark.slow
def test_a_linen_network():
    network = Network()
    variables = jax.jit(network.init)(jax.random.key(0), TOKENS)
    rules = {
        "embedding$": Svd(rank=6),
        "(query|key|value)/kernel": Svd(rank=4, rows=(0,)),
        "(out|Conv_0)/kernel": Svd(ratio=0.6),
    }
    small = factorize.convert(variables, rules)
    assert sum(isinstance(w, LowRank) for w in jax.tree.leaves(small, is_leaf=is_leaf)) == 6
    close(jax.jit(compressed(network.apply, strict=True))(small, TOKENS), network.apply(dense(small), TOKENS))


def net(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


@pytest.mark.slow
def test_cut_factorized_traced_again_quantized_and_packed(tmp_path):
    """Units are cut, what is left factorized, ranks cut as units are, factors quantized, and all of it is packed."""
    params, x = {"a": weight(6, 32), "b": weight(32, 48), "c": weight(48, 4)}, weight(32, 6)
    groups = channels.groups(net, params, x)
    plan = channels.plan(groups, channels.norm(groups, params), 0.5)
    cut, fn = plan.apply(params), channels.shrink(net, params, plan)
    whole = {**cut, "b": factorize.svd(cut["b"], Svd(energy=1.0))}
    assert whole["b"].shape == (16, 24) and whole["b"].rank == 16
    close(compressed(fn, strict=True)(whole, x), fn(cut, x))

    small = factorize.convert(cut, {"b": Svd(rank=8)})
    run = compressed(fn)
    close(run(small, x), fn(dense(small), x))
    before, after = (report.cost(fn, p, x, rounds=1) for p in (cut, small))
    assert after.flops < before.flops and after.nbytes < before.nbytes

    def of_factors(p, x):  # `channels` takes trees of arrays, so it is given the factors
        return run({**p, "b": LowRank.from_factors(**p["b"])}, x)

    with pytest.raises(ValueError, match="'b' is compressed"):
        channels.groups(run, small, x)
    factors = {**small, "b": small["b"].fields()[0]}
    again = channels.groups(of_factors, factors, x)
    assert {group.size for group in again} == {16, 8, 24}  # units of `a`, ranks of `b`, units of `b`
    second = channels.plan(again, channels.norm(again, factors), 0.5)
    assert channels.verify(of_factors, factors, second, x).ok
    smaller = second.apply(factors)
    assert smaller["b"]["left"].shape == (8, 4)

    last = channels.shrink(of_factors, factors, second)
    packed = {**smaller, "b": {k: quantize.Affine(8).convert(w) for k, w in smaller["b"].items()}}
    pack.save(tmp_path / "small.jxc", packed)
    wanted = last(smaller, x)
    close(compressed(last)(pack.load(tmp_path / "small.jxc"), x), wanted, 0.02 * float(jnp.abs(wanted).max()))
    assert nbytes(packed) < nbytes(smaller) < nbytes(small) < nbytes(cut) < nbytes(params)
