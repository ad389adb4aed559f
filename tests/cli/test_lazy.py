"""Commands are imported when they run, and the list of commands says what their functions say."""

import subprocess
import sys
from typing import Any

import pytest
import typer

from ruyi_flow.cli.app import MODULES, Panel, listed
from ruyi_flow.cli.commands import app
from tests.conftest import Command

HEAVY = {"torch", "transformers", "numpy", "grpc", "pydantic", "yaml", "simpy", "msgpack"}


def imported(code: str) -> set[str]:
    """Return the modules that a fresh process has after running code."""
    end = "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\ntry:\n    {code}\nfinally:\n    {end}"], capture_output=True, text=True
    )
    return set(done.stderr.split())


def command_line(*words: str) -> str:
    return f"from ruyi_flow.cli import main; sys.argv = {['ruyi-flow', *words]}; main()"


def test_importing_the_package_imports_nothing_else() -> None:
    modules = imported("import ruyi_flow")
    assert "ruyi_flow" in modules and not {"typer", "rich", *HEAVY} & modules
    assert not [name for name in modules if name.startswith("ruyi_flow.")]


@pytest.mark.parametrize("words", [("--help",), ("--version",)])
def test_the_list_of_commands_needs_no_command(words: tuple[str, ...]) -> None:
    modules = imported(command_line(*words))
    assert "ruyi_flow.cli.app" in modules and not HEAVY & modules
    assert not {f"ruyi_flow.cli.{module}" for module in MODULES.values()} & modules


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (("generate", "--help"), {"torch", "transformers", "numpy", "grpc", "simpy"}),
        (("simulate", "--help"), {"torch", "transformers", "grpc", "simpy", "ruyi_flow.cli.asking"}),
        (("init", "--help"), {"torch", "transformers", "numpy", "grpc", "simpy", "ruyi_flow.cli.asking"}),
    ],
)
def test_a_command_imports_its_own_module(words: tuple[str, ...], without: set[str]) -> None:
    modules = imported(command_line(*words))
    assert f"ruyi_flow.cli.{MODULES[words[0]]}" in modules and not without & modules


def test_every_command_has_a_module() -> None:
    group: Any = typer.main.get_command(app)
    assert sorted(group.commands) == sorted(MODULES)
    for name, command in group.commands.items():
        made = command.callback.__module__ if command.callback else f"ruyi_flow.cli.{MODULES[name]}"
        assert made in (f"ruyi_flow.cli.{MODULES[name]}", "ruyi_flow.cli.options"), name


@pytest.mark.parametrize("name", MODULES)
def test_the_list_says_what_the_command_says(name: str) -> None:
    command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    shown = listed(name)
    assert (shown.help or "").split() == command.help.split() and shown.rich_help_panel == command.rich_help_panel
    assert shown.rich_help_panel in vars(Panel).values()


def test_a_mistyped_command_is_told_which_one_is_meant(run: Command) -> None:
    code, _, err = run("gnerate")
    assert code == 2 and "Did you mean 'generate'" in err
