"""Rules of sums, extrema, windows, sorts and the like: most keep the axes whole that they run along."""

from collections.abc import Sequence
from typing import Any

from jaxcompress.prune.channels._convolve import is_as_written
from jaxcompress.prune.channels._pool import pool
from jaxcompress.prune.channels._tape import Call, Step, Tracer, Value, rule


@rule("reduce_sum")
def _reduce_sum(tracer: Tracer, call: Call) -> list[Value]:
    (x,), axes = call.inputs, call.params["axes"]
    for axis in axes:
        tracer.contract(x.labels[axis], x.zero[axis], "is summed over where it is not zero")
    width = 1
    for axis in axes:
        width *= x.shape[axis]
    labels = tuple(label for axis in axes if (label := x.labels[axis]) is not None)
    return [_without(tracer, call, x, axes, summed=(labels, width) if labels else None)]


@rule("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin")
def _reduce(tracer: Tracer, call: Call) -> list[Value]:
    (x,), axes = call.inputs, call.params["axes"]
    tracer.freeze(x, axes, f"{call.name!r} runs along it")
    return [_without(tracer, call, x, axes)]


def _without(tracer: Tracer, call: Call, x: Value, axes: Sequence[int], **more: Any) -> Value:
    left = [axis for axis in range(x.ndim) if axis not in axes]
    empty = 0 in (x.shape[axis] for axis in axes)  # the product of nothing is 1
    keeps = not empty and not call.name.startswith("arg")
    zero = [x.zero[axis] and keeps for axis in left]
    held = tuple(0 if x.held and x.held[axis] == 0 and keeps else None for axis in left)
    return tracer.value(call.avals[0], [x.labels[axis] for axis in left], zero, held=held, **more)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(tracer: Tracer, call: Call) -> list[Value]:
    (x,), axis = call.inputs, call.params["axis"]
    tracer.freeze(x, [axis], f"{call.name!r} runs along it")
    labels = [label if i != axis else None for i, label in enumerate(x.labels)]
    return [tracer.value(call.avals[0], labels, x.zero if call.name != "cumlogsumexp" else None)]


@rule("sort")
def _sort(tracer: Tracer, call: Call) -> list[Value]:
    along, first = call.params["dimension"], call.inputs[0]
    for x in call.inputs:
        tracer.freeze(x, [along], "it is sorted along")
        for axis in range(x.ndim):
            if axis != along:
                tracer.atoms.unify(first.labels[axis], x.labels[axis], "sorted beside a whole axis")
    labels = [label if axis != along else None for axis, label in enumerate(first.labels)]
    return [tracer.value(aval, labels, x.zero) for aval, x in zip(call.avals, call.inputs, strict=True)]


@rule("top_k")
def _top_k(tracer: Tracer, call: Call) -> list[Value]:
    (x,) = call.inputs
    axis = call.params.get("axis", x.ndim - 1) % x.ndim
    tracer.freeze(x, [axis], "the largest along it are taken")
    labels = [label if i != axis else None for i, label in enumerate(x.labels)]
    return [tracer.value(call.avals[0], labels, x.zero), tracer.value(call.avals[1], labels)]


def _window_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    if is_as_written():
        return [step.primitive.bind(*inputs, **step.params)]
    return [pool(step.primitive, inputs[0], step.params)]


@rule("reduce_window_max", "reduce_window_min", run=_window_run)
@rule("reduce_window_sum")
def _window(tracer: Tracer, call: Call) -> list[Value]:
    (x,) = call.inputs
    axes = _windowed(call.params)
    tracer.freeze(x, axes, "a window runs along it")
    labels = [label if axis not in axes else None for axis, label in enumerate(x.labels)]
    return [tracer.value(call.avals[0], labels, x.zero)]


def _windowed(p: dict[str, Any]) -> list[int]:
    """The axes that a window of more than one index, or with steps or padding, runs along."""
    n = len(p["window_dimensions"])
    ones = (1,) * n
    base, dilation = p.get("base_dilation", ones), p.get("window_dilation", ones)
    return [
        i
        for i in range(n)
        if (p["window_dimensions"][i], p["window_strides"][i], base[i], dilation[i], tuple(p["padding"][i]))
        != (1, 1, 1, 1, (0, 0))
    ]


@rule("select_and_scatter_add", "select_and_gather_add")
def _select_and_add(tracer: Tracer, call: Call) -> list[Value]:
    moved, x = call.inputs  # the cotangent, or the tangent
    axes = _windowed(call.params)
    for v in call.inputs:
        tracer.freeze(v, axes, "a window runs along it")
    for axis in range(x.ndim):
        tracer.atoms.unify(moved.labels[axis], x.labels[axis], "a window's maximum of a whole axis")
    labels = [label if axis not in axes else None for axis, label in enumerate(x.labels)]
    return [tracer.value(call.avals[0], labels, moved.zero)]


@rule("fft")
def _fft(tracer: Tracer, call: Call) -> list[Value]:
    (x,) = call.inputs
    axes = range(x.ndim - len(call.params["fft_lengths"]), x.ndim)
    tracer.freeze(x, axes, "a Fourier transform runs along it")
    labels = [label if axis not in axes else None for axis, label in enumerate(x.labels)]
    return [tracer.value(call.avals[0], labels, x.zero)]


@rule("random_bits", "random_gamma", "rng_bit_generator", run=lambda runner, step, inputs: _drawn(runner, step, inputs))
def _random(tracer: Tracer, call: Call) -> list[Value]:
    """Random numbers are drawn as for the whole model, and then cut: dropout stays what it was."""
    for x in call.inputs:
        tracer.freeze(x, range(x.ndim), "a random key")
    labels = [[tracer.atoms.fresh(n) if n > 1 else None for n in aval.shape] for aval in call.avals]
    if call.name == "rng_bit_generator":  # the new key, and the bits
        labels[0] = [None] * len(labels[0])
    return [tracer.value(aval, each) for aval, each in zip(call.avals, labels, strict=True)]


def _drawn(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    outs = step.primitive.bind(*inputs, **step.params)
    outs = outs if step.primitive.multiple_results else [outs]
    return [runner.cut(x, value) for x, value in zip(outs, step.outputs, strict=True)]


@rule("random_seed", "random_wrap", "random_unwrap", "random_split", "random_clone")
def _keys(tracer: Tracer, call: Call) -> list[Value]:
    for x in call.inputs:
        tracer.freeze(x, range(x.ndim), "a random key")
    return [tracer.value(aval) for aval in call.avals]
