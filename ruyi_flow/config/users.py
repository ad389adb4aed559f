"""The tokens file of a deployment: its users, the SHA-256 of each one's token, what each may do, and how much of it.

    users:
      - name: ann
        sha256: 5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef
        may: [generate, status]
        expires: 2027-06-30
        limits: {requests_per_minute: 60, max_new_tokens: 1000}

The file never has a token itself; `ruyi-flow keys token` makes one and shows it once.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from ruyi_flow.config.security import check_unwritable
from ruyi_flow.config.yaml_files import Model, explain, read_yaml
from ruyi_flow.errors import ConfigError, Unauthenticated

__all__ = ["LOOK_S", "Caller", "Duty", "User", "UserLimits", "Users", "UsersFile", "hash_of", "last_day", "new_token"]

LOOK_S = 1.0
"""Seconds between two looks at a file that may have changed."""

logger = logging.getLogger(__name__)


class Duty(StrEnum):
    """What a user may be allowed to do."""

    GENERATE = "generate"
    """Ask for answers and tokens of prompts, and list the models."""
    STATUS = "status"
    """See the state of the nodes."""
    METRICS = "metrics"
    """See the counters of the HTTP server."""


class UserLimits(Model):
    """The limits of one user at one entry node; replicas of it count each for itself. Default of each: none."""

    requests_per_minute: int | None = Field(None, ge=1)
    """Requests for answers a minute, on average; as many may come at once after a pause."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Tokens of prompts and answers a minute, on average. What a request costs is known when it ends: the next one
    waits until the mean is right again."""
    sessions: int | None = Field(None, ge=1)
    """Answers at the same time."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer; longer ones are cut there."""
    deepest: int | None = Field(None, ge=1)
    """Deepest exit that is asked, also where the routing would go deeper."""


class User(Model):
    """One user."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}$")
    """Name, as logs show it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the user's token."""
    may: tuple[Duty, ...] = (Duty.GENERATE, Duty.STATUS)
    """What the user may do: generate, status, metrics."""
    expires: date | None = None
    """Last day (UTC) on which the token counts. Default: it has no end."""
    limits: UserLimits = UserLimits()
    """The user's limits."""


class Users(Model):
    """A tokens file."""

    users: tuple[User, ...]
    """The users."""

    @model_validator(mode="after")
    def _check_unique(self) -> Users:
        for what in ("name", "sha256"):
            values = [getattr(user, what) for user in self.users]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two users have the {what} {twice}; each needs its own")
        return self

    @classmethod
    def load(cls, path: Path) -> Users:
        """Read a tokens file.

        Raises:
            ConfigError: it is missing or not valid, or every user of this machine may write it.
        """
        check_unwritable(path, "these tokens")
        data = read_yaml(path, "tokens")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(path))) from None


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request is from."""

    name: str
    """Name, as logs show it."""
    limits: UserLimits = UserLimits()
    """What the caller may use up."""


class UsersFile:
    """The users of a tokens file, which is read again when it has changed.

    A file with a mistake leaves the users of before in force, and the log says so once.

    Args:
        path: the file.

    Raises:
        ConfigError: it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stamp = path, _stamp(path)
        self._users = Users.load(path).users

    def find(self, token: str) -> User:
        """Return the user of a token. Every user's hash is compared, each in constant time.

        Raises:
            Unauthenticated: no user has this token, or it has expired.
        """
        wanted, found = hash_of(token), None
        for user in self._users:
            if hmac.compare_digest(user.sha256, wanted):
                found = user
        if found is None:
            raise Unauthenticated("this token is no user's; ask the operator for one (ruyi-flow keys token NAME)")
        if found.expires is not None and datetime.now(UTC).date() > found.expires:
            raise Unauthenticated(
                f"the token of {found.name} has expired on {found.expires}; ask the operator for a new one"
            )
        return found

    def look(self) -> None:
        """Read the file again if it has changed since the last look. It waits for the disk."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._users = Users.load(self._path).users
        except ConfigError as error:
            logger.error("the users of before stay in force: %s", error)
        else:
            logger.info("%s has changed: %d users", self._path, len(self._users))


def hash_of(token: str) -> str:
    """Return the SHA-256 of a token, as a tokens file has it."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def new_token() -> str:
    """Return a new token: 32 random bytes."""
    return f"rf-{secrets.token_urlsafe(32)}"


def last_day(days: int) -> date:
    """Return the last day of a token that counts for some days from now."""
    return (datetime.now(UTC) + timedelta(days=days)).date()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file's content: time in ns, size in bytes and inode; None if it is missing."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size, info.st_ino
