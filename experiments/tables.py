"""`python -m experiments.tables`: writes the tables of `experiments/README.md` from `experiments/results/*.json`.

A table stands between `<!-- result: NAME -->` and `<!-- end of result -->`; whatever else the file says stays as it
is. A result that has no such place yet gets a section at the end. With `--check` nothing is written, and the command
fails if the file is not what it would write.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments._command import run_main
from experiments._results import Column, Figure, Result, read

HERE = Path(__file__).parent
BLOCK = re.compile(r"<!-- result: (\S+) -->\n(.*?)<!-- end of result -->", re.DOTALL)


def main(check: bool = False, results: Path = HERE / "results", readme: Path = HERE / "README.md") -> None:
    """Writes the tables of the experiments' README from the result files.

    Args:
      check: write nothing, and fail if the README is stale.
      results: the folder with result files.
      readme: the file with the tables.
    """
    try:
        found = {path.stem: read(path) for path in sorted(results.glob("*.json"))}
        old = readme.read_text(encoding="utf-8")
        new = updated(old, found)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if check and new != old:
        sys.exit(f"error: {readme} is stale: run `python -m experiments.tables` and commit what it writes")
    if not check:
        readme.write_text(new, encoding="utf-8")
        print(f"{readme}: {len(found)} table(s)")


def updated(text: str, results: Mapping[str, Result]) -> str:
    """`text` with the table of each result in its place, or in a new section at the end.

    Raises:
      ValueError: a place names a result that does not exist, or a result has two places.
    """
    places = [match[1] for match in BLOCK.finditer(text)]
    if text.count("<!-- result:") != len(places) or text.count("<!-- end of result -->") != len(places):
        raise ValueError("every `<!-- result: NAME -->` line needs an `<!-- end of result -->` line of its own")
    if unknown := [name for name in places if name not in results or places.count(name) > 1]:
        raise ValueError(f"tables for {', '.join(unknown)}: each needs one result file, and has one place")
    for name, result in results.items():
        if name not in places:
            text = f"{text.rstrip()}\n\n## {result.title}\n\n<!-- result: {name} -->\n<!-- end of result -->\n"
    return BLOCK.sub(
        lambda match: f"<!-- result: {match[1]} -->\n{rendered(results[match[1]])}<!-- end of result -->", text
    )


def rendered(result: Result) -> str:
    """The table of a result in Markdown, with what it rests on."""
    header, ruler = ["model"], ["---"]
    for column in result.columns:
        titles = [column.title, f"{column.title}, paper"] if _in_paper(result, column) else [column.title]
        header, ruler = header + titles, ruler + ["---:"] * len(titles)
    lines = [_line([*header, "seeds"]), _line([*ruler, "---:"])]
    for row in result.rows:
        cells = [row.name]
        for column in result.columns:
            cells.append(_cell(row.ours[column.key], column))
            if _in_paper(result, column):
                cells.append(_number(row.paper[column.key], column) if column.key in row.paper else "-")
        lines.append(_line([*cells, str(len(row.seeds))]))
    titles_by_key = {column.key: column for column in result.columns}
    points = [f"Figures are means ± sample standard deviations over seeds. {result.source}"]
    for stated in result.comparisons:
        column, d = titles_by_key[stated.column], stated.difference
        mean, low, high = (_number(value, column, sign="+") for value in (d.mean, d.low, d.high))
        points.append(
            f"{stated.first} minus {stated.second}, {column.title}: {mean}, {d.confidence:.0%} interval"
            f" [{low}, {high}] (paired, {d.count} seeds)."
        )
    points += [*result.notes, *_provenance(result)]
    return "\n".join(["", *lines, "", *(f"- {point}" for point in points), "", ""])


def _provenance(result: Result) -> list[str]:
    splits = ", ".join(f"{name} {split.examples:,} (`{split.sha256[:12]}`)" for name, split in result.splits.items())
    reads = f"; test data read once for each of {len(result.test_reads)} final models" if result.test_reads else ""
    picks = "".join(f" {choice.what}: {choice.chosen} ({choice.rule})." for choice in result.choices)
    machine = ", ".join(f"{value} {key}" if key == "cores" else value for key, value in result.machine.items())
    versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
    return [
        f"Data: {result.data}: {splits}{reads}.",
        f"Choices: {result.selection}{picks}",
        f"Command: `{result.command}`, seeds {', '.join(map(str, result.seeds))}; on {machine}; {versions}.",
    ]


def _in_paper(result: Result, column: Column) -> bool:
    return any(column.key in row.paper for row in result.rows)


def _cell(figure: Figure, column: Column) -> str:
    spread = f" ± {_number(figure.std, column)}" if figure.std else ""
    return _number(figure.mean, column) + spread


def _number(value: float, column: Column, sign: str = "") -> str:
    return f"{value:{sign},.{column.decimals}f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_main(main)
