"""All commands together."""

from ruyi_flow.cli import (  # noqa: F401 (add commands)
    asking,
    benching,
    calibrating,
    doctor,
    families,
    nodes,
    simulating,
)
from ruyi_flow.cli.app import app, run

__all__ = ["app", "run"]
