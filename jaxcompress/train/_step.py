import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcompress.paths import path_name
from jaxcompress.train._checkpoint import gather, to_json
from jaxcompress.train._sharding import on_mesh, shard_batch
from jaxcompress.train._state import Optimizer, TrainState, split, strong


class Context(NamedTuple):
    """What a loss may use beside the parameters and the batch.

    Attributes:
      extras: the state's extras: batch statistics, a moving average of the params.
      frozen: what the caller hands in and nothing trains: a teacher's variables, several teachers', weights of a
        schedule.
      key: this step's own typed key. Split it for several uses.
      step: int32 scalar: the steps taken before this one, for schedules.
      opt_state: the optimizer's state, where the forward pass asks it: `prune.straight_through(params,
        context.opt_state)`.
    """

    extras: Any
    frozen: Any
    key: jax.Array
    step: jax.Array
    opt_state: Any = None


Metrics = Mapping[str, jax.Array]
LossFn = Callable[[Any, Any, Context], tuple[jax.Array, Metrics, Any]]
"""What `make_step` takes."""


def make_step(
    loss_fn: LossFn,
    tx: Optimizer,
    *,
    batch_axis: str | tuple[str, ...] = "data",
    grad_norm: bool = False,
) -> "Step":
    """One training step, jitted, for a student and whatever teaches it, wherever the state lies.

        def loss_fn(params, batch, context):
            logits, extras = student.apply({"params": params, **context.extras}, batch["image"],
                                           rngs={"dropout": context.key}, mutable=["batch_stats"])
            teacher_logits = teacher.apply(context.frozen, batch["image"])
            losses = distillation_loss(logits, teacher_logits, batch["label"])
            return losses.mean(), {}, extras

        step = make_step(loss_fn, optax.adam(1e-3))
        state, metrics = step(state, batch, teacher_variables)

    The step follows the state: on one device it runs there; if the state was placed on a mesh (see `shard`), the batch
    is divided along `batch_axis`, the new state lies exactly as the old one did, and a mean over the batch, a
    batch-norm statistic and a dropout mask are what they are on one device. The state is donated, `frozen` never is,
    nor does any gradient flow to it. Under a mesh, `with_sharding_constraint(x, P(...))` works inside `loss_fn`.

    A state has one key; each step gets it with the step folded in, so a resumed run draws what the straight run drew.
    To accumulate gradients over batches, wrap `tx` in `optax.MultiSteps`. `tx.update` also gets `value=`, `grad=` and
    `value_fn=`, for the transformations that ask for them.

    Args:
      loss_fn: `loss_fn(params, batch, context) -> (loss, metrics, extras)`: a scalar to descend, scalars to report by
        name, and the next step's extras (`context.extras` itself where nothing changes). See `Context`.
      tx: the optimizer with which the state was created.
      batch_axis: the mesh axis (or axes) along which the batch's rows lie.
      grad_norm: report the gradient's global L2 norm, in float32. It costs one more reading of the gradient.
    """
    return Step(loss_fn, tx, batch_axis, grad_norm)


class Step:
    """A jitted step, as `make_step` makes it: `step(state, batch, frozen=None) -> (state, metrics)`.

    `metrics` has the scalars that the loss returned, `loss`, and, if asked for, `grad_norm`: each on every device.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tx: Optimizer,
        batch_axis: str | tuple[str, ...] = "data",
        grad_norm: bool = False,
    ):
        self._loss_fn = loss_fn
        if isinstance(tx, optax.MultiSteps):  # hands on what it gets, but optax's wrapper below would drop it
            tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
        self._tx = optax.with_extra_args_support(tx)
        self._batch_axis = batch_axis
        self._grad_norm = grad_norm
        self._jitted: dict[Any, tuple[Any, Mesh | None]] = {}
        self._current: tuple[Any, Mesh | None] | None = None
        self._last_state: Callable[[], TrainState | None] = lambda: None
        self._last_frozen: Any = None
        self._has_compared = False

    def __call__(self, state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        """Takes the step. `state` is donated; `frozen` lies on the state's mesh, the batch may come from the host.

        Raises:
          ValueError: state and `frozen` do not lie on one mesh, or share an array; the state is of another optimizer;
            the loss's results are not what a step can use; in the first step, processes hand in batches of other
            shapes than each other.
        """
        # the state that the last call returned lies where that call put it: no need to look at every leaf again
        if self._current is None or state is not self._last_state() or frozen is not self._last_frozen:
            self._current = self._choose(state, frozen)
        jitted, mesh = self._current
        if mesh is not None:
            if not self._has_compared:
                _compare_processes(batch, mesh)
                self._has_compared = True
            batch = shard_batch(batch, mesh, self._batch_axis)
        state, metrics = jitted(state, batch, frozen)
        self._last_state, self._last_frozen = weakref.ref(state), frozen
        return state, metrics

    def lower(self, state: Any, batch: Any, frozen: Any = None) -> jax.stages.Lowered:
        """The step, traced and lowered; on `jax.ShapeDtypeStruct`s with shardings it needs no devices."""
        jitted, _ = self._choose(state, frozen)
        return jitted.lower(state, batch, frozen)

    def _choose(self, state: TrainState, frozen: Any) -> tuple[Any, Mesh | None]:
        """The jitted function for states that lie as this one does."""
        leaves, treedef = jax.tree.flatten(state)
        places = tuple(getattr(x, "sharding", None) for x in leaves)
        mesh = _common_mesh(state, frozen)
        if (treedef, places) not in self._jitted:
            shardings = None
            if mesh is not None:
                shardings = (jax.tree.unflatten(treedef, places), NamedSharding(mesh, PartitionSpec()))
            self._jitted[treedef, places] = jax.jit(self._update(mesh), donate_argnums=0, out_shardings=shardings), mesh
        return self._jitted[treedef, places]

    def _update(self, mesh: Mesh | None) -> Callable[..., Any]:
        def step(state: TrainState, batch: Any, frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            here = contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
            with here:
                state, metrics, gradient = _take(self._loss_fn, self._tx, state, batch, frozen)
            return state, {**metrics, "grad_norm": _norm(gradient)} if self._grad_norm else metrics

        return step


def _compare_processes(batch: Any, mesh: Mesh) -> None:
    """Each process takes the others to have as many rows as itself: if not, means are wrong without a word.

    Only a mesh of all processes is asked, for all must take part; and only once, for each time the hosts would wait.
    """
    if jax.process_count() == 1 or len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        return
    shapes = [list(np.shape(x)) for x in jax.tree.leaves(batch) if not on_mesh(x, mesh)]
    each = gather(to_json(shapes))
    if any(other != each[0] for other in each):
        raise ValueError(f"every process must hand in batches of the same shapes; by process they are {each}")


def _take(
    loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs, state: TrainState, batch: Any, frozen: Any
) -> tuple[TrainState, dict[str, jax.Array], Any]:
    trained, fixed = split(state.params)
    _check_optimizer(tx, trained, state.opt_state)
    key = jax.random.fold_in(state.key, state.step)
    context = Context(state.extras, frozen, key, state.step, state.opt_state)

    def objective(trained: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        loss, metrics, extras = _checked(loss_fn(eqx.combine(trained, fixed), batch, context))
        return loss, (metrics, extras)

    (loss, (metrics, extras)), gradient = jax.value_and_grad(objective, has_aux=True)(trained)
    gradient = jax.tree.map(jnp.conj, gradient)  # of a complex leaf JAX gives the conjugate of what descends
    updates, opt_state = tx.update(
        gradient, state.opt_state, trained, value=loss, grad=gradient, value_fn=lambda tree: objective(tree)[0]
    )
    new = TrainState(
        step=state.step + 1,
        params=eqx.combine(optax.apply_updates(trained, updates), fixed),
        opt_state=_like("the optimizer's state", opt_state, state.opt_state),
        extras=_like("extras", extras, state.extras),
        key=state.key,
    )
    return new, {"loss": loss, **metrics}, gradient


def _check_optimizer(tx: optax.GradientTransformationExtraArgs, trained: Any, opt_state: Any) -> None:
    """Another optimizer's state may pass through an update and change nothing, or half of it."""
    try:
        own: Any = jax.tree.structure(jax.eval_shape(tx.init, trained))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return  # an init that reads values can't be asked here
    if own != jax.tree.structure(opt_state):
        raise ValueError("the state is of another optimizer than the step: give TrainState.create and make_step one tx")


