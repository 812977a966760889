"""Iterative magnitude pruning with rewinding, around any training function; and masks by other criteria."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import paths
from jaxcompress.prune import _scores
from jaxcompress.prune._fixed import choose
from jaxcompress.prune._patterns import Pattern, Unstructured
from jaxcompress.prune.tickets._treatments import TREATMENTS, treated
from jaxcompress.prune.tickets._trees import beside, like, same

Criterion = str | Callable[[jax.Array, jax.Array], jax.Array]
"""A key of `CRITERIA`, `"random"`, or a function of a weight's `(initial, final)` values: the lowest are pruned."""


def _same_sign(initial: jax.Array, final: jax.Array) -> jax.Array:
    return final * jnp.sign(initial)


CRITERIA: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    **_scores.CRITERIA,
    "large_final_same_sign": _same_sign,
    "large_final_other_sign": lambda initial, final: -_same_sign(initial, final),
}
"""The mask criteria of Zhou et al. 2019. `large_final_same_sign` is theirs for supermasks: large final values come
first, and values whose sign has changed last; `large_final_other_sign` is its opposite. `"random"`, which needs a key,
is not in the table."""


class Round(NamedTuple):
    """A round of `search`. It is a pytree, so it can be saved and handed to `search` again as `after`."""

    number: int  # 0 is the dense network
    masks: Any  # tree of the parameters: bool, True is kept; None where no rule matched
    start: Any  # the parameters that this round's training began with
    params: Any  # those it ended with


def levels(
    rates: paths.Rules[float | None], rounds: int, pattern: Callable[[float], Pattern] = Unstructured
) -> list[dict[str, Pattern | None]]:
    """The rules of each round, if each prunes the same part of what is left.

    Args:
      rates: by path, the part of the weights that are left which a round prunes, in (0, 1): Frankle & Carbin 2019 use
        0.2, and 0.1 for the last layer. `None` keeps a parameter dense.
      rounds: how many, at least 1. After the `i`-th the sparsity is `1 - (1 - rate) ** i`.
      pattern: from a sparsity to a pattern: `lambda s: prune.vectors(s, axis=-2)` for whole neurons, `lambda s:
        prune.Unstructured(s, stack=1)` for a stack of networks (seeds) each pruned on its own.

    Raises:
      ValueError: a rate is not in (0, 1), or there are no rounds.
    """
    pairs = list(rates.items()) if hasattr(rates, "items") else list(rates)
    if rounds < 1 or any(rate is not None and not 0 < rate < 1 for _, rate in pairs):
        raise ValueError(f"want 1 or more rounds and rates in (0, 1), got {rounds} rounds and {dict(pairs)}")
    return [
        {rule: None if rate is None else pattern(1 - (1 - rate) ** i) for rule, rate in pairs}
        for i in range(1, rounds + 1)
    ]


def search(
    train: Callable[[Any, Any, int], Any],
    initial: Any,
    levels: Sequence[paths.Rules[Pattern | float | None]],
    *,
    criterion: Criterion = "large_final",
    rewind_to: Any = None,
    treatment: str = "rewind",
    init: Callable[[jax.Array], Any] | None = None,
    key: jax.Array | None = None,
    after: Round | None = None,
) -> Iterator[Round]:
    """Trains, prunes, puts the weights back, and so on: iterative magnitude pruning (Frankle & Carbin 2019).

    Round 0 trains the dense network. Each further round draws its masks from what the last one ended with, never
    bringing a pruned weight back, and trains again from `rewind_to`, with the pruned weights at zero. Nothing is
    trained before the iterator is asked for the round.

    Args:
      train: `(params, masks, number) -> params`: any training, in which pruned weights stay zero (`prune.fixed(masks)`
        last in the chain). It should do the same in every round: same steps, same data from the rewinding point on.
      initial: the parameters at initialisation, which criteria compare with.
      levels: the rules of each round after the first, as for `prune.choose`, of rising sparsity; `levels` makes some.
      criterion: which weights stay.
      rewind_to: where weights are put back to: `initial`, or the parameters after the first `k` steps (Frankle et al.
        2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis"); round 0 begins there too.
      treatment: what becomes of these values, a key of `TREATMENTS`; `"rewind"` keeps them.
      init: `key -> params`, for treatments that draw values anew.
      key: for treatments and criteria that are random; each round has its own.
      after: go on after this round.

    Yields:
      Each round as it ends.

    Raises:
      ValueError: the parameters that `train` returns are of another tree, or not zero where a mask says so; levels
        that would bring weights back; and as `prune.choose`, `by_criterion` and `treated`.
    """
    origin = initial if rewind_to is None else rewind_to
    same(initial, origin, "tree to rewind to")
    if treatment not in TREATMENTS:
        raise ValueError(f"no treatment {treatment!r}: there are {', '.join(TREATMENTS)}")
    if not levels:
        raise ValueError("no levels: give the rules of one round or more")
    if after is None:
        dense = jax.tree.map(jnp.ones_like, choose(initial, levels[0]))
        after = _trained(train, Round(0, dense, origin, origin))
        yield after
    for number in range(after.number + 1, len(levels) + 1):
        own = None if key is None else jax.random.fold_in(key, number)
        masks = by_criterion(criterion, initial, after.params, levels[number - 1], within=after.masks, key=own)
        _check_nested(after.masks, masks, number)
        start = treated(origin, masks, *TREATMENTS[treatment], key=own, init=init)
        after = _trained(train, Round(number, masks, start, start))
        yield after


