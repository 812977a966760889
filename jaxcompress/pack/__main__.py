"""`python -m jaxcompress.pack FILE`: print a packed file's header."""

import json
import sys

from jaxcompress.pack._error import PackError
from jaxcompress.pack._file import read_header


def main(arguments: list[str]) -> int:
    """Print the header of the one file named in `arguments`; returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m jaxcompress.pack FILE", file=sys.stderr)
        return 2
    try:
        print(json.dumps(read_header(arguments[0]), indent=2))
    except (PackError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
