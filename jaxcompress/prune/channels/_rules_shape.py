"""Rules of the primitives that move, cut and join axes: the labels move along."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.prune.channels._labels import Label, joined, outer
from jaxcompress.prune.channels._tape import Call, Step, Tracer, Value, rule


@rule("broadcast_in_dim", run=lambda runner, step, inputs: _broadcast(runner, step, inputs))
def _broadcast_in_dim(tracer: Tracer, call: Call) -> list[Value]:
    x, shape = call.inputs[0], call.avals[0].shape
    placed = dict(zip(call.params["broadcast_dimensions"], range(x.ndim), strict=True))
    labels: list[Label] = []
    zero, axes, held = [], [], []
    for axis, n in enumerate(shape):
        from_axis = placed.get(axis)
        held.append(x.held[from_axis] if x.held and from_axis is not None else None)
        if from_axis is not None and x.shape[from_axis] == n:
            labels.append(x.labels[from_axis])
            zero.append(x.zero[from_axis])
            axes.append(x.source[1][from_axis] if x.source is not None else ())
        else:
            labels.append(tracer.atoms.fresh(n) if n > 1 else None)
            zero.append(x.is_zero)
            axes.append(())
    source = (x.source[0], tuple(axes)) if x.source is not None else None
    keeps = math.prod(shape) == math.prod(x.shape)
    summed = x.summed if keeps else None
    return [tracer.value(call.avals[0], labels, zero, source=source, summed=summed, held=tuple(held))]


def _broadcast(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    shape = runner.shape(step.outputs[0])
    return [lax.broadcast_in_dim(inputs[0], shape, step.params["broadcast_dimensions"])]


@rule("reshape", run=lambda runner, step, inputs: _reshape_run(runner, step, inputs))
def _reshape(tracer: Tracer, call: Call) -> list[Value]:
    x, shape = call.inputs[0], tuple(call.avals[0].shape)
    if call.params["dimensions"] is not None:  # in another order than it lies: vmapped convolutions, order="F"
        x = _in_order(x, call.params["dimensions"])
    labels: list[Label] = [None] * len(shape)
    zero = [False] * len(shape)
    axes: list[tuple[int, ...]] = [()] * len(shape)
    held: list[Any] = [None] * len(shape)
    if 0 in x.shape:
        tracer.freeze(x, range(x.ndim), "an empty array")
        return [tracer.value(call.avals[0])]
    for before, after in _blocks(x.shape, shape):
        old = [i for i in before if x.shape[i] > 1]
        new = [i for i in after if shape[i] > 1]
        if [x.shape[i] for i in old] == [shape[i] for i in new]:
            parts = [x.labels[i] for i in old]
        else:
            sizes = [x.shape[i] for i in old]
            merged = outer([x.labels[i] for i in old], sizes)
            parts = [merged] if len(new) == 1 else tracer.atoms.split(merged, [shape[i] for i in new], "is split")
        for i, label in zip(new, parts, strict=True):
            labels[i] = label
            cut = [j for j in old if x.labels[j] is not None]
            zero[i] = all(x.zero[j] for j in cut)
            held[i] = x.held[cut[0]] if x.held and len(cut) == 1 else None
            if x.source is not None:
                axes[i] = tuple(sorted({leaf for j in old for leaf in x.source[1][j]}))
    source = (x.source[0], tuple(axes)) if x.source is not None else None
    return [tracer.value(call.avals[0], labels, zero, source=source, summed=x.summed, held=tuple(held))]


def _reshape_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    return [lax.reshape(inputs[0], runner.shape(step.outputs[0]), step.params["dimensions"])]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes with the same number of elements before and after."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = math.prod(old[k] for k in before), math.prod(new[k] for k in after)
        i, j = i + len(before), j + len(after)
        while a != b:
            if a < b:
                before.append(i)
                a, i = a * old[i], i + 1
            else:
                after.append(j)
                b, j = b * new[j], j + 1
        blocks.append((before, after))
    return blocks


@rule("transpose")
def _transpose(tracer: Tracer, call: Call) -> list[Value]:
    return [_permuted(tracer, call, call.params["permutation"])]


@rule("squeeze")
def _squeeze(tracer: Tracer, call: Call) -> list[Value]:
    gone = {axis % call.inputs[0].ndim for axis in call.params["dimensions"]}
    return [_permuted(tracer, call, [axis for axis in range(call.inputs[0].ndim) if axis not in gone])]


def _permuted(tracer: Tracer, call: Call, order: Sequence[int]) -> Value:
    x = _in_order(call.inputs[0], order)
    return tracer.value(call.avals[0], x.labels, x.zero, source=x.source, summed=x.summed, held=x.held)


def _in_order(x: Value, order: Sequence[int]) -> Value:
    """The value with its axes in another order, or fewer of them."""
    source = (x.source[0], tuple(x.source[1][i] for i in order)) if x.source is not None else None
    shape, labels = tuple(x.shape[i] for i in order), tuple(x.labels[i] for i in order)
    zero, held = tuple(x.zero[i] for i in order), tuple(x.held[i] for i in order) if x.held else ()
    return Value(shape, x.dtype, labels, zero, source=source, summed=x.summed, held=held)


@rule("rev")
def _rev(tracer: Tracer, call: Call) -> list[Value]:
    (x,) = call.inputs
    labels = [
        label[::-1] if label is not None and axis in call.params["dimensions"] else label
        for axis, label in enumerate(x.labels)
    ]
    return [tracer.value(call.avals[0], labels, x.zero, source=x.source)]


@rule("concatenate")
def _concatenate(tracer: Tracer, call: Call) -> list[Value]:
    along = call.params["dimension"]
    out = _beside(tracer, call, along)
    label = joined([x.labels[along] for x in call.inputs], [x.shape[along] for x in call.inputs])
    labels = (*out.labels[:along], label, *out.labels[along + 1 :])
    return [tracer.value(call.avals[0], labels, out.zero)]


@rule("stack")
def _stack(tracer: Tracer, call: Call) -> list[Value]:
    axis, first = call.params["axis"], call.inputs[0]
    out = _beside(tracer, call, None)
    labels, zero = list(out.labels), list(out.zero)
    labels.insert(axis, None)
    zero.insert(axis, False)
    assert len(labels) == first.ndim + 1
    return [tracer.value(call.avals[0], labels, zero)]


def _beside(tracer: Tracer, call: Call, along: int | None) -> Value:
    """The first input with labels that agree with the others' on all axes but one."""
    first, zero = call.inputs[0], []
    for axis in range(first.ndim):
        zero.append(all(x.zero[axis] for x in call.inputs if x.labels[axis] is not None or axis != along))
        for x in call.inputs[1:] if axis != along else []:
            tracer.atoms.unify(first.labels[axis], x.labels[axis], f"meets a whole axis in {call.name!r}")
    return Value(first.shape, first.dtype, first.labels, tuple(zero))


