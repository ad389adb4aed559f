"""All commands together, for programs that go through them; the command line imports a module when it needs it."""

from importlib import import_module

from ruyi_flow.cli.app import MODULES, app

__all__ = ["app"]

for _module in dict.fromkeys(MODULES.values()):
    import_module(f"ruyi_flow.cli.{_module}")
