"""Ruyi Flow: familial language models, split at their exits over device, edge and cloud.

Importing this package loads neither torch nor grpc; they come with the first family or client that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruyi_flow.client import AsyncClient, Client
    from ruyi_flow.config.topology import Topology
    from ruyi_flow.errors import RuyiFlowError
    from ruyi_flow.local import Family, load_family
    from ruyi_flow.reply import Reply
    from ruyi_flow.requests import Options, SamplingParams
    from ruyi_flow.types import Token

__all__ = [
    "AsyncClient",
    "Client",
    "Family",
    "Options",
    "Reply",
    "RuyiFlowError",
    "SamplingParams",
    "Token",
    "Topology",
    "load_family",
]

__version__ = "0.1.0"

_HOME = {
    "AsyncClient": "client",
    "Client": "client",
    "Family": "local",
    "Options": "requests",
    "Reply": "reply",
    "RuyiFlowError": "errors",
    "SamplingParams": "requests",
    "Token": "types",
    "Topology": "config.topology",
    "load_family": "local",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ruyi_flow' has no attribute {name!r}")
    from importlib import import_module

    from ruyi_flow.extras import needed_by

    module = f"ruyi_flow.{_HOME[name]}"
    try:
        with needed_by(name):
            return getattr(import_module(module), name)
    except AttributeError as error:  # `from ruyi_flow import` would turn it into "cannot import name", without a cause
        raise ImportError(f"{module} cannot be imported: {error}") from error


def __dir__() -> list[str]:
    return sorted(__all__)
