"""Intermediate values of a model by name, without editing it: what distillation compares and probes look at.

`capture` transforms a function into one that also returns chosen values of its inside. In a plain function they are
those that `jax.ad_checkpoint.checkpoint_name` names; `linen.capture` and `nnx.capture` name what the modules' methods
return, by the modules' paths, and then do the same. All three take patterns and give `(output, features)`:

    captured = features.capture(forward, ["hidden$", "pooled$"])          # h = checkpoint_name(h, "hidden") inside
    captured = linen.capture(model, "Block_[13]$")                        # the paths of submodules
    output, found = captured(variables, x, train=True, mutable=["batch_stats"])
    found["Block_1"]                                                      # [batch, height, width, channels]

The function is staged to a jaxpr and run again with the named values as further outputs, so they are ordinary values:
`jit`, `grad`, `vmap` and `shard_map` around a captured function treat them as any other, and under `jit` what nobody
uses is not computed. It looks into `jit`, `jax.checkpoint` (the values leave it, the rest is rematerialised as
before), `custom_jvp`, `custom_vjp`, `scan` (values stacked along a new leading axis, one a step) and `cond` (if all
branches have the name).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax._src import source_info_util
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jaxcompress.paths import UnmatchedRuleError, match, path_name

__all__ = ["capture", "named"]

_MARK = "jaxcompress.features:"  # set before the names that modules get, so that no remat policy knows them by accident
_INLINE = {"jit", "pjit", "closed_call", "core_call"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call"}


def capture(fn: Callable[..., Any], patterns: str | Sequence[str]) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """A function like `fn` that returns its output and the values inside it whose names match.

    Args:
      fn: any function; arrays in its arguments are traced, all else (flags, strings) stays as it is.
      patterns: regular expressions, searched in the names as everywhere in this library (`paths.match`).

    Returns:
      `captured(*args, **kwargs) -> (fn(*args, **kwargs), features)`. A name that comes once is its own key; one that
      comes several times has the keys `name/0`, `name/1`, ... in the order of evaluation. Calling `captured` raises
      `UnmatchedRuleError`, which lists the names there are, if a pattern matches none, and `ValueError` if a chosen
      value lies where it has no single value (in a `while` loop, in some branches of a `cond` only, in a kernel), or if
      its key is another's too, as of `h`, `h` and `h/0`.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)

    def captured(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        arrays, rest = eqx.partition((args, kwargs), _is_array)
        static: list[Any] = []

        def staged(arrays: Any) -> Any:
            args, kwargs = eqx.combine(arrays, rest)
            out_arrays, out_rest = eqx.partition(fn(*args, **kwargs), _is_array)
            static.append(out_rest)
            return out_arrays

        closed, shapes = jax.make_jaxpr(staged, return_shape=True)(arrays)
        listed = _listed(closed.jaxpr)
        keys = _keys(listed)
        chosen = _chosen(patterns, keys)
        twice = sorted(key for key, count in Counter(keys).items() if count > 1 and key in chosen)
        if twice:  # a dict would keep the last one, without a word
            raise ValueError(f"two values have the key {twice[0]!r}: a name that comes several times gets numbers")
        wanted = {name for name, key in zip(listed, keys, strict=True) if key in chosen}
        outs, values = _run(closed.jaxpr, closed.consts, jax.tree.leaves(arrays), wanted)
        found_keys = [key for name, key in zip(listed, keys, strict=True) if name in wanted]
        features = {key: value for key, value in zip(found_keys, values, strict=True) if key in chosen}
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), outs), static[0]), features

    return captured


def named(out: Any, path: str, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`out` with every array in it named: `path`, or `path/key` in a container. For wrappers of module systems."""

    def of_leaf(key: Any, x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        name = "/".join(part for part in (path, path_name(key)) if part)
        return checkpoint_name(x, _MARK + name)

    return jax.tree_util.tree_map_with_path(of_leaf, out, is_leaf=is_leaf)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _keys(listed: Sequence[str]) -> list[str]:
    """The key of every named value, in order: its name, with a number where the name comes again."""
    total, seen, keys = Counter(listed), Counter[str](), []
    for name in listed:
        keys.append(f"{name}/{seen[name]}" if total[name] > 1 else name)
        seen[name] += 1
    return keys


def _chosen(patterns: Sequence[str], keys: Sequence[str]) -> set[str]:
    try:
        hit = match([(pattern, True) for pattern in patterns], keys, default=False)
    except UnmatchedRuleError as error:
        there = ", ".join(keys) if keys else "none (name a value with jax.ad_checkpoint.checkpoint_name)"
        raise UnmatchedRuleError(f"{error}. Values that can be captured: {there}") from None
    return {key for key, is_hit in zip(keys, hit, strict=True) if is_hit}


def _name(eqn: Any) -> str | None:
    return eqn.params["name"].removeprefix(_MARK) if eqn.primitive.name == "name" else None


def _bodies(eqn: Any) -> list[Any]:
    """The jaxprs inside an equation, without constants of their own."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns"):
                found.append(getattr(x, "jaxpr", x))
    return found


