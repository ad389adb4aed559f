"""The command line: one function a subcommand, by what they are about."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from ruyi_flow.cli.app import run  # here, so that Ctrl-C while modules are loaded prints no stack trace

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
