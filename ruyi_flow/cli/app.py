"""The command line's frame: a user's error is one line and exit status 2, never a stack trace."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from ruyi_flow.cli.display import out
from ruyi_flow.errors import RuyiFlowError

__all__ = ["Panel", "app", "run"]


class Panel:
    """The groups of commands in `ruyi-flow --help`."""

    RUN = "Run a family"
    ASK = "Ask it"
    CALIBRATE = "Calibrate when early exits decide"
    TRAIN = "Train and measure"
    SIMULATE = "Simulate and plan"


_ORDER = (
    *("demo", "pull", "list", "rm", "up", "status", "shard", "node"),
    *("generate", "chat", "explain"),
    *("trace", "calibrate"),
    *("train", "eval", "bench"),
    *("profile", "simulate", "sweep", "plan"),
)


class _Commands(typer.core.TyperGroup):
    """Lists commands in the order in which they are used, and leaves pydantic's words out of typer's messages."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.replace("Value error, ", "", 1)
            raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        out.print(f"ruyi-flow {version('ruyi-flow')}", highlight=False)
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
            sys.stderr.write("interrupted\n")
        raise
    except (RuyiFlowError, OSError) as error:  # OSError: files and folders that cannot be read or written
        # Not through rich: a message must stay one line in logs and pipes, and may contain brackets.
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
