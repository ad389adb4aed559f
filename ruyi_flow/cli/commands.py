"""All commands together."""

from ruyi_flow.cli import asking, benching, calibrating, chatting, families, nodes, simulating  # noqa: F401 (add commands)
from ruyi_flow.cli.app import app, run

__all__ = ["app", "run"]
