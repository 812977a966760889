"""Values captured by name equal those computed by hand, under every transform, and models stay as they were."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxcompress import compressed, features, linen, quantize
from jaxcompress import nnx as nnx_wrappers
from jaxcompress.paths import UnmatchedRuleError

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)


def forward(w, x, flag="plain"):
    """A named value in each place that the evaluator looks into."""
    assert flag in ("plain", "other")  # stays a string under tracing
    h = checkpoint_name(jnp.sin(x @ w), "first")
    h = jax.checkpoint(lambda h: jnp.cos(checkpoint_name(h * 2, "remat/inner")))(h)

    def body(h, scale):
        h = checkpoint_name(jnp.tanh(h * scale), "steps")
        return h, h.sum()

    h, sums = jax.lax.scan(body, h, jnp.arange(1.0, 4.0))
    h = jax.jit(lambda h: checkpoint_name(h * 3, "jitted") + 1)(h)
    h = jax.lax.cond(
        h.sum() > 0, lambda h: checkpoint_name(h + 1, "branch"), lambda h: checkpoint_name(h - 1, "branch"), h
    )
    h = clip(h)
    return {"out": checkpoint_name(checkpoint_name(h, "twice") * 2, "twice"), "sums": sums, "label": "text"}


@jax.custom_vjp
def clip(h):
    return jnp.clip(checkpoint_name(h * 0.5, "custom"), -1, 1)


clip.defvjp(lambda h: (clip(h), None), lambda _, ct: (7 * ct,))


def by_hand(w, x):
    first = jnp.sin(x @ w)
    inner = first * 2
    h, steps = jnp.cos(inner), []
    for scale in (1.0, 2.0, 3.0):
        h = jnp.tanh(h * scale)
        steps.append(h)
    jitted = h * 3
    branch = jnp.where((jitted + 1).sum() > 0, jitted + 2, jitted)
    custom = branch * 0.5
    twice = jnp.clip(custom, -1, 1)
    return {
        "first": first,
        "remat/inner": inner,
        "steps": jnp.stack(steps),
        "jitted": jitted,
        "branch": branch,
        "custom": custom,
        "twice/0": twice,
        "twice/1": twice * 2,
    }


def test_plain_function_values_and_gradients():
    """Every named value, and the gradient of a loss on each, equal those of the function written out by hand."""
    w = jax.random.normal(jax.random.key(0), (4, 3))
    captured = features.capture(forward, ["first$", "remat", "steps|jitted", "^branch", "custom", "twice"])
    weights = {name: i + 1.0 for i, name in enumerate(by_hand(w, X))}

    def loss(values):
        return sum(weights[name] * jnp.sum(value**2) for name, value in values.items() if not name.startswith("twice"))

    @jax.jit
    def ours(w):
        def of(w):
            out, found = captured(w, X, flag="other")
            assert out["label"] == "text" and list(found) == list(weights)
            return loss(found), (out["out"], found)

        return jax.grad(of, has_aux=True)(w)

    gradient, (out, found) = ours(w)
    want = by_hand(w, X)
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(out, forward(w, X)["out"], rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(lambda w: loss(by_hand(w, X)))(w), rtol=1e-5, atol=1e-3)


def test_the_output_keeps_its_own_derivative():
    """A custom derivative still rules the output where a value inside it is captured, and gives 7 here, not 0.5."""
    captured = features.capture(clip, "custom")
    np.testing.assert_allclose(jax.grad(lambda h: captured(h)[0].sum())(jnp.ones(3) / 4), 7.0)
    np.testing.assert_allclose(jax.grad(lambda h: captured(h)[1]["custom"].sum())(jnp.ones(3) / 4), 0.5)


def test_only_what_is_used_is_computed():
    def fn(x):
        return checkpoint_name(x + 1, "cheap"), checkpoint_name(x @ x, "dear")

    text = jax.jit(lambda x: features.capture(fn, ["cheap", "dear"])(x)[1]["cheap"]).lower(jnp.ones((8, 8))).compile()
    assert "dot" not in text.as_text()


def test_remat_still_saves_nothing_but_what_leaves_it():
    """With the name captured inside a checkpointed body, its other residuals are still recomputed, not stored."""

    def body(x):
        for _ in range(4):
            x = jnp.sin(checkpoint_name(jnp.exp(x), "h") if _ == 1 else jnp.exp(x))
        return x

    def stored(fn):
        _, pullback = jax.vjp(fn, jnp.ones(1000))
        return sum(x.size for x in jax.tree.leaves(pullback) if x.size >= 1000)

    captured = features.capture(jax.checkpoint(body), "h")
    assert stored(captured) <= 2000 < stored(body)


def test_errors_list_what_there_is():
    def fn(x):
        x = jax.lax.while_loop(lambda x: x < 3, lambda x: checkpoint_name(x + 1, "loop"), checkpoint_name(x, "start"))
        return jax.lax.cond(x > 0, lambda x: checkpoint_name(x, "yes"), lambda x: checkpoint_name(x, "no"), x)

    with pytest.raises(UnmatchedRuleError, match=r"'strat\$' matches no path; .*captured: start, loop, no, yes$"):
        features.capture(fn, ["start", "strat$"])(1.0)
    with pytest.raises(UnmatchedRuleError, match=r"none .name a value with jax.ad_checkpoint.checkpoint_name"):
        features.capture(jnp.sin, "h")(1.0)
    with pytest.raises(ValueError, match="'loop': it is computed inside a 'while'"):
        features.capture(fn, "loop")(1.0)
    with pytest.raises(ValueError, match="branches do not all have the same names"):
        features.capture(fn, "yes")(1.0)
    with pytest.raises(ValueError, match="not a regular expression"):
        features.capture(fn, "(")(1.0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        x = nn.BatchNorm(use_running_average=not training, momentum=0.5)(nn.Dense(4)(x))
        return checkpoint_name(nn.relu(x), "activated")


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4)(x)), None


class Net(nn.Module):
    """Neither `remat` nor `scan` has been told of captures."""

    @nn.compact
    def __call__(self, x, training=True):
        x = Block()(x, training)
        x = nn.remat(Block, static_argnums=2)()(x, training)
        x, _ = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        return nn.Dense(3)(x)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def net_by_hand(variables, x):
    """The net's output, two of its values, and its new batch statistics."""
    params, stats = variables["params"], variables["batch_stats"]
    found, new = {}, {}
    for name in ("Block_0", "CheckpointBlock_0"):
        x = found[f"{name}/Dense_0"] = dense(params[name]["Dense_0"], x)
        mean, var, norm = x.mean(0), x.var(0), params[name]["BatchNorm_0"]
        new[name] = {"BatchNorm_0": {"mean": 0.5 * mean, "var": 0.5 * (stats[name]["BatchNorm_0"]["var"] + var)}}
        x = found[name] = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * norm["scale"] + norm["bias"])
    steps = []
    for i in range(3):
        x = jnp.tanh(dense(jax.tree.map(lambda leaf, i=i: leaf[i], params["ScanStep_0"]["Dense_0"]), x))
        steps.append(x)
    found["ScanStep_0/0"] = jnp.stack(steps)
    return dense(params["Dense_0"], x), found, new


