"""`python -m benchmarks [NAME ...] [--json FILE] [--list] [--rounds N]`."""

import argparse
import difflib
import fnmatch
import importlib
import pathlib
import pkgutil
import sys
from collections.abc import Sequence

import benchmarks
from benchmarks import _harness, _records


class UnknownBenchmarkError(ValueError):
    """A name or pattern that no benchmark has."""


def select(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that match any of the patterns (`prune.*`), in the order of `names`; all, if there are no patterns.

    Raises:
      UnknownBenchmarkError: a pattern that matches nothing; the message has the nearest names.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)
            raise UnknownBenchmarkError(f"no benchmark is called {pattern!r}; nearest: {', '.join(near)}")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def load_all() -> dict[str, _harness.Benchmark]:
    """Import every public module of this package; returns what they registered, by name."""
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"benchmarks.{module.name}")
    return dict(sorted(_harness.REGISTRY.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that are named in `arguments` (default: the command line's); returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks, or patterns such as 'prune.*'; default: all"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="merge the records by name into FILE")
    parser.add_argument("--list", action="store_true", help="say which benchmarks there are, and run none")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timings a figure (default: 9)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    registry = load_all()
    try:
        names = select(options.names, list(registry))
        if options.json:  # before an hour of measuring, not after
            _records.read(options.json)
            if not options.json.absolute().parent.is_dir():
                raise _records.RecordsError(
                    f"there is no folder {options.json.absolute().parent} for {options.json.name}"
                )
    except (UnknownBenchmarkError, _records.RecordsError) as error:
        parser.error(str(error))
    if options.list:
        for name in names:
            print(f"{name:24} {(registry[name].__doc__ or '').strip().splitlines()[0]}")
        return 0
    status = 0
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)  # some take minutes
        try:
            found = _records.records(name, registry[name](options.rounds))
        except ModuleNotFoundError as error:  # an extra's: the others go on without it
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
            status = 1
            continue
        print(_records.table(found), flush=True)
        if options.json:
            _records.merge(options.json, found)
    return status


if __name__ == "__main__":
    sys.exit(main())