def _listed(jaxpr: Any) -> list[str]:
    """Every named value's name, in order; what several branches of a `cond` have counts once, and theirs are sorted."""
    names: list[str] = []
    for eqn in jaxpr.eqns:
        name = _name(eqn)
        if name is not None:
            names.append(name)
        elif eqn.primitive.name == "cond":
            union: Counter[str] = Counter()
            for branch in _bodies(eqn):
                union |= Counter(_listed(branch))
            names.extend(sorted(union.elements()))
        else:
            for body in _bodies(eqn):
                names.extend(_listed(body))
    return names


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], wanted: set[str]) -> tuple[list[Any], list[Any]]:
    """The jaxpr's outputs, and the wanted named values in the order of `_listed`."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]  # noqa: E731
    found: list[Any] = []
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
            outs, values = _run_equation(eqn, inputs, wanted)
        env.update(zip(eqn.outvars, outs, strict=True))
        found.extend(values)
    return [read(v) for v in jaxpr.outvars], found


def _run_equation(eqn: Any, inputs: list[Any], wanted: set[str]) -> tuple[Sequence[Any], list[Any]]:
    if eqn.primitive.name == "name":
        bound = inputs if eqn.params["name"].startswith(_MARK) else [_bind(eqn, inputs)]
        return bound, bound if _name(eqn) in wanted else []
    inside = [name for body in _bodies(eqn) for name in _listed(body) if name in wanted]
    if not inside:
        outs = _bind(eqn, inputs)
        return (outs if eqn.primitive.multiple_results else [outs]), []
    kind, params = eqn.primitive.name, eqn.params
    if kind in _INLINE:
        return _run(*_closed(params.get("jaxpr", params.get("call_jaxpr"))), inputs, wanted)
    if kind in _CUSTOM:  # the output keeps its own derivative; the values inside get the plain one
        return _bind(eqn, inputs), _run(*_closed(params["call_jaxpr"]), inputs, wanted)[1]
    if kind in ("checkpoint", "remat", "remat2"):
        body = jax.checkpoint(
            lambda *args: _run(*_closed(params["jaxpr"]), args, wanted),
            prevent_cse=params["prevent_cse"],
            policy=params["policy"],
        )
        return body(*inputs)
    if kind == "scan":
        return _scan(params, inputs, wanted)
    if kind == "cond":
        return _cond(params["branches"], inputs, wanted)
    raise ValueError(
        f"cannot capture {', '.join(map(repr, inside))}: it is computed inside a {kind!r}, where it has no single "
        "value to give out; choose a value outside, or turn a loop of known length into jax.lax.scan"
    )


def _scan(params: Any, inputs: list[Any], wanted: set[str]) -> tuple[list[Any], list[Any]]:
    if "ft_in" in params:  # JAX 0.12
        consts, init, xs = map(list, params["ft_in"].update(inputs).unpack())
    else:
        fixed, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, init, xs = inputs[:fixed], inputs[fixed:carried], inputs[carried:]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        outs, values = _run(*_closed(params["jaxpr"]), [*consts, *carry, *x], wanted)
        return outs[: len(init)], (outs[len(init) :], values)

    carry, (ys, values) = jax.lax.scan(
        body, init, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys], values


def _cond(branches: Sequence[Any], inputs: list[Any], wanted: set[str]) -> tuple[list[Any], list[Any]]:
    names = [sorted(name for name in _listed(_closed(branch)[0]) if name in wanted) for branch in branches]
    if any(each != names[0] for each in names):
        raise ValueError(f"cannot capture from a cond whose branches do not all have the same names: they have {names}")

    def of_branch(branch: Any) -> Callable[..., tuple[list[Any], list[Any]]]:
        def run(*args: Any) -> tuple[list[Any], list[Any]]:
            outs, values = _run(*_closed(branch), args, wanted)
            own = [name for name in _listed(_closed(branch)[0]) if name in wanted]
            return outs, [values[i] for i in sorted(range(len(own)), key=own.__getitem__)]

        return run

    try:
        return jax.lax.switch(inputs[0], [of_branch(branch) for branch in branches], *inputs[1:])
    except TypeError as error:
        raise ValueError(f"cannot capture {names[0]} from a cond: its branches give them other shapes") from error


def _closed(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _bind(eqn: Any, inputs: Sequence[Any]) -> Any:
    return eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
