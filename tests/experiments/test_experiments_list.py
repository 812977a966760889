"""`python -m experiments` names every command there is."""

import pathlib

import experiments
from experiments.__main__ import main


def test_every_command_is_listed(capsys):
    main()
    listed = capsys.readouterr().out
    (folder,) = map(pathlib.Path, experiments.__path__)
    commands = [path.stem for path in folder.glob("[a-z]*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(commands) > 20
    assert [name for name in commands if f"python -m experiments.{name}" not in listed] == []
