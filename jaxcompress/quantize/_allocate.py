"""Mixed precision: what each scheme costs each layer, and the choice of one a layer under a budget of bytes."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import compressed, is_leaf, nbytes
from jaxcompress.calibrate._batches import check_batches
from jaxcompress.calibrate._watched import Watcher, chosen_weights, measured
from jaxcompress.paths import Rules, named_leaves
from jaxcompress.quantize._convert import Scheme, converted_leaf


class LayerCost(NamedTuple):
    """What one scheme does to one weight, all others staying float.

    Attributes:
      name: the weight's path.
      scheme: the scheme's name.
      nbytes: what the compressed weight stores.
      weight_snr: signal to noise of the weights, in dB: `10 log10(|w|^2 / |w - w'|^2)`; infinite where nothing is lost.
      output_snr: the same of what the layer gives, from the inputs that the float model has there, over the batches.
      loss: the mean loss over the batches with this weight alone compressed; NaN if no loss was given, or it is none.
    """

    name: str
    scheme: str
    nbytes: int
    weight_snr: float
    output_snr: float
    loss: float


def layer_costs(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules[Any],
    schemes: Mapping[str, Scheme],
    loss: Callable[[Any, Any], Any] | None = None,
) -> list[LayerCost]:
    """Each scheme on each weight that `rules` choose, one at a time: where rounding hurts.

        schemes = {"8": Affine(8), "4": Affine(4, group=(0, 32)), "2": Affine(2)}
        costs = quantize.layer_costs(fn, params, batches, {"kernel$": True}, schemes, loss)
        chosen = quantize.allocate(costs, budget=20_000)  # {"Dense_0/kernel": "4", ...}
        small = quantize.convert(params, quantize.chosen_rules(chosen, schemes))

    Args:
      fn: `fn(params, batch)`, the model.
      params: a tree of float arrays.
      batches: calibration data, read once for each scheme and once for each weight and scheme if there is a loss.
      rules: by path, whether a weight is looked at: a value that is neither None nor False.
      schemes: by name, whatever `convert` takes.
      loss: `loss(params, batch)`, a number; it may get compressed weights. Compiled once a scheme and weight.

    Returns:
      One entry a weight and scheme, in the order of the tree, then of the schemes.

    Raises:
      UnmatchedRuleError, TypeError, ValueError: as `convert` and `calibrate.input_values`.
    """
    if not isinstance(schemes, Mapping):
        raise TypeError(f'schemes have names, as in {{"8": Affine(8), "4": Affine(4)}}, got {schemes!r}')
    check_batches(batches)
    batches, leaves = list(batches), dict(named_leaves(params, is_leaf))
    names = chosen_weights(params, rules)
    tree = jax.tree.structure(params, is_leaf=is_leaf)
    evaluate = None if loss is None else jax.jit(compressed(loss))
    watcher = Watcher(fn, names, "noise")
    rows: dict[tuple[str, str], LayerCost] = {}
    for scheme_name, scheme in schemes.items():
        small = {name: converted_leaf(name, leaves[name], scheme) for name in names}
        beside = jax.tree.unflatten(tree, [small.get(name, x) for name, x in leaves.items()])
        noise = measured(watcher, params, batches, beside=beside)
        for name in names:
            signal, off = np.sum([np.sum(np.reshape(batch[name], (-1, 2)), axis=0) for batch in noise], axis=0)
            values = float("nan")
            if evaluate is not None:
                alone = jax.tree.unflatten(tree, [small[name] if n == name else x for n, x in leaves.items()])
                values = float(np.mean([float(evaluate(alone, batch)) for batch in batches]))
            weight = jnp.asarray(leaves[name], jnp.float32)
            error = weight - jnp.asarray(small[name].materialise(), jnp.float32)
            in_weight = _decibel(float(jnp.sum(weight * weight)), float(jnp.sum(error * error)))
            rows[name, scheme_name] = LayerCost(
                name, scheme_name, nbytes(small[name]), in_weight, _decibel(float(signal), float(off)), values
            )
    return [rows[name, scheme_name] for name in names for scheme_name in schemes]


def allocate(
    costs: Sequence[LayerCost], budget: int, by: Literal["loss", "output", "weight"] | None = None
) -> dict[str, str]:
    """The scheme of each weight for which the sum of costs is least, with no more than `budget` bytes in all.

    A knapsack with one choice a weight, solved exactly: of all choices so far, those that no other beats in both bytes
    and cost are kept, weight after weight. Costs are taken to add up, as they do where each is small.

    Args:
      costs: from `layer_costs`.
      budget: bytes of all these weights together.
      by: what is summed: the "loss", or the part of noise in the "output" or in the "weight" itself (its inverse signal
        to noise ratio). The default is the loss where it was measured, else the output. A scheme whose loss is NaN
        beside others that are not is as bad as can be.

    Returns:
      The scheme's name by the weight's path.

    Raises:
      ValueError: not even the smallest schemes fit, or all that fit have a cost that is not finite; no costs; losses
        that were not measured.
    """
    if by not in (None, "loss", "output", "weight"):
        raise ValueError(f'by is "loss", "output", "weight" or None, got {by!r}')
    measured_loss = any(not np.isnan(c.loss) for c in costs)  # NaN may also be what a scheme did to the loss
    by = by or ("loss" if measured_loss else "output")
    if not costs or (by == "loss" and not measured_loss):
        raise ValueError("there are no costs" if not costs else "losses were not measured: hand layer_costs a loss")
    options: dict[str, list[LayerCost]] = {}
    for cost in costs:
        options.setdefault(cost.name, []).append(cost)
    least = sum(min(c.nbytes for c in choice) for choice in options.values())
    if least > budget:
        raise ValueError(f"the smallest schemes take {least:,} bytes, more than the budget of {budget:,}")
    front: list[tuple[int, float, tuple[str, ...]]] = [(0, 0.0, ())]
    for choice in options.values():
        longer = [(b + c.nbytes, v + _cost(c, by), (*s, c.scheme)) for b, v, s in front for c in choice]
        front = []
        for entry in sorted((e for e in longer if e[0] <= budget), key=lambda e: (e[0], e[1])):
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    if not front[-1][1] < float("inf"):
        raise ValueError(f"with {budget:,} bytes some weight has only schemes whose cost ({by}) is not finite")
    return dict(zip(options, front[-1][2], strict=True))


def _cost(cost: LayerCost, by: str) -> float:
    if by == "loss":
        return float("inf") if np.isnan(cost.loss) else cost.loss
    return float(10 ** (-(cost.output_snr if by == "output" else cost.weight_snr) / 10))


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")


def chosen_rules(chosen: Mapping[str, str], schemes: Mapping[str, Scheme]) -> list[tuple[str, Scheme]]:
    """The rules that `convert`, `fake` or `gptq` take, of a choice by `allocate`.

    Raises:
      ValueError: a scheme that was chosen is not among them.
    """
    missing = sorted(set(chosen.values()) - set(schemes))
    if missing:
        raise ValueError(f"the schemes {missing} were chosen, there are only {list(schemes)}")
    return [(f"^{re.escape(name)}$", schemes[scheme]) for name, scheme in chosen.items()]
