"""Measured statistics against X^T X of inputs captured another way, in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress.nnx
from jaxcompress.calibrate import InputObserver, input_statistics


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def gram(x):
    """X^T X in float64 of `[..., inputs]`."""
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return rows.T @ rows


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance * np.abs(b).max())


def check_products(statistics, x, params, expected, atol=1e-4):
    """What the layout is for: `x @ matrix` is what the function computed."""
    matrices = statistics.layout.matrices(params)
    np.testing.assert_array_equal(statistics.layout.weight(matrices), params)  # and back
    close(np.einsum("prk,pkn->prn", x, matrices), expected, atol)


def mlp(p, x):
    h = jax.nn.relu(x @ p["first"])
    return jnp.einsum("oh,bh->bo", p["second"], h)  # the weight on the left, its inputs last


def test_a_network_over_batches(rng):
    params = {"first": normal(rng, 5, 6), "second": normal(rng, 3, 6)}
    batches = [normal(rng, 7, 5), normal(rng, 4, 5)]
    stats = input_statistics(mlp, params, batches, {"first|second": True})
    assert list(stats) == ["first", "second"]  # in the order of use
    x = np.concatenate(batches)
    h = np.maximum(x @ params["first"], 0)
    for name, seen in {"first": x, "second": h}.items():
        close(stats[name].gram[0], gram(seen))
        close(stats[name].squares[0], np.sum(np.float64(seen) ** 2, 0))
        assert stats[name].rows.tolist() == [11]
    check_products(stats["second"], h[None], params["second"], (h @ params["second"].T)[None])
    squares = input_statistics(mlp, params, batches, {"second": True}, gram=False)
    assert list(squares) == ["second"] and squares["second"].gram is None
    close(squares["second"].squares, stats["second"].squares)


def patches(x, kernel, stride, padding, dilation, groups):
    """NumPy's view of what a kernel [h, w, in, out] meets: `[groups, rows, h * w * in]`."""
    (kh, kw, n, _), ((top, bottom), (left, right)) = kernel.shape, padding
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    height = (x.shape[1] - dilation * (kh - 1) - 1) // stride + 1
    width = (x.shape[2] - dilation * (kw - 1) - 1) // stride + 1
    rows = []
    for g in range(groups):
        for b in range(x.shape[0]):
            for i in range(height):
                for j in range(width):
                    rows.append(
                        [
                            x[b, i * stride + a * dilation, j * stride + c * dilation, g * n + k]
                            for a in range(kh)
                            for c in range(kw)
                            for k in range(n)
                        ]
                    )
    return np.array(rows).reshape(groups, -1, kh * kw * n)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [
        (1, ((1, 1), (1, 1)), 1, 1),
        (2, ((0, 1), (2, 0)), 2, 1),
        (1, ((0, 0), (0, 0)), 1, 2),
        (2, ((1, 1), (1, 1)), 1, 4),
    ],
    ids=["same", "strided, dilated", "groups", "depthwise"],
)
def test_convolutions(stride, padding, dilation, groups, rng):
    x, kernel = normal(rng, 2, 6, 5, 4), normal(rng, 3, 2, 4 // groups, 8)

    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["kernel"],
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    stats = input_statistics(fn, {"kernel": kernel}, [x], {"kernel": True})["kernel"]
    seen = patches(x, kernel, stride, padding, dilation, groups)
    close(stats.gram, np.einsum("grk,grl->gkl", seen, seen))
    assert stats.rows.tolist() == [seen.shape[1]] * groups
    out = np.moveaxis(np.asarray(fn({"kernel": kernel}, x)).reshape(-1, groups, 8 // groups), 1, 0)
    check_products(stats, seen, kernel, out)


class Attention(nn.Module):
    """DenseGeneral with several contracted axes, inside what quax has to see through."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype, deterministic=True)(x)
        return x + nn.Dense(6, dtype=self.dtype)(nn.gelu(y))


@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("plain", "bfloat16")), "remat"])
def test_attention(kind, rng):
    cls = nn.remat(Attention) if kind == "remat" else Attention
    model, x = cls(jnp.bfloat16 if kind == "bfloat16" else jnp.float32), normal(rng, 3, 4, 6)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    stats = input_statistics(jax.jit(model.apply), variables, [x], {"kernel$": True})
    seen = {}

    def keep(next_fn, args, kwargs, context):
        if context.method_name == "__call__" and isinstance(context.module, nn.Dense | nn.DenseGeneral):
            seen["/".join(context.module.path)] = args[0]
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(keep), jax.disable_jit():
        Attention(model.dtype).apply(variables, x)
    assert len(stats) == len(seen) == 5
    for path, value in seen.items():
        inputs = value.reshape(3, 4, -1)  # of the last projection: heads and their size
        name = next(name for name in stats if path.split("/", 1)[-1] in name)
        close(stats[name].gram[0], gram(inputs), 2e-2 if kind == "bfloat16" else 2e-5)
        assert stats[name].gram.dtype == jnp.float32 and stats[name].rows.tolist() == [12]


def test_weights_stacked_by_scan(rng):
    params = {"stack": normal(rng, 3, 5, 5), "stack_last": normal(rng, 5, 5, 3)}
    x = normal(rng, 4, 5)

    def fn(p, x):
        turned = jnp.moveaxis(p["stack_last"], -1, 0)

        def step(x, ws):
            return jnp.tanh(x @ ws[0]) @ ws[1].T, None

        return lax.scan(step, x, (p["stack"], turned))[0]

    stats = input_statistics(fn, params, [x], {"stack": True})
    for layer in range(3):
        close(stats["stack"].gram[layer], gram(x))
        h = np.tanh(x @ params["stack"][layer])
        close(stats["stack_last"].gram[layer], gram(h))
        matrix = stats["stack_last"].layout.matrices(params["stack_last"])[layer]
        np.testing.assert_array_equal(matrix, params["stack_last"][..., layer].T)
        x = h @ params["stack_last"][..., layer].T
    assert stats["stack"].rows.tolist() == [4, 4, 4]


def test_a_cell_used_at_every_step_and_a_tied_embedding(rng):
    params = {"table": normal(rng, 9, 4), "cell": normal(rng, 4, 4)}
    tokens = jnp.asarray(rng.integers(0, 9, (2, 5)))

    def fn(p, tokens):
        x = p["table"][tokens]
        state, states = lax.scan(lambda s, x: (jnp.tanh((s + x) @ p["cell"]),) * 2, jnp.zeros((2, 4)), x.swapaxes(0, 1))
        return jax.nn.log_softmax(states @ p["table"].T), state

    stats = input_statistics(fn, params, [tokens], {"": True})
    state, seen, states = np.zeros((2, 4)), [], []
    for t in range(5):
        seen.append(state + params["table"][tokens[:, t]])
        state = np.tanh(seen[-1] @ params["cell"])
        states.append(state)
    close(stats["cell"].gram[0], gram(np.stack(seen)))
    close(stats["table"].gram[0], gram(np.stack(states)))  # of its use as a projection; the lookup is no product
    assert stats["table"].layout.matrix_shape == (1, 4, 9)


def test_control_flow_and_two_uses(rng):
    params = {"w": normal(rng, 4, 4), "twice": normal(rng, 4, 4), "experts": normal(rng, 2, 4, 4)}
    x = normal(rng, 6, 4)

    def fn(p, x):
        x = lax.cond(x[0, 0] > -100, lambda x: x @ p["w"], lambda x: x, x)
        x = jax.vmap(lambda row: jnp.tanh(row @ p["twice"]))(x)
        y = x @ p["twice"]
        z = jax.vmap(lambda w, x: x @ w)(p["experts"], y.reshape(2, 3, 4))
        return jnp.max(z)

    stats = input_statistics(fn, params, [x], {"": True})
    close(stats["w"].gram[0], gram(x))
    h = np.asarray(x @ params["w"])
    g = np.tanh(h @ params["twice"])
    close(stats["twice"].gram[0], gram(h) + gram(g))
    assert stats["twice"].rows.tolist() == [12]
    y = np.asarray(g @ params["twice"]).reshape(2, 3, 4)
    close(stats["experts"].gram, np.stack([gram(y[0]), gram(y[1])]))


def test_nnx(rng):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    apply, params, rest = jaxcompress.nnx.functional(model)
    x = normal(rng, 5, 4)
    stats = input_statistics(lambda p, x: apply(p, rest, x)[0], params, [x], {"kernel$": True})
    close(stats["kernel"].gram[0], gram(x))


def test_again_with_other_weights_and_only_some(rng):
    params = {"first": normal(rng, 5, 6), "second": normal(rng, 3, 6)}
    x = normal(rng, 7, 5)
    observer = InputObserver(mlp, params, x, {"": True})
    changed = params | {"first": params["first"].at[0].set(0)}
    stats = observer.measure(changed, [x], only=["second"])
    assert list(stats) == ["second"]
    close(stats["second"].gram[0], gram(np.maximum(x @ changed["first"], 0)))


def test_batches_over_eight_devices(rng):
    """One all-reduce of the sums, and the weights stay where they are."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"first": normal(rng, 8, 16), "second": normal(rng, 16, 16)}
    x = normal(rng, 16, 8)
    alone = input_statistics(mlp, params, [x], {"": True})
    placed = {
        "first": jax.device_put(params["first"], NamedSharding(mesh, P(None, "model"))),
        "second": jax.device_put(params["second"], NamedSharding(mesh, P(None, "model"))),
    }
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    observer = InputObserver(mlp, placed, spread, {"": True})
    stats = observer.measure(placed, [spread])
    for name in stats:
        close(stats[name].gram, alone[name].gram)
    totals = {name: observer._zeros(layout) for name, layout in observer.layouts.items()}
    text = observer._step.lower(totals, placed, spread, None).compile().as_text()
    made = [line.split("=")[1].split("(")[0] for line in text.splitlines() if " all-gather(" in line]
    assert " all-reduce(" in text and " all-to-all(" not in text
    assert not any(f"f32[{shape}]" in line for line in made for shape in ("8,16", "16,8", "16,16"))  # whole weights


def test_an_explicit_mesh(rng):
    """Through a scan and a convolution, whose results say how they are divided."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    params = {"conv": normal(rng, 3, 3, 2, 8), "stack": normal(rng, 2, 8, 8), "last": normal(rng, 8, 4)}
    x = normal(rng, 8, 5, 5, 2)

    def fn(params, x):
        x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), jnp.mean(x, (1, 2)), params["stack"])[0]
        return x @ params["last"]

    alone = input_statistics(fn, params, [x], {"": True})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P())) | {
            "last": jax.device_put(params["last"], NamedSharding(mesh, P(None, "model")))
        }
        stats = input_statistics(fn, placed, [jax.device_put(x, NamedSharding(mesh, P("data")))], {"": True})
    for name in alone:
        close(stats[name].gram, alone[name].gram)


def test_it_costs_a_forward_pass_and_the_sums(rng):
    """XLA drops what a gradient computes besides: twice the products of the forward pass."""
    params, x = {name: normal(rng, 64, 64) for name in "abc"}, normal(rng, 512, 64)

    def fn(p, x):
        for w in p.values():
            x = nn.gelu(x @ w)
        return x

    def flops(lowered):
        return lowered.compile().cost_analysis()["flops"] / (2 * 512 * 64 * 64)  # in products

    observer = InputObserver(fn, params, x, {"": True})
    totals = {name: observer._zeros(layout) for name, layout in observer.layouts.items()}
    assert flops(observer._step.lower(totals, params, x, None)) < flops(jax.jit(fn).lower(params, x)) + 3.1


def test_what_cannot_be_measured(rng):
    params = {"w": normal(rng, 4, 4), "i": jnp.arange(3), "v": normal(rng, 4, 4)}
    x = normal(rng, 2, 4)
    for message, fn in {
        "'w' meets no floating-point input .*only slice": lambda p, x: x + p["w"][:2],
        "'w' meets no floating-point input .*only dot_general": lambda p, x: x.astype(int) @ p["w"],
        "'w' meets no floating-point input .*does not use": lambda p, x: x,
        "nothing was measured for 'w'": lambda p, x: lax.stop_gradient(x @ p["w"]),
        "no floating-point array": lambda p, x: jnp.argmax(x @ p["w"]),
        "while_loop": lambda p, x: lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x * 2, x @ p["w"]),
        "'w' is used in 2 ways": lambda p, x: x @ p["w"] @ p["w"].T,
    }.items():
        with pytest.raises(ValueError, match=message):
            input_statistics(fn, params, [x], {"^w$": True, "i": None})
    with pytest.raises(ValueError, match="no batches"):
        input_statistics(mlp, params, [], {"w": True})
    for batch, message in ((x, r"of shape \[2, 4\]: .*hand in \[batch\]"), ({"x": x}, "got one dict: ")):
        with pytest.raises(TypeError, match=f"batches must be several, .*{message}"):
            input_statistics(mlp, params, batch, {"w": True})
    with pytest.raises(ValueError, match="not finite"):
        input_statistics(lambda p, x: x @ p["w"], params, [x.at[0, 0].set(jnp.nan)], {"^w$": True})
    with pytest.raises(TypeError, match="'i' is int32"):
        input_statistics(mlp, params, [x], {"i": True})
