"""What a model costs, measured: bytes, non-zeros, FLOPs, memory, latency; as a table, a figure and JSON.

row = report.Row("student", {"accuracy": 0.97, **report.cost(apply, params, images)._asdict()})
print(report.table([row], report.COST_COLUMNS))
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._files import replacing
from jaxcompress.arrays import Quantized, Sparse, compressed, is_leaf, nbytes

__all__ = [
    "COST_COLUMNS",
    "Column",
    "Cost",
    "Row",
    "cost",
    "figure",
    "in_turns",
    "nonzeros",
    "parameters",
    "table",
    "write_json",
]


class Cost(NamedTuple):
    """What a model costs to keep and to call.

    Attributes:
      parameters: elements of the weights, as the model sees them.
      nonzeros: elements that are not zero.
      nbytes: bytes of the weights in memory.
      flops: floating-point (and integer multiply-add) operations of one call, by XLA's count of the compiled program.
      peak_bytes: bytes that one call holds at once: its arguments, results and temporaries, as compiled.
      latency: seconds a call takes, the median.
    """

    parameters: int
    nonzeros: int
    nbytes: int
    flops: float
    peak_bytes: int
    latency: float


def cost(fn: Callable[..., Any], params: Any, *args: Any, rounds: int = 30) -> Cost:
    """Measures `fn(params, *args)`, compiled for the default device; `params` may have compressed leaves.

    Args:
      fn: a function of the parameters and some inputs.
      params: the weights; counted by `parameters`, `nonzeros` and `jaxcompress.nbytes`.
      *args: the inputs; the latency is for this batch.
      rounds: how many calls to time, after one that is not counted.
    """
    args = jax.device_put(args)
    params = jax.device_put(params)
    compiled = jax.jit(compressed(fn)).lower(params, *args).compile()
    analysis: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Cost(
        parameters(params),
        nonzeros(params),
        nbytes(params),
        float(analysis.get("flops", math.nan)),
        held,
        in_turns({"": lambda: compiled(params, *args)}, rounds, 0.0)[""],
    )


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int = 15, seconds: float = 0.02) -> dict[str, float]:
    """The median seconds that each call takes, over rounds in which all take turns.

    So a busy spell of the machine meets all alike: compare these figures, rather than those of `cost` from different
    moments.

    Args:
      calls: each compiled and warmed up by a first call, which is not counted.
      rounds: how many turns each has; the one that begins changes from round to round.
      seconds: how long a turn lasts about, in calls one after another; at least one call.
    """
    counts, found = dict[str, int](), dict[str, list[float]]()
    for name, call in calls.items():
        jax.block_until_ready(call())
        counts[name], found[name] = max(1, round(seconds / _seconds(call, 1))), []
    names = list(calls)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(_seconds(calls[name], counts[name]))
    return {name: statistics.median(samples) for name, samples in found.items()}


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / count


def parameters(tree: Any) -> int:
    """The elements of a tree of weights; of a leaf those of what it stands for, of a Python number one."""
    return sum(x.size if hasattr(x, "size") else jnp.size(x) for x in jax.tree.leaves(tree, is_leaf=is_leaf))


def nonzeros(tree: Any) -> int:
    """The elements that are not zero. A quantized weight is zero where its integer is the zero point."""
    return sum(int(_nonzeros(x)) for x in jax.tree.leaves(tree, is_leaf=is_leaf))


def _nonzeros(x: Any) -> Any:
    if isinstance(x, Quantized):
        return jnp.count_nonzero(x.centred(jnp.float32))
    if isinstance(x, Sparse):
        return jnp.count_nonzero(x.values)
    if isinstance(x, np.ndarray):
        return np.count_nonzero(x)  # not as JAX sees it: of 64 bits it would take 32
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x.size
    return jnp.count_nonzero(x.materialise() if is_leaf(x) else x)


class Row(NamedTuple):
    """A model's line in a report."""

    name: str
    figures: Mapping[str, float]
    """Numbers by column key."""


class Column(NamedTuple):
    """A column: its key in the rows' figures, its heading, and how a number is written, as in `format`."""

    key: str
    title: str
    form: str = ",.0f"


COST_COLUMNS = (
    Column("parameters", "parameters"),
    Column("nonzeros", "non-zeros"),
    Column("nbytes", "bytes in memory"),
    Column("flops", "FLOPs a batch"),
    Column("peak_bytes", "peak bytes"),
    Column("latency", "seconds a batch", ".2e"),
)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The report as a Markdown table, which reads well in a terminal too. A figure that a row lacks is left empty."""
    cells = [["", *(column.title for column in columns)]]
    for row in rows:
        found = [row.figures.get(column.key) for column in columns]
        cells.append([row.name, *("" if x is None else format(x, c.form) for x, c in zip(found, columns, strict=True))])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]

    def line(texts: Sequence[str]) -> str:
        first, *rest = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = (
        "| " + " | ".join("-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)) + " |"
    )
    return "\n".join([line(cells[0]), rule, *(line(texts) for texts in cells[1:])])


def write_json(path: str | os.PathLike[str], rows: Sequence[Row], **context: Any) -> None:
    """Writes the rows, and whatever else the report should say, as JSON, in one go.

    Raises:
      ValueError: a figure is not finite.
    """
    for row in rows:
        for key, value in row.figures.items():
            if not math.isfinite(value):
                raise ValueError(f"row {row.name!r}: {key} is {value}, which is no measurement")
    text = json.dumps({**context, "rows": {row.name: dict(row.figures) for row in rows}}, indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


def figure(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    x: str = "bytes",
    y: str = "accuracy",
    x_title: str = "",
    y_title: str = "",
) -> None:
    """Draws the rows as named points, `y` against `x` (logarithmic), joined in order. Needs matplotlib.

    Raises:
      ValueError: a row lacks the figure `x` or `y`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no plotting on import, and no global state
    from matplotlib.figure import Figure

    for row in rows:
        if not {x, y} <= row.figures.keys():
            raise ValueError(
                f"row {row.name!r} lacks {x!r} or {y!r}; it has {sorted(row.figures)}: choose by x= and y="
            )
    canvas = FigureCanvasAgg(Figure(figsize=(7, 4.5), layout="constrained"))
    axes = canvas.figure.add_subplot()
    xs, ys = [row.figures[x] for row in rows], [row.figures[y] for row in rows]
    axes.plot(xs, ys, color="0.8", zorder=1)
    for i, (row, at_x, at_y) in enumerate(zip(rows, xs, ys, strict=True)):
        axes.scatter(at_x, at_y, zorder=2)
        above = i % 2 == 0
        axes.annotate(
            row.name,
            (at_x, at_y),
            (0, 8 if above else -8),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.margins(0.15)
    axes.set_xlabel(x_title or x)
    axes.set_ylabel(y_title or y)
    axes.grid(alpha=0.3)
    canvas.figure.savefig(path, dpi=150)
