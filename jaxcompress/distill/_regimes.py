"""Who teaches whom, in which order, and on which data."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import Number, as_float, check_between, check_positive, check_rank
from jaxcompress.distill._softmax import temperature_softmax

Spec = TypeVar("Spec")


def teaching_chain(train: Callable[[Spec, Any], Any], students: Iterable[Spec], teacher: Any = None) -> list[Any]:
    """Trains one student after the other, each taught by the one before.

    Students of falling size are teacher assistants: Mirzadeh et al., "Improved knowledge distillation via teacher
    assistant", 2020. Students of one size are born-again networks: Furlanello et al., "Born-again neural networks",
    2018, whose ensemble is `ensemble_targets` of all their logits (mean `"probabilities"`).

    Args:
      train: from a student's description and its teacher (None for a first one that learns from labels) to the
        trained student.
      students: descriptions, in order.
      teacher: of the first student; None by default.

    Returns:
      The trained students, in order.
    """
    trained = []
    for spec in students:
        teacher = train(spec, teacher)
        trained.append(teacher)
    return trained


class AlternatingState(NamedTuple):
    """The state of `alternating`."""

    turn: jax.Array  # int32 scalar: the updates made so far
    networks: tuple[Any, ...]  # each network's own optimizer state, at the network's own place in the parameters


def alternating(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer for several networks side by side that moves one of them an update, in turn.

    For the alternating form of deep mutual learning (Zhang et al., "Deep mutual learning", 2018, algorithm 1): give
    each batch to the step `n` times and descend `mutual_learning_loss(logits, labels)[context.step % n].mean()`, so
    that each network learns from what its peers have just become. A zero gradient would not do instead: momentum and
    weight decay move a network that has none.

    Args:
      tx: the optimizer, of which every network gets its own state. It sees the whole list, tuple or dict with None for
        the other networks, so that the paths in its state end with the parameters'.

    Returns:
      An optimizer for a list, tuple or dict of networks' parameters; update `k` moves network `k % n`.
    """
    tx = optax.with_extra_args_support(tx)

    def alone(tree: Any) -> list[Any]:
        """`tree` once for each network, with None for the others."""
        networks, structure = jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
        return [
            jax.tree.unflatten(structure, [x if i == k else None for i, x in enumerate(networks)])
            for k in range(len(networks))
        ]

    def init_fn(params: Any) -> AlternatingState:
        return AlternatingState(jnp.zeros((), jnp.int32), tuple(tx.init(p) for p in alone(params)))

    def update_fn(
        updates: Any, state: AlternatingState, params: Any = None, **extra: Any
    ) -> tuple[Any, AlternatingState]:
        each = alone(updates)
        weights = [None] * len(each) if params is None else alone(params)
        moves, states = [], []
        for k, (u, s, p) in enumerate(zip(each, state.networks, weights, strict=True)):
            is_turn = state.turn % len(each) == k
            move, after = tx.update(u, s, p, **extra)
            moves += [jnp.where(is_turn, x, jnp.zeros_like(x)) for x in jax.tree.leaves(move)]
            states.append(jax.tree.map(lambda new, old, on=is_turn: jnp.where(on, new, old), after, s))
        return jax.tree.unflatten(jax.tree.structure(updates), moves), AlternatingState(state.turn + 1, tuple(states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def refined_labels(
    predict: Callable[[jax.Array], jax.Array], crops: ArrayLike, *, temperature: Number = 1.0
) -> jax.Array:
    """Label refinery: the soft label of each crop is what the teacher sees in that very crop.

    Bagherinezhad et al., "Label refinery: improving ImageNet classification through label progression", 2018, section
    3: labels made anew for every augmented image, not one a source image. Train on them with `soft_label_loss`; refine
    again with the student as the next teacher (`teaching_chain`).

    Args:
      predict: the teacher, from images `[batch, ...]` to logits `[batch, classes]`.
      crops: `[batch, crops, ...]`, several crops of each image.
      temperature: above 0.

    Returns:
      Probabilities `[batch, crops, classes]`; constant.
    """
    crops = jnp.asarray(crops)
    if crops.ndim < 3:
        raise ValueError(f"crops must be [batch, crops, ...], got shape {crops.shape}")
    logits = predict(crops.reshape(-1, *crops.shape[2:]))
    labels = temperature_softmax(jax.lax.stop_gradient(logits), temperature)
    return labels.reshape(*crops.shape[:2], -1)


def munge(
    key: jax.Array,
    table: ArrayLike,
    *,
    rounds: int = 1,
    swap_probability: float = 0.2,
    local_variance: float = 5.0,
    categorical: ArrayLike | None = None,
) -> jax.Array:
    """MUNGE: synthetic rows for a table, near the data's manifold, for the teacher to label.

    Bucila, Caruana and Niculescu-Mizil, "Model compression", 2006, algorithm 1. Each round goes through a copy of the
    table: every row meets its nearest neighbour, and with `swap_probability` each attribute of the two is exchanged. A
    continuous one becomes a normal draw around the other's value with the standard deviation `|a - a'| /
    local_variance`; a categorical one is swapped.

    Distances are Euclidean over continuous attributes scaled to [0, 1], a differing category counting 1. The cost grows
    with the square of the rows.

    Args:
      key: a random key.
      table: `[rows, attributes]`, floating; categories as numbers.
      rounds: how many copies of the table to make.
      swap_probability: in [0, 1].
      local_variance: above 0; larger keeps new values nearer to existing ones.
      categorical: `[attributes]`, True where an attribute is a category; none by default.

    Returns:
      `[rounds * rows, attributes]`; categories keep to the values that occur.
    """
    table = as_float(table, "table")
    check_rank(table, 2, "table", "[rows, attributes]")
    check_between(swap_probability, 0.0, 1.0, "swap_probability")
    check_positive(local_variance, "local_variance")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if table.shape[0] < 2:
        raise ValueError("munge needs at least 2 rows: a row's new values come from its nearest neighbour")
    categorical = jnp.zeros(table.shape[1], bool) if categorical is None else jnp.asarray(categorical, bool)
    if categorical.shape != table.shape[1:]:
        raise ValueError(f"categorical must have shape {table.shape[1:]}, got {categorical.shape}")
    span = jnp.max(table, axis=0) - jnp.min(table, axis=0)
    scale = jnp.where(span > 0, span, 1)

    def one_round(key: jax.Array) -> jax.Array:
        def meet_neighbour(i: jax.Array, rows: jax.Array) -> jax.Array:
            gap = jnp.where(categorical, rows != rows[i], (rows - rows[i]) / scale)
            squares = jnp.sum(gap**2, axis=1).at[i].set(jnp.inf)
            j = jnp.argmin(squares)
            swap_key, mine_key, theirs_key = jax.random.split(jax.random.fold_in(key, i), 3)
            swap = jax.random.bernoulli(swap_key, swap_probability, categorical.shape)
            mine, theirs = rows[i], rows[j]
            deviation = jnp.where(categorical, 0, jnp.abs(mine - theirs) / local_variance)
            new_mine = theirs + deviation * jax.random.normal(mine_key, mine.shape)
            new_theirs = mine + deviation * jax.random.normal(theirs_key, mine.shape)
            return rows.at[i].set(jnp.where(swap, new_mine, mine)).at[j].set(jnp.where(swap, new_theirs, theirs))

        return jax.lax.fori_loop(0, table.shape[0], meet_neighbour, table)

    made = jax.lax.map(one_round, jax.random.split(key, rounds))
    return made.reshape(-1, table.shape[1])
