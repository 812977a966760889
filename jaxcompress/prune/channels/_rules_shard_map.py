"""Rules of `shard_map` and of the collectives in it.

The body sees one shard. An axis that is cut over the mesh is the shard's axis, repeated: what goes must go in every
shard, so that shards stay of one size; a unit then owns an index of each. An axis that is not cut has the same label
inside and outside. Every shard keeps the same indices, so what adds or moves whole shards leaves labels as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.prune.channels._labels import Label
from jaxcompress.prune.channels._rules_control import _finish, _handed
from jaxcompress.prune.channels._tape import RULES, Call, Step, Tracer, Value, barrier, rule

_SHARDS = "cut into shards, of which each must keep the same"


@rule("shard_map", run=lambda runner, step, inputs: _shard_map_run(runner, step, inputs), raw=True)
def _shard_map(tracer: Tracer, call: Call) -> list[Value]:
    p, mesh = call.params, call.params["mesh"]
    jaxpr = getattr(p["jaxpr"], "jaxpr", p["jaxpr"])
    if any(_unreduced(spec) for spec in (*p["in_specs"], *p["out_specs"])):
        call.inputs = [tracer.use(x, call.tape) for x in call.inputs]
        call.run = _bound
        return barrier(tracer, call)
    inside = []
    for x, spec, var in zip(call.inputs, p["in_specs"], jaxpr.invars, strict=True):
        shards = _shards(mesh, spec, x.ndim)
        if x.known and math.prod(shards) > 1:
            value = tracer.value(var.aval, known=True, is_zero=x.is_zero)
        else:
            value = _handed(tracer, x)
            if not x.known:
                value.labels = tuple(_of_shard(tracer, *each) for each in zip(x.labels, x.shape, shards, strict=True))
            value.shape, value.mat = tuple(var.aval.shape), getattr(var.aval, "mat", None)
        inside.append(value)
    outer, tracer.stage = tracer.stage, _staged_within(tracer.stage, p)
    tape = tracer.body(p["jaxpr"], inside)
    _finish(tracer, tape)
    tracer.stage = outer
    call.extra = tape
    outs = []
    for aval, x, spec in zip(call.avals, tape.outputs, p["out_specs"], strict=True):
        shards = _shards(mesh, spec, x.ndim)
        labels = [_repeated(label, n) for label, n in zip(x.labels, shards, strict=True)]
        outs.append(tracer.value(aval, labels, x.zero))
    return outs


def _shard_map_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    return list(_within(lambda *xs: tuple(runner.run(step.extra, xs)), step.params)(*inputs))


def _within(body: Callable[..., Any], params: dict[str, Any], **specs: Any) -> Callable[..., Any]:
    """`body` on shards, over the mesh of an equation's parameters."""
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=specs.get("in_specs", tuple(params["in_specs"])),
        out_specs=specs.get("out_specs", tuple(params["out_specs"])),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )


def _staged_within(outer: Callable[..., Any], params: dict[str, Any]) -> Callable[..., Any]:
    """How functions of shards are staged: where the mesh's axes have names."""

    def stage(fn: Callable[..., Any], inputs: Sequence[Value]) -> Any:
        found: list[Any] = []

        def body() -> tuple[()]:
            placed = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P())
            structs = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed, manual_axis_type=x.mat)
                if x.mat is not None and x.mat.varying
                else jax.ShapeDtypeStruct(x.shape, x.dtype)
                for x in inputs
            ]
            found.append(jax.make_jaxpr(fn)(*structs))
            return ()

        outer(_within(body, params, in_specs=(), out_specs=()), [])
        return found[0]

    return stage


