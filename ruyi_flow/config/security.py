"""The section `security` of a topology: which files prove who a node or a user is, and what others may do with them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ruyi_flow.config.yaml_files import Model
from ruyi_flow.errors import ConfigError

__all__ = [
    "OPERATOR",
    "Keys",
    "NodeSecurity",
    "Security",
    "check_private",
    "check_unwritable",
    "node_identity",
    "user_identity",
]

OPERATOR = "operator"
"""Name of the user whose certificate `ruyi-flow keys init` makes, and which clients use by default."""

_LABEL = re.compile(r"(?!x-)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""The names that are labels of a DNS name as they are."""


def node_identity(node: str, deployment: str) -> str:
    """Return the DNS name by which the certificate of a node, and of each of its replicas, names it."""
    return f"{_label(node)}.nodes.{deployment}.ruyi-flow"


def user_identity(user: str, deployment: str) -> str:
    """Return the DNS name by which a user's certificate names the user."""
    return f"{_label(user)}.users.{deployment}.ruyi-flow"


def _label(name: str) -> str:
    """Return a name as one label of a DNS name; one with other letters becomes `x-` and a part of its SHA-256."""
    return name if _LABEL.fullmatch(name) else f"x-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class Keys:
    """The files by which one party proves who it is, and by which it checks others."""

    deployment: str
    """Name of the deployment."""
    ca: Path
    """Certificate of the deployment's private CA (PEM)."""
    certificate: Path
    """The party's own certificate (PEM)."""
    key: Path
    """Private key of that certificate (PEM)."""


class NodeSecurity(Model):
    """The certificate of one node."""

    certificate: Path | None = None
    """File of the node's certificate (PEM). Default: nodes/NAME.pem beside the file `security.ca`."""
    key: Path | None = None
    """File of its private key (PEM), which only the user of the node's process may read. Default: nodes/NAME.key beside
    the file `security.ca`."""


class Security(Model):
    """The keys of a deployment. With this section, every connection is TLS 1.3; `ruyi-flow keys init` makes the files.

    Each machine needs `ca.pem` and the certificate and key of what runs on it, and no others. Files are read again when
    they have changed.
    """

    deployment: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")
    """Name of the deployment, in every certificate: small letters, digits and hyphens. Nodes of other deployments are
    refused, also with certificates of the same CA."""
    ca: Path = Path("keys/ca.pem")
    """File of the CA's certificate (PEM). Its key, ca.key, belongs on no node."""
    certificate: Path | None = None
    """File of the certificate of a user of this file: clients and `ruyi-flow serve` (PEM). Default: users/operator.pem
    beside the file `ca`."""
    key: Path | None = None
    """File of its private key (PEM). Default: users/operator.key beside the file `ca`."""

    @property
    def folder(self) -> Path:
        """The folder of the keys."""
        return self.ca.parent

    def of_node(self, name: str, own: NodeSecurity | None) -> Keys:
        """Return the files of a node.

        Args:
            name: the node's name.
            own: the node's section `security`.
        """
        stem, own = self.folder / "nodes" / name, own or NodeSecurity()
        return Keys(
            self.deployment,
            self.ca,
            own.certificate or stem.with_name(f"{name}.pem"),
            own.key or stem.with_name(f"{name}.key"),
        )

    def of_user(self) -> Keys:
        """Return the files of clients."""
        stem = self.folder / "users" / OPERATOR
        return Keys(
            self.deployment, self.ca, self.certificate or stem.with_suffix(".pem"), self.key or stem.with_suffix(".key")
        )


def check_private(file: Path, info: os.stat_result) -> None:
    """Check that nobody else may read or change a private key.

    The group may read a file of root, as that of a secret that is mounted into a container.

    Args:
        file: the file.
        info: its owner and mode.

    Raises:
        ConfigError: somebody else may.
    """
    if os.name == "nt":
        return
    if info.st_uid not in (0, os.getuid()):
        raise ConfigError(f"{file}: belongs to another user, who can read this key; chown it, or make a new one")
    allowed = 0o740 if info.st_uid == 0 else 0o700
    if stat.S_IMODE(info.st_mode) & ~allowed & 0o777:
        raise ConfigError(
            f"{file}: the key can be read by others (mode {stat.S_IMODE(info.st_mode):04o}); chmod 600 {file}, and "
            "make a new one if others have used this machine: ruyi-flow keys renew"
        )


def check_unwritable(path: Path, what: str) -> None:
    """Check that not every user of this machine may change a file or a folder.

    Args:
        path: the file or the folder.
        what: what it is, for the error message.

    Raises:
        ConfigError: every user may.
    """
    if os.name == "nt":
        return
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # whoever opens it reports it
    if mode & stat.S_IWOTH:
        raise ConfigError(f"{path}: every user of this machine may change {what}; chmod o-w {path}")
