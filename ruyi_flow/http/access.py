"""The one door where a caller is known, before anything of its request is read.

Where the topology has a tokens file, a caller sends its token as OpenAI's clients do (`Authorization: Bearer`), or as
`X-Api-Key`. It goes on to the entry node, which counts what its user has used up. Without one, the server lets everyone
in, with any key or none; it listens on loopback only then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruyi_flow.config.users import LOOK_S, Duty, UsersFile
from ruyi_flow.errors import Unauthenticated
from ruyi_flow.http.errors import HttpError

__all__ = ["OPEN_PATHS", "Access", "Caller"]

OPEN_PATHS = frozenset({"/health"})
"""The paths that need no token: a load balancer asks whether the server is there."""

_DUTIES = {"/ready": Duty.STATUS, "/metrics": Duty.METRICS}
"""What a user must be allowed to do for a path; `generate` for all others."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request."""

    name: str
    """The caller's name, as logs and counters show it."""
    token: str | None = None
    """The caller's token, which goes on to the entry node; None if the topology has no tokens file."""


class Access:
    """Decides who may ask.

    Args:
        file: the tokens file. Default: everyone may ask.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._users = None if file is None else UsersFile(file)

    @property
    def has_users(self) -> bool:
        """Whether callers need tokens."""
        return self._users is not None

    def admit(self, scope: Mapping[str, Any]) -> Caller:
        """Return the caller of a request, given its ASGI scope.

        Raises:
            HttpError: this caller must not ask.
        """
        path = scope["path"]
        if self._users is None or path in OPEN_PATHS:
            return Caller("local" if self._users is None else "anyone")
        token = _token(scope)
        if not token:
            raise _unauthorized("this server asks for a token: send the header Authorization: Bearer TOKEN")
        try:
            user = self._users.find(token)
        except Unauthenticated as error:
            raise _unauthorized(str(error)) from None
        duty = _DUTIES.get(path, Duty.GENERATE)
        if duty not in user.may:
            raise HttpError(403, f"the user {user.name} may not {duty}", type="permission_error", code="forbidden")
        return Caller(user.name, token)

    async def watch(self) -> None:
        """Read the file again whenever it has changed."""
        while self._users is not None:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self._users.look)


def _token(scope: Mapping[str, Any]) -> str:
    """Return the token in a request's headers; empty if there is none."""
    headers = dict(reversed(scope["headers"]))  # the first of several counts
    kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if kind.lower() != "bearer":
        token = headers.get(b"x-api-key", b"").decode("latin-1")
    return token.strip()


def _unauthorized(message: str) -> HttpError:
    return HttpError(
        401, message, type="authentication_error", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
    )