@rule("psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast")
def _over_shards(tracer: Tracer, call: Call) -> list[Value]:
    axes = [axis for axis in call.params.get("axes", ()) if isinstance(axis, int)]
    if axes:  # of the array, not of the mesh: what `vmap` makes of the axis that it gave a name
        call.run = _bound
        like = RULES["reduce_sum" if call.name.startswith("psum") else "reduce_max"]
        return like.label(tracer, dataclasses.replace(call, params={**call.params, "axes": tuple(axes)}))
    pairs = zip(call.avals, call.inputs, strict=True)
    return [tracer.value(aval, x.labels, x.zero) for aval, x in pairs]


@rule("axis_index")
def _axis_index(tracer: Tracer, call: Call) -> list[Value]:
    return [tracer.value(aval) for aval in call.avals]


@rule("all_gather", "all_gather_invariant")
def _all_gather(tracer: Tracer, call: Call) -> list[Value]:
    (x,), axis, out = call.inputs, call.params["all_gather_dimension"], call.avals[0].shape
    labels, zero = list(x.labels), list(x.zero)
    if call.params["tiled"]:
        labels[axis] = _repeated(labels[axis], out[axis] // x.shape[axis])
    else:
        labels.insert(axis, None)
        zero.insert(axis, False)
    return [tracer.value(call.avals[0], labels, zero)]


@rule("reduce_scatter")
def _reduce_scatter(tracer: Tracer, call: Call) -> list[Value]:
    (x,), axis, out = call.inputs, call.params["scatter_dimension"], call.avals[0].shape
    labels, zero = list(x.labels), list(x.zero)
    if call.params["tiled"]:
        labels[axis] = _of_shard(tracer, labels[axis], x.shape[axis], x.shape[axis] // out[axis])
    else:
        tracer.freeze(x, [axis], "each shard takes one index of it")
        del labels[axis], zero[axis]
    return [tracer.value(call.avals[0], labels, zero)]


@rule("all_to_all")
def _all_to_all(tracer: Tracer, call: Call) -> list[Value]:
    (x,), split, to = call.inputs, call.params["split_axis"], call.params["concat_axis"]
    labels = list(x.labels)
    shards = x.shape[split] // call.avals[0].shape[split]
    if split == to:  # its blocks change places, and must be alike
        names, groups = call.params["axis_name"], call.params["axis_index_groups"]
        sizes = call.eqn.ctx.cur_abstract_mesh.shape
        names = names if isinstance(names, list | tuple) else (names,)
        shards = math.prod(sizes[name] for name in names) if groups is None else len(groups[0])
        _of_shard(tracer, labels[split], x.shape[split], shards)
    else:
        labels[split] = _of_shard(tracer, labels[split], x.shape[split], shards)
        labels[to] = _repeated(labels[to], shards)
    return [tracer.value(call.avals[0], labels, x.zero)]


def _shards(mesh: Any, spec: Any, ndim: int) -> list[int]:
    """How many shards each axis is cut into."""
    names = [*spec, *[None] * (ndim - len(spec))]
    names = [() if each is None else each if isinstance(each, tuple) else (each,) for each in names]
    return [math.prod(mesh.shape[name] for name in each) for each in names]


def _unreduced(spec: Any) -> bool:
    return not isinstance(spec, jax.P) or bool(spec.unreduced or spec.reduced)


def _of_shard(tracer: Tracer, label: Label, n: int, shards: int) -> Label:
    """The label of a shard of an axis of `n`; the same indices of each go."""
    if label is None or shards == 1:
        return label
    if n == shards:
        tracer.atoms.freeze(label, _SHARDS)
        return None
    inner = tracer.atoms.fresh(n // shards)
    tracer.atoms.unify(label, np.tile(inner, (shards, 1)), _SHARDS)
    return inner


def _repeated(label: Label, shards: int) -> Label:
    return label if label is None or shards == 1 else np.tile(label, (shards, 1))


def _bound(runner: Any, step: Step, inputs: list[Any]) -> Sequence[Any]:
    outs = step.primitive.bind(*inputs, **step.primitive.get_bind_params(step.params))
    return outs if step.primitive.multiple_results else [outs]
