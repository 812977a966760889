"""Rules of loops, branches, rematerialisation and custom derivatives: their bodies are tapes of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxcompress.prune.channels._tape import Call, Step, Tape, Tracer, Value, live, rule

_LOOP = "carried into a loop beside a whole axis"


def _handed(tracer: Tracer, x: Value, zero: Sequence[bool] | None = None) -> Value:
    """A body's input that is an outer value."""
    if x.known:
        return Value(x.shape, x.dtype, x.labels, x.zero, known=True, is_zero=x.is_zero, whole=x, mat=x.mat)
    return Value(x.shape, x.dtype, x.labels, tuple(zero) if zero is not None else x.zero, source=x.source, mat=x.mat)


def _settled(tracer: Tracer, trace: Callable[[list[list[bool]]], list[Value]], carry: Sequence[Value]) -> None:
    """Trace a loop's body until what it says of zeros in the carry holds after a turn, too.

    What an earlier trace noted stays: it holds in the first turns.
    """
    zero = [list(x.zero) for x in carry]
    while True:
        outs = trace(zero)
        after = [[a and b for a, b in zip(z, out.zero, strict=True)] for z, out in zip(zero, outs, strict=True)]
        if after == zero:
            return
        zero = after


def _agree(tracer: Tracer, before: Sequence[Value], after: Sequence[Value], why: str) -> None:
    for a, b in zip(before, after, strict=True):
        for x, y in zip(a.labels, b.labels, strict=True):
            tracer.atoms.unify(x, y, why)


def _finish(tracer: Tracer, tape: Tape) -> None:
    tape.outputs = [tracer.use(v, tape) for v in tape.outputs]


@rule("scan", run=lambda runner, step, inputs: _scan_run(runner, step, inputs), raw=True)
def _scan(tracer: Tracer, call: Call) -> list[Value]:
    consts, init, xs = _scan_parts(call.params, call.inputs)
    init, xs = [tracer.use(v, call.tape) for v in init], [tracer.use(v, call.tape) for v in xs]
    call.inputs = [*consts, *init, *xs]
    for x in xs:
        tracer.freeze(x, [0], "a loop runs along it")
    slices = []
    for x in xs:
        source = (x.source[0], x.source[1][1:]) if x.source is not None else None
        slices.append(Value(x.shape[1:], x.dtype, x.labels[1:], x.zero[1:], source=source, mat=x.mat))
    tape = Tape([])

    def trace(zero: list[list[bool]]) -> list[Value]:
        nonlocal tape
        carry = [_handed(tracer, x, z) for x, z in zip(init, zero, strict=True)]
        tape = tracer.body(call.params["jaxpr"], [*(_handed(tracer, x) for x in consts), *carry, *slices])
        _finish(tracer, tape)
        return tape.outputs[: len(init)]

    for x in init:
        x.source = None  # a carried parameter is only one in the first turn
    _settled(tracer, trace, init)
    _agree(tracer, init, tape.outputs[: len(init)], _LOOP)
    call.extra = tape
    outs = [
        tracer.value(aval, out.labels, out.zero)
        for aval, out in zip(call.avals[: len(init)], tape.outputs[: len(init)], strict=True)
    ]
    for aval, y in zip(call.avals[len(init) :], tape.outputs[len(init) :], strict=True):
        outs.append(tracer.value(aval, (None, *y.labels), (False, *y.zero)))
    return outs