def assert_close(one, other, tolerance=2e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


def test_linen_under_jit_and_grad_through_remat_and_scan():
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(1), X)
    captured = linen.capture(model, ["Block_0$", "Block_0/Dense_0$", "^ScanStep_0/0"])

    @jax.jit
    def step(variables, x):
        def loss(params):
            (out, updates), found = captured({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(out**2) + sum(jnp.sum(value**3) for value in found.values()), (out, found, updates)

        return jax.grad(loss, has_aux=True)(variables["params"])

    def hand_loss(params):
        out, found, _ = net_by_hand({**variables, "params": params}, X)
        return jnp.sum(out**2) + sum(jnp.sum(value**3) for value in found.values())

    gradient, (out, found, updates) = step(variables, X)
    want_out, want_found, want_stats = net_by_hand(variables, X)
    assert_close(found, want_found)
    assert_close((out, updates["batch_stats"]), (want_out, want_stats))
    assert_close(gradient, jax.jit(jax.grad(hand_loss))(variables["params"]), 1e-3)


def test_two_linen_models_in_one_process():
    """A capture changes neither its model nor another one, whichever was traced first."""
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(1), X)
    plain = jax.jit(lambda v, x: model.apply(v, x, training=False))
    before = plain(variables, X)
    out, found = linen.capture(model, "activated")(variables, X, training=False)
    assert list(found) == ["activated/0", "activated/1"]
    np.testing.assert_array_equal(plain(variables, X), before)
    np.testing.assert_allclose(out, before, rtol=1e-5, atol=1e-6)
    assert "name=" not in str(jax.make_jaxpr(lambda x: nn.Dense(4).apply(dense_variables(), x))(X))
    found = linen.capture(nn.Dense(4), "__call__")(dense_variables(), X)[1]
    np.testing.assert_allclose(found["__call__"], X + 1)
    with pytest.raises(UnmatchedRuleError, match=r"captured: Block_0/Dense_0, .*CheckpointBlock_0, .*__call__"):
        linen.capture(model, "Block_7")(variables, X, training=False)


def dense_variables():
    return {"params": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}}


