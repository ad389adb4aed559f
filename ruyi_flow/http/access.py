"""The one door where a caller is known, before anything of its request is read.

Today the server listens on loopback only, and everyone who reaches it may ask. Credentials will be checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Access", "Caller"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request."""

    name: str
    """The caller's name, as logs and counters show it."""


class Access:
    """Decides who may ask. It lets everyone in, with any key or none, as OpenAI's clients always send one."""

    def admit(self, scope: Mapping[str, Any]) -> Caller:
        """Return the caller of a request, given its ASGI scope.

        Raises:
            HttpError: this caller must not ask.
        """
        return Caller("local")
