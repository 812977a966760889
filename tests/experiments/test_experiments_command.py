"""What all commands share: errors of one line, and results that stand beside the recorded ones."""

import importlib
import pathlib
import subprocess
import sys
from dataclasses import dataclass

import pytest

import experiments
from experiments._command import UsageError, run_main
from experiments.data import DataNotFoundError, load

HERE = pathlib.Path(next(iter(experiments.__path__)))
COMMANDS = {path.stem: path.read_text() for path in HERE.glob("[a-z]*.py") if "\nif __name__" in path.read_text()}


@dataclass
class Config:
    """A command's."""

    seeds: int = 1


@pytest.fixture
def two_seeds(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--seeds", "2"])


def raising(error):
    def main(config: Config) -> None:
        assert config.seeds == 2
        raise error

    return main


@pytest.mark.parametrize("error", [UsageError("no model 'x'"), DataNotFoundError("no model 'x'")])
def test_what_the_user_can_mend_is_one_line(error, two_seeds, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(raising(error), Config)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: no model 'x'\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(error, two_seeds):
    with pytest.raises(type(error), match="a bug"):
        run_main(raising(error), Config)


def test_no_seeds_are_refused_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--seeds", "0"])
    with pytest.raises(SystemExit, match="2"):
        run_main(raising(AssertionError("trained")), Config)
    assert capsys.readouterr().err == "error: --seeds must be at least 1, got 0\n"


def test_arguments_without_a_config(two_seeds):
    found = []

    def main(seeds: int = 1) -> None:
        found.append(seeds)

    run_main(main)
    assert found == [2]


def test_a_wrong_name_on_a_real_command_line(tmp_path):
    command = [sys.executable, "-m", "experiments.prune_curves", "--data", "digit", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no data set 'digit': there are digits, ")
    assert "Traceback" not in done.stderr


def test_missing_data_are_the_users(tmp_path):
    with pytest.raises(UsageError, match="no MNIST in "):
        load("mnist", tmp_path)


def test_every_command_is_run_that_way():
    commands = COMMANDS | {"data": (HERE / "data" / "__main__.py").read_text()}
    assert len(commands) > 20
    assert [name for name, text in commands.items() if "\n    run_main(" not in text] == []


def test_a_trial_never_takes_the_place_of_a_recorded_result():
    modules = {name: importlib.import_module(f"experiments.{name}") for name in COMMANDS}
    outs = {name: module.Config().out for name, module in modules.items() if hasattr(module, "Config")}
    assert len(outs) > 20
    assert [name for name, out in outs.items() if out.parts[0] != "runs"] == []
