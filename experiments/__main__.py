"""`python -m experiments`: says which experiments there are, without importing any."""

import ast
from pathlib import Path


def main() -> None:
    """Prints the first line of every command's docstring, which has the command."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        title = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        if f"python -m experiments.{path.stem}" in title:
            print(title)
    print("\nEach has --help. Data sets and results: experiments/README.md.")


if __name__ == "__main__":
    main()