@rule("tile")
def _tile(tracer: Tracer, call: Call) -> list[Value]:
    (x,) = call.inputs
    pairs = zip(x.labels, call.params["reps"], strict=True)
    return [
        tracer.value(
            call.avals[0], [np.tile(label, (n, 1)) if label is not None else None for label, n in pairs], x.zero
        )
    ]


@rule("slice", run=lambda runner, step, inputs: [take(runner, inputs[0], step.inputs[0], step.extra)])
def _slice(tracer: Tracer, call: Call) -> list[Value]:
    p, (x,) = call.params, call.inputs
    strides = p["strides"] or (1,) * x.ndim
    ranges = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    call.extra = [np.arange(*bounds) for bounds in ranges]
    return [chosen(tracer, call, x, call.extra)]


@rule("split", run=lambda runner, step, inputs: _split_run(runner, step, inputs))
def _split(tracer: Tracer, call: Call) -> list[Value]:
    (x,), axis, at = call.inputs, call.params["axis"], 0
    outs, labels = [], []
    for aval in call.avals:
        n = aval.shape[axis]
        label = x.labels[axis]
        label = tracer.piece(label[at : at + n], "a single index of a split axis") if label is not None else None
        labels.append((at, n))
        at += n
        outs.append(tracer.value(aval, (*x.labels[:axis], label, *x.labels[axis + 1 :]), x.zero, source=x.source))
    call.extra = labels
    return outs


