"""What fake quantization adds to a training step, what codebooks cost to find, and what products with integers cost."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _mlp
from benchmarks._harness import Figure, Figures, Stepper, benchmark, compiled_bytes, faster, paired
from jaxcompress import compressed, nbytes, quantize
from jaxcompress.arrays import Quantized

INT8 = quantize.Affine(bits=8, activation_bits=8)


@benchmark("quantize.fake_step")
def fake_step(rounds: int) -> dict[str, Figure]:
    """A step with int8 fake quantization of weights (w8), or of weights and inputs (w8a8), against the plain step.

    On 256 rows, the size that the goal is for, and on 128 (`.128`): what rounds weights costs the same on both.
    """
    optimizer = optax.adam(1e-3)
    state, plain = _mlp.init(optimizer), _mlp.train_step(optimizer)
    figures = {}
    for rows, suffix in ((256, ""), (128, ".128")):
        data = _mlp.batch(size=rows)
        plain_bytes = compiled_bytes(plain, state, data)
        for name, spec in {"w8": quantize.Affine(bits=8), "w8a8": INT8}.items():
            step = _mlp.train_step(optimizer, quantize.fake(_mlp.apply, {"kernel$": spec}))
            figures[name + suffix] = paired(
                Stepper(step, state, data),
                Stepper(plain, state, data),
                "plain adam step",
                rounds,
                seconds=0.5,
                bytes=compiled_bytes(step, state, data),
                baseline_bytes=plain_bytes,
            )
    return figures


@benchmark("quantize.codebook")
def codebook(rounds: int) -> Figures:
    """Optimal codebooks of a million Laplace weights against scikit-learn's k-means (one start, 20 iterations)."""
    from sklearn.cluster import KMeans

    weights = np.random.default_rng(0).laplace(size=1 << 20).astype(np.float32)
    array = jnp.asarray(weights).reshape(1024, -1)
    figures = {}
    for k in (16, 256):

        def ours(k: int = k) -> Any:
            return quantize.KMeans(k).convert(array)

        found: list[Any] = []  # of the last run: with 256 centroids one takes as long as all else together

        def theirs(k: int = k, found: list[Any] = found) -> Any:
            found[:] = [KMeans(k, n_init=1, max_iter=20, random_state=0).fit(weights[:, None])]

        figure = faster(ours, theirs, "scikit-learn's KMeans", max(3, rounds // 3), calls=1, weights=weights.size)
        errors = [
            float(np.mean((weights - values.ravel()) ** 2))
            for values in (np.asarray(ours().materialise()), found[0].cluster_centers_[found[0].labels_])
        ]
        detail = {**figure.detail, "error": errors[0], "baseline_error": errors[1]}
        figures[str(k)] = dataclasses.replace(figure, detail=detail)
    return figures


SIZE, ROWS = 4096, (1, 4, 16, 128)


def _products(
    scheme: Any,
    rounds: int,
    product: Callable[..., jax.Array] = jnp.dot,
    finish: Callable[[Quantized], Quantized] = lambda w: w,
    shape: tuple[int, ...] = (SIZE, SIZE),
) -> dict[str, Figure]:
    """`x @ w` with the compressed weight against the float32 one, for few rows of x; and the compiled temporaries."""
    weight = jax.random.normal(jax.random.key(0), shape) / shape[-1] ** 0.5
    small = finish(scheme.convert(weight))
    figures = {}
    for rows in ROWS:
        x = jax.random.normal(jax.random.key(1), (rows, shape[-2]))

        def call(w: Any, x: jax.Array = x) -> Callable[[], Any]:
            run = jax.jit(compressed(product))
            return lambda: run(x, w)

        temp = compiled_bytes(compressed(product), x, small)["temp"]
        figures[str(rows)] = faster(
            call(small), call(weight), "float32 product", rounds, temp=temp, weight_bytes=nbytes(small)
        )
    return figures


@benchmark("quantize.weight_only")
def weight_only(rounds: int) -> Figures:
    """Products of 1, 4, 16 and 128 rows with a 4096x4096 weight in each format, against float32."""
    schemes = {
        "int8": quantize.Affine(bits=8),
        "int4": quantize.Affine(bits=4),
        "int4_zero": quantize.Affine(bits=4, symmetric=False),
        "int8_groups": quantize.Affine(bits=8, group=(0, 128)),
        "int4_groups": quantize.Affine(bits=4, group=(0, 128)),
        "int4_groups_zero": quantize.Affine(bits=4, group=(0, 128), symmetric=False),
        "bfloat16": quantize.Floats("bfloat16"),
        "float16": quantize.Floats("float16"),
        "float8_e4m3": quantize.Floats("float8_e4m3fn"),
        "float8_e5m2": quantize.Floats("float8_e5m2"),
        "mx_float8": quantize.MX(),
        "nf4": quantize.NF4(),
        "codebook_16": quantize.KMeans(16),
        "ternary": quantize.Ternary(),
        "binary": quantize.Binary(),
    }
    return {
        f"{name}.{rows}": figure
        for name, scheme in schemes.items()
        for rows, figure in _products(scheme, rounds).items()
    }


@benchmark("quantize.integer")
def integer(rounds: int) -> Figures:
    """The same with inputs in int8 too, as products of integers; of weights in int8, in int4, and in groups.

    `int8_static`: by a grid of the inputs with a zero point, known beforehand; `int8_16`: inputs in int16.
    """
    four = dataclasses.replace(INT8, bits=4)
    in_groups = {
        f"{name}_groups": dataclasses.replace(s, group=(0, 128)) for name, s in (("int8", INT8), ("int4", four))
    }
    others = {"int4": four, **in_groups, "int8_16": dataclasses.replace(INT8, activation_bits=16)}
    found = {f"{name}.{rows}": f for name, scheme in others.items() for rows, f in _products(scheme, rounds).items()}
    known = {f"int8_static.{rows}": f for rows, f in _products(INT8, rounds, finish=_with_known_grid).items()}
    return {**_products(INT8, rounds), **found, **known}


def _with_known_grid(w: Quantized) -> Quantized:
    return quantize.static({"w": w}, {"w": quantize.Range(np.array(-3.0), np.array(5.0))})["w"]


@benchmark("quantize.tied")
def tied(rounds: int) -> Figures:
    """A table of 4096 embeddings read backwards, `x @ table.T`, in int8 and int4, against float32."""
    schemes = {name: quantize.Affine(bits, axes=(0,)) for name, bits in (("int8", 8), ("int4", 4))}
    return {
        f"{name}.{rows}": figure
        for name, scheme in schemes.items()
        for rows, figure in _products(scheme, rounds, product=lambda x, table: x @ table.T).items()
    }


@benchmark("quantize.layers")
def layers(rounds: int) -> Figures:
    """Eight layers of 2048x2048 in one array, `x @ w[i]` in a loop, in int8 and int4, against float32."""

    def in_turn(x: jax.Array, w: Any) -> jax.Array:
        return jax.lax.fori_loop(0, w.shape[0], lambda i, x: x @ w[i], x)

    schemes = {name: quantize.Affine(bits, axes=(0, -1)) for name, bits in (("int8", 8), ("int4", 4))}
    return {
        f"{name}.{rows}": figure
        for name, scheme in schemes.items()
        for rows, figure in _products(scheme, rounds, product=in_turn, shape=(8, 2048, 2048)).items()
    }


@benchmark("quantize.outputs_first")
def outputs_first(rounds: int) -> Figures:
    """Both with the int8 codes stored outputs first: weights alone in int8, and inputs too."""
    schemes = {"weight_only": quantize.Affine(bits=8), "integer": INT8}
    return {
        f"{name}.{rows}": figure
        for name, scheme in schemes.items()
        for rows, figure in _products(scheme, rounds, finish=Quantized.outputs_first).items()
    }
