"""Run the smaller model, and prove it right: the traced function again, at the sizes that are left."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import paths
from jaxcompress.prune.channels._plan import Plan
from jaxcompress.prune.channels._rules_shape import pick
from jaxcompress.prune.channels._run import Runner
from jaxcompress.prune.channels._trace import Traced, is_array, trace


def shrink(fn: Callable[..., Any], params: Any, plan: Plan, *, rederive: bool = False) -> Callable[..., Any]:
    """`fn` for the smaller parameters: `small(plan.apply(params), *args)`.

    At each call (under `jit`: at each trace) `fn` is staged at its original shapes with the call's inputs, labelled,
    and evaluated at the shapes that the plan leaves; the sizes that its Python code reads are the original ones. The
    result is an ordinary JAX function for `jit`, `grad`, `vmap`, `scan` and any batch size. Call it under `jit`: the
    staging takes as long as `groups`.

    Args:
      fn: as for `groups`.
      params: as for `groups`; only shapes and types are used.
      plan: what stays.
      rederive: numbers that the function derives from widths stay as traced, so that the smaller model is exactly the
        one with zeroed units; `True` divides means by the widths that are left, as a model built so small would.
        Other such numbers, like attention's `1 / sqrt(width of a head)`, a variance's `n - 1`, and what the derivative
        of a mean divides by where `fn` itself takes one, stay in both cases.

    Raises:
      ValueError: the plan is for another tree; when called: for another function, or small parameters that don't fit.
    """
    plan.check(params)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype) if is_array(x) else x, params)

    def small(small_params: Any, *args: Any) -> Any:
        _check_small(plan, small_params)
        traced, runner = _prepared(fn, _like(whole, small_params), plan, args, rederive)
        inputs = jax.tree.leaves((eqx.filter(small_params, is_array), eqx.filter(tuple(args), is_array)))
        return traced.out(runner.run(traced.tape, inputs))

    return small


def _prepared(
    fn: Callable[..., Any], whole: Any, plan: Plan, args: Any, rederive: bool = False
) -> tuple[Traced, Runner]:
    traced = trace(fn, whole, args, plan.free_out)
    return traced, Runner(traced.tracer, dropped_atoms(traced, plan), rederive)


def _like(whole: Any, small: Any) -> Any:
    """The original shapes with the small leaves' types, and in the small tree's structure."""
    shapes = {name: x.shape for name, x in paths.named_leaves(whole) if is_array(x)}
    leaves = [
        jax.ShapeDtypeStruct(shapes[name], x.dtype) if is_array(x) else x for name, x in paths.named_leaves(small)
    ]
    return paths.with_leaves(small, leaves)


def _check_small(plan: Plan, small: Any) -> None:
    shapes = {name: tuple(x.shape) for name, x in paths.named_leaves(small) if is_array(x)}
    for name, shape in plan.shapes.items():
        axes = plan.keep.get(name, {})
        wanted = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(shape))
        if name not in shapes:
            raise ValueError(f"the smaller parameters have no {name!r}: pass what plan.apply(params) gives")
        if shapes[name] != wanted:
            raise ValueError(f"{name!r} has shape {shapes[name]}, want {wanted}: pass what plan.apply(params) gives")


def dropped_atoms(traced: Traced, plan: Plan) -> np.ndarray:
    """Of each atom of a trace, whether the plan drops it; ValueError if the plan's choice isn't one of atoms."""
    atoms = traced.tracer.atoms
    kept, owned = np.zeros(atoms.count, bool), np.zeros(atoms.count, bool)
    axes = []
    for name, value in zip(traced.names, traced.params, strict=True):
        for axis, label in enumerate(value.labels):
            stays = np.ones(value.shape[axis], bool)
            if axis in plan.keep.get(name, {}):
                stays[:] = False
                stays[plan.keep[name][axis]] = True
            resolved = atoms.resolve(label)
            if resolved is not None:
                owned[resolved] = True
                kept[resolved[stays]] = True
            axes.append((f"{name}[{axis}]", label, stays))
    dropped = owned & ~kept
    dropped[0] = False
    for axis_name, label, stays in axes:
        left = atoms.kept(label, dropped) if label is not None else np.ones_like(stays)
        if not np.array_equal(left, stays):
            why = atoms.why(label[left & ~stays]) if label is not None and (left & ~stays).any() else ""
            raise ValueError(
                f"the plan does not fit this function: it drops {int((left & ~stays).sum())} indices of {axis_name} "
                f"that must stay{': ' + why if why else ', or that go with others that stay'}. "
                "Make the plan from groups of the same function"
            )
    for piece in traced.tracer.pieces:
        if not atoms.kept(piece, dropped).any():
            raise ValueError(
                "the plan leaves nothing of a part of an axis that the function uses by itself; drop fewer"
            )
    return dropped


@dataclass(frozen=True)
class Verification:
    """How far the smaller model is from the model with zeroed units: the largest difference by the largest value.

    Attributes:
      forward: of the outputs.
      gradient: of the parameters' gradient of a random sum of the outputs; `None` if it was not compared.
      finite: whether what the zeroed model gives is finite where it is compared; without, nothing can be. Outputs
        alone can still be, with `gradient=False`, where only its gradient isn't (`Group.notes` says so).
      tolerance: as given.
    """

    forward: float
    gradient: float | None
    finite: bool
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both differences are within the tolerance."""
        return self.finite and self.forward <= self.tolerance and (self.gradient or 0.0) <= self.tolerance