def _scan_parts(params: dict[str, Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    if "ft_in" in params:  # JAX 0.12
        consts, init, xs = map(list, params["ft_in"].update(list(inputs)).unpack())
        return consts, init, xs
    fixed, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(inputs[:fixed]), list(inputs[fixed:carried]), list(inputs[carried:])


def _scan_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    consts, init, xs = _scan_parts(step.params, inputs)

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = runner.run(step.extra, [*consts, *carry, *x])
        return outs[: len(init)], outs[len(init) :]

    p = step.params
    carry, ys = jax.lax.scan(body, init, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]


@rule("while", run=lambda runner, step, inputs: _while_run(runner, step, inputs), raw=True)
def _while(tracer: Tracer, call: Call) -> list[Value]:
    p = call.params
    a, b = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    tests, consts = call.inputs[:a], call.inputs[a:b]
    init = [tracer.use(v, call.tape) for v in call.inputs[b:]]
    call.inputs = [*tests, *consts, *init]
    for x in init:
        x.source = None
    tapes: list[Tape] = []

    def trace(zero: list[list[bool]]) -> list[Value]:
        carry = [_handed(tracer, x, z) for x, z in zip(init, zero, strict=True)]
        body = tracer.body(p["body_jaxpr"], [*(_handed(tracer, x) for x in consts), *carry])
        carry = [_handed(tracer, x, z) for x, z in zip(init, zero, strict=True)]
        test = tracer.body(p["cond_jaxpr"], [*(_handed(tracer, x) for x in tests), *carry])
        _finish(tracer, body)
        _finish(tracer, test)
        tapes[:] = [test, body]
        return body.outputs

    _settled(tracer, trace, init)
    _agree(tracer, init, tapes[1].outputs, _LOOP)
    call.extra = (*tapes, a, b)
    return [tracer.value(aval, out.labels, out.zero) for aval, out in zip(call.avals, tapes[1].outputs, strict=True)]


def _while_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    test, body, a, b = step.extra
    tests, consts, init = inputs[:a], inputs[a:b], inputs[b:]
    return jax.lax.while_loop(
        lambda carry: runner.run(test, [*tests, *carry])[0],
        lambda carry: runner.run(body, [*consts, *carry]),
        init,
    )


@rule("cond", run=lambda runner, step, inputs: _cond_run(runner, step, inputs), raw=True)
def _cond(tracer: Tracer, call: Call) -> list[Value]:
    index, *operands = call.inputs
    tapes = [tracer.body(b, [_handed(tracer, x) for x in operands]) for b in call.params["branches"]]
    for tape in tapes:
        _finish(tracer, tape)
        _agree(tracer, tapes[0].outputs, tape.outputs, "another branch has a whole axis there")
    call.extra = tapes
    call.inputs = [tracer.use(index, call.tape), *operands]
    outs = []
    for i, aval in enumerate(call.avals):
        branches = [tape.outputs[i] for tape in tapes]
        zero = [all(flags) for flags in zip(*(x.zero for x in branches), strict=True)]
        outs.append(tracer.value(aval, branches[0].labels, zero))
    return outs


def _cond_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    branches = [lambda *args, tape=tape: runner.run(tape, args) for tape in step.extra]
    return jax.lax.switch(jnp.asarray(inputs[0], jnp.int32), branches, *inputs[1:])


@rule("remat2", "checkpoint", "remat", run=lambda runner, step, inputs: _remat_run(runner, step, inputs), raw=True)
def _remat(tracer: Tracer, call: Call) -> list[Value]:
    tape = tracer.body(call.params["jaxpr"], [_handed(tracer, x) for x in call.inputs])
    _finish(tracer, tape)
    call.extra = tape
    return [tracer.value(aval, x.labels, x.zero) for aval, x in zip(call.avals, tape.outputs, strict=True)]


def _remat_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    body = jax.checkpoint(
        lambda *args: runner.run(step.extra, args),
        prevent_cse=step.params["prevent_cse"],
        policy=step.params["policy"],
    )
    return body(*inputs)


@rule("custom_jvp_call", run=lambda runner, step, inputs: _custom_jvp_run(runner, step, inputs))
def _custom_jvp(tracer: Tracer, call: Call) -> list[Value]:
    n, moved = len(call.inputs), [_differentiable(x) for x in call.inputs]
    primal = _primal(tracer, call)
    call.extra = (primal, None, moved)
    if not tracer.in_derivative:  # a rule that calls its own function would never end
        _, jvp = call.primitive.get_bind_params(call.params)["subfuns"]

        def flat(*xs: Any) -> list[Any]:
            tangents = iter(xs[n:])
            given = [
                next(tangents) if is_moved else SymbolicZero(jax.typeof(x).to_tangent_aval())
                for x, is_moved in zip(xs[:n], moved, strict=True)
            ]
            outs = jvp.call_wrapped(*xs[:n], *given)
            half = len(outs) // 2
            return [*outs[:half], *(_dense(t) for t, out in zip(outs[half:], outs, strict=False) if _moves(out))]

        tangents = [x for x, is_moved in zip(call.inputs, moved, strict=True) if is_moved]
        tape = _traced(tracer, flat, [*call.inputs, *tangents])
        outs = primal.outputs
        _agree(tracer, outs, tape.outputs[: len(outs)], "a custom derivative")
        _agree(tracer, [x for x in outs if _differentiable(x)], tape.outputs[len(outs) :], "a custom derivative")
        call.extra = (primal, tape, moved)
    return [tracer.value(aval, x.labels, x.zero) for aval, x in zip(call.avals, primal.outputs, strict=True)]


def _custom_jvp_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    primal, tape, moved = step.extra
    if tape is None:
        return runner.run(primal, inputs)

    @jax.custom_jvp
    def call(*args: Any) -> list[Any]:
        return runner.run(primal, args)

    @call.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        given = [t for t, is_moved in zip(tangents, moved, strict=True) if is_moved]
        found = runner.run(tape, [*primals, *given])
        outs, nonzero = found[: len(primal.outputs)], iter(found[len(primal.outputs) :])
        zeros = [np.zeros(np.shape(x), jax.dtypes.float0) if not _moves(x) else next(nonzero) for x in outs]
        return outs, zeros

    return call(*inputs)


@rule("custom_vjp_call", run=lambda runner, step, inputs: _custom_vjp_run(runner, step, inputs))
def _custom_vjp(tracer: Tracer, call: Call) -> list[Value]:
    primal = _primal(tracer, call)
    call.extra = (primal, None, None, None, None)
    outs = [tracer.value(aval, x.labels, x.zero) for aval, x in zip(call.avals, primal.outputs, strict=True)]
    if tracer.in_derivative:
        return outs
    fixed = call.params["num_consts"]
    moved = [_differentiable(x) and i >= fixed for i, x in enumerate(call.inputs)]
    params = call.primitive.get_bind_params(call.params)
    _, fwd, bwd = params["subfuns"]
    forward = _traced(
        tracer,
        lambda *xs: fwd.call_wrapped(*[v for pair in zip(xs, moved, strict=True) for v in pair]),
        call.inputs,
    )
    _, residual_tree, forwarded = params["out_trees"]()
    own = len(forward.outputs) - len(outs)
    _agree(tracer, outs, forward.outputs[own:], "a custom derivative")
    kept = iter(forward.outputs[:own])
    residuals = [next(kept) if i is None else call.inputs[i] for i in forwarded]
    assert len(residuals) == residual_tree.num_leaves
    cotangents = [x for x in outs if _differentiable(x)]

    def backward(*xs: Any) -> list[Any]:
        given = iter(xs[len(residuals) :])
        cts = [next(given) if _differentiable(x) else np.zeros(x.shape, jax.dtypes.float0) for x in outs]
        found = bwd.call_wrapped(*xs[: len(residuals)], *cts)
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
            found = found[0]  # JAX 0.12 returns (cotangents, logs)
        return [_filled(ct, x) for ct, x, is_moved in zip(found, call.inputs, moved, strict=True) if is_moved]

    blank = [Value(x.shape, x.dtype, x.labels, (False,) * x.ndim, mat=x.mat) for x in cotangents]
    back = _traced(tracer, backward, [*residuals, *blank])
    _agree(
        tracer,
        [x for x, is_moved in zip(call.inputs, moved, strict=True) if is_moved],
        back.outputs,
        "a custom derivative",
    )
    call.extra = (primal, forward, back, moved, forwarded)
    return outs


def _custom_vjp_run(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    primal, forward, back, moved, forwarded = step.extra
    if forward is None:
        return runner.run(primal, inputs)
    outs_at = len(forward.outputs) - len(primal.outputs)

    @jax.custom_vjp
    def call(*args: Any) -> list[Any]:
        return runner.run(primal, args)

    def call_fwd(*args: Any) -> Any:
        found = runner.run(forward, args)
        own = iter(found[:outs_at])
        return found[outs_at:], [next(own) if i is None else args[i] for i in forwarded]

    def call_bwd(residuals: list[Any], cotangents: list[Any]) -> Any:
        given = [ct for ct, x in zip(cotangents, primal.outputs, strict=True) if _differentiable(x)]
        found = iter(runner.run(back, [*residuals, *given]))
        return tuple(next(found) if is_moved else None for is_moved in moved)

    call.defvjp(call_fwd, call_bwd)
    return call(*inputs)


def _primal(tracer: Tracer, call: Call) -> Tape:
    tape = tracer.body(call.params["call_jaxpr"], [_handed(tracer, x) for x in call.inputs])
    _finish(tracer, tape)
    return tape


def _traced(tracer: Tracer, fn: Callable[..., list[Any]], inputs: Sequence[Value]) -> Tape:
    """A derivative's function, staged at the original shapes and labelled."""
    jaxpr = live(tracer.stage(fn, inputs))
    outer, tracer.in_derivative = tracer.in_derivative, True
    tape = tracer.body(jaxpr, [_handed(tracer, x) for x in inputs])
    tracer.in_derivative = outer
    _finish(tracer, tape)
    return tape


def _differentiable(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _moves(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _dense(tangent: Any) -> Any:
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent


def _filled(ct: Any, like: Value) -> Any:
    if ct is None or isinstance(ct, SymbolicZero) or not hasattr(ct, "dtype") or ct.dtype == jax.dtypes.float0:
        return jnp.zeros(like.shape, like.dtype)
    return ct
