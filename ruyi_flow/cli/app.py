"""The command line's frame: errors of ours are one line and exit status 2, never a stack trace."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ruyi_flow.cli.display import out
from ruyi_flow.errors import RuyiFlowError

__all__ = ["app", "main"]


app = typer.Typer(
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Familial language models, split at their exits over device, edge and cloud."""


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core prints lines of its own beside our errors otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # gRPC's older poller wakes one thread less for each message: 0.31 ms a round trip instead of 0.42 (docs/log.md).
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # typer turns Ctrl-C into this
            sys.stderr.write("interrupted\n")
        raise
    except (RuyiFlowError, OSError) as error:  # the latter: files and folders that cannot be read or written
        # Not through rich: a message is a line for logs and pipes too, and it may contain brackets.
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
