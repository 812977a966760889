"""A progress bar a stage, with the loss and accuracy of the latest step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

OnMetrics = Callable[[int, dict[str, float]], None]


@contextmanager
def bar(title: str, steps: int, console: Console | None = None) -> Iterator[OnMetrics]:
    """A bar of `steps`; yields what `jaxcompress.train.fit` takes as `on_metrics`."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:6.4f} acc {task.fields[accuracy]:4.0%}"),
    )  # 80 columns
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"), accuracy=float("nan"))

        def on_metrics(step: int, metrics: dict[str, float]) -> None:
            progress.update(task, completed=step, loss=metrics["loss"], accuracy=metrics["accuracy"])

        yield on_metrics
