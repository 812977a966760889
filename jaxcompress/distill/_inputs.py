"""What every loss does with its arguments first: dtypes, shapes, the teacher's constancy, the padding mask."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

Tree = TypeVar("Tree")

Number = float | jax.Array
"""A temperature or a weight: a number (checked), or a traced scalar (a schedule's); a weight may be an array."""

_CONCRETE = int | float | np.generic | np.ndarray  # what can be looked at without waiting for a device


def as_float(x: ArrayLike, name: str) -> jax.Array:
    """`x` in float32, or in its own dtype where that is wider; a TypeError where it is not floating."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array, got {x.dtype}; cast it, e.g. {name}.astype('float32')")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def constant(x: ArrayLike, name: str) -> jax.Array:
    """A teacher's array: `as_float`, and no gradient flows into it."""
    return jax.lax.stop_gradient(as_float(x, name))


def check_same_shape(student: jax.Array, teacher: jax.Array, what: str) -> None:
    """A ValueError where the two differ in shape: broadcasting here is nearly always a mistake."""
    if student.shape != teacher.shape:
        raise ValueError(f"{what} of student and teacher must have one shape, got {student.shape} and {teacher.shape}")


def check_rank(x: jax.Array, rank: int, name: str, layout: str) -> None:
    """A ValueError where `x` has not `rank` axes; `layout` says what they mean."""
    if x.ndim != rank:
        raise ValueError(f"{name} must be {layout}, got shape {x.shape}")


def check_positive(value: Number, name: str) -> None:
    """A ValueError where this is no scalar, or a concrete one not above zero; a traced one (a schedule) passes."""
    if jnp.ndim(value):
        raise ValueError(f"{name} must be one number, got shape {jnp.shape(value)}; for one an example use vmap")
    if isinstance(value, _CONCRETE) and not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_between(value: Number, low: float, high: float, name: str) -> None:
    """A ValueError where a concrete number, or one of several, lies outside [low, high]; a traced one passes."""
    if isinstance(value, _CONCRETE) and not np.all((low <= np.asarray(value)) & (np.asarray(value) <= high)):
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")


def check_not_negative(values: ArrayLike, name: str) -> None:
    """A ValueError where one of these is below 0; traced ones pass."""
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values)) and np.min(values, initial=0) < 0:
        raise ValueError(f"{name} must not be negative, got {values}")