def _norm(gradient: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient))


def _checked(result: Any) -> tuple[jax.Array, Metrics, Any]:
    if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[1], Mapping)):
        raise ValueError(
            f"loss_fn must return (loss, metrics, extras): a scalar, a dict of scalars ({{}} for none), and the next "
            f"step's extras (context.extras where nothing changes); got {_describe(result)}"
        )
    loss, metrics, extras = result
    for name, value in {"loss": loss, **metrics}.items():
        if jnp.shape(value) != ():
            raise ValueError(f"{name} must be a scalar, got {_describe(value)}; take its mean")
    taken = {"loss", "grad_norm"} & metrics.keys()
    if taken:
        raise ValueError(f"the step itself reports {sorted(taken)}: give the loss's metrics other names")
    return loss, metrics, extras


def _like(what: str, new: Any, old: Any) -> Any:
    """`new`, if it can take the place of `old` in the next step."""
    new = jax.tree.map(lambda x: strong(jnp.asarray(x)), new)
    before, after = _describe_leaves(old), _describe_leaves(new)
    for name in [*before, *after]:
        if before.get(name) != after.get(name):
            raise ValueError(
                f"{what} must keep its leaves from step to step, but {name or 'it'} was {before.get(name, 'absent')} "
                f"and is now {after.get(name, 'absent')}"
            )
    kinds: list[Any] = [jax.tree.structure(old), jax.tree.structure(new)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{what} had the structure {kinds[0]} and now has {kinds[1]}")
    return new


def _describe_leaves(tree: Any) -> dict[str, str]:
    return {path_name(path): _describe(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(x: Any) -> str:
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, tuple | list) else "")


def _common_mesh(state: TrainState, frozen: Any) -> Mesh | None:
    """The mesh on which everything lies, or `None` for a single device.

    Raises:
      ValueError: something lies elsewhere: it would be copied there anew in every step; something is in both.
    """
    leaves = [(path_name(path), x, True) for path, x in jax.tree_util.tree_leaves_with_path(state)]
    places = [getattr(x, "sharding", None) for _, x, _ in leaves]
    mesh = next((s.mesh for s in places if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
    own = {id(x) for _, x, _ in leaves if isinstance(x, jax.Array)}
    for path, x in jax.tree_util.tree_leaves_with_path(frozen):
        if id(x) in own:
            raise ValueError(
                f"frozen/{path_name(path)} is an array of the state, which the step donates: hand in a copy, "
                f"jax.tree.map(jnp.copy, ...)"
            )
        leaves.append((f"frozen/{path_name(path)}", x, jnp.ndim(x) > 0))  # a scalar is soon copied
    for name, x, must in leaves:
        if mesh is None and isinstance(getattr(x, "sharding", None), NamedSharding):
            raise ValueError(f"{name} lies on a mesh, but the state does not: place it with shard(state, mesh, rules)")
        if mesh is not None and must and not on_mesh(x, mesh):
            raise ValueError(f"{name} does not lie on the state's mesh: place it once, with shard(tree, mesh, rules)")
    return mesh