class Part(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.activate(self.norm(self.linear(x)))

    def activate(self, x):
        return jax.nn.relu(x)


class Recomputed(Part):
    @nnx.remat
    def __call__(self, x):
        return {"out": jnp.sin(self.linear(x))}


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.parts = nnx.List([Part(rngs), Part(rngs)])
        self.recomputed = Recomputed(rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        x = self.recomputed(x)["out"]

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return jnp.tanh(layer(x))

        return through(x, self.layers)


def test_nnx_under_jit_and_grad_through_remat_and_scan():
    model = Stack(nnx.Rngs(0))
    apply, params, rest = nnx_wrappers.functional(model)
    captured = nnx_wrappers.capture(model, [r"parts/\d$", "parts/0/activate", "recomputed/out", "layers"])

    def by_hand(params, x):
        found = {}
        for i in range(2):
            part = params["parts"][i]
            x = dense(part["linear"], x)
            x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
            x = jax.nn.relu(x * part["norm"]["scale"] + part["norm"]["bias"])
            if i == 0:
                found["parts/0/activate"] = x
            found[f"parts/{i}"] = x
        x = found["recomputed/out"] = jnp.sin(dense(params["recomputed"]["linear"], x))
        before = []
        for i in range(3):
            before.append(dense(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x))
            x = jnp.tanh(before[-1])
        found["layers"] = jnp.stack(before)
        return x, found

    def total(out, found):
        return jnp.sum(out**2) + sum(jnp.sum(value**3) for value in found.values())

    @jax.jit
    def step(params, rest, x):
        def loss(params):
            (out, new), found = captured(params, rest, x)
            return total(out, found), (out, found, new)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (out, found, new) = step(params, rest, X)
    want_out, want = by_hand(params, X)
    assert_close((out, found), (want_out, want))
    assert_close(gradient, jax.jit(jax.grad(lambda p: total(*by_hand(p, X))))(params), 1e-3)
    plain_out, plain_new = apply(params, rest, X)  # after the capture, as if there had been none
    assert_close((out, new), (plain_out, plain_new))
    assert type(model.parts[0]) is Part and not hasattr(model.parts[0], "jaxcompress_path")
    with pytest.raises(UnmatchedRuleError, match="captured: parts/0/linear, parts/0/norm, parts/0/activate, parts/0,"):
        nnx_wrappers.capture(model, "part$")(params, rest, X)


@pytest.mark.slow
def test_features_of_a_compressed_model():
    """Captured inside `compressed`, a compressed weight is met by its rule as in the plain run."""
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    small = quantize.convert(variables, [("kernel$", quantize.Affine(bits=8))])
    run = compressed(linen.capture(model, "layers_0$"), strict=True)
    out, found = run(small, X)
    np.testing.assert_allclose(out, compressed(model.apply)(small, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["layers_0"], model.layers[0].apply(layer(variables), X), atol=0.02)


def layer(variables):
    return {"params": variables["params"]["layers_0"]}


def test_a_linen_module_is_no_nnx_module():
    for take in (nnx_wrappers.functional, lambda module: nnx_wrappers.capture(module, "")):
        with pytest.raises(TypeError, match="want an NNX module, got Dense: of a Linen module `apply`"):
            take(nn.Dense(3))


def test_two_values_never_share_a_key():
    """`h`, which comes twice, is `h/0` and `h/1`; a value of the name `h/0` would take the first one's place."""

    def forward(x):
        return checkpoint_name(x, "h") + checkpoint_name(2 * x, "h") + checkpoint_name(3 * x, "h/0")

    with pytest.raises(ValueError, match="two values have the key 'h/0'"):
        features.capture(forward, "h")(X)
    assert_close(features.capture(forward, "1$")(X)[1], {"h/1": 2 * X})
