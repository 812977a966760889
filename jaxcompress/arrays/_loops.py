"""`scan`, `while_loop` and `cond` over compressed leaves.

quax keeps a loop's traced body by the structure of the leaves, not by their parts' shapes and dtypes, and serves it to
leaves with other scales; and it wants the body to give back what it got without saying what has changed. So bodies are
traced here each time, and what they give back is held against what they got: a carried leaf stays a leaf of its
structure or is an error that says what made it dense; the branches of `cond` agree on a leaf or on its dense value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import quax
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jaxtyping import ArrayLike
from quax._compat import unpack_scan_args

from jaxcompress.arrays._leaf import Hit, is_leaf, made_dense, overheard


@quax.register(lax.scan_p)
def _scan(*args: quax.ArrayValue | ArrayLike, **params: Any) -> Any:
    """On leaves that are sliced: copies for all steps of what they share."""
    if not any(map(is_leaf, args)):
        return lax.scan_p.bind(*args, **params)
    consts, carry, xs = unpack_scan_args(args, params)
    xs = [x.unshared(params["length"]) if is_leaf(x) else x for x in xs]
    body = _body(params["jaxpr"])

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        with overheard() as hits:
            outs = body(*consts, *carry, *xs)
        return _carried(lax.scan_p, carry, outs[: len(carry)], hits), outs[len(carry) :]

    how = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
    carry, ys = lax.scan(step, carry, xs, **how)
    return [*carry, *ys]


@quax.register(lax.while_p)
def _while(
    *args: quax.ArrayValue | ArrayLike, cond_nconsts: int, cond_jaxpr: Any, body_nconsts: int, body_jaxpr: Any
) -> Any:
    if not any(map(is_leaf, args)):
        jaxprs = {"cond_jaxpr": cond_jaxpr, "body_jaxpr": body_jaxpr}
        return lax.while_p.bind(*args, cond_nconsts=cond_nconsts, body_nconsts=body_nconsts, **jaxprs)
    cond_consts, rest = args[:cond_nconsts], args[cond_nconsts:]
    body_consts, carry = rest[:body_nconsts], list(rest[body_nconsts:])
    cond, body = _body(cond_jaxpr), _body(body_jaxpr)

    def step(consts: Sequence[Any], carry: list[Any]) -> list[Any]:
        with overheard() as hits:
            outs = body(*consts, *carry)
        return _carried(lax.while_p, carry, outs, hits)

    # not by `lax.while_loop`: of a loop that was mapped the condition is one for each example
    groups = [jax.tree.leaves(group) for group in (cond_consts, body_consts, carry)]
    outs = lax.while_p.bind(
        *(x for group in groups for x in group),
        cond_nconsts=len(groups[0]),
        cond_jaxpr=jax.make_jaxpr(lambda consts, carry: cond(*consts, *carry))(cond_consts, carry),
        body_nconsts=len(groups[1]),
        body_jaxpr=jax.make_jaxpr(step)(body_consts, carry),
    )
    return jax.tree.unflatten(jax.tree.structure(carry), outs)


@quax.register(lax.cond_p)
def _cond(index: ArrayLike, *args: quax.ArrayValue | ArrayLike, branches: Sequence[Any], **params: Any) -> Any:
    if not any(map(is_leaf, args)):
        return lax.cond_p.bind(index, *args, branches=branches, **params)
    flat, tree = jax.tree.flatten(args)

    def traced(finish: Callable[[list[Any]], list[Any]]) -> list[tuple[Any, list[Any]]]:
        def run(branch: Any) -> tuple[Any, list[Any]]:
            body = _body(branch)
            return jax.make_jaxpr(lambda *flat: finish(body(*jax.tree.unflatten(tree, flat))), return_shape=True)(*flat)

        return [run(branch) for branch in branches]

    found = traced(lambda outs: [_settled(lax.cond_p, out) for out in outs])
    differ = [any(_parts(x) != _parts(out[0]) for x in out) for out in zip(*(outs for _, outs in found), strict=True)]
    if any(differ):

        def agreed(outs: list[Any]) -> list[Any]:
            ways = [_as_array if other else _settled for other in differ]
            return [way(lax.cond_p, out) for way, out in zip(ways, outs, strict=True)]

        found = traced(agreed)
    jaxprs, outs = tuple(jaxpr for jaxpr, _ in found), found[0][1]
    params.pop("linear", None)  # flags of operands that were one array each
    return jax.tree.unflatten(jax.tree.structure(outs), lax.cond_p.bind(index, *flat, branches=jaxprs, **params))


def _body(jaxpr: Any) -> Callable[..., list[Any]]:
    closed = jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())
    return quax.quaxify(jaxpr_as_fun(closed))


def _carried(loop: Primitive, before: Sequence[Any], after: Sequence[Any], hits: dict[Hit, int]) -> list[Any]:
    """What a body gives back in the places of its carry: the leaves that it got, or arrays where it got arrays."""
    return [_again(loop, b, a, hits) for b, a in zip(before, after, strict=True)]


def _again(loop: Primitive, before: Any, after: Any, hits: dict[Hit, int]) -> Any:
    if not is_leaf(before):
        return _as_array(loop, after)
    if _parts(after) == _parts(before):
        return after
    after = _settled(loop, after)
    if _parts(after) == _parts(before):
        return after
    what = f"a {type(before).__name__} of shape {before.shape} is carried by a `{loop}` whose body gives back"
    if is_leaf(after):
        changes = [f"{b} became {a}" for b, a in zip(_parts(before), _parts(after), strict=False) if b != a]
        raise TypeError(f"{what} another: {', '.join(changes)}. A carried leaf must keep its parts, step by step")
    without = sorted({primitive for name, primitive, how in hits if (name, how) == (type(before).__name__, "dense")})
    raise TypeError(
        f"{what} an array in its place"
        + (f": {', '.join(without)} had no rule for it there" if without else "")
        + ". Carry its dense value (jaxcompress.dense), or call the body step by step outside of the loop"
    )


def _settled(primitive: Primitive, x: Any) -> Any:
    """A leaf on which nothing is put off any more."""
    return x.done(primitive) if is_leaf(x) else x


def _as_array(primitive: Primitive, x: Any) -> Any:
    x = _settled(primitive, x)
    if not is_leaf(x):
        return x
    made_dense(primitive, [x], "gives an array there in another step or branch")
    return x.materialise()


def _parts(x: Any) -> list[Any]:
    """The structure, and the shape and dtype of each part."""
    return [jax.tree.structure(x), *((part.dtype.name, part.shape) for part in jax.tree.leaves(x))]
