"""Cutting channels: how long the analysis takes, and how much faster the smaller networks run.

The networks are those of `_architectures.py`. A share of the units of every group goes, whichever: speed does not ask
which. The floating-point operations are those of products and convolutions, counted before and after.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _architectures as architectures
from benchmarks._harness import Figure, Figures, benchmark, faster, summary
from jaxcompress.prune import channels

SHARES = (0, 0.25, 0.5, 0.75)

ANALYSED: dict[str, Callable[[], architectures.Model]] = {
    "resnet50": architectures.resnet50,
    "mobilenet_v2": architectures.mobilenet_v2,
    "vit_b": architectures.vit_b,
    "decoder_8b": architectures.llama,
}

TIMED: dict[str, Callable[[], architectures.Model]] = {
    "resnet50": architectures.resnet50,
    "resnet50_batch_4": lambda: architectures.resnet50(batch=4),
    "mobilenet_v2": lambda: architectures.mobilenet_v2(batch=4),
    "vit_b": architectures.vit_b,
    "vit_b_batch_4": lambda: architectures.vit_b(batch=4),
    "decoder": lambda: architectures.llama(
        time=256, layers=4, d=768, q_heads=12, kv_heads=4, wide=2048, vocabulary=8192, dtype=jnp.float32
    ),
}


@benchmark("channels.analysis")
def _analysis(rounds: int) -> Figures:
    """Seconds of channels.groups on abstract parameters, with what jax.make_jaxpr alone takes beside it."""
    figures = {}
    for name, make in ANALYSED.items():
        ours, staged, found = [], [], None
        for _ in range(rounds):
            fn, params, x = make()  # a new function each time: nothing is cached
            start = time.perf_counter()
            jax.make_jaxpr(fn)(params, x)
            staged.append(time.perf_counter() - start)
            fn, params, x = make()
            start = time.perf_counter()
            found = channels.groups(fn, params, x)
            ours.append(time.perf_counter() - start)
        assert found is not None
        parameters = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(params))
        figures[name] = summary(
            ours,
            "s",
            "the time of jax.make_jaxpr is in the detail",
            make_jaxpr_s=float(np.median(staged)),
            groups=len(found),
            units=sum(group.size for group in found),
            parameters=parameters,
        )
    return figures


@benchmark("channels.speed")
def _speed(rounds: int) -> Figures:
    """How many times faster networks run with 25, 50 and 75 % of all units cut, beside the ratio of operations.

    With nothing cut (0) the figure is what `shrink` gains by the way it writes convolutions.
    """
    return {
        f"{name}.{round(100 * share)}": figure
        for name, make in TIMED.items()
        for share, figure in _cut_by(make, rounds, SHARES, _by_units).items()
    }


@benchmark("channels.speed_by_operations")
def _speed_by_operations(rounds: int) -> Figures:
    """The same with so many units cut that 25, 50 and 75 % of the operations go."""
    return {
        f"{name}.{round(100 * share)}": figure
        for name in ("resnet50", "vit_b")
        for share, figure in _cut_by(TIMED[name], rounds, SHARES[1:], _by_operations).items()
    }


def _by_units(groups: channels.Groups, share: float) -> channels.Plan:
    dropped = {g.name: np.arange(int(share * g.size // 8 * 8) or int(share * g.size)) for g in groups}
    return channels.from_units(groups, dropped)


def _by_operations(groups: channels.Groups, share: float) -> channels.Plan:
    return channels.plan(groups, channels.random(groups, jax.random.key(0)), flops=1 - share, round_to=8)


def _cut_by(
    make: Callable[[], architectures.Model],
    rounds: int,
    shares: Sequence[float],
    planned: Callable[[channels.Groups, float], channels.Plan],
) -> dict[float, Figure]:
    """How many times faster a network is with each share cut, each called in a row, as one that serves is."""
    fn, shapes, x = make()
    params = architectures.random_like(shapes)
    inputs = _inputs(x)
    whole = jax.jit(fn)
    groups = channels.groups(fn, params, inputs)
    before = channels.flops(groups)
    figures = {}
    for share in shares:
        plan = planned(groups, share)
        small, cut = jax.jit(channels.shrink(fn, params, plan)), plan.apply(params)
        ratio = before / channels.flops(groups, plan)
        figures[share] = faster(
            partial(small, cut, inputs),
            partial(whole, params, inputs),
            f"the whole network, {ratio:.2f} times the operations",
            rounds,
            warm=True,
            flops_ratio=ratio,
            gflops=before / 1e9,
            parameters=list(plan.parameters),
        )
    return figures


def _inputs(x: jax.ShapeDtypeStruct) -> Any:
    rng = np.random.default_rng(0)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 100, x.shape), x.dtype)
    return jnp.asarray(rng.normal(size=x.shape), x.dtype)
