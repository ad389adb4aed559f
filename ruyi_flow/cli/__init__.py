"""The command line: one function a subcommand, by what they are about."""

from ruyi_flow.cli import asking, benching, calibrating, families, nodes, simulating  # noqa: F401 (add commands)
from ruyi_flow.cli.app import app, main

__all__ = ["app", "main"]
