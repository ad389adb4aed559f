"""What is wrong with the keys of a deployment, in words, and when they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ruyi_flow.config.security import Keys, Security, check_private, node_identity, user_identity
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.keys.authority import hosts_of, is_signed_by, key_of, keys_of_user, read_certificate

__all__ = ["Finding", "State", "all_keys", "check"]

_SOON = timedelta(days=30)
"""Time before its end from which a certificate should be renewed."""


class State(StrEnum):
    """What was found of one certificate and its key."""

    OK = "ok"
    SOON = "ends soon"
    ELSEWHERE = "not here"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one certificate and its key."""

    owner: str
    """The certificate's owner: the CA, node cloud, or user ann."""
    file: Path
    """File of the certificate."""
    state: State
    """Whether it can be used."""
    text: str = ""
    """What is wrong and what to do, or when it ends."""
    ends: datetime | None = None
    """When it ends; None if it cannot be read."""


def all_keys(topology: Topology) -> dict[str, Keys]:
    """Return the files of every node, and of every user whose certificate is in the folder of keys, by their owners."""
    security = topology.security
    assert security is not None
    found = {f"node {node.name}": security.of_node(node.name, node.security) for node in topology.nodes}
    users = sorted(file.stem for file in (security.folder / "users").glob("*.pem"))
    return found | {f"user {name}": keys_of_user(security, name) for name in users}


def check(topology: Topology) -> list[Finding]:
    """Check the keys of a deployment, as far as they are on this machine.

    Args:
        topology: the topology, with the section `security`.

    Returns:
        What was found: of the CA, then of each node and user.
    """
    security = topology.security
    assert security is not None
    try:
        ca = read_certificate(security.ca)
    except ConfigError as error:
        text = f"{error}; copy the CA's certificate here, or make keys with ruyi-flow keys init"
        return [Finding("CA", security.ca, State.WRONG, text)]
    problems = list(_about_time(ca, "the CA and all keys must be made anew: move the folder away, and keys init"))
    if key_of(security).exists():
        problems += _about_mode(key_of(security))
    found = [_finding("CA", security.ca, problems, ca)]
    owned = all_keys(topology)
    own = topology.user_keys
    if own is not None and own not in owned.values():  # the file names a certificate elsewhere
        owned["this file's user"] = own
    for owner, keys in owned.items():
        kind, _, name = owner.partition(" ")
        names = [node_identity(name, security.deployment), *hosts_of(topology, name)] if kind == "node" else []
        names += [user_identity(name, security.deployment)] if kind == "user" else []
        found.append(_check(owner, keys, ca, names, security))
    return found


def _check(owner: str, keys: Keys, ca: x509.Certificate, names: Sequence[str], security: Security) -> Finding:
    if not keys.certificate.exists() and not keys.key.exists():
        return Finding(owner, keys.certificate, State.ELSEWHERE, "its files are not on this machine")
    try:
        certificate = read_certificate(keys.certificate)
    except ConfigError as error:
        return Finding(owner, keys.certificate, State.WRONG, f"{error}; make it with ruyi-flow keys")
    problems = list(_about_time(certificate, "renew it: ruyi-flow keys renew"))
    if not is_signed_by(certificate, ca):
        problems.append(f"it is of another CA than {security.ca}; copy the files of one CA to all machines")
    there = {str(one.value) for one in _alternative_names(certificate)}
    missing = [name for name in names if name not in there]
    if missing and missing[0] == names[0]:
        theirs = sorted(name for name in there if name.endswith(".ruyi-flow"))
        problems.append(
            f"it names {', '.join(theirs) or 'nobody'} and not {names[0]}: it is of another node or deployment"
        )
    elif missing:
        problems.append(f"it lacks the address {', '.join(missing)} of the topology; make it anew: ruyi-flow keys node")
    problems += _about_mode(keys.key)
    problems += _about_key(keys, certificate)
    return _finding(owner, keys.certificate, problems, certificate)


def _finding(owner: str, file: Path, problems: Sequence[str], certificate: x509.Certificate) -> Finding:
    ends = certificate.not_valid_after_utc
    if problems:
        return Finding(owner, file, State.WRONG, "; ".join(problems), ends)
    text = f"ends on {ends:%Y-%m-%d}"
    if ends - datetime.now(UTC) < _SOON:
        return Finding(owner, file, State.SOON, f"{text}; renew it: ruyi-flow keys renew", ends)
    return Finding(owner, file, State.OK, text, ends)


def _alternative_names(certificate: x509.Certificate) -> Iterator[x509.GeneralName]:
    try:
        yield from certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return


def _about_time(certificate: x509.Certificate, fix: str) -> Iterator[str]:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        yield f"it has expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {fix}"
    if now < certificate.not_valid_before_utc:
        yield f"it is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; set this machine's clock"


def _about_mode(file: Path) -> Iterator[str]:
    try:
        check_private(file, file.stat())
    except ConfigError as error:
        yield str(error)
    except OSError as error:
        yield f"{file}: {error.strerror}"


def _about_key(keys: Keys, certificate: x509.Certificate) -> Iterator[str]:
    try:
        key = serialization.load_pem_private_key(keys.key.read_bytes(), None)
    except OSError:
        return  # told with its mode
    except (ValueError, TypeError):
        yield f"{keys.key}: is no private key (PEM)"
        return
    if key.public_key() != certificate.public_key():
        yield f"{keys.key}: is the key of another certificate"
