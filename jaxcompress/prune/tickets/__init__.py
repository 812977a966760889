"""Lottery tickets: sparse networks found by training, and what is left of them when their weights are taken away.

Frankle & Carbin 2019 train a network, prune it, put the weights that are left back to their initial values, and train
that: a *winning ticket*, if it learns as well as the dense network did. `search` does so round by round, around any
training function; only the function knows about data and optimizer:

    def train(params, masks, number):  # number is the round's, 0 the dense one
        tx = optax.chain(optax.adam(1e-3), prune.fixed(masks))
        ...
        return params

    rates = {"head/kernel$": 0.1, "kernel$": 0.2}  # the part of what is left that a round prunes
    for found in tickets.search(train, initial, tickets.levels(rates, rounds=15)):
        print(found.number, prune.sparsity(found.masks)[""], accuracy(found.params))

`rewind_to` puts the weights back to an early step of the training instead (Frankle et al. 2020): train that far once,
and hand the parameters in. `after` goes on from a round that was saved.

**Is it the mask, the values or the signs?** `by_criterion` draws masks by other rules than the final magnitude (those
of Zhou et al. 2019, and random ones); `treated` replaces the initial values (drawn anew, set to a constant, shuffled)
and the signs (kept, random). `TREATMENTS` names the pairs of the literature.

**Masks without training weights.** `edge_popup` learns scores and keeps the highest (Ramanujan et al. 2020),
`bernoulli` learns the probability of each weight (Zhou et al. 2019). Both turn `fn(weights, ...)` into a function of
weights and scores, to be differentiated by the scores:

    scores = tickets.popup_scores(weights, rules, key)
    logits = tickets.edge_popup(model.apply, rules)(weights, scores, images)

**Is it worth it?** Liu et al. 2019 train the pruned architecture from random weights: for as many steps (scratch-E)
or for as much computation (scratch-B) as the dense network. `multiply_adds` says what counts as computation,
`scratch_steps` how many steps it buys. For a mask of single weights scratch-E is `treated(..., "resample", "own")`.
"""

from jaxcompress.prune.tickets._scratch import multiply_adds, scratch_steps
from jaxcompress.prune.tickets._search import CRITERIA, Criterion, Round, by_criterion, levels, search
from jaxcompress.prune.tickets._supermasks import (
    bernoulli,
    bernoulli_logits,
    bernoulli_masks,
    edge_popup,
    masked,
    popup_masks,
    popup_scores,
)
from jaxcompress.prune.tickets._treatments import TREATMENTS, treated

__all__ = [
    "CRITERIA",
    "TREATMENTS",
    "Criterion",
    "Round",
    "bernoulli",
    "bernoulli_logits",
    "bernoulli_masks",
    "by_criterion",
    "edge_popup",
    "levels",
    "masked",
    "multiply_adds",
    "popup_masks",
    "popup_scores",
    "scratch_steps",
    "search",
    "treated",
]