def verify(
    fn: Callable[..., Any], params: Any, plan: Plan, *args: Any, tolerance: float = 1e-5, gradient: bool = True
) -> Verification:
    """Compare the smaller model with the whole one in which the dropped units are zero, on given inputs.

    This is independent of how the smaller model is made: the zeroed parameters run through `fn` itself. For plans of
    exact groups the two agree up to rounding. Run it with values like those of use.

    Args:
      fn: as for `groups`.
      params: the whole parameters.
      plan: what stays.
      *args: inputs.
      tolerance: for `Verification.ok`, relative to the largest value; 1e-5 suits float32.
      gradient: also compare gradients, of all float parameters.
    """
    small = shrink(fn, params, plan)
    masked, cut = plan.mask(params), plan.apply(params)
    traced, runner = _prepared(fn, params, plan, args)
    kept = [
        {axis: runner.positions(label, len(label)) for axis, label in enumerate(value.labels) if label is not None}
        if not value.known
        else {}
        for value in traced.tape.outputs
    ]

    def of_whole(tree: Any) -> list[jax.Array]:
        leaves = [x for x in jax.tree.leaves(fn(tree, *args)) if is_array(x)]
        return _inexact([_kept(x, axes) for x, axes in zip(leaves, kept, strict=True)])

    def of_small(tree: Any) -> list[jax.Array]:
        return _inexact([x for x in jax.tree.leaves(small(tree, *args)) if is_array(x)])

    def measured(run: Callable[[Any], list[jax.Array]], tree: Any) -> tuple[list[jax.Array], Any]:
        if not gradient:
            return run(tree), None
        trained, rest = eqx.partition(tree, eqx.is_inexact_array)

        def total(trained: Any) -> tuple[jax.Array, list[jax.Array]]:
            outs = run(eqx.combine(trained, rest))
            weights = [jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(outs)]
            terms = (jnp.real(jnp.vdot(w, x)) for w, x in zip(weights, outs, strict=True))
            return sum(terms, jnp.zeros(())), outs

        return jax.grad(total, has_aux=True)(trained)[::-1]

    both = eqx.filter_jit(lambda a, b: (measured(of_whole, a), measured(of_small, b)))(masked, cut)
    (wholes, of_mask), (smalls, of_cut) = jax.device_get(both)  # what follows would be many small compilations
    left = {name: _kept(x, plan.keep.get(name, {})) for name, x in paths.named_leaves(of_mask)} if gradient else {}
    finite = all(bool(np.isfinite(x).all()) for x in [*wholes, *left.values()])
    forward = largest(relative_difference(a, b) for a, b in zip(wholes, smalls, strict=True))
    if not gradient:
        return Verification(forward, None, finite, tolerance)
    scale = max((np.abs(x).max(initial=0.0) for x in jax.tree.leaves(of_cut)), default=0.0)
    small_gradients = dict(paths.named_leaves(of_cut))
    backward = largest(relative_difference(x, small_gradients[name], scale) for name, x in left.items())
    return Verification(forward, backward, finite, tolerance)


def _inexact(leaves: list[Any]) -> list[jax.Array]:
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _kept(x: Any, axes: Mapping[int, np.ndarray]) -> Any:
    for axis, kept in axes.items():
        x = np.take(x, kept, axis) if isinstance(x, np.ndarray) else pick(x, kept, axis)
    return x


def largest(differences: Iterable[float]) -> float:
    """The largest of several differences, 0 of none."""
    return float(np.max([0.0, *differences]))  # NaN, if any is: Python's `max` would lose it


def relative_difference(a: np.ndarray, b: np.ndarray, scale: Any = None) -> float:
    """The largest difference, by `scale` or else by the largest value of `a`."""
    scale = np.abs(a).max(initial=0.0) if scale is None else scale
    with np.errstate(invalid="ignore"):  # of what is not finite it is no number
        return float(np.abs(a - b).max(initial=0.0) / np.maximum(scale, 1e-30))
