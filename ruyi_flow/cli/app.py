"""The command line's frame: a user's error is one line and exit status 2, never a stack trace.

A module of commands is imported when one of its commands runs. The list of commands needs none of them: it is read from
their source.
"""

from __future__ import annotations

import ast
import io
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ruyi_flow import __version__
from ruyi_flow.errors import RuyiFlowError, did_you_mean
from ruyi_flow.extras import missing_extra

__all__ = ["MODULES", "Panel", "app", "listed", "run"]


class Panel:
    """The groups of commands in `ruyi-flow --help`."""

    RUN = "Run a family"
    ASK = "Ask it"
    CALIBRATE = "Calibrate when early exits decide"
    TRAIN = "Train and measure"
    SIMULATE = "Simulate and plan"


MODULES = {
    "demo": "asking",
    "init": "starting",
    "pull": "families",
    "list": "families",
    "rm": "families",
    "up": "nodes",
    "serve": "serving",
    "status": "nodes",
    "doctor": "doctor",
    "keys": "keys",
    "shard": "nodes",
    "node": "nodes",
    "generate": "asking",
    "chat": "chatting",
    "explain": "asking",
    "trace": "calibrating",
    "calibrate": "calibrating",
    "train": "families",
    "eval": "families",
    "bench": "benching",
    "profile": "simulating",
    "simulate": "simulating",
    "sweep": "simulating",
    "plan": "simulating",
}
"""The commands in the order in which they are used, with the module of each."""


class _Commands(typer.core.TyperGroup):
    """Imports a command's module when the command runs, and leaves pydantic's words out of typer's messages."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in MODULES and cmd_name not in self.commands:
            self.commands[cmd_name] = listed(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in MODULES:
            import_module(f"ruyi_flow.cli.{MODULES[args[0]]}")
            self.commands.update(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
        else:
            self.commands.update({name: listed(name) for name in MODULES})  # one of them may be meant
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            command = ctx.invoked_subcommand
            if (missing := missing_extra(error, f"ruyi-flow {command}", extra=command)) is None:
                raise
            raise missing from error
        except typer.BadParameter as error:
            error.message = error.message.replace("Value error, ", "", 1)
            raise
        except _UsageError as error:
            _suggest_option(error)
            raise


_UsageError: type[Any] = typer.BadParameter.__bases__[0]
"""A command line that is wrong; typer does not export it."""


def _suggest_option(error: Any) -> None:
    """Let the error of an unknown option name the closest one, as the SDK does."""
    given = getattr(error, "option_name", "")
    if not (hasattr(error, "possibilities") and given.startswith("--") and error.ctx is not None):
        return
    from ruyi_flow.requests import own_name

    known = [name for parameter in error.ctx.command.params for name in parameter.opts if name.startswith("--")]
    meant = f"--{own_name(given[2:].replace('-', '_')).replace('_', '-')}"
    if hint := did_you_mean(meant, known):
        error.message, error.possibilities = f"unknown option {given!r}{hint}", []


def listed(name: str) -> typer.core.TyperCommand:
    """Return a command as the list of commands shows it: without its options, and without importing its module."""
    panel, text = _listings(MODULES[name])[name]
    return typer.core.TyperCommand(name, help=text, rich_help_panel=panel)


@lru_cache
def _listings(module: str) -> dict[str, tuple[str, str]]:
    """Read the panel and the help of each command from the source of a module, by name."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    return dict(listing for statement in tree.body for listing in _listings_in(statement))


def _listings_in(statement: ast.stmt) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield what a statement adds to `app`: a function with `@app.command`, or a group by `app.add_typer`."""
    if isinstance(statement, ast.FunctionDef):
        calls, name, text = statement.decorator_list, statement.name, ast.get_docstring(statement)
    elif isinstance(statement, ast.Expr):
        calls, name, text = [statement.value], "", ""
    else:
        return
    for call in calls:
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("app.command", "app.add_typer"):
            given = {word.arg: word.value for word in call.keywords}
            if isinstance(call.args[0] if call.args else None, ast.Constant):
                name = ast.literal_eval(call.args[0])
            name = ast.literal_eval(given["name"]) if "name" in given else name
            text = ast.literal_eval(given["help"]) if "help" in given else text
            panel = given["rich_help_panel"]
            assert isinstance(panel, ast.Attribute)
            yield name, (getattr(Panel, panel.attr), text or "")


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ruyi-flow {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run familial language models, split at their early exits over device, edge and cloud."""


def run() -> None:
    """Run the command that the arguments name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # answers contain any character, also where the locale knows few
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # otherwise gRPC prints lines of its own beside the errors
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # gRPC's older poller wakes one thread less per message: a round trip of 0.31 ms instead of 0.42 (docs/log.md).
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt from None
        raise
    except (RuyiFlowError, OSError) as error:  # OSError: files and folders that cannot be read or written
        # Not through rich: a message must stay one line in logs and pipes, and may contain brackets.
        from ruyi_flow.cli.display import printable

        sys.stderr.write(f"error: {printable(str(error))}\n")
        sys.exit(2)