def _split_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    axis = step.params["axis"]
    sizes = tuple(runner.shape(out)[axis] for out in step.outputs)
    return list(step.primitive.bind(inputs[0], axis=axis, sizes=sizes))


@rule("pad", run=lambda runner, step, inputs: _pad_run(runner, step, inputs))
def _pad(tracer: Tracer, call: Call) -> list[Value]:
    x, filler = call.inputs
    labels: list[Label] = []
    zero = []
    parts: list[Any] = []
    for axis, (low, high, interior) in enumerate(call.params["padding_config"]):
        label, n = x.labels[axis], x.shape[axis]
        if interior:
            tracer.atoms.freeze(label, "padded between its indices")
            label = None
        if label is None or not (low or high):
            labels.append(label)
            parts.append(None)
            zero.append(x.zero[axis])
            continue
        begin = None if low <= 0 else tracer.atoms.fresh(low)
        end = None if high <= 0 else tracer.atoms.fresh(high)
        inner = label[max(0, -low) : n - max(0, -high)]
        if low < 0 or high < 0:
            tracer.pieces.append(inner)
        whole = joined([begin, inner, end], [max(low, 0), len(inner), max(high, 0)])
        if whole is not None and len(whole) == 1:
            tracer.atoms.freeze(whole, "padded to a single index")
            whole = None
        labels.append(whole)
        parts.append((label[: max(0, -low)], label[n - max(0, -high) :], begin, end))
        zero.append(x.zero[axis])
    call.extra = parts
    filled = any(low > 0 or high > 0 or interior for low, high, interior in call.params["padding_config"])
    if filled and not filler.is_zero:
        zero = [False] * x.ndim
    return [tracer.value(call.avals[0], labels, zero)]


def _pad_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    def count(label: Label) -> int:
        return 0 if label is None or not len(label) else runner.count(label)

    config = []
    for (low, high, interior), parts in zip(step.params["padding_config"], step.extra, strict=True):
        if parts is not None:
            low = count(parts[2]) if parts[2] is not None else -count(parts[0])
            high = count(parts[3]) if parts[3] is not None else -count(parts[1])
        config.append((low, high, interior))
    return [lax.pad(inputs[0], inputs[1], config)]


def chosen(tracer: Tracer, call: Call, x: Value, picked: Sequence[np.ndarray]) -> Value:
    """The value made of the picked indices of each axis."""
    labels: list[Label] = []
    for axis, indices in enumerate(picked):
        label = x.labels[axis]
        if label is not None and not np.array_equal(indices, np.arange(x.shape[axis])):
            label = tracer.piece(label[indices], "a single index of its axis is used by itself")
        labels.append(label)
    return tracer.value(call.avals[0], labels, x.zero, source=x.source)


def take(runner: Any, x: jax.Array, value: Value, picked: Sequence[np.ndarray]) -> jax.Array:
    """Of a smaller `x`, those of the picked original indices of each axis that are left."""
    for axis, indices in enumerate(picked):
        left = runner.positions(value.labels[axis], value.shape[axis])
        wanted = indices[np.isin(indices, left)]
        x = pick(x, np.searchsorted(left, wanted), axis)
    return x


def pick(x: Any, indices: np.ndarray, axis: int) -> Any:
    """`x` at static indices of an axis: a slice where they are evenly spaced."""
    n = len(indices)
    if n == x.shape[axis] and np.array_equal(indices, np.arange(n)):
        return x
    steps = np.unique(np.diff(indices))
    if n == 1 or (len(steps) == 1 and steps[0] > 0):
        step = int(steps[0]) if n > 1 else 1
        return lax.slice_in_dim(x, int(indices[0]), int(indices[-1]) + 1, step, axis)
    return jnp.take(x, jnp.asarray(indices), axis=axis, mode="clip", unique_indices=len(set(indices)) == n)
