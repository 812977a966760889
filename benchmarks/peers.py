"""Beside a peer in one run: qwix, another quantization library for JAX. There with the `peers` extra only."""

import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._harness import Figure, Figures, Stepper, benchmark, exact, faster, paired
from jaxcompress import compressed, nbytes, quantize

WIDTH, BATCHES = 2048, (1, 128)
KINDS = {"w8": None, "w8a8": 8}
"""The bits of the inputs; weights have eight, a scale a channel."""


def peer(rounds: int) -> Figures:
    """qwix on the same model, trained on digits: accuracy, fake quantization's step, latency, bytes.

    With one row qwix's time is one of two from process to process: 2 to 3 times ours, or 8 to 9 times.
    """
    model = nn.Sequential([nn.Dense(WIDTH), nn.relu, nn.Dense(WIDTH), nn.relu, nn.Dense(WIDTH), nn.relu, nn.Dense(10)])
    (images, labels), test = _digits()
    variables = _trained(model, images, labels)
    figures: dict[str, Figure] = {}
    for kind, bits in KINDS.items():
        spec = quantize.Affine(bits=8, activation_bits=bits)
        theirs, their_variables, their_training = _theirs(model, variables, images[:1], bits)
        ours, our_apply = quantize.convert(variables, {"kernel$": spec}), compressed(model.apply)
        right = [_accuracy(f, v, *test) for f, v in ((our_apply, ours), (theirs, their_variables))]
        plain = _accuracy(model.apply, variables, *test)
        figures[f"{kind}.accuracy"] = exact(right[0], "%", f"qwix: {right[1]:.2f} %, float32: {plain:.2f} %")
        sizes = nbytes(ours), nbytes(their_variables)
        figures[f"{kind}.bytes"] = exact(sizes[0] / sizes[1], "x", "qwix", ours=sizes[0], theirs=sizes[1])
        training = quantize.fake(model.apply, {"kernel$": spec})
        steppers = [
            Stepper(_step(apply), (variables, _OPTIMIZER.init(variables)), images[:256], labels[:256])
            for apply in (training, their_training, model.apply)
        ]
        figures[f"{kind}.fake_step"] = paired(steppers[0], steppers[1], "qwix's step", rounds)
        figures[f"{kind}.fake_step.qwix"] = paired(steppers[1], steppers[2], "plain step, for qwix", rounds)
        for batch in BATCHES:
            x = images[:batch]
            calls = [
                _call(f, v, x) for f, v in ((our_apply, ours), (theirs, their_variables), (model.apply, variables))
            ]
            figures[f"{kind}.latency.{batch}"] = faster(calls[0], calls[1], "qwix", rounds)
            figures[f"{kind}.latency.{batch}.float32"] = faster(calls[0], calls[2], "float32", rounds)
    return figures


if importlib.util.find_spec("qwix") is not None:
    benchmark("quantize.peer")(peer)

_OPTIMIZER = optax.adam(1e-3)


def _digits() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def _step(apply: Any) -> Any:
    def loss(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(variables, images), labels))

    @jax.jit
    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        variables, inner = state
        value, gradient = jax.value_and_grad(loss)(variables, images, labels)
        updates, inner = _OPTIMIZER.update(gradient, inner)
        return (optax.apply_updates(variables, updates), inner), value

    return step


def _trained(model: nn.Module, images: jax.Array, labels: jax.Array) -> Any:
    variables = model.init(jax.random.key(0), images[:1])
    step, state = _step(model.apply), (variables, _OPTIMIZER.init(variables))
    for i in range(40):
        state, _ = step(state, images[i % 4 * 256 :][:256], labels[i % 4 * 256 :][:256])
    return state[0]


def _theirs(model: nn.Module, variables: Any, example: jax.Array, bits: int | None) -> tuple[Any, Any, Any]:
    """qwix's function of integers, its variables, and its function for training."""
    import qwix

    kind = None if bits is None else f"int{bits}"
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype=kind)]
    small = qwix.quantize_model(model, qwix.PtqProvider(rules))
    like = jax.eval_shape(small.init, jax.random.key(0), example)["params"]
    params = qwix.quantize_params(variables["params"], like)
    return small.apply, {"params": params}, qwix.quantize_model(model, qwix.QtProvider(rules)).apply


def _call(apply: Any, variables: Any, x: jax.Array) -> Any:
    jitted = jax.jit(apply)
    return lambda: jitted(variables, x)


def _accuracy(apply: Any, variables: Any, images: jax.Array, labels: jax.Array) -> float:
    return 100 * float(jnp.mean(jnp.argmax(jax.jit(apply)(variables, images), axis=-1) == labels))
