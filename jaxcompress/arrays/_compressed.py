"""Running any JAX function on compressed weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import quax

from jaxcompress.arrays._leaf import is_leaf

P = ParamSpec("P")
R = TypeVar("R")


def compressed(fn: Callable[P, R], *, strict: bool = False) -> Callable[P, R]:
    """`fn`, able to take compressed leaves wherever its arguments have arrays.

    Each primitive that meets a compressed leaf runs that leaf's rule where there is one, and on the leaf's dense value
    otherwise. `fn` is any JAX function: a Linen module's `apply`, a function that merges an NNX module, a plain one; it
    may use `jit`, `grad`, `vmap`, `scan`, `cond`, `while_loop`, `jax.checkpoint` and custom derivatives inside, and the
    result may be transformed by them. Put `jax.jit` around it: without, each call is interpreted.

    Only *arguments* are compressed. An array that `fn` closes over is what it is. An inner `shard_map` is not seen
    through: call `compressed` inside it.

    Args:
      fn: the function.
      strict: raise `MadeDenseError` wherever a weight would be made dense for want of a rule.

    Returns:
      A function of the same signature. What it returns unchanged (a weight handed through) stays compressed.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if strict:
            args, kwargs = _marked((args, kwargs), True)
        out = quax.quaxify(fn)(*args, **kwargs)
        return _marked(out, False) if strict else out

    return run


def _marked(tree: Any, strict: bool) -> Any:
    # the mark is part of the leaf's structure: what JAX or quax have cached for lenient leaves won't serve strict ones
    return jax.tree.map(lambda x: dataclasses.replace(x, strict=strict) if is_leaf(x) else x, tree, is_leaf=is_leaf)
