"""Pruning: what masks cost a train step, what a mask update costs, and the exact global threshold.

The step is that of the shared MLP (`_mlp.py`) under adam, with 90 % of every kernel pruned; beside it stands the plain
adam step. The threshold's peer is `jnp.sort` of all weights as one array.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _mlp as mlp
from benchmarks._harness import Figure, Figures, Stepper, benchmark, compiled_bytes, exact, faster, paired
from jaxcompress import prune

PLAIN = "plain adam step"
RULES = {"kernel$": 0.9}
ALWAYS = prune.Schedule(lambda step: step >= 0, lambda step: 1 - 1 / (step + 2.0))  # another sparsity at every step


def _tx(schedule: prune.Schedule | None) -> optax.GradientTransformation:
    adam = optax.adam(1e-3)
    return adam if schedule is None else optax.chain(adam, prune.sparsify(RULES, schedule))


def _sorting(sparsity: float) -> optax.GradientTransformation:
    """What `sparsify` does at a mask update, the usual way: a sort a layer gives its threshold."""

    def update(updates: Any, state: Any, params: Any) -> Any:
        def pruned(update: jax.Array, weight: jax.Array) -> jax.Array:
            if weight.ndim < 2:
                return update
            scores = jnp.abs(weight)
            return jnp.where(scores > jnp.sort(scores.ravel())[round(sparsity * weight.size) - 1], update, -weight)

        return jax.tree.map(pruned, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _stepper(schedule: prune.Schedule | None) -> Stepper:
    return Stepper(mlp.train_step(_tx(schedule)), mlp.init(_tx(schedule)), mlp.batch())


def _bytes(schedule: prune.Schedule | None) -> dict[str, int]:
    return compiled_bytes(mlp.train_step(_tx(schedule)), mlp.init(_tx(schedule)), mlp.batch())


def _held(sizes: dict[str, int]) -> int:
    """What the step holds at once: arguments, temporaries, and outputs that are not arguments' buffers."""
    return sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]


@benchmark("prune.step")
def _step(rounds: int) -> Figures:
    """Train step with masks and no mask update, against the plain adam step; and the compiled bytes of both."""
    pruning = _stepper(prune.one_shot())
    pruning()  # the masks are made here: nine of ten weights are pruned in every step that is timed
    ours, plain = _bytes(prune.one_shot()), _bytes(None)
    return {
        "": paired(pruning, _stepper(None), PLAIN, rounds, seconds=0.5),
        "bytes": exact(_held(ours) / _held(plain), "x", PLAIN, ours=ours, plain=plain),
        "temp": exact(ours["temp"] / plain["temp"], "x", PLAIN),
    }


@benchmark("prune.mask_update")
def _mask_update(rounds: int) -> Figures:
    """Train step that computes every mask anew, against the plain adam step, and against one that sorts."""
    sorting = optax.chain(optax.adam(1e-3), _sorting(0.9))
    peer = Stepper(mlp.train_step(sorting), mlp.init(sorting), mlp.batch())
    return {
        "": paired(_stepper(ALWAYS), _stepper(None), PLAIN, rounds, seconds=0.5),
        "sort": paired(_stepper(ALWAYS), peer, "step that sorts each layer", max(3, rounds // 3), seconds=0.5),
    }


@benchmark("prune.rewire")
def _rewire(rounds: int) -> Figures:
    """Train step of RigL between two changes of its masks, and one that changes them, against the plain adam step."""

    def stepper(every: int) -> Stepper:
        rewire = prune.rewire(RULES, key=jax.random.key(0), end=10**9, every=every)
        tx = prune.around(optax.adam(1e-3), rewire)
        return Stepper(mlp.train_step(tx), mlp.init(tx), mlp.batch())

    return {
        "step": paired(stepper(10**6), _stepper(None), PLAIN, rounds, seconds=0.5),
        "change": paired(stepper(1), _stepper(None), PLAIN, rounds, seconds=0.5),
    }


@benchmark("prune.memory")
def _memory(rounds: int) -> Figures:
    """Temporary bytes of the transformation's update alone, with its mask update, against the largest leaf."""
    tx, (weights, _) = prune.sparsify(RULES, ALWAYS), mlp.init(_tx(None))
    sizes = compiled_bytes(jax.jit(tx.update, donate_argnums=(0, 1)), weights, tx.init(weights), weights)
    largest = max(x.nbytes for x in jax.tree.leaves(weights))
    return exact(sizes["temp"] / largest, "x", "bytes of the largest leaf", temp=sizes["temp"], largest=largest)


def _weights(size: int) -> list[jax.Array]:
    """Gaussian weights in four leaves of different scale."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (size // 4096, 1024)) * 0.02 * (i + 1) for i, key in enumerate(keys)]


@jax.jit
def _by_sort(weights: list[jax.Array]) -> jax.Array:
    scores = jnp.sort(jnp.concatenate([jnp.abs(x).ravel() for x in weights]))
    return scores[round(0.9 * scores.size) - 1]


def _threshold(size: int, rounds: int) -> Figure:
    weights = _weights(size)
    if prune.threshold(weights, 0.9) != _by_sort(weights):
        raise AssertionError("the threshold is not the one that sorting finds")
    return faster(
        lambda: prune.threshold(weights, 0.9), lambda: _by_sort(weights), "jnp.sort", rounds, calls=1, weights=size
    )


@benchmark("prune.global_threshold")
def _global_threshold(rounds: int) -> Figures:
    """Exact global threshold of 10 M and 100 M weights against a sort (100 M: a third of the rounds)."""
    return {"": _threshold(10 * 2**20, rounds), "100m": _threshold(100 * 2**20, max(1, rounds // 3))}
