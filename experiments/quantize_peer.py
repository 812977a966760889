"""Beside qwix, another quantization library for JAX: `python -m experiments.quantize_peer`.

The same trained network, with 8-bit weights alone (w8) and with 8-bit inputs too (w8a8), by both libraries in one run:
accuracy, bytes, the time of a training step under fake quantization, and latency at batch 1 and 128. All that is timed
is called in turns, so that a busy spell of the machine meets all alike. qwix comes with the `peers` extra.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import _quantizing, _results
from experiments._command import UsageError, run_main
from experiments._pruning import command
from experiments._quantizing import Images, keyed, lab_for
from experiments._results import Column, Row
from jaxcompress import compressed, nbytes, quantize, report
from jaxcompress.paths import named_leaves
from jaxcompress.quantize import Affine

BATCHES = (1, 128)
KINDS = {"w8": None, "w8a8": 8}
"""The bits of the inputs; weights have eight, a scale an output."""
TIMES = {"step": "training step", **{f"batch {size}": f"batch {size}" for size in BATCHES}}


@dataclass(frozen=True)
class Config(_quantizing.Config):
    """Ours and qwix on a trained network of the experiments."""

    rounds: int = 15
    """Of timing."""


SHORT = Config(seeds=1, epochs=2, batch_size=64, rounds=1)
"""A run of seconds, for tests."""

Apply = Callable[[Any, jax.Array], jax.Array]


def main(config: Config) -> _results.Result:
    """Trains, quantizes by both libraries, measures, and writes the result.

    Raises:
      UsageError: qwix is not installed.
    """
    if importlib.util.find_spec("qwix") is None:
        raise UsageError("this experiment measures beside qwix: pip install jaxcompress[peers] has it")
    lab = lab_for(config)
    found: dict[str, dict[int, dict[str, float]]] = {}
    refused: dict[str, str] = {}
    for seed in range(config.seeds):
        trained = lab.trained(seed)
        arms: dict[str, tuple[Apply, Any, Apply]] = {"float32": (lab.apply, trained, lab.apply)}
        for kind, bits in KINDS.items():
            spec = {"kernel$": Affine(8, activation_bits=bits)}
            ours = quantize.convert(trained, spec)
            arms[f"jaxcompress, {kind}"] = (compressed(lab.apply), ours, quantize.fake(lab.apply, spec))
            matrices = {
                f"^{re.escape(name)}$": True
                for name, w in named_leaves(trained)
                if name.endswith("kernel") and w.ndim == 2
            }
            laid = quantize.outputs_first(ours, matrices)
            arms[f"jaxcompress, {kind}, outputs first"] = (compressed(lab.apply), laid, quantize.fake(lab.apply, spec))
            try:
                arms[f"qwix, {kind}"] = _theirs(lab, trained, bits)
            except ValueError as error:  # weights alone, in a convolution
                refused[kind] = str(error).splitlines()[0]
        times = _timed(lab, config, trained, arms)
        for name, (apply, params, _) in arms.items():
            figures = lab.tested(f"{name}, seed {seed}", params, apply)
            own = {"bytes": float(nbytes(params)), **{key: 1e3 * of[name] for key, of in times.items()}}
            found.setdefault(name, {})[seed] = {**keyed("kept", figures), **own}
        print(f"seed {seed}: done", flush=True)
    result = lab.result(
        name=f"quantize_peer_{config.model}_{config.data}",
        title=f"Beside qwix: {config.model} on {config.data}",
        source=f"{lab.measured} Times are medians of {config.rounds} rounds in which all take turns.",
        command=command("quantize_peer", config),
        selection="nothing was chosen",
        columns=[
            *lab.columns({"kept": "on test data"}),
            Column("bytes", "bytes", 0),
            *(Column(key, f"{title} (ms)", 3) for key, title in TIMES.items()),
        ],
        rows=[Row.measured(name, by_seed) for name, by_seed in found.items()],
        notes=[
            lab.setting(),
            f"qwix {importlib.metadata.version('qwix')}. All kernels have 8 bits and a scale an output; w8a8 rounds "
            "what meets them too, with steps that are found as inputs come. Training steps are Adam's at batch "
            f"{lab.batch}, under fake quantization; latencies are of the integers.",
            *(f"qwix refuses {kind}: {error}" for kind, error in refused.items()),
        ],
    )
    return _results.written(result, config.out)


def _theirs(lab: Images, params: Any, bits: int | None) -> tuple[Apply, Any, Apply]:
    """qwix's function of integers, its parameters, and its function for training."""
    import qwix

    kernels = "|".join(name.removesuffix("/kernel") for name, _ in named_leaves(params) if name.endswith("/kernel"))
    kind = None if bits is None else f"int{bits}"
    rules = [qwix.QuantizationRule(module_path=f"^({kernels})$", weight_qtype="int8", act_qtype=kind)]
    small = qwix.quantize_model(lab.model, qwix.PtqProvider(rules))
    like = jax.eval_shape(small.init, jax.random.key(0), lab.images[:1])["params"]
    training = qwix.quantize_model(lab.model, qwix.QtProvider(rules))
    return (
        lambda params, x: small.apply({"params": params}, x),
        qwix.quantize_params(params, like),
        lambda params, x: training.apply({"params": params}, x),
    )


def _timed(
    lab: Images, config: Config, trained: Any, arms: Mapping[str, tuple[Apply, Any, Apply]]
) -> dict[str, dict[str, float]]:
    """Seconds by what is timed and by whom."""
    times = {}
    for size in BATCHES:
        x = lab.images[:size]
        calls = {name: _call(apply, params, x) for name, (apply, params, _) in arms.items()}
        times[f"batch {size}"] = report.in_turns(calls, config.rounds)
    steps = {name: _stepper(training, trained, lab) for name, (_, _, training) in arms.items()}
    return {"step": report.in_turns(steps, config.rounds), **times}


def _call(apply: Apply, params: Any, x: jax.Array) -> Callable[[], Any]:
    run = jax.jit(apply)
    return lambda: run(params, x)


def _stepper(apply: Apply, params: Any, lab: Images) -> Callable[[], Any]:
    optimizer, (images, labels) = optax.adam(1e-3), (lab.images[: lab.batch], lab.labels[: lab.batch])

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:  # constants would be rounded once
        def loss(params: Any) -> jax.Array:
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels))

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    held = [(params, optimizer.init(params))]

    def call() -> Any:
        held[0] = step(*held[0], images, labels)
        return held[0]

    return call


if __name__ == "__main__":
    run_main(main, Config)
