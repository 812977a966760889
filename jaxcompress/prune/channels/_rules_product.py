"""Rules of matrix products and convolutions: contracted axes must agree, the others pass."""

from typing import Any

from jaxcompress.prune.channels._convolve import convolve
from jaxcompress.prune.channels._labels import Label, outer
from jaxcompress.prune.channels._tape import Call, Step, Tracer, Value, barrier, rule


@rule("dot_general", "ragged_dot_general")
def _dot_general(tracer: Tracer, call: Call) -> list[Value]:
    x, y, *sizes = call.inputs
    (x_contract, y_contract), (x_batch, y_batch) = product_axes(call)
    labels: list[Label] = []
    zero = []
    grouped: tuple[int, ...] = ()
    for v in sizes:  # of groups of rows, each with a matrix of its own: which rows they are is computed
        if v.ndim > 1:
            return barrier(tracer, call)
        numbers = call.params["ragged_dot_dimension_numbers"]
        (rows,), grouped = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
        for each, axes in ((x, [rows]), (y, grouped), (v, [0])):
            tracer.freeze(each, axes, "rows in groups of computed sizes")
        if rows in x_contract:  # a product for each group
            labels, zero = [None], [False]
    for i, j in zip(x_contract, y_contract, strict=True):
        tracer.atoms.unify(x.labels[i], y.labels[j], "contracted with a whole axis")
        tracer.contract(x.labels[i], x.zero[i] or y.zero[j], "is summed over in a product where it is not zero")
        tracer.mark(x, i, "in")
        tracer.mark(y, j, "in")
    for i, j in zip(x_batch, y_batch, strict=True):
        tracer.atoms.unify(x.labels[i], y.labels[j], "a batch axis of a product with a whole one")
        labels.append(x.labels[i])
        zero.append(x.zero[i] or y.zero[j])
    for v, used in ((x, {*x_contract, *x_batch}), (y, {*y_contract, *y_batch, *grouped})):
        for i in range(v.ndim):
            if i not in used:
                labels.append(v.labels[i])
                zero.append(v.zero[i])
                tracer.mark(v, i, "out")
    return [tracer.value(call.avals[0], labels, zero)]


def product_axes(step: Call | Step) -> Any:
    """((axes contracted of the left, of the right), (batch axes, likewise)) of a product, in groups of rows or not."""
    if step.primitive.name == "dot_general":
        return step.params["dimension_numbers"]
    return step.params["ragged_dot_dimension_numbers"].dot_dimension_numbers


@rule("conv_general_dilated", run=lambda runner, step, inputs: _conv_run(runner, step, inputs))
def _conv(tracer: Tracer, call: Call) -> list[Value]:
    x, kernel = call.inputs
    p, numbers = call.params, call.params["dimension_numbers"]
    (x_batch, x_feature, *x_space), (k_out, k_in, *k_space), (o_batch, o_feature, *o_space) = (
        numbers.lhs_spec,
        numbers.rhs_spec,
        numbers.out_spec,
    )
    if p["batch_group_count"] != 1:
        for v in (x, kernel):
            tracer.freeze(v, range(v.ndim), "a convolution grouped along the batch")
        return [tracer.value(call.avals[0])]
    tracer.freeze(kernel, k_space, "a spatial axis of a kernel")
    labels: list[Label] = [None] * x.ndim
    zero = [False] * x.ndim
    labels[o_batch], zero[o_batch] = x.labels[x_batch], x.zero[x_batch]
    for d, (i, o) in enumerate(zip(x_space, o_space, strict=True)):
        at_points = kernel.shape[k_space[d]] == 1 and p["window_strides"][d] == 1 and p["padding"][d] == (0, 0)
        if at_points and p["lhs_dilation"][d] == 1:
            labels[o], zero[o] = x.labels[i], x.zero[i]
        else:
            tracer.freeze(x, [i], "a spatial axis under a convolution")
    groups = p["feature_group_count"]
    inputs, outputs = kernel.shape[k_in], kernel.shape[k_out]
    why = "the channels of a convolution"
    call.extra = None
    if groups == 1:
        tracer.atoms.unify(x.labels[x_feature], kernel.labels[k_in], "contracted with a whole axis")
    else:
        group = tracer.atoms.fresh(groups)
        within = tracer.atoms.fresh(outputs // groups) if outputs > groups else None
        sizes = (groups, outputs // groups)
        tracer.atoms.unify(x.labels[x_feature], outer([group, kernel.labels[k_in]], (groups, inputs)), why)
        tracer.atoms.unify(kernel.labels[k_out], outer([group, within], sizes), why)
        call.extra = group
    tracer.contract(
        kernel.labels[k_in], x.zero[x_feature] or kernel.zero[k_in], "is summed over in a convolution, and not zero"
    )
    labels[o_feature], zero[o_feature] = kernel.labels[k_out], kernel.zero[k_out]
    tracer.mark(kernel, k_in, "in")
    tracer.mark(kernel, k_out, "out")
    return [tracer.value(call.avals[0], labels, zero)]


def _conv_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    params = dict(step.params)
    if step.extra is not None:
        params["feature_group_count"] = runner.count(step.extra)
    return [convolve(*inputs, **params)]
