"""Tokens of users: making one, and noting its hash in the tokens file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.config.users import Duty, User, Users, hash_of, last_day, new_token
from ruyi_flow.config.yaml_files import explain
from ruyi_flow.errors import ConfigError

__all__ = ["issue_token"]


def issue_token(file: Path, name: str, *, may: Sequence[Duty] | None = None, days: int) -> str:
    """Make a token for a user, note its hash in the tokens file, and return it. A user who has one gets a new one.

    Args:
        file: the tokens file; a missing one is made.
        name: the user's name.
        may: what the user may do. Default: as before; of a new user, ask for answers and see the state of the nodes.
        days: days for which the token counts.

    Raises:
        ConfigError: the name or the file is not valid.
    """
    users = Users.load(file).users if file.exists() else ()
    token = new_token()
    changes = {"sha256": hash_of(token), "expires": last_day(days)} | ({} if may is None else {"may": tuple(may)})
    try:
        before = next((user for user in users if user.name == name), None)
        user = User(name=name, **changes) if before is None else before.model_copy(update=changes)
    except ValidationError as error:
        raise ConfigError(explain(error, User, name)) from None
    data = Users(users=(*(one for one in users if one.name != name), user))
    with atomic_file(file) as new:
        new.write_text(yaml.safe_dump(data.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
        new.chmod(0o600)
    return token
