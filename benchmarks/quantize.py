"""What fake quantization adds to a training step."""

import optax

from benchmarks import _mlp
from benchmarks._harness import Figure, Stepper, benchmark, compiled_bytes, paired
from jaxcompress import quantize

INT8 = quantize.Affine(bits=8, activation_bits=8)


@benchmark("quantize.fake_step")
def fake_step(rounds: int) -> dict[str, Figure]:
    """A step with int8 fake quantization of weights (w8), or of weights and inputs (w8a8), against the plain step."""
    optimizer = optax.adam(1e-3)
    state, data = _mlp.init(optimizer), _mlp.batch()
    plain = _mlp.train_step(optimizer)
    plain_bytes = compiled_bytes(plain, state, data)
    figures = {}
    for name, spec in {"w8": quantize.Affine(bits=8), "w8a8": INT8}.items():
        step = _mlp.train_step(optimizer, quantize.fake(_mlp.apply, {"kernel$": spec}))
        figures[name] = paired(
            Stepper(step, state, data),
            Stepper(plain, state, data),
            "plain adam step",
            rounds,
            seconds=0.5,
            bytes=compiled_bytes(step, state, data),
            baseline_bytes=plain_bytes,
        )
    return figures