def by_criterion(
    criterion: Criterion,
    initial: Any,
    final: Any,
    rules: paths.Rules[Pattern | float | None],
    *,
    within: Any = None,
    key: jax.Array | None = None,
    allow_empty: bool = False,
) -> Any:
    """Masks from two checkpoints (Zhou et al. 2019, "Deconstructing Lottery Tickets").

    Args:
      criterion: which weights stay: a key of `CRITERIA`, `"random"`, or a function `(initial, final) -> scores`.
      initial: parameters at initialisation.
      final: the same after training.
      rules: by path, as for `prune.choose`.
      within: masks of an earlier round: what they prune stays pruned.
      key: for `"random"`.
      allow_empty: as for `prune.choose`.

    Returns:
      As `prune.choose`; of the structure of `final`.

    Raises:
      ValueError: no such criterion, no key for `"random"`, trees that differ; and as `prune.choose`.
    """
    if criterion == "random" and key is None:
        raise ValueError("masks by the criterion 'random' need a key")
    if isinstance(criterion, str) and criterion not in (*CRITERIA, "random"):
        raise ValueError(f"no criterion {criterion!r}: there are {', '.join([*CRITERIA, 'random'])}")
    function = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    named = paths.named_leaves(final)
    wanted = paths.match(rules, [name for name, _ in named], None)
    earlier = beside(final, within, "mask")
    scores = []
    for i, ((_, x), x0, rule, mask) in enumerate(
        zip(named, same(final, initial, "initial tree"), wanted, earlier, strict=True)
    ):
        if rule is not None:
            x = function(x0, x) if function else _random(key, i, x.shape)
            x = x if mask is None else _below(x, mask)
        scores.append(x)
    return choose(like(final, scores), rules, allow_empty=allow_empty)


def _random(key: Any, i: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, i), shape)


def _below(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores that are finite, and below all others where the mask prunes."""
    least = jnp.min(scores)
    return jnp.where(mask, scores, least - jnp.abs(least) - 1)


def _trained(train: Callable[[Any, Any, int], Any], begun: Round) -> Round:
    params = train(begun.params, begun.masks, begun.number)
    named, found = paths.named_leaves(begun.start), same(begun.start, params, "trained tree")
    for (name, _), x, mask in zip(named, found, beside(begun.start, begun.masks, "mask"), strict=True):
        if mask is not None and bool(jnp.any(jnp.where(mask, 0, x) != 0)):
            raise ValueError(
                f"round {begun.number}: training let pruned weights of {name!r} move: put prune.fixed(masks) last in "
                f"its optimizer's chain"
            )
    return begun._replace(params=params)


def _check_nested(masks: Any, inner: Any, number: int) -> None:
    for (name, old), (_, new) in zip(paths.named_leaves(masks), paths.named_leaves(inner), strict=True):
        if bool(np.any(np.asarray(new) & ~np.asarray(old))):
            raise ValueError(
                f"round {number} would bring weights of {name!r} back: its sparsity must not be below the last round's"
            )
