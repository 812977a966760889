"""What every command shares: its command line, and one line instead of a traceback for what its user can mend."""

import sys
from collections.abc import Callable
from typing import Any

import tyro


class UsageError(ValueError):
    """A name, a setting or a file that a command was given and cannot work with; the message says what it can."""


def run_main(main: Callable[..., Any], config: Any = None) -> None:
    """Calls `main` with what the command line says, and ends with status 2 where that is a `UsageError`.

    Any other exception is a fault of the program, and keeps its traceback.

    Args:
      main: called with a `config`, or, without one, with its own arguments from the command line.
      config: the dataclass that the command line fills; it has a number of seeds.
    """
    try:
        if config is None:
            tyro.cli(main)
        else:
            settings = tyro.cli(config)
            if settings.seeds < 1:  # before a teacher is trained for no student
                raise UsageError(f"--seeds must be at least 1, got {settings.seeds}")
            main(settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