def varying_as(tree: Tree, others: Any) -> Tree:
    """`tree`, in a `shard_map` marked as varying over the mesh axes that one of `others` does: so must a loop begin."""

    def varies(x: jax.Array) -> frozenset[str]:
        kind = getattr(jax.typeof(x), "manual_axis_type", None)  # JAX has renamed it before
        return frozenset() if kind is None else kind.varying

    axes = frozenset[str]().union(*map(varies, jax.tree.leaves(others)))

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varies(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def logits(x: ArrayLike, name: str, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Logits with the class axis last and zeros on the examples that `where` leaves out."""
    x = as_float(x, name)
    if x.ndim == 0:
        raise ValueError(f"{name} must have a class axis, got a scalar")
    return blank(jnp.moveaxis(x, axis, -1), where)


def logit_pair(
    student_logits: ArrayLike, teacher_logits: ArrayLike, axis: int = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Both sides' logits with the class axis last; the teacher's constant."""
    student = logits(student_logits, "student_logits", axis, where)
    teacher = logits(teacher_logits, "teacher_logits", axis, where)
    check_same_shape(student, teacher, "logits")
    return student, jax.lax.stop_gradient(teacher)


def class_labels(labels: ArrayLike, shape: tuple[int, ...], classes: int, where: ArrayLike | None = None) -> jax.Array:
    """Integer labels of `shape`; those that `where` leaves out become 0, so that -100 may mark padding.

    Any other label that is no class becomes `classes`, one too many: its loss is NaN instead of another class's.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer class indices, got {labels.dtype}; use argmax of one-hot labels")
    if labels.shape != shape:
        raise ValueError(f"labels must have shape {shape}, one for each row of logits, got {labels.shape}")
    labels = labels.astype(int)  # a byte may not hold the number of classes
    if where is not None:
        labels = jnp.where(_mask(where, shape), labels, 0)
    return jnp.where((labels >= 0) & (labels < classes), labels, classes)


def one_hot(labels: jax.Array, classes: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """`[..., classes]`, 1 at the label; a row of NaN where it is no class."""
    is_class = (labels >= 0) & (labels < classes)
    return jnp.where(is_class[..., None], jax.nn.one_hot(labels, classes, dtype=dtype), jnp.nan)


def at_label(x: jax.Array, labels: jax.Array) -> jax.Array:
    """`x` `[..., classes]` at each row's label; NaN where it is no class."""
    return jnp.take_along_axis(x, labels[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]


def blank(x: jax.Array, where: ArrayLike | None) -> jax.Array:
    """`x` with zeros on the examples (all axes but the last) left out, so that nothing there reaches a gradient."""
    if where is None:
        return x
    return jnp.where(_mask(where, x.shape[:-1])[..., None], x, 0)


def feature_pair(
    student: ArrayLike,
    teacher: ArrayLike,
    where: ArrayLike | None = None,
    *,
    layout: str = "[batch, height, width, channels]",
    same_shape: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Both sides' features, the teacher's constant, with zeros on the examples (first axis) that `where` leaves out.

    `layout` names the axes that a loss needs, and so their number; with an ellipsis any number from 1 passes.
    """
    pair = as_float(student, "student"), constant(teacher, "teacher")
    for x, name in zip(pair, ("student", "teacher"), strict=True):
        if "..." not in layout:
            check_rank(x, layout.count(",") + 1, name, layout)
        elif x.ndim == 0:
            raise ValueError(f"{name} must be {layout}, got a scalar")
    if pair[0].shape[0] != pair[1].shape[0]:
        raise ValueError(f"student and teacher must have one batch, got shapes {pair[0].shape} and {pair[1].shape}")
    if same_shape:
        check_same_shape(*pair, "features")
    if where is None:
        return pair
    student, teacher = (jnp.where(_of_examples(where, x), x, 0) for x in pair)
    return student, teacher


def _of_examples(where: ArrayLike, x: jax.Array) -> jax.Array:
    return _mask(where, x.shape[:1]).reshape(-1, *[1] * (x.ndim - 1))


def keep(losses: jax.Array, where: ArrayLike | None) -> jax.Array:
    """`losses` with zeros on the examples left out."""
    return losses if where is None else jnp.where(_mask(where, losses.shape), losses, 0)


def _mask(where: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    where = jnp.asarray(where, bool)
    try:
        return jnp.broadcast_to(where, shape)
    except ValueError:
        raise ValueError(
            f"where must have (or broadcast to) the losses' shape {shape}, got {where.shape}; "
            "it marks whole examples or tokens, True for those that count"
        ) from None


def mask_of(where: ArrayLike | None, batch: int) -> jax.Array:
    """`where` as a mask `[batch]`; all True by default."""
    return jnp.ones(batch, bool) if where is None else _mask(where, (batch,))


def count_of(where: ArrayLike | None, batch: int) -> Number:
    """How many examples count, but at least 1: what a mean over the batch divides by. float32, for its powers."""
    return float(max(batch, 1)) if where is None else jnp.maximum(jnp.sum(mask_of(where, batch)), 1).astype("float32")


def masked_mean(losses: ArrayLike, where: ArrayLike | None = None) -> jax.Array:
    """The mean of `losses` over the entries that count; 0, not NaN, where none does.

    Args:
      losses: any shape, as the losses on examples return them.
      where: a mask that broadcasts to `losses`, True for the entries that count; all of them by default.

    Returns:
      A scalar.
    """
    losses = jnp.asarray(losses)
    if where is None:
        return jnp.mean(losses) if losses.size else jnp.sum(losses) / 1.0
    where = _mask(where, losses.shape)
    return jnp.sum(jnp.where(where, losses, 0)) / jnp.maximum(jnp.sum(where), 1)
