"""The command line: one function a subcommand, by what they are about."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from ruyi_flow.cli import commands  # here, so that Ctrl-C while modules are loaded prints no stack trace

        commands.run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
