"""Rules of gathers, scatters and slices at computed places: an axis that is indexed stays whole, others pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxcompress.prune.channels._labels import Label
from jaxcompress.prune.channels._rules_shape import chosen, pick, take
from jaxcompress.prune.channels._tape import Call, Step, Tracer, Value, concrete, rule


@rule("dynamic_slice", run=lambda runner, step, inputs: _dynamic_slice_run(runner, step, inputs), raw=True)
def _dynamic_slice(tracer: Tracer, call: Call) -> list[Value]:
    x, sizes = tracer.use(call.inputs[0], call.tape), call.params["slice_sizes"]
    known = [start for start in map(concrete, call.inputs[1:]) if start is not None]
    call.inputs = [x, *call.inputs[1:]]
    if len(known) == x.ndim:  # places known while tracing
        clamped = [int(np.clip(s, 0, n - k)) for s, n, k in zip(known, x.shape, sizes, strict=True)]
        call.extra = [np.arange(s, s + k) for s, k in zip(clamped, sizes, strict=True)]
        call.run = lambda runner, step, inputs: [take(runner, inputs[0], step.inputs[0], step.extra)]
        return [chosen(tracer, call, x, call.extra)]
    whole = [k == n for k, n in zip(sizes, x.shape, strict=True)]
    tracer.freeze(x, [i for i in range(x.ndim) if not whole[i]], "it is sliced at a place that is computed")
    labels = [label if whole[i] else None for i, label in enumerate(x.labels)]
    return [tracer.value(call.avals[0], labels, x.zero, source=x.source)]


def _dynamic_slice_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    return [lax.dynamic_slice(inputs[0], inputs[1:], runner.shape(step.outputs[0]))]


@rule("dynamic_update_slice", raw=True)
def _dynamic_update_slice(tracer: Tracer, call: Call) -> list[Value]:
    x, update = (tracer.use(v, call.tape) for v in call.inputs[:2])
    call.inputs = [x, update, *call.inputs[2:]]
    labels: list[Label] = []
    zero = []
    for axis, n in enumerate(x.shape):
        if update.shape[axis] == n:
            tracer.atoms.unify(x.labels[axis], update.labels[axis], "written into a whole axis")
            labels.append(x.labels[axis])
        else:
            for v in (x, update):
                tracer.freeze(v, [axis], "it is written to at a place that is computed")
            labels.append(None)
        zero.append(x.zero[axis] and update.zero[axis])
    return [tracer.value(call.avals[0], labels, zero)]


@rule("gather", run=lambda runner, step, inputs: _gather_run(runner, step, inputs), raw=True)
def _gather(tracer: Tracer, call: Call) -> list[Value]:
    numbers, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    x = tracer.use(call.inputs[0], call.tape)
    static = _static(x, call.inputs[1], numbers, sizes)
    if static is not None:
        call.inputs, call.extra, call.run = [x], static, _static_run
        return [_selected(tracer, call, x, *static)]
    indices_value = tracer.use(call.inputs[1], call.tape)
    call.inputs = [x, indices_value]
    batch = {d: j for d, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)}
    windows = [d for d in range(x.ndim) if d not in numbers.collapsed_slice_dims and d not in batch]
    placed = _placed(numbers.start_index_map, call.params["mode"])
    passing = [d for d in windows if sizes[d] == x.shape[d] and d not in placed]
    for d, j in batch.items():
        tracer.atoms.unify(x.labels[d], indices_value.labels[j], "a batch axis of a lookup in a whole one")
    tracer.freeze(x, [d for d in range(x.ndim) if d not in passing and d not in batch], "it is indexed")
    tracer.freeze(indices_value, [indices_value.ndim - 1], "the coordinates of a lookup")
    rows = iter(range(indices_value.ndim - 1))
    labels, zero, axes = [], [], []
    for axis in range(len(call.avals[0].shape)):
        if axis in numbers.offset_dims:
            d = windows[numbers.offset_dims.index(axis)]
            labels.append(x.labels[d] if d in passing else None)
            zero.append(x.zero[d])
            axes.append(x.source[1][d] if x.source is not None else ())
        else:
            j = next(rows)
            labels.append(indices_value.labels[j])
            zero.append(any(x.zero[d] for d, k in batch.items() if k == j))
            axes.append(())
    call.extra = passing
    fill = call.params["fill_value"]
    if call.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and not (fill is None or fill == 0 or fill != fill):
        zero = [False] * len(zero)  # a place outside is no zero; NaN is NaN in either model
    source = (x.source[0], tuple(axes)) if x.source is not None else None
    return [tracer.value(call.avals[0], labels, zero, source=source)]


def _placed(indexed: Sequence[int], mode: Any) -> Sequence[int]:
    """The axes where a whole window may lie elsewhere: not where places are clipped, as those of a `vmap`ped slice."""
    return () if mode == lax.GatherScatterMode.CLIP else indexed


def _gather_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    x, shape = step.inputs[0], runner.shape(step.inputs[0])
    sizes = tuple(shape[d] if d in step.extra else size for d, size in enumerate(step.params["slice_sizes"]))
    assert len(sizes) == x.ndim
    return [step.primitive.bind(*inputs, **{**step.params, "slice_sizes": sizes})]


def _static(x: Value, indices: Value, numbers: Any, sizes: Sequence[int]) -> tuple[int, np.ndarray, int] | None:
    """(axis, its indices, where they stand in the result) of a lookup along one axis at places known while tracing."""
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims or indices.ndim != 2 or indices.shape[1] != 1:
        return None
    (axis,) = numbers.start_index_map
    whole = all(sizes[d] == n for d, n in enumerate(x.shape) if d != axis)
    if tuple(numbers.collapsed_slice_dims) != (axis,) or sizes[axis] != 1 or not whole:
        return None
    found = concrete(indices)
    if found is None or (found < 0).any() or (found >= x.shape[axis]).any() or not found.size:
        return None
    (place,) = [i for i in range(x.ndim) if i not in numbers.offset_dims]
    return axis, found[:, 0].astype(np.int64), place


def _selected(tracer: Tracer, call: Call, x: Value, axis: int, indices: np.ndarray, place: int) -> Value:
    labels, zero, axes = list(x.labels), list(x.zero), list(x.source[1]) if x.source is not None else []
    label = labels.pop(axis)
    labels.insert(
        place, tracer.piece(label[indices], "a single index is used by itself") if label is not None else None
    )
    zero.insert(place, zero.pop(axis))
    if x.source is None:
        return tracer.value(call.avals[0], labels, zero)
    axes.insert(place, axes.pop(axis))
    return tracer.value(call.avals[0], labels, zero, source=(x.source[0], tuple(axes)))


def _static_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    axis, indices, place = step.extra
    value = step.inputs[0]
    left = runner.positions(value.labels[axis], value.shape[axis])
    wanted = indices[np.isin(indices, left)]
    x = pick(inputs[0], np.searchsorted(left, wanted), axis)
    order = [d for d in range(value.ndim) if d != axis]
    order.insert(place, axis)
    return [lax.transpose(x, order)]


@rule("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter_add", "scatter_mul")
def _scatter(tracer: Tracer, call: Call) -> list[Value]:
    x, indices, updates = call.inputs
    numbers = call.params["dimension_numbers"]
    places = _places(x, indices, updates, numbers)
    if places is not None:
        return [_scattered(tracer, call, *places)]
    inserted, batch = numbers.inserted_window_dims, numbers.operand_batching_dims
    windows = [d for d in range(x.ndim) if d not in inserted and d not in batch]
    tracer.freeze(indices, [indices.ndim - 1], "the coordinates of a scatter")
    rows = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
    for j, axis in enumerate(rows):
        tracer.atoms.unify(updates.labels[axis], indices.labels[j], "scattered to whole places")
    placed = _placed(numbers.scatter_dims_to_operand_dims, call.params["mode"])
    labels: list[Label] = [None] * x.ndim
    zero = [False] * x.ndim
    for d, axis in zip(windows, numbers.update_window_dims, strict=True):
        if updates.shape[axis] == x.shape[d] and d not in placed:
            tracer.atoms.unify(x.labels[d], updates.labels[axis], "scattered into a whole axis")
            labels[d], zero[d] = x.labels[d], x.zero[d] and updates.zero[axis]
        else:
            tracer.freeze(x, [d], "it is scattered into")
            tracer.freeze(updates, [axis], "it is scattered into")
    for d, j in zip(batch, numbers.scatter_indices_batching_dims, strict=True):
        tracer.atoms.unify(x.labels[d], indices.labels[j], "a batch axis of a scatter")
        labels[d], zero[d] = x.labels[d], x.zero[d] and updates.zero[rows[j]]
    tracer.freeze(x, inserted, "it is scattered into")
    _check_sums(tracer, updates, rows, batch, numbers)
    return [tracer.value(call.avals[0], labels, _zero(call, zero))]


def _zero(call: Call, zero: list[bool]) -> list[bool]:
    applied = call.name == "scatter" and call.params["update_jaxpr"] is not None
    return [False] * len(zero) if applied else zero  # x.at[...].apply(f), and f(0) may be anything


def _places(x: Value, indices: Value, updates: Value, numbers: Any) -> tuple[int, int | None, np.ndarray] | None:
    """(axis, the updates' axis, the places) of a scatter along one axis, at places known while tracing.

    The updates have no such axis where they go to a single place.
    """
    if len(numbers.scatter_dims_to_operand_dims) != 1 or numbers.operand_batching_dims or indices.ndim > 2:
        return None
    (axis,) = numbers.scatter_dims_to_operand_dims
    others = [d for d in range(x.ndim) if d not in numbers.inserted_window_dims]
    windows = dict(zip(others, numbers.update_window_dims, strict=True))
    rows = [i for i in range(updates.ndim) if i not in numbers.update_window_dims]
    whole = all(d == axis or (d in windows and updates.shape[windows[d]] == n) for d, n in enumerate(x.shape))
    found = concrete(indices)
    if not whole or found is None or not found.size or (axis in windows and rows):
        return None
    first = found.reshape(-1).astype(np.int64)
    places = first + np.arange(updates.shape[windows[axis]]) if axis in windows else first
    if not places.size or places.min() < 0 or places.max() >= x.shape[axis]:
        return None
    return axis, windows.get(axis, rows[0] if rows else None), places


def _scattered(tracer: Tracer, call: Call, axis: int, along: int | None, places: np.ndarray) -> Value:
    x, indices, updates = call.inputs
    numbers, label = call.params["dimension_numbers"], x.labels[axis]
    tracer.freeze(indices, range(indices.ndim), "the coordinates of a scatter")
    others = [d for d in range(x.ndim) if d not in numbers.inserted_window_dims]
    zero = list(x.zero)
    for d, i in zip(others, numbers.update_window_dims, strict=True):
        if d != axis:
            tracer.atoms.unify(x.labels[d], updates.labels[i], "scattered into a whole axis")
            zero[d] = x.zero[d] and updates.zero[i]
    written = tracer.piece(label[places], "a single index is written to by itself") if label is not None else None
    if along is not None:
        tracer.atoms.unify(written, updates.labels[along], "scattered to places that stay")
        zero[axis] = x.zero[axis] and updates.zero[along]
    call.inputs, call.extra, call.run = [x, updates], (axis, places, indices.ndim), _scattered_run
    return tracer.value(call.avals[0], x.labels, _zero(call, zero))


def _scattered_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    axis, places, ndim = step.extra
    value, (x, updates) = step.inputs[0], inputs
    left = runner.positions(value.labels[axis], value.shape[axis])
    moved = np.searchsorted(left, places[np.isin(places, left)]).astype(np.int32)
    indices = moved[:, None] if ndim == 2 else moved[:1]  # one behind the other they were, and are
    return [step.primitive.bind(x, indices, updates, **step.params)]


def _check_sums(tracer: Tracer, updates: Value, rows: Sequence[int], batch: Sequence[int], numbers: Any) -> None:
    """Update rows that go are left out of sums, products and places: they must stay."""
    batched = set(numbers.scatter_indices_batching_dims)
    for j, axis in enumerate(rows):
        if j not in batched:
            tracer.freeze(updates, [axis], "its rows are scattered")
